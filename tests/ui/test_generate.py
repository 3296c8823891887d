"""The sub-tab that makes pictures, in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

FORM = "#prefuse-tab-generate"
PICTURES = "#prefuse-generate-gallery img"


def test_a_prompt_becomes_a_picture_with_the_report_of_its_loras(page: PageDriver, server: PageServer) -> None:
    page.type("generate.prompt", "a red circle <lora:stripes:0.5> <lora:nosuch:1>")
    page.slide("generate.steps", 2)
    page.click("generate.start")
    assert page.job_end(FORM).startswith("Done in")
    assert page.wait(f"document.querySelector('{PICTURES}')?.naturalWidth") == 64
    report = page.text(f"{FORM} .prefuse-report")
    assert "stripes at 0.5" in report
    assert "nosuch" in report
    assert len(list(server.outputs.glob("*.png"))) == 1
