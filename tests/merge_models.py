"""Checkpoints as files and as live modules, and LoRAs of many families for them, to compare merges with prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from lib_lora.core.checkpoint import layer_tensors
from lib_lora.core.keymap import KeyMap
from tests.family_files import family_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from lib_lora.core.layers import LayerRef
    from lib_lora.session import LoraSession

GOLDEN = Path(__file__).parent / "golden" / "sd1"
BASE, LORA = GOLDEN / "base.safetensors", GOLDEN / "lora_A.safetensors"
FAMILIES = ("LoRA", "LoHa", "Full", "DoRA of outputs", "LoRA Tucker")
OTHERWISE = ("embedding", "text_projection")
"""In open_clip's files these are no layers, and no trainer changes them."""


def write_mixed_lora(path: Path, components: Mapping[str, nn.Module], every: int = 1, dtype=torch.float32) -> Path:
    """A LoRA in kohya's layout that changes weights, norms and biases, each weight by another family than the last.

    Args:
        path: Where.
        components: The model.
        every: Only each so many-th weight is changed; in a fused weight, so, not all rows.
        dtype: Of the file.
    """
    tensors: dict[str, Tensor] = {}
    chosen = [layer for layer in KeyMap.from_modules(dict(components)).parameters if not _is_otherwise(layer)]
    for number, layer in enumerate(chosen[::every]):
        component, _, layer_path = layer.key.partition(".")
        name = f"lora_{component}_{layer_path.removesuffix('.bias').replace('.', '_')}"
        if layer.key.endswith(".bias"):
            made = {"diff_b": torch.randn(layer.shape)}
        elif len(layer.shape) == 1:
            made = {"w_norm": torch.randn(layer.shape)}
        else:
            made = family_tensors(FAMILIES[number % len(FAMILIES)], layer.shape, seed=number)
        tensors |= {f"{name}.{suffix}": (tensor * 0.3).to(dtype).contiguous() for suffix, tensor in made.items()}
    save_file(tensors, path)
    return path


def write_as(source: Path, target: Path, dtype: torch.dtype, metadata: Mapping[str, str] | None = None) -> Path:
    """The same checkpoint in another type; what holds no weights of layers stays as it is."""
    kept = ("alphas_cumprod",)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name not in kept else tensor
        for name, tensor in load_file(source).items()
    }
    save_file(tensors, target, dict(metadata or {}))
    return target


def different_layers(session: LoraSession, files: Iterable[Path]) -> list[str]:
    """Layers whose live weight is not what the files hold, bit for bit."""
    layers = [layer for layer in session.keymap.parameters if not _is_otherwise(layer)]
    stored = layer_tensors(layers, list(files))
    return [
        layer.key
        for layer in layers
        if not torch.equal(bits(stored[layer.key].reshape(layer.shape)), bits(layer.live()))
    ]


def _is_otherwise(layer: LayerRef) -> bool:
    return layer.component != "unet" and any(part in layer.key for part in OTHERWISE)


def bits(tensor: Tensor) -> Tensor:
    return (
        tensor.detach().contiguous().view(torch.uint8) if tensor.ndim else tensor.detach().reshape(1).view(torch.uint8)
    )


def diffusers_folder(folder: Path) -> Path:
    """`BASE` as three files in diffusers' layout, with LDM's names, which are known there too."""
    tensors = load_file(BASE)
    prefixes = {"unet": "model.", "text_encoder": "cond_stage_model.", "vae": "first_stage_model."}
    for part, prefix in prefixes.items():
        (folder / "model" / part).mkdir(parents=True)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        save_file(own, folder / "model" / part / "model.safetensors")
    (folder / "model" / "model_index.json").write_bytes(b"{}")
    return folder / "model"


def output_beside_another(folder: Path) -> Path:
    """A file to be, in a folder with another file."""
    (folder / "out").mkdir()
    (folder / "out" / "precious.txt").write_bytes(b"precious")
    return folder / "out" / "merged.safetensors"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, and what is in it."""
    return {str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None for item in folder.rglob("*")}
