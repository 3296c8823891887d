"""Which family a single-file checkpoint belongs to, told by the names of its tensors, and what that means for loading.

Names: https://github.com/CompVis/stable-diffusion and https://github.com/Stability-AI/generative-models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lib_lora.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class TextTower:
    """One text encoder of a family.

    Attributes:
        component: Its name in a pipeline, such as ``text_encoder``.
        prefix: What its tensors' names begin with in a checkpoint.
        layout: ``clip`` (names of transformers) or ``open_clip`` (names and fused qkv of open_clip).
        pad_token: Fills a prompt up to 77 tokens.
    """

    component: str
    prefix: str
    layout: Literal["clip", "open_clip"]
    pad_token: str

    @property
    def tokenizer(self) -> str:
        """Name of its tokenizer in a pipeline: ``tokenizer`` or ``tokenizer_2``."""
        return self.component.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one model family are built.

    Attributes:
        title: For people.
        config: Name of its folder of configurations, in diffusers' layout.
        towers: Its text encoders; the last one's prefix tells the families apart.
        may_predict_v: Whether some of its checkpoints predict velocity, which no name or shape tells.
    """

    title: str
    config: str
    towers: tuple[TextTower, ...]
    may_predict_v: bool = False


_END, _ZERO = "<|endoftext|>", "!"

FAMILIES = (
    Family(
        "SDXL",
        "sdxl",
        (
            TextTower("text_encoder", "conditioner.embedders.0.transformer.", "clip", _END),
            TextTower("text_encoder_2", "conditioner.embedders.1.model.", "open_clip", _ZERO),
        ),
    ),
    Family(
        "SD 2.x",
        "sd2",
        (TextTower("text_encoder", "cond_stage_model.model.", "open_clip", _ZERO),),
        may_predict_v=True,
    ),
    Family("SD 1.x", "sd1", (TextTower("text_encoder", "cond_stage_model.transformer.", "clip", _END),)),
)

# What people give by mistake: a part of a name → what the file is and what to do.
_STRANGERS = (
    ("lora_down", "is a LoRA, not a model; put it into a LoRA folder and name it in the prompt"),
    ("lora_A.", "is a LoRA, not a model; put it into a LoRA folder and name it in the prompt"),
    ("control_model.", "is a ControlNet, not a model that makes pictures by itself"),
    ("conditioner.embedders.0.model.", "is an SDXL refiner; give the base model"),
    ("joint_blocks.", "is an SD3 model; SD1, SD2 and SDXL can be loaded from one file"),
    ("double_blocks.", "is a Flux model; SD1, SD2 and SDXL can be loaded from one file"),
    ("down_blocks.", "is one part of a diffusers model; give the folder that holds model_index.json"),
)


def recognise(shapes: Mapping[str, tuple[int, ...]], file: str) -> Family:
    """The family of a checkpoint that is complete: UNet for 4 latent channels, VAE and text encoders.

    Args:
        shapes: Shape of each tensor by name.
        file: The file's name, for the message.

    Raises:
        ModelError: If it is something else, or lacks a part.
    """
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    family = next((family for family in FAMILIES if _has(shapes, family.towers[-1].prefix)), None)
    if first is None or family is None:
        raise ModelError(f"{file} {_what_is_it(shapes, has_unet=first is not None)}.")
    if first[1] != LATENT_CHANNELS:
        kind = "an inpainting model" if first[1] == 2 * LATENT_CHANNELS + 1 else "made for another input than noise"
        raise ModelError(f"{file} is {kind} (its UNet takes {first[1]} channels, not {LATENT_CHANNELS}).")
    for part, prefix in (("VAE", VAE_PREFIX), *((tower.component, tower.prefix) for tower in family.towers)):
        if not _has(shapes, prefix):
            raise ModelError(
                f"{file} holds no {part} (no tensor {prefix}…); give a complete {family.title} checkpoint."
            )
    return family


def _has(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _what_is_it(shapes: Mapping[str, tuple[int, ...]], has_unet: bool) -> str:
    for part, answer in _STRANGERS:
        if any(part in name for name in shapes):
            return answer
    if has_unet:
        return "holds no text encoder of SD1, SD2 or SDXL; give a complete checkpoint"
    return "is no SD1, SD2 or SDXL checkpoint: it has no tensor model.diffusion_model.input_blocks.0.0.weight"
