"""Each demo LoRA does its one thing: whole at strength 1, about half at 0.5, nothing at 0; and both go together."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from benchmarks.effects import CLEARLY_VISIBLE, drawn, luminance, outline_darkness, stripe_contrast
from lib_lora import LoraSession
from lib_lora.hosts.standalone.demo import LORA_DIR, MODEL_DIR, PROMPTS

STEPS = 20
CFG = 4.0
LARGEST_BYTES = 1_000_000
# Share of the whole effect that still counts as half.
HALF = (0.25, 0.75)
# With both LoRAs, each effect keeps at least this share of what it does alone.
KEPT_TOGETHER = 0.5

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
        return luminance(drawn(pipe, PROMPTS, STEPS, CFG, first_seed=100))

    return run


EFFECTS = {
    "stripes": lambda pictures: stripe_contrast(pictures).mean(),
    "outline": lambda pictures: outline_darkness(pictures).mean(),
}


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
