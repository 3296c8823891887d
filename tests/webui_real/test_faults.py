"""What can not be applied: the picture is as without it, and the answer says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.webui_real.make_models import FOR_SDXL, NOT_FINITE, TRUNCATED
from tests.webui_real.server import largest_difference
from tests.webui_real.test_pictures import CLEAR, TEXT

if TYPE_CHECKING:
    from tests.webui_real.server import WebUI

REFUSED = {
    "missing": ("<lora:nosuch:0.8>", "nosuch"),
    "truncated": (f"<lora:{TRUNCATED}:0.8>", TRUNCATED),
    "not finite": (f"<lora:{NOT_FINITE}:0.8>", NOT_FINITE),
    "for SDXL": (f"<lora:{FOR_SDXL}:0.8>", FOR_SDXL),
    "a strength that is no number": ("<lora:b:strong>", "strong"),
    "a strength that is not finite": ("<lora:b:nan>", "nan"),
    "a path": ("<lora:../../../etc/passwd:1>", "etc/passwd"),
    "no name": ("<lora::0.8>", "name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tag_that_can_not_be_applied_changes_nothing(webui: WebUI, case: str) -> None:
    tag, _ = REFUSED[case]
    base = webui.draw(TEXT).picture
    assert np.array_equal(webui.draw(f"{TEXT} {tag}").picture, base)
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.parametrize("case", REFUSED)
def test_a_tag_that_can_not_be_applied_drops_only_itself(webui: WebUI, case: str) -> None:
    tag, _ = REFUSED[case]
    alone = webui.draw(f"{TEXT} <lora:a:0.8>").picture
    assert largest_difference(alone, webui.draw(TEXT).picture) > CLEAR
    assert np.array_equal(webui.draw(f"{TEXT} {tag} <lora:a:0.8>").picture, alone)
    assert np.array_equal(webui.draw(f"{TEXT} <lora:a:0.8> {tag}").picture, alone)


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_refused_is_told_in_the_answer_and_in_one_line_of_the_console(webui: WebUI, case: str) -> None:
    tag, word = REFUSED[case]
    printed = len(webui.console())
    assert word in webui.draw(f"{TEXT} {tag} <lora:a:0.8>").told
    said = webui.console()[printed:]
    assert word in said
    assert "Traceback" not in said


def test_what_was_refused_is_told_again_at_each_generation_and_no_longer_when_it_is_gone(webui: WebUI) -> None:
    for _ in range(2):
        assert "nosuch" in webui.draw(f"{TEXT} <lora:nosuch:0.8>").told
    assert "nosuch" not in webui.draw(TEXT).told


@pytest.mark.parametrize("name", ["nosuch", TRUNCATED, NOT_FINITE, FOR_SDXL])
def test_hashes_name_only_what_was_applied(webui: WebUI, name: str) -> None:
    text = webui.draw(f"{TEXT} <lora:{name}:0.8> <lora:a:0.8>").parameters
    assert 'Lora hashes: "a: ' in text
    assert f"{name}: " not in text.split("Lora hashes", 1)[1].split('"')[1]


def test_a_file_that_was_repaired_applies_without_a_restart(webui: WebUI) -> None:
    folder = webui.data / "models/Lora"
    broken, good = folder / f"{TRUNCATED}.safetensors", folder / "a.safetensors"
    kept = broken.read_bytes()
    base = webui.draw(TEXT).picture
    assert np.array_equal(webui.draw(f"{TEXT} <lora:{TRUNCATED}:0.8>").picture, base)
    broken.write_bytes(good.read_bytes())
    try:
        repaired = webui.draw(f"{TEXT} <lora:{TRUNCATED}:0.8>").picture
        assert np.array_equal(repaired, webui.draw(f"{TEXT} <lora:a:0.8>").picture)
    finally:
        broken.write_bytes(kept)
    assert np.array_equal(webui.draw(TEXT).picture, base)


def test_a_file_that_appears_is_found_and_one_that_goes_is_told(webui: WebUI) -> None:
    place = webui.data / "models/Lora/sub/newcomer.safetensors"
    place.parent.mkdir(exist_ok=True)
    assert "newcomer" in webui.draw(f"{TEXT} <lora:newcomer:0.8>").told
    place.write_bytes((webui.data / "models/Lora/a.safetensors").read_bytes())
    found = webui.draw(f"{TEXT} <lora:newcomer:0.8>").picture
    place.unlink()
    assert np.array_equal(found, webui.draw(f"{TEXT} <lora:a:0.8>").picture)
    gone = webui.draw(f"{TEXT} <lora:newcomer:0.8>")
    assert "newcomer" in gone.told
    assert np.array_equal(gone.picture, webui.draw(TEXT).picture)
