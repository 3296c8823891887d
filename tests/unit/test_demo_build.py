"""The demo model's build: pictures come from their scene alone, and every stage leaves files that load."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from benchmarks.effects import luminance, outline_darkness, stripe_contrast
from lib_lora.hosts.standalone.demo import CONFIG_DIR, LORA_DIR, MODEL_DIR, build, train_unet, train_vae
from lib_lora.hosts.standalone.demo.drawing import PALETTE, SHAPES, Scene, draw_array, random_scene
from lib_lora.hosts.standalone.demo.lora_pictures import EFFECTS, write_pictures
from lib_lora.hosts.standalone.demo.tokenizer import new_tokenizer
from lib_lora.train.option_values import read_toml
from lib_lora.train.options import TrainOptions

pytestmark = pytest.mark.newest

PICTURES = 8
STEPS = 2
LEAST_CORRELATION = 0.5
"""Of strength and effect; the effect is larger where colours are brighter."""
FEW = {"max_train_steps": STEPS, "train_batch_size": 4, "lr_warmup_steps": 0}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and LoRAs after two steps of each stage."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_vae, train_unet):
            patch.setattr(module, "PICTURES", PICTURES)
        patch.setattr(train_unet, "BATCH", 4)
        patch.setattr(build, "ROUNDS", (train_vae.Round(STEPS, 4, 1e-3),))
        patch.setattr(build, "UNET_STEPS", STEPS)
        patch.setattr(build, "write_pictures", partial(write_pictures, count=PICTURES))
        patch.setattr(build, "read_toml", lambda path: read_toml(path) | FEW)
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


@pytest.mark.parametrize(("effect", "measure"), [("stripes", stripe_contrast), ("outline", outline_darkness)])
def test_a_picture_shows_the_effect_at_the_strength_it_is_learned_at(tmp_path: Path, effect: str, measure) -> None:
    listed = [json.loads(line) for line in write_pictures(effect, tmp_path, 100).read_text("utf-8").splitlines()]
    strengths = np.array([facts["network_multiplier"] for facts in listed])
    drawn = np.stack([np.asarray(Image.open(tmp_path / facts["file_name"]), float) for facts in listed])
    assert np.corrcoef(strengths, measure(luminance(drawn)))[0, 1] > LEAST_CORRELATION
    assert 0.35 < (strengths == 1).mean() < 0.65
    assert strengths.min() < 0.1
    assert not any(effect[:5] in facts["text"] for facts in listed)


@pytest.mark.parametrize("name", EFFECTS)
def test_a_configuration_is_one_of_the_command(name: str) -> None:
    options = TrainOptions.of(read_toml(CONFIG_DIR / f"{name}.toml"))
    assert options.output.output_name == name
    assert options.model.pretrained_model_name_or_path == "demo"


def test_every_stage_is_in_the_provenance(built: Path) -> None:
    known = json.loads((built / "model" / "PROVENANCE.json").read_text(encoding="utf-8"))
    assert list(known["stages"]) == ["vae", "unet", "stripes", "outline"]
    assert len(known["sha256"]) == 5


def test_built_folder_draws_a_picture(built: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(built / "model", local_files_only=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (64, 64)


def test_trained_loras_have_the_shapes_of_the_shipped_ones(built: Path) -> None:
    for name in EFFECTS:
        made, shipped = (load_file(folder / f"{name}.safetensors") for folder in (built / "loras", LORA_DIR))
        assert {key: tensor.shape for key, tensor in made.items()} == {k: tensor.shape for k, tensor in shipped.items()}
        assert any(torch.count_nonzero(tensor) for key, tensor in made.items() if "lora_up" in key)


def test_shipped_tokenizer_is_the_one_that_the_build_writes(tmp_path: Path) -> None:
    new_tokenizer(tmp_path)
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / file).read_text("utf-8") == (MODEL_DIR / "tokenizer" / file).read_text("utf-8")
