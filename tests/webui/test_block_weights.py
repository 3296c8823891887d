"""Block weights in the WebUI: preset files, random numbers of a picture's seed, what the infotext and the page say."""

from __future__ import annotations

import pytest
import torch

RANDOM = f"a cat <lora:ink:0.8:lbw={'R,' * 16}U>"
ONES, HALVES = (",".join([number] * 17) for number in ("1", "0.5"))


def test_a_tag_with_block_weights_gives_the_picture_of_a_session(webui, expected):
    for tag in ("<lora:ink:0.8:lbw=MIDD>", "<lora:wash:0.5:lbwe=ATTNDEEPOFF:out=0.3>"):
        assert torch.equal(webui.picture(f"a cat {tag}"), expected(tag, "a cat "))


@pytest.mark.parametrize("place", ["lbwpresets.txt", "extensions/sd-webui-lora-block-weight/scripts/lbwpresets.txt"])
def test_presets_beside_the_settings_and_of_the_extension_are_found(webui, expected, tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(f"MY:{HALVES}")
    assert torch.equal(webui.picture("a cat <lora:ink:0.8:lbw=MY>"), expected("<lora:ink:0.4>", "a cat "))


def test_a_preset_that_is_edited_changes_the_conds_of_the_same_tag(webui, expected, tmp_path):
    for numbers, strength in ((ONES, 0.8), (HALVES, 0.4)):
        (tmp_path / "lbwpresets.txt").write_text(f"MY:{numbers}")
        assert torch.equal(webui.picture("a cat <lora:ink:0.8:lbw=MY>"), expected([("ink", strength)], "a cat "))


def test_each_batch_draws_from_its_own_seed_and_the_infotext_holds_what_was_drawn(webui, expected):
    done = webui.generate(RANDOM, seed=5, n_iter=2)
    alone = [webui.generate(RANDOM, seed=seed).extra_generation_params["Lora resolved"] for seed in (5, 6)]
    assert alone[0] != alone[1]
    assert [resolved in text for resolved, text in zip(alone, done.infotexts, strict=True)] == [True, True]
    drawn = webui.picture(RANDOM, seed=1)
    tag = webui.generate(RANDOM, seed=1).extra_generation_params["Lora resolved"]
    assert torch.equal(drawn, expected(tag, "a cat "))


def test_the_infotext_says_no_more_than_needed_and_joins_both_passes(webui):
    assert "Lora resolved" not in webui.generate("a cat <lora:ink:0.8:in=0.5>").extra_generation_params
    done = webui.generate(
        "a <lora:ink:1:lbw=IND>", enable_hr=True, hr_prompt="a <lora:ink:1:lbw=IND><lora:wash:1:lbw=INS>"
    )
    tags = done.extra_generation_params["Lora resolved"]
    assert (tags.count("<lora:ink:1:lbw="), tags.count("<lora:wash:1:lbw=")) == (1, 1)
    assert "Lora resolved" not in webui.generate("a cat <lora:ink:0.8>").extra_generation_params


def test_the_page_and_the_api_tell_the_weights_and_what_is_refused(webui):
    done = webui.generate("a cat <lora:ink:0.8:lbw=IND><lora:wash:1:lbw=NOPE>")
    (entry,) = list.copy(done.extra_generation_params["Prefuse"])
    weights = "lbw=1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0"
    assert entry["applied"] == [
        {"name": "ink", "te": 0.8, "unet": 0.8, "weights": weights, "schedule": "", "moving": ""}
    ]
    assert "lbw names no preset 'NOPE'" in entry["refused"][0]["reason"]
    endpoint, _ = webui.app.routes["/prefuse/v1/state"]
    assert [lora.weights for lora in endpoint().applied] == [weights]
