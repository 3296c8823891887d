"""From what a user names to a pipeline that makes pictures: the demo model, a diffusers folder, a checkpoint file."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lib_lora.compile.together import CompiledModels
from lib_lora.core.model_folder import weight_files
from lib_lora.core.pickles import convert_pickle
from lib_lora.errors import ModelError, PickleRefusedError
from lib_lora.hosts.standalone.checkpoints import load_single_file
from lib_lora.hosts.standalone.libraries import diffusers_class, dtype_option, hide_loading_bars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lib_lora.hosts.standalone.checkpoints import Prediction
    from lib_lora.hosts.standalone.controlnets import LoadedControlNet

DEMO = "demo"
# Of so small a model more threads do not draw faster, and beside other programs they wait for each other.
DEMO_THREADS = 1
CONVERT_SECONDS = 1800.0
PATCHED_PARTS = ("unet", "text_encoder", "text_encoder_2")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda", "mps")
# Pipelines of a folder → the one that makes pictures from text.
PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
}
# Never loaded: a folder's own code, and what is not needed for pictures.
NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
V_SIZE = 768


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline that is ready, and where it came from.

    Attributes:
        pipe: The diffusers pipeline, on its device.
        name: Its name for people and for the infotext.
        files: The .safetensors files of its UNet and text encoders, which can serve as the store of base weights;
            empty if the weights were converted.
        hashed: The file that stands for the model in the infotext.
        scheduler: Configuration of the scheduler that came with the model.
        notes: What loading found out.
        handle: What its UNet and its ControlNets run on.
        controlnets: What steers it.
    """

    pipe: Any
    name: str
    files: tuple[Path, ...]
    hashed: Path
    scheduler: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    handle: CompiledModels = field(default_factory=CompiledModels)
    controlnets: tuple[LoadedControlNet, ...] = ()

    @cached_property
    def short_hash(self) -> str:
        """First 10 hex digits of the SHA-256 of the whole file, as the WebUI names a model."""
        digest = hashlib.sha256()
        with self.hashed.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()[:10]

    @property
    def size(self) -> int:
        """Width and height in pixels that the model was made for."""
        config = self.pipe.unet.config
        velocity_sd2 = config.cross_attention_dim == 1024 and self.scheduler["prediction_type"] != "epsilon"
        return V_SIZE if velocity_sd2 else config.sample_size * self.pipe.vae_scale_factor


def load_pipeline(
    model: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    tokenizer: Path | None = None,
    config: Path | None = None,
    prediction: Literal["auto", "epsilon", "v"] = "auto",
) -> LoadedModel:
    """Load a model without a network.

    Args:
        model: ``demo``, a folder with model_index.json, or a .safetensors, .ckpt or .pt file.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``. `auto` takes what is there.
        dtype: ``auto`` (fp16 on a GPU, fp32 on a CPU), ``fp32``, ``fp16``, ``bf16`` or a torch dtype.
        tokenizer: Folder or file with CLIP's vocabulary, for a checkpoint file.
        config: Folder of configurations, for a checkpoint file of another size than its family's.
        prediction: What the UNet of a checkpoint file predicts.

    Raises:
        ModelError: If there is no such model, or it is not one that pictures can be made with.
        FileError: If a file can not be read.
    """
    hide_loading_bars()
    place = _device(device)
    number = _dtype(dtype, place)
    path = _demo_folder() if str(model) == DEMO else Path(model)
    asked: Prediction | None = {"epsilon": "epsilon", "v": "v_prediction"}.get(prediction)  # type: ignore[assignment]
    if path.is_dir():
        loaded = _load_folder(path, number, DEMO if str(model) == DEMO else path.resolve().name)
    elif path.is_file():
        loaded = _load_file(path, number, tokenizer=tokenizer, config=config, prediction=asked)
    else:
        raise ModelError(f"There is no model at {path}; give a folder, a file, or the word {DEMO}.")
    loaded.pipe.to(place)
    return loaded


def _demo_folder() -> Path:
    from lib_lora.hosts.standalone.demo import MODEL_DIR

    return MODEL_DIR


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
        reason = str(error).splitlines()[0]
        raise ModelError(f"The device {name} can not be used: {reason}. `doctor` lists what works here.") from error
    return torch.device(name)


def _dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise ModelError(f"{name} is no dtype; choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _load_file(path: Path, dtype: torch.dtype, **options: Any) -> LoadedModel:
    try:
        pipe, notes = load_single_file(path, dtype, **options)
    except PickleRefusedError:
        return _load_pickle(path, dtype, **options)
    return LoadedModel(pipe, path.stem, (path,), path, dict(pipe.scheduler.config), notes)


def _load_pickle(path: Path, dtype: torch.dtype, **options: Any) -> LoadedModel:
    """A .ckpt, through a .safetensors file that is deleted afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        converted = Path(scratch) / f"{path.stem}.safetensors"
        convert_pickle(path, converted, timeout_s=CONVERT_SECONDS)
        pipe, notes = load_single_file(converted, dtype, **options)
    advice = f"{path.name} is a pickle; `convert-pickle` once makes it load faster"
    return LoadedModel(pipe, path.stem, (), path, dict(pipe.scheduler.config), (*notes, advice))


def _load_folder(folder: Path, dtype: torch.dtype, name: str) -> LoadedModel:
    kind, components = _read_index(folder)
    variant = variant_of(folder / "unet")
    absent: dict[str, Any] = {part: None for part in NOT_LOADED if part in components}
    if kind == "StableDiffusionPipeline":
        absent["requires_safety_checker"] = False
    options = {"local_files_only": True, "use_safetensors": True, "variant": variant, **absent, **dtype_option(dtype)}
    try:
        pipe = diffusers_class(kind).from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"The model in {folder} can not be loaded: {str(error).strip().splitlines()[0]}") from error
    parts = [folder / part for part in PATCHED_PARTS if (folder / part).is_dir()]
    files = [file for part in parts for file in weight_files(part, variant)]
    return LoadedModel(pipe, name, tuple(files), files[0], dict(pipe.scheduler.config))


def _read_index(folder: Path) -> tuple[str, set[str]]:
    """Pipeline class and component names of a folder; nothing but diffusers' and transformers' own classes.

    Raises:
        ModelError: If there is no index, or it asks for another pipeline or for code of its own.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = PIPELINES.get(index["_class_name"])
        parts = {part: value for part, value in index.items() if isinstance(value, list)}
    except FileNotFoundError:
        raise ModelError(f"{folder} is no diffusers model: it has no model_index.json.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / 'model_index.json'} can not be read: {error}.") from error
    foreign = [part for part, (library, *_) in parts.items() if library not in (None, "diffusers", "transformers")]
    if kind is None or not set(foreign) <= set(NOT_LOADED):
        what = f"{foreign[0]} with code of its own" if kind else f"a {index['_class_name']}"
        raise ModelError(f"The model in {folder} is {what}; SD1, SD2 and SDXL pipelines can be loaded.")
    return kind, set(parts)


def variant_of(folder: Path) -> str | None:
    """``fp16`` if that is the only kind of weights in the folder."""
    files = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None
