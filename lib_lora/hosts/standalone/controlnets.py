"""ControlNets of SD1, SD2 and SDXL, from a folder of diffusers or from a file, beside the model that they steer."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora.core.files import map_checkpoint
from lib_lora.core.keymap import KeyMap
from lib_lora.core.model_folder import weight_files
from lib_lora.core.pickles import convert_pickle
from lib_lora.errors import ModelError, PickleRefusedError
from lib_lora.hosts.standalone.checkpoints import check_complete, owned
from lib_lora.hosts.standalone.libraries import diffusers_class, dtype_option
from lib_lora.hosts.standalone.loading import CONVERT_SECONDS, variant_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from lib_lora.hosts.standalone.loading import LoadedModel

KIND = "ControlNetModel"
CHANNELS = 3
"""Of the pictures that it is given."""
MUST_AGREE = ("in_channels", "cross_attention_dim", "addition_embed_type", "block_out_channels", "layers_per_block")
"""Settings in which a ControlNet and its UNet are the same."""
CONTEXT_LAYER = "attn2.to_k.weight"
HINTS = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
"""One of them is in every ControlNet, as diffusers or its authors name it."""
# What people give by mistake: a part of a name → what the file is.
_STRANGERS = (
    ("lora_controlnet", "is a Control-LoRA, which is a difference to a UNet"),
    ("difference", "holds the difference to a UNet"),
    ("lllite_", "is a ControlNet-LLLite"),
    ("lora_", "is a LoRA, which belongs into a LoRA folder and into the prompt"),
    ("adapter.", "is a T2I-Adapter"),
)
_HASHED = (0x100000, 0x10000)
"""Where the WebUI's short hash of a model begins, and of how many bytes it is."""


@dataclass(frozen=True)
class LoadedControlNet:
    """A ControlNet that is ready.

    Attributes:
        model: Diffusers' ControlNetModel.
        name: For people and for the infotext.
        file: Its weights, or the first file of them.
    """

    model: nn.Module
    name: str
    file: Path

    @property
    def short_hash(self) -> str:
        """As the WebUI's ControlNet extension names a model: 8 hex digits of a SHA-256."""
        start, size = _HASHED
        with self.file.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(size)).hexdigest()[:8]


def add_controlnets(loaded: LoadedModel, paths: Sequence[Path]) -> LoadedModel:
    """The same model in a pipeline that ControlNets steer.

    Args:
        loaded: A model; its parts are shared.
        paths: A ControlNet each: diffusers' folder, a .safetensors file, or a .pth, .ckpt or .pt file.

    Raises:
        ModelError: If there is no such ControlNet, or it was made for another family of models.
        FileError: If a file can not be read.
    """
    if not paths:
        return loaded
    pipe = loaded.pipe
    controlnets = tuple(_load(path, pipe) for path in paths)
    models = [controlnet.model.to(pipe.device) for controlnet in controlnets]
    kind, options = "StableDiffusionControlNetPipeline", {"requires_safety_checker": False}
    if hasattr(pipe, "text_encoder_2"):
        kind = "StableDiffusionXLControlNetPipeline"
        zeros = pipe.config.force_zeros_for_empty_prompt
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    steered = diffusers_class(kind)(**pipe.components, controlnet=models if models[1:] else models[0], **options)
    return replace(loaded, pipe=steered, controlnets=controlnets)


