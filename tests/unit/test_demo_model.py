"""The embedded demo model draws what its prompt says, is built like SD1, and is the file that its provenance names."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from lib_lora.hosts.standalone.demo import MODEL_DIR, PROMPTS
from lib_lora.hosts.standalone.demo.drawing import PALETTE, SHAPES, caption

SD1_NAMES = Path(__file__).parents[1] / "golden" / "fullsize" / "sd1_lora_names.json"
PROMPT_COUNT = 40
LEAST_RIGHT = 36
LARGEST_BYTES = 16_000_000
STEPS = 25
CFG = 4.0
# Layers of SD1 that no LoRA of kohya's trains.
UNTRAINED = ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIR, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes() -> list[tuple[str, str, str]]:
    """40 fixed (shape, colour, background)."""
    rng = random.Random(40)
    return [(SHAPES[i % len(SHAPES)], *rng.sample(sorted(PALETTE), 2)) for i in range(PROMPT_COUNT)]


def nearest_colour(pixels: np.ndarray) -> str:
    """Name of the palette colour nearest to the median of (N, 3) pixels."""
    median = np.median(pixels, axis=0)
    return min(PALETTE, key=lambda name: np.linalg.norm(median - np.array(PALETTE[name])))


def centre_and_border(picture: np.ndarray) -> tuple[str, str]:
    inside = np.zeros(picture.shape[:2], bool)
    inside[4:-4, 4:-4] = True
    return nearest_colour(picture[28:36, 28:36].reshape(-1, 3)), nearest_colour(picture[~inside])


def colours_drawn(pipe: StableDiffusionPipeline, prompts: list[str]) -> list[tuple[str, str]]:
    """Colours at the centre and at the border, one seed for each prompt."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pictures = pipe(prompts, num_inference_steps=STEPS, guidance_scale=CFG, generator=seeds, height=64, width=64).images
    return [centre_and_border(np.asarray(picture, float)) for picture in pictures]


def test_36_of_40_pictures_have_the_colours_of_their_prompt(pipe: StableDiffusionPipeline) -> None:
    wanted = scenes()
    seen = colours_drawn(pipe, [caption(*scene) for scene in wanted])
    wrong = [(scene, colours) for scene, colours in zip(wanted, seen, strict=True) if scene[1:] != colours]
    assert len(wanted) - len(wrong) >= LEAST_RIGHT, wrong


def test_a_red_circle_on_blue_comes_out_in_9_of_10_seeds(pipe: StableDiffusionPipeline) -> None:
    seen = colours_drawn(pipe, ["a red circle on a blue background"] * 10)
    assert seen.count(("red", "blue")) >= 9


def test_folder_loads_as_float32_without_being_told(pipe: StableDiffusionPipeline) -> None:
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


def test_unknown_words_and_long_prompts_are_drawn_too(pipe: StableDiffusionPipeline) -> None:
    prompt = "eine grüne Katze 猫 🙂 " + "very " * 100
    assert pipe(prompt, num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def test_every_word_of_the_example_prompts_is_one_token(pipe: StableDiffusionPipeline) -> None:
    for prompt in PROMPTS:
        ids = pipe.tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 2
        assert ids[-1] == pipe.tokenizer.eos_token_id == pipe.text_encoder.config.eos_token_id


def test_model_takes_at_most_16_mb() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.rglob("*") if file.is_file()) <= LARGEST_BYTES


def test_every_weight_file_has_the_hash_of_its_provenance() -> None:
    known = json.loads((MODEL_DIR / "PROVENANCE.json").read_text(encoding="utf-8"))["sha256"]
    root = MODEL_DIR.parent
    found = {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in root.rglob("*.safetensors")
    }
    assert found == known


def test_weights_are_stored_as_fp16() -> None:
    for file in MODEL_DIR.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_unet_has_the_layers_and_kernels_of_sd1() -> None:
    sd1 = json.loads(SD1_NAMES.read_text(encoding="utf-8"))["c3lier_shapes"]
    expected = {name: shape[2:] for name, shape in sd1.items() if name.startswith("lora_unet_")}
    with safe_open(MODEL_DIR / "unet" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        shapes = {name.removesuffix(".weight"): weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    layers = {f"lora_unet_{name.replace('.', '_')}": shape[2:] for name, shape in shapes.items() if len(shape) > 1}
    assert layers == expected | {f"lora_unet_{name}": layers[f"lora_unet_{name}"] for name in UNTRAINED}
