"""The semantics of the built-in extension that users rely on, as a table (its arguments, names, duplicates, hashes)."""

from __future__ import annotations

import pytest
import torch

SAME = [
    ("<lora:ink>", [("ink", 1.0)]),
    ("<lora:ink:0.5>", [("ink", 0.5)]),
    ("<lora:ink:0.5:0.7>", [("ink", 0.5, 0.7)]),
    ("<lora:ink:te=0.2>", [("ink", 0.2)]),
    ("<lora:ink:unet=0.2>", [("ink", 1.0, 0.2)]),
    ("<lora:ink:0.5:unet=0.2>", [("ink", 0.5, 0.2)]),
    ("<lora:unet=0.2:ink:0.5>", [("ink", 0.5, 0.2)]),
    ("<lora:my lora (v1).2:0.8>", [("my lora (v1).2", 0.8)]),
    ("<lora:ink: 0.8 >", [("ink", 0.8)]),
    ("<lora:ink:-0.5>", [("ink", -0.5)]),
    ("<lora:echo:0.5>", [("alias", 0.5)]),
    ("<lora:ink:1:dyn=0>", []),
    ("<lora:ink:0>", []),
    ("<lora:ink:0.5><lora:ink:0.8>", [("ink", 1.3)]),
    ("<lora:wash:0.5><lora:ink:0.8>", [("ink", 0.8), ("wash", 0.5)]),
    ("<lora: ink :0.8>", []),
    ("<lora:ink=b:1>", []),
    ("<lora:../../etc/passwd:1>", []),
]
FLOAT_ERROR = 1e-3


@pytest.mark.parametrize(("tag", "request_"), SAME)
def test_tags_mean_what_they_mean_there(webui, expected, tag, request_):
    picture, other = webui.picture(f"a cat {tag}"), expected(request_, "a cat ")
    assert (picture - other).abs().max() <= FLOAT_ERROR * other.abs().max()


def test_only_the_first_prompt_of_a_batch_gives_the_tags(webui, expected):
    p = webui.modules.processing.StableDiffusionProcessingTxt2Img(batch_size=2)
    p.init = lambda: setattr(p, "all_prompts", ["a cat <lora:ink:0.8>", "a dog <lora:wash:0.5>"])
    done = webui.modules.processing.process_images(p)
    assert torch.equal(done.images[0], expected([("ink", 0.8)], "a cat "))


def test_arguments_that_an_extension_gives_as_numbers_are_read(webui):
    params = webui.modules.extra_networks.ExtraNetworkParams(items=["ink", 0.8])
    p = webui.modules.processing.StableDiffusionProcessingTxt2Img()
    webui.model  # noqa: B018 -- loads it
    webui.modules.extra_networks.activate(p, {"lora": [params]})
    assert [(one.name, one.unet_multiplier) for one in webui.networks.loaded_networks] == [("ink", 0.8)]


def test_without_networks_for_extra_activation_nothing_is_applied_at_model_load(webui):
    base = webui.state()
    assert webui.networks.loaded_networks == []
    assert webui.state() == base


def test_names_and_hashes_of_what_was_applied_and_of_nothing_else(webui):
    done = webui.generate("a cat <lora:ink:0.8><lora:nosuch:1><lora:echo:1><lora:broken:1>")
    lines = dict(part.split(": ", 1) for part in done.infotexts[0].split(", ") if ": " in part)
    assert set(lines) == {"Lora hashes", "echo", "Lora files"}
    assert len(lines["echo"]) == 12
    assert lines["Lora hashes"].startswith("ink: ")
    assert lines["Lora files"] == "echo: alias"


def test_hashes_of_both_passes_are_joined_and_go_with_the_tags(webui):
    p = webui.modules.processing.StableDiffusionProcessingTxt2Img(
        prompt="a <lora:ink:1>", enable_hr=True, hr_prompt="a <lora:wash:1>"
    )
    done = webui.modules.processing.process_images(p)
    assert list(p.lora_hashes) == ["ink", "wash"]
    assert done.extra_generation_params["Lora hashes"].count(":") == 2
    p.prompt, p.hr_prompt = "a", "a"
    assert "Lora hashes" not in webui.modules.processing.process_images(p).extra_generation_params


def test_hashes_are_left_out_if_the_setting_says_so(webui):
    webui.set(lora_add_hashes_to_infotext=False)
    assert "Lora hashes" not in webui.generate("a <lora:ink:1>").extra_generation_params


def test_without_hashing_no_file_is_hashed(webui):
    webui.modules.shared.cmd_opts.no_hashing = True
    try:
        assert "Lora hashes" not in webui.generate("a <lora:ink:1>").extra_generation_params
    finally:
        webui.modules.shared.cmd_opts.no_hashing = False


def test_what_was_applied_can_be_looked_up_when_it_is_pasted(webui):
    hashes = webui.generate("a <lora:ink:1>").extra_generation_params["Lora hashes"]
    short = hashes.partition(": ")[2]
    assert webui.networks.available_network_hash_lookup[short].name == "ink"


def test_a_popup_warns_if_the_setting_asks_for_it(webui):
    import gradio

    webui.set(lora_not_found_gradio_warning=True)
    webui.generate("a <lora:nosuch:1>")
    assert "nosuch" in gradio.warned[0]
    gradio.warned.clear()
