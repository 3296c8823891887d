"""The page's line about how the model runs: its words, and what changes a backend."""

from __future__ import annotations

import re
from html import unescape

import pytest

from lib_lora.compile.protocol import CompileStatus
from lib_lora.ui.texts import Texts

pytest.importorskip("gradio", reason="a test of the page did not run: no gradio")

from lib_lora.hosts.standalone.host import StandaloneHost
from lib_lora.ui.compiling import compile_words, told
from lib_lora.ui.page import Page

WARMING = CompileStatus("inductor", blocks=9, compiled=("unet.mid_block",), asked=8, done=2)
READY = CompileStatus("inductor", 9, tuple("abcdefghi"), asked=9, done=9, switches=3, switch_ms=12.34)
PARTLY = CompileStatus("tensorrt", 9, ("a",), 9, 9, recompiles=1, reason="b runs eagerly, for <memory> is short.")


class Host(StandaloneHost):
    """A host that runs as it is told."""

    status = CompileStatus()

    def compile_status(self) -> CompileStatus:
        return self.status


@pytest.fixture
def page():
    return Page(Host(), Texts("en"))


def test_the_line_says_what_is_compiled_how_far_it_is_and_what_the_last_switch_cost():
    texts = Texts("en")
    assert compile_words(texts, WARMING) == "inductor: 1 of 9 blocks compiled · warming up, 25 % · 0 recompiles"
    assert compile_words(texts, READY) == "inductor: 9 of 9 blocks compiled · last switch 12.3 ms · 0 recompiles"
    assert compile_words(texts, PARTLY).endswith(" · 1 recompiles · b runs eagerly, for <memory> is short.")


def test_the_line_has_its_words_in_every_language():
    words = compile_words(Texts("zh"), READY)
    assert re.search("[\u4e00-\u9fff]", words)
    assert all(number in words for number in ("9/9", "12.3", "0"))


def test_nothing_is_shown_where_nothing_is_compiled_and_the_reason_where_that_can_not_be(page):
    assert told(page) == "<div></div>"
    page.host.use_compiler("tensorrt")
    assert told(page) == "<div data-live></div>"
    page.host.status = CompileStatus(reason="TensorRT is not <installed>.")
    assert "TensorRT is not &lt;installed&gt;." in told(page)
    page.host.status = WARMING
    assert compile_words(page.texts, WARMING) in unescape(told(page))


def test_a_host_takes_another_backend_before_and_after_its_model_is_loaded(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    host = StandaloneHost(device="cpu", compiler="inductor")
    assert (host.compiler(), str(host.compile_status())) == ("inductor", "not compiled")
    host.use_model("demo")
    blocks = host.compile_status().blocks
    assert blocks == 9
    host.use_compiler("off")
    assert (host.compiler(), str(host.compile_status())) == ("off", "not compiled")
    host.use_compiler("inductor")
    assert host.compile_status().blocks == blocks
    loaded, session = host._loaded
    assert not session.may_hook
    host.close()
    assert str(host.compile_status()) == "not compiled"
    assert "forward" not in vars(loaded.pipe.unet.mid_block)
