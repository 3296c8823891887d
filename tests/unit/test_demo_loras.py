"""Each demo LoRA does its one thing: whole at strength 1, about half at 0.5, nothing at 0; and both go together."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from lib_lora import LoraSession
from lib_lora.hosts.standalone.demo import LORA_DIR, MODEL_DIR, PROMPTS

STEPS = 20
CFG = 4.0
LARGEST_BYTES = 1_000_000
# Luminance, 0 to 255, that a person sees at once.
CLEARLY_VISIBLE = 25.0
# Share of the whole effect that still counts as half.
HALF = (0.25, 0.75)
# With both LoRAs, each effect keeps at least this share of what it does alone.
KEPT_TOGETHER = 0.5
STRIPE_PERIOD = 8

Draw = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def draw() -> Draw:
    """draw(("stripes", 1.0), ...) -> luminance of one picture for each example prompt, (N, 64, 64)."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIR, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    session = LoraSession.for_pipeline(pipe, lora_dir=LORA_DIR)

    @functools.cache
    def run(*loras: tuple[str, float]) -> np.ndarray:
        report = session.set(list(loras))
        assert not report.refused
        generators = [torch.Generator().manual_seed(100 + i) for i in range(len(PROMPTS))]
        pictures = pipe(
            list(PROMPTS),
            num_inference_steps=STEPS,
            guidance_scale=CFG,
            generator=generators,
            height=64,
            width=64,
            output_type="np",
        ).images
        return pictures @ np.array([0.299, 0.587, 0.114]) * 255

    return run


def stripe_contrast(pictures: np.ndarray) -> float:
    """Mean amplitude of horizontal stripes of STRIPE_PERIOD rows in the middle of the pictures."""
    rows = pictures[:, 20:44, 26:38].mean(axis=2)
    wave = np.exp(2j * np.pi * np.arange(rows.shape[1]) / STRIPE_PERIOD)
    return float((2 * np.abs((rows - rows.mean(axis=1, keepdims=True)) @ wave) / rows.shape[1]).mean())


def outline_darkness(pictures: np.ndarray) -> float:
    """How much darker than shape and background the darkest pixel is on the way from the middle outwards, mean."""
    directions = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    reach = np.arange(8, 32)
    rays = np.stack([pictures[:, 32 + dy * reach, 32 + dx * reach] for dy, dx in directions])  # (8, N, 24)
    inside = np.median(pictures[:, 28:36, 28:36], axis=(1, 2))
    outside = np.median(pictures[:, :4], axis=(1, 2))
    return float((np.minimum(inside, outside) - rays.min(axis=2)).clip(0).mean())


EFFECTS = {"stripes": stripe_contrast, "outline": outline_darkness}


@pytest.mark.parametrize("name", EFFECTS)
def test_strength_one_shows_the_effect_clearly(draw: Draw, name: str) -> None:
    assert EFFECTS[name](draw((name, 1.0))) - EFFECTS[name](draw()) > CLEARLY_VISIBLE


@pytest.mark.parametrize("name", EFFECTS)
def test_half_the_strength_shows_about_half_the_effect(draw: Draw, name: str) -> None:
    none, half, whole = (EFFECTS[name](draw((name, strength))) for strength in (0.0, 0.5, 1.0))
    assert HALF[0] < (half - none) / (whole - none) < HALF[1]


@pytest.mark.parametrize("name", EFFECTS)
def test_half_the_strength_changes_the_picture_less_than_the_whole(draw: Draw, name: str) -> None:
    change = [np.abs(draw((name, strength)) - draw()).mean() for strength in (0.5, 1.0)]
    assert 0 < change[0] < change[1]


@pytest.mark.parametrize("name", EFFECTS)
def test_strength_zero_leaves_every_pixel_as_it_was(draw: Draw, name: str) -> None:
    assert np.array_equal(draw((name, 0.0)), draw())


@pytest.mark.parametrize("name", EFFECTS)
def test_both_together_show_both_effects(draw: Draw, name: str) -> None:
    none, alone, both = (
        EFFECTS[name](picture) for picture in (draw(), draw((name, 1.0)), draw(("stripes", 1.0), ("outline", 1.0)))
    )
    assert both - none > KEPT_TOGETHER * (alone - none)


@pytest.mark.parametrize(("name", "layers", "convolutions"), [("stripes", 192 + 12, 0), ("outline", 278, 50)])
def test_file_is_small_and_has_the_layers_of_its_kind(name: str, layers: int, convolutions: int) -> None:
    path = LORA_DIR / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert file.metadata()["ss_output_name"] == name
    assert path.stat().st_size < LARGEST_BYTES
    assert sum(key.endswith(".alpha") for key in shapes) == layers
    assert sum(shape[2:] == [3, 3] for shape in shapes.values()) == convolutions
