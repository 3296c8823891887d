"""The line about how the model runs, in a browser; torch.compile is switched off, so nothing takes minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ui.driver import PageDriver
from tests.ui.serving import PageServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.browser import Browser

LINE = "#prefuse-compiling"
MODEL = "#prefuse-generate-model-status"


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        server = PageServer(tmp_path_factory.mktemp("uncompiled"), "--compile", "inductor")
        server.start()
    yield server
    server.end()


def test_the_line_follows_what_is_compiled_and_the_choice_of_a_backend(
    uncompiled: PageServer, browser: Browser
) -> None:
    page = PageDriver(browser, uncompiled.address).open()
    assert page.count(f"{LINE} .prefuse-note") == 0
    assert page.value("generate.compile") == "inductor"
    page.type("generate.prompt", "a red circle")
    page.slide("generate.steps", 2)
    page.job("generate.start", "#prefuse-generate-status")
    page.choose("generate.compile", "off")
    page.job_end(MODEL)
    page.wait(f"!document.querySelector('{LINE} .prefuse-note')", 10)
    page.choose("generate.compile", "inductor")
    assert page.job_end(MODEL).startswith("Done")
    page.wait(f"/inductor: 0 of 9 blocks compiled/.test(document.querySelector('{LINE}').textContent)", 20)
    page.click("generate.start")
    page.wait(f"/torch.compile is switched off/.test(document.querySelector('{LINE}').textContent)", 20)
    assert "0 recompiles" in page.text(LINE)
    page.wait(f"!/warming/.test(document.querySelector('{LINE}').textContent)", 20)
    assert not [error for error in browser.errors if "prefuse" in error]