def _load(path: Path, pipe: Any) -> LoadedControlNet:
    if path.is_dir():
        model, file = _from_folder(path, pipe.dtype)
    elif path.is_file():
        model, file = _from_file(path, pipe.unet, pipe.dtype), path
    else:
        raise ModelError(f"There is no ControlNet at {path}; give a folder or a file.")
    config = model.config
    for key in MUST_AGREE:
        own, wanted = _plain(config[key]), _plain(pipe.unet.config[key])
        if own != wanted:
            raise _misfit(path, model, pipe.unet, f"its {key} is {own}, the UNet's {wanted}")
    if config.conditioning_channels != CHANNELS:
        raise ModelError(f"{path.name} is given pictures of {config.conditioning_channels} channels, not of RGB.")
    return LoadedControlNet(model, path.resolve().name if path.is_dir() else path.stem, file)


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Path]:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError:
        raise ModelError(f"{folder} is no ControlNet: it has no config.json.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} can not be read: {error}.") from error
    if kind != KIND:
        raise ModelError(f"{folder} holds a {kind}; a {KIND} of SD1, SD2 or SDXL can be loaded.")
    variant = variant_of(folder)
    options = {"local_files_only": True, "use_safetensors": True, "variant": variant, **dtype_option(dtype)}
    file = weight_files(folder, variant)[0]
    try:
        return diffusers_class(KIND).from_pretrained(folder, **options), file
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"The ControlNet in {folder} can not be loaded: {_first_line(error)}") from error


def _from_file(path: Path, unet: Any, dtype: torch.dtype) -> Any:
    try:
        return _from_safetensors(path, path, unet, dtype)
    except PickleRefusedError:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            converted = Path(scratch) / f"{path.stem}.safetensors"
            convert_pickle(path, converted, timeout_s=CONVERT_SECONDS)
            return _from_safetensors(converted, path, unet, dtype)


def _from_safetensors(file: Path, path: Path, unet: Any, dtype: torch.dtype) -> Any:
    """The file says nothing of its structure, so it must be the half of this UNet.

    Args:
        file: What is read.
        path: What the user gave.
        unet: Of the model that it is for.
        dtype: Of the weights in memory.
    """
    tensors = map_checkpoint(file)
    shapes = {name: info.shape for name, info in tensors.header.tensors.items()}
    _check_is_one(shapes, path)
    _check_context(shapes, unet, path)
    with tempfile.TemporaryDirectory() as scratch:
        _empty(unet).save_config(Path(scratch) / "controlnet")
        options = {"config": scratch, "subfolder": "controlnet", "local_files_only": True, **dtype_option(dtype)}
        try:
            model = diffusers_class(KIND).from_single_file(owned(dict(tensors.items()), dtype), **options)
        except NotImplementedError as error:  # torch moves a weight that the file did not give
            raise ModelError(f"{path.name} lacks weights of a ControlNet for this model's UNet.") from error
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:  # whatever the conversion trips over
            raise ModelError(f"{path.name} does not fit this model's UNet: {_first_line(error)}") from error
    check_complete(model, "ControlNet", path)
    return model


def _empty(unet: Any) -> Any:
    """A ControlNet for a UNet, without weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return diffusers_class(KIND).from_unet(unet, load_weights_from_unet=False)


def _check_is_one(shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    text = "\n".join(shapes)
    found = next((what for part, what in _STRANGERS if part in text), "is none: it has no tensor for a control image")
    if not any(name.endswith(HINTS) for name in shapes) or not found.startswith("is none"):
        raise ModelError(f"{path.name} {found}; give a complete ControlNet of SD1, SD2 or SDXL.")


def _check_context(shapes: Mapping[str, Sequence[int]], unet: Any, path: Path) -> None:
    width, wanted = _context(shapes), unet.config.cross_attention_dim
    if width is not None and width != wanted:
        family = KeyMap.from_components({"controlnet": shapes})
        raise _misfit(path, family, unet, f"it reads texts of {width} numbers a word, the UNet of {wanted}")


def _context(shapes: Mapping[str, Sequence[int]]) -> int | None:
    return next((shape[1] for name, shape in shapes.items() if name.endswith(CONTEXT_LAYER)), None)


def _misfit(path: Path, controlnet: nn.Module | KeyMap, unet: nn.Module, detail: str) -> ModelError:
    keymap = controlnet if isinstance(controlnet, KeyMap) else KeyMap.from_modules({"controlnet": controlnet})
    family, wanted = (known.base_model.value for known in (keymap, KeyMap.from_modules({"unet": unet})))
    return ModelError(f"{path.name} was made for {family}, this model is {wanted}: {detail}.")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
