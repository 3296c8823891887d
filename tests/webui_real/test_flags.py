"""Start options that change where weights lie or what is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.webui_real.server import AnswerError, largest_difference
from tests.webui_real.test_pictures import CLEAR, ROUNDING, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.webui_real.server import WebUI

PROMPT = f"{TEXT} <lora:a:0.6><lora:b:0.2>"


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--medvram", "--lowvram", "--nowebui", "--disable-model-loading-ram-optimization"])
def test_pictures_and_their_removal_are_the_same_with_every_start_option(
    make_webui: Callable[..., WebUI], flag: str
) -> None:
    webui = make_webui(flag)
    try:
        base, ours = webui.draw(TEXT).picture, webui.draw(PROMPT).picture
        assert largest_difference(ours, base) > CLEAR
        hires = {"enable_hr": True, "hr_prompt": f"{TEXT} <lora:c:0.5>", "denoising_strength": 0.7}
        passes = webui.draw(PROMPT, **hires).picture
        assert np.array_equal(webui.draw(TEXT).picture, base)
        with webui.with_options(prefuse_enabled=False):
            assert largest_difference(webui.draw(PROMPT).picture, ours) <= ROUNDING
            assert largest_difference(webui.draw(PROMPT, **hires).picture, passes) <= ROUNDING
        assert np.array_equal(webui.draw(PROMPT).picture, ours)
        assert np.array_equal(webui.draw(TEXT).picture, base)
        assert "/prefuse/v1/state" in webui.get("/openapi.json")["paths"]
    finally:
        webui.stop()


def test_it_loads_without_an_error(one_webui: WebUI) -> None:
    printed = one_webui.console()
    assert "Error loading script" not in printed
    assert "Error executing callback" not in printed
    assert "Error calling" not in printed


@pytest.mark.slow
def test_the_api_wants_the_password_of_the_webui(make_webui: Callable[..., WebUI]) -> None:
    webui = make_webui("--api-auth", "someone:secret", login="someone:secret")
    try:
        assert webui.get("/prefuse/v1/state")["applied"] == []
        for login in ("", "someone:wrong", "else:secret"):
            webui.login = login
            for path, body in (("state", None), ("catalog", None), ("resolve", {"prompt": TEXT}), ("release", {})):
                with pytest.raises(AnswerError, match="401"):
                    webui.get(f"/prefuse/v1/{path}") if body is None else webui.post(f"/prefuse/v1/{path}", body)
    finally:
        webui.stop()
