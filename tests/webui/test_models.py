"""Where the parts of each family of models are."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn


def wrapper(**parts):
    return SimpleNamespace(wrapped=SimpleNamespace(**parts))


UNET = nn.Linear(1, 1)
CLIP, OPEN_CLIP = wrapper(transformer=nn.Linear(1, 1)), wrapper(model=nn.Linear(1, 1))
SD3 = SimpleNamespace(clip_l=nn.Linear(1, 1), clip_g=nn.Linear(1, 1), t5xxl=None)
BARE = nn.Linear(1, 1)

FAMILIES = [
    ("SD1", {"cond_stage_model": CLIP}, {"te1": CLIP.wrapped}),
    ("SD2", {"cond_stage_model": OPEN_CLIP}, {"te1": OPEN_CLIP.wrapped}),
    ("not hijacked", {"cond_stage_model": BARE}, {"te1": BARE}),
    (
        "SDXL",
        {"conditioner": SimpleNamespace(embedders=[CLIP, OPEN_CLIP, SimpleNamespace()])},
        {"te1": CLIP.wrapped, "te2": OPEN_CLIP.wrapped},
    ),
    (
        "SDXL's refiner",
        {"conditioner": SimpleNamespace(embedders=[OPEN_CLIP, SimpleNamespace()])},
        {"te2": OPEN_CLIP.wrapped},
    ),
    ("SD3", {"cond_stage_model": SD3}, {"te1": SD3.clip_l, "te2": SD3.clip_g}),
]


@pytest.mark.parametrize(("attributes", "encoders"), [family[1:] for family in FAMILIES], ids=[f[0] for f in FAMILIES])
def test_components_are_found(fake_modules, attributes, encoders):
    from lib_lora.hosts.webui.model import components

    sd_model = SimpleNamespace(model=SimpleNamespace(diffusion_model=UNET), **attributes)
    assert components(sd_model) == {"unet": UNET} | encoders


def test_the_folders_are_the_built_ins_and_the_later_wins(fake_modules):
    from modules import shared

    from lib_lora.hosts.webui.loaded import lora_folders

    shared.cmd_opts.lora_dir, shared.cmd_opts.lyco_dir_backcompat = "a", ""
    assert lora_folders() == ["a"]
    shared.cmd_opts.lyco_dir_backcompat = "b"
    assert lora_folders() == ["a", "b"]


def test_a_model_that_is_thrown_away_takes_what_was_kept_for_it_along(webui):
    webui.picture("a <lora:ink:1>")
    gone = weakref.ref(webui.model)
    model_data = webui.modules.sd_models.model_data
    model_data.sd_model, model_data.loaded_sd_models = None, []
    gc.collect()
    assert gone() is None


def test_a_model_that_was_moved_to_the_meta_device_is_forgotten(webui, expected):
    """As the WebUI does with models that it throws away, while something still holds them."""
    webui.picture("a cat <lora:ink:0.8>")
    held, model_data = webui.model, webui.modules.sd_models.model_data
    model_data.sd_model, model_data.loaded_sd_models, model_data.was_loaded_at_least_once = None, [], False
    held.to("meta")
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([("ink", 0.8)], "a cat "))
    assert not webui.modules.errors.shown
