"""The demo model's build: pictures come from their scene alone, and every stage leaves files that load."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lib_lora.hosts.standalone.demo import LORA_DIR, MODEL_DIR, build, train_loras, train_unet, train_vae
from lib_lora.hosts.standalone.demo.drawing import PALETTE, SHAPES, Scene, draw_array, random_scene
from lib_lora.hosts.standalone.demo.tokenizer import new_tokenizer

pytestmark = pytest.mark.newest

PICTURES = 8
STEPS = 2


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and LoRAs after two steps of each stage."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_vae, train_unet, train_loras):
            patch.setattr(module, "PICTURES", PICTURES)
        patch.setattr(train_unet, "BATCH", 4)
        patch.setattr(train_loras, "BATCH", 4)
        patch.setattr(build, "ROUNDS", (train_vae.Round(STEPS, 4, 1e-3),))
        patch.setattr(build, "STEPS", dict.fromkeys(build.STEPS, STEPS))
        patch.setattr("sys.argv", ["build", "--out", str(out)])
        build.main()
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_covers_the_middle_and_background_the_corners(shape: str) -> None:
    rng = random.Random(1)
    for _ in range(20):
        scene = replace(random_scene(rng), shape=shape)
        picture = draw_array(scene)
        assert tuple(picture[32, 32]) == PALETTE[scene.colour]
        assert tuple(picture[0, 0]) == PALETTE[scene.background]


@pytest.mark.parametrize("effect", ["stripes", "outline"])
def test_effects_grow_with_their_strength(effect: str) -> None:
    plain, half, whole = (
        draw_array(replace(Scene("circle", "red", "white"), **{effect: strength})).astype(float)
        for strength in (0.0, 0.5, 1.0)
    )
    assert np.abs((half - plain) * 2 - (whole - plain)).max() <= 2
    assert np.abs(whole - plain).max() > 100


def test_pictures_of_a_seed_are_always_the_same() -> None:
    first, second = (random_scene(random.Random(3)) for _ in range(2))
    assert np.array_equal(draw_array(first), draw_array(second))


def test_every_stage_is_in_the_provenance(built: Path) -> None:
    known = json.loads((built / "model" / "PROVENANCE.json").read_text(encoding="utf-8"))
    assert list(known["stages"]) == ["vae", "unet", "stripes", "outline"]
    assert len(known["sha256"]) == 5


def test_built_folder_draws_a_picture(built: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(built / "model", local_files_only=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (64, 64)


def test_trained_loras_have_the_shapes_of_the_shipped_ones(built: Path) -> None:
    for name in train_loras.RECIPES:
        made, shipped = (load_file(folder / f"{name}.safetensors") for folder in (built / "loras", LORA_DIR))
        assert {key: tensor.shape for key, tensor in made.items()} == {k: tensor.shape for k, tensor in shipped.items()}
        assert any(torch.count_nonzero(tensor) for key, tensor in made.items() if "lora_up" in key)


def test_shipped_tokenizer_is_the_one_that_the_build_writes(tmp_path: Path) -> None:
    new_tokenizer(tmp_path)
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / file).read_text("utf-8") == (MODEL_DIR / "tokenizer" / file).read_text("utf-8")
