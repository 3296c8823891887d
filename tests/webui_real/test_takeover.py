"""Taking `<lora:…>` over and giving it back: settings, reload, infotext, the API of both."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.webui_real.make_models import ALIAS, GOOD
from tests.webui_real.server import AnswerError, largest_difference
from tests.webui_real.test_pictures import CLEAR, ROUNDING, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.webui_real.server import Answer, WebUI


def hashes(answer: Answer) -> str:
    found = re.search(r'Lora hashes: ("(?:[^"\\]|\\.)*"|[^,]*)', answer.parameters)
    return found[1] if found else ""


def state(webui: WebUI) -> str:
    return json.dumps(webui.get("/prefuse/v1/state"))


def test_turning_it_off_and_on_needs_no_restart_and_leaves_nothing(webui: WebUI) -> None:
    prompt = f"{TEXT} <lora:a:0.8><lora:b:0.2>"
    base, ours = webui.draw(TEXT).picture, webui.draw(prompt).picture
    for _ in range(3):
        webui.options(prefuse_enabled=False)
        assert largest_difference(webui.draw(prompt).picture, ours) <= ROUNDING
        webui.options(prefuse_enabled=True)
        assert np.array_equal(webui.draw(prompt).picture, ours)
        webui.options(prefuse_enabled=False)
        assert np.array_equal(webui.draw(TEXT).picture, base)
        webui.options(prefuse_enabled=True)
        assert np.array_equal(webui.draw(TEXT).picture, base)


def test_turned_off_nothing_of_it_runs(webui: WebUI) -> None:
    webui.draw(f"{TEXT} <lora:a:0.8>")
    with webui.with_options(prefuse_enabled=False):
        webui.draw(f"{TEXT} <lora:b:0.2>")
        assert "refuse" not in webui.draw(f"{TEXT} <lora:nosuch:0.2>").told


@pytest.mark.parametrize(
    "tags",
    ["<lora:a:0.8>", "<lora:b:0.8><lora:a:0.2>", f"<lora:{ALIAS}:0.8>", "<lyco:c:0.8>", "<lora:loha:0.1><lora:a>", ""],
)
def test_hashes_in_the_infotext_are_the_builtin_ones(webui: WebUI, builtin: Callable[..., Answer], tags: str) -> None:
    ours, reference = hashes(webui.draw(f"{TEXT} {tags}")), hashes(builtin(f"{TEXT} {tags}"))
    assert ours == reference
    assert bool(ours) is bool(tags)


def test_the_infotext_of_plain_tags_is_the_builtin_one(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    prompt = f"{TEXT} <lora:a:0.8> <lora:b:0.2:0.3>"
    assert webui.draw(prompt).infotext == builtin(prompt).infotext


def test_hashes_of_both_passes_are_in_the_infotext(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    request = {"enable_hr": True, "hr_prompt": f"{TEXT} <lora:b:0.5>", "denoising_strength": 0.7}
    prompt = f"{TEXT} <lora:a:0.5>"
    assert hashes(webui.draw(prompt, **request)) == hashes(builtin(prompt, **request)) != ""


def test_a_picture_without_tags_says_nothing_of_it(webui: WebUI) -> None:
    answer = webui.draw(TEXT)
    assert "ora" not in answer.parameters
    assert "refuse" not in answer.parameters


def test_the_builtins_list_of_loras_still_answers(webui: WebUI) -> None:
    webui.draw(f"{TEXT} <lora:a:0.8>")
    listed = {entry["name"]: entry for entry in webui.get("/sdapi/v1/loras")}
    assert {*GOOD, "loha", "dora"} <= listed.keys()
    assert listed["e"]["alias"] == ALIAS
    webui.post("/sdapi/v1/refresh-loras")


def test_the_extra_network_of_the_settings_is_added_to_the_prompt(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    with webui.with_options(sd_lora="a"):
        ours, reference = webui.draw(TEXT), builtin(TEXT)
    assert largest_difference(ours.picture, webui.draw(TEXT).picture) > CLEAR
    assert largest_difference(ours.picture, reference.picture) <= ROUNDING
    assert ours.infotext == reference.infotext


def test_the_state_names_what_is_fused(webui: WebUI) -> None:
    webui.draw(f"{TEXT} <lora:loha:0.1><lora:dora:0.2>")
    assert "loha" in state(webui)
    assert "dora" in state(webui)
    webui.draw(TEXT)
    assert "loha" not in state(webui)


def test_a_prompt_is_resolved_without_drawing(webui: WebUI) -> None:
    before = state(webui)
    answer = json.dumps(webui.post("/prefuse/v1/resolve", {"prompt": f"{TEXT} <lora:loha:0.1:0.25><lora:nosuch:1>"}))
    assert "loha" in answer
    assert "0.25" in answer
    assert "nosuch" in answer
    assert state(webui) == before


def test_the_catalog_lists_every_file_with_its_aliases(webui: WebUI) -> None:
    listed = json.dumps(webui.get("/prefuse/v1/catalog"))
    for name in (*GOOD, "loha", "dora", ALIAS):
        assert f'"{name}"' in listed


def test_a_rescan_finds_new_files(webui: WebUI) -> None:
    place = webui.data / "models/Lora/afterwards.safetensors"
    place.write_bytes((webui.data / "models/Lora/a.safetensors").read_bytes())
    try:
        webui.post("/prefuse/v1/rescan")
        assert '"afterwards"' in json.dumps(webui.get("/prefuse/v1/catalog"))
    finally:
        place.unlink()
        webui.post("/prefuse/v1/rescan")
    assert '"afterwards"' not in json.dumps(webui.get("/prefuse/v1/catalog"))


def test_memory_is_released_on_request_and_the_next_pictures_are_right(webui: WebUI) -> None:
    base, ours = webui.draw(TEXT).picture, webui.draw(f"{TEXT} <lora:a:0.8>").picture
    webui.post("/prefuse/v1/release")
    assert np.array_equal(webui.draw(f"{TEXT} <lora:a:0.8>").picture, ours)
    webui.post("/prefuse/v1/release")
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.parametrize("body", [{}, {"prompt": 5_000_000 * "<lora:a:1>"}, {"prompt": ["x"]}, [], "text"])
def test_a_bad_question_is_answered_with_a_client_error_or_a_result(webui: WebUI, body: object) -> None:
    try:
        webui.post("/prefuse/v1/resolve", body)
    except AnswerError as error:
        assert 400 <= error.status < 500
    assert np.array_equal(webui.draw(TEXT).picture, webui.draw(TEXT).picture)


@pytest.mark.slow
def test_reloading_the_page_leaves_one_registration_and_the_same_pictures(webui: WebUI) -> None:
    prompt = f"{TEXT} <lora:a:0.8><lyco:b:0.2>"
    base, ours = webui.draw(TEXT).picture, webui.draw(prompt).picture
    for number in range(3):
        webui.draw(prompt if number % 2 else TEXT)
        webui.reload_page()
        assert np.array_equal(webui.draw(prompt).picture, ours)
        assert np.array_equal(webui.draw(TEXT).picture, base)
        with webui.with_options(prefuse_enabled=False):
            assert largest_difference(webui.draw(prompt).picture, ours) <= ROUNDING
            assert np.array_equal(webui.draw(TEXT).picture, base)
    said = webui.draw(f"{TEXT} <lora:nosuch:1>").told
    assert said.count("nosuch") >= 1
