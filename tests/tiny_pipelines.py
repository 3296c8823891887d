"""SD1, SD2 and SDXL with their real structure at a few channels: modules, configuration folder, tokenizer, files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ldm_files import clip_tensors, ldm_tensors, open_clip_tensors, tower_state, write_checkpoint

from lib_lora.core.saving import save_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

CLIP_PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
OPEN_CLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
TE_WIDTH = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class TinyModel:
    """Modules of one family and where their configuration lies.

    Attributes:
        parts: Pipeline component → module.
        config: Folder in diffusers' layout, without weights.
        tensors: The same weights under their original names.
    """

    family: str
    parts: dict[str, nn.Module]
    config: Path
    tensors: dict[str, Tensor]

    def write(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        return write_checkpoint(path, self.tensors, metadata)


def make_tiny(family: str, folder: Path, seed: int = 0) -> TinyModel:
    torch.manual_seed(seed)
    parts = {"unet": _unet(family), "vae": _vae()}
    parts |= {name: _tower(family, name) for name in CLIP_PREFIXES[family]}
    for name, part in parts.items():
        config = part.config if name in ("unet", "vae") else part.config.to_dict()
        architectures = {} if name in ("unet", "vae") else {"architectures": [type(part).__name__]}
        _write_json(folder / name / "config.json", {**config, **architectures})
    shipped = Path(__file__).parents[1] / "lib_lora/configs" / family
    scheduler = json.loads((shipped / "scheduler/scheduler_config.json").read_text())
    _write_json(folder / "scheduler/scheduler_config.json", scheduler)
    return TinyModel(family, parts, folder, original_tensors(family, parts))


def original_tensors(family: str, parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of a model as they are now, under their original names."""
    towers = {}
    for name, prefix in CLIP_PREFIXES[family].items():
        tower = parts[name]
        towers[prefix] = open_clip_tensors(tower_state(tower)) if (family, name) in OPEN_CLIP else clip_tensors(tower)
    return ldm_tensors(parts["unet"], parts["vae"], towers)


def _unet(family: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 2}
    if family == "sdxl":
        settings |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (4, 8, 8),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2 * TE_WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + TE_WIDTH,
        }
    else:
        settings |= {"block_out_channels": (4, 8, 8, 8), "cross_attention_dim": TE_WIDTH}
    return UNet2DConditionModel(**settings, use_linear_projection=family != "sd1").eval()


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=2,
        norm_num_groups=2,
        sample_size=64,
    ).eval()


def _tower(family: str, name: str) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=TE_WIDTH,
        intermediate_size=2 * TE_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TE_WIDTH,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    kind = CLIPTextModelWithProjection if (family, name) == ("sdxl", "text_encoder_2") else CLIPTextModel
    return kind(config).eval()


def vocabulary() -> dict[str, int]:
    """Letters, alone and at the end of a word, and ``!``, which pads."""
    tokens = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def write_tokenizer(folder: Path) -> Path:
    _write_json(folder / "vocab.json", vocabulary())
    save_bytes(folder / "merges.txt", b"#version: 0.2\n")
    return folder


def write_folder(model: TinyModel, folder: Path) -> Path:
    """The same model as diffusers saves it; SD1 and SD2."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder.parent / "tokenizer"), model_max_length=77)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        **model.parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def _write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_bytes(path, json.dumps(data, default=list).encode(), overwrite=True)
