"""Where the parts of each family of models are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
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
