"""LoRAs by name through the WebUI: card, tag, what is applied, infotext, paste; hostile, strange and colliding ones."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from lib_lora.core.keymap import KeyMap
from tests.faults.test_names import HOSTILE_NAMES, STRANGE_NAMES, FileWatch
from tests.toys import write_lora

if TYPE_CHECKING:
    from pathlib import Path

EMPTY_HASH = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def put(webui, lora_dir, monkeypatch):
    """Writes small LoRAs into the folder for one test; nothing is drawn."""
    monkeypatch.setattr(webui.modules.processing, "denoise", lambda *_: torch.zeros(1))
    (layer, *_) = KeyMap.from_modules(webui.model.parts())
    written: list[Path] = []
    numbers = itertools.count(50)

    def put(name: str, **metadata: str) -> Path:
        written.append(write_lora(lora_dir / f"{name}.safetensors", [layer], metadata, seed=next(numbers)))
        webui.networks.list_available_networks()
        return written[-1]

    yield put
    for path in written:
        path.unlink(missing_ok=True)
    webui.networks.list_available_networks()


def card_tag(name: str) -> str:
    import lora_script

    return lora_script.card_tag(name)


def applied(webui) -> list[str]:
    return [one.network_on_disk.filename for one in webui.networks.loaded_networks]


def pasted(webui, prompt: str, done) -> str:
    fields = {"Prompt": prompt, **{key: str(value) for key, value in done.extra_generation_params.items()}}
    webui.modules.script_callbacks.run("infotext_pasted", "", fields)
    return fields["Prompt"]


def test_thirty_strange_names_go_from_card_to_tag_to_infotext_and_back(webui, put):
    assert len(STRANGE_NAMES) == 30
    for name in STRANGE_NAMES:
        path = put(name)
        prompt = f"a {card_tag(name)} cat"
        done = webui.generate(prompt)
        assert applied(webui) == [str(path)], name
        assert done.comments == "", name
        assert "Lora hashes" in done.extra_generation_params, name
        webui.generate(pasted(webui, prompt, done))
        assert applied(webui) == [str(path)], name
    assert not webui.modules.errors.shown


@pytest.mark.parametrize("alias", ["style: ink", "a > b", "x=1", "plain"])
def test_an_alias_that_no_tag_can_hold_is_not_what_the_card_writes(webui, put, alias):
    path = put("quiet", ss_output_name=alias)
    tag = card_tag("quiet")
    webui.generate(f"a {tag}")
    assert applied(webui) == [str(path)]
    assert tag == ("<lora:plain:1>" if alias == "plain" else "<lora:quiet:1>")
    webui.set(prefuse_enabled=False)  # the built-in's tags are its own affair
    assert card_tag("quiet") == f"<lora:{alias}:1>"


def test_a_pasted_prompt_finds_the_renamed_file_by_its_hash(webui, put):
    prompt = "a <lora:before:0.5>"
    path = put("before", sshs_model_hash="ab" * 32)
    done = webui.generate(prompt)
    path.unlink()
    put("after: all", sshs_model_hash="ab" * 32)
    assert pasted(webui, prompt, done) == "a <lora:after_ all:0.5>"


@pytest.mark.parametrize("digits", [EMPTY_HASH, "cd" * 32], ids=["the hash of nothing", "the hash of two files"])
def test_an_ambiguous_hash_never_swaps_a_lora(webui, put, digits):
    first = put("first", sshs_model_hash=digits)
    done = webui.generate("a <lora:first:0.5>")
    done.extra_generation_params["Lora hashes"] = f"first: {digits[:12]}"  # as the built-in would have written it
    put("second", sshs_model_hash=digits)
    assert pasted(webui, "a <lora:first:0.5>", done) == "a <lora:first:0.5>"
    webui.generate("a <lora:first:0.5>")
    assert applied(webui) == [str(first)]


def test_a_collision_is_told_under_the_picture_and_a_path_decides(webui, put):
    one, two = put("style/twin"), put("zen/twin")
    done = webui.generate("a <lora:twin:1>")
    assert applied(webui) == [str(two)]
    assert "write 'style/twin' for style/twin.safetensors" in done.comments
    done = webui.generate("a <lora:style/twin:1>")
    assert applied(webui) == [str(one)]
    assert done.comments == ""


def test_sixty_hostile_names_open_no_file_outside_the_folder(webui, put, lora_dir, tmp_path):
    assert len(HOSTILE_NAMES) == 60
    watch = FileWatch()
    params = webui.modules.extra_networks.ExtraNetworkParams
    for name in HOSTILE_NAMES:
        with watch.watching() as seen:
            webui.modules.extra_networks.activate(
                webui.modules.processing.StableDiffusionProcessingTxt2Img(), {"lora": [params([name, "1"])]}
            )
            found = list(seen)
        assert [path for path in found if not path.startswith((str(lora_dir), str(tmp_path)))] == [], ascii(name)
        assert applied(webui) == []
    assert not webui.modules.errors.shown
