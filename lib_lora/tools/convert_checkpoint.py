"""A model in the other layout: one file under the original names of SD1, SD2 or SDXL, or a folder of diffusers.

Tensors go from memory maps to the new files one after the other, none is rounded. What the other layout has no place
for is left out and told.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lib_lora.core.model_folder import MappedFiles, weight_files
from lib_lora.core.model_layouts import all_original_tensors, diffusers_parts, family_of
from lib_lora.core.models import BaseModel
from lib_lora.core.opening import shown
from lib_lora.core.replacing import making_folder
from lib_lora.core.saving import check_output, file_size, no_progress, save_bytes, save_tensors
from lib_lora.core.single_file import CONFIGS, Family, recognise
from lib_lora.errors import ModelError
from lib_lora.tools.metadata import model_spec, usual_prediction
from lib_lora.tools.outcome import Outcome
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.saving import LazyTensor, Progress

_PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
_WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
_V_PREDICTION = "v_prediction"
_FORMAT = {"format": "pt"}
"""Without it, transformers does not load a file."""
_INDEX, _SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
_ALL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_NEEDED = {"unet": ("block_out_channels",), "vae": ("block_out_channels",)}
_TOWER = ("architectures", "num_hidden_layers")
"""What configurations must say: of the UNet and the VAE, and of a text encoder."""
_SHOWN_PARTS = 5
"""Of names that are left out: enough for ``cond_stage_model.model.transformer.resblocks.23``."""
_SIZES = (
    ("unet", "conv_in.weight", 0, "block_out_channels"),
    ("unet", "attn2.to_k.weight", 1, "cross_attention_dim"),
    ("vae", "encoder.conv_in.weight", 0, "block_out_channels"),
    ("text_encoder", "token_embedding.weight", 0, "vocab_size"),
    ("text_encoder", "token_embedding.weight", 1, "hidden_size"),
    ("text_encoder", "position_embedding.weight", 0, "max_position_embeddings"),
)
"""Part, end of a weight's name, its dimension, and where the configuration says how large that is."""


@dataclass(frozen=True, kw_only=True)
class ModelConversion(Outcome):
    """A model in another layout.

    Attributes:
        source: What it was made of.
        layout: ``single`` or ``diffusers``.
        base_model: Its family.
        tensors: How many were written.
        left_out: Beginning of tensors' names → how many of them the other layout has no place for.
    """

    source: str
    layout: str
    base_model: str
    tensors: int
    left_out: Mapping[str, int]

    def __str__(self) -> str:
        """For people."""
        left_out = ", ".join(f"{name} ({count})" for name, count in self.left_out.items())
        made = f"{self.path}: {self.tensors} tensors of {self.base_model}, {self.size_text()}"
        return "\n".join([*self.notes, *([f"left out: {left_out}"] if left_out else []), made, *self.preview_lines()])


def to_diffusers(
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    tokenizer: Callable[[str], Mapping[str, bytes]] | None = None,
    prediction: str | None = None,
    preview: bool = False,
    progress: Progress = no_progress,
) -> ModelConversion:
    """Write a single-file checkpoint as a folder of diffusers.

    Args:
        source: A .safetensors checkpoint of SD1, SD2 or SDXL.
        out: The folder to be, which must not exist.
        config: Folder of configurations in diffusers' layout, for a model of another size; None for the family's own.
        tokenizer: Token that fills a prompt → the tokenizer's files, name → content; a folder without is not complete.
        prediction: ``epsilon`` or ``v``; None to take what the file says, else what is usual in the family.
        preview: Whether all is checked and nothing is written.
        progress: Told the bytes written.

    Raises:
        FileError: If `source` can not be read.
        ModelError: If it is no complete checkpoint, or does not fit the configuration.
        OutputError: If there is something at `out`, or it can not be written.
    """
    files = MappedFiles([source])
    tensors = files.tensors
    family = recognise(_shapes(tensors), shown(source))
    folder = config or CONFIGS / family.config
    configs = {part: _read_json(folder / part / "config.json", _NEEDED.get(part, _TOWER)) for part in _parts(family)}
    parts, used = diffusers_parts(tensors, family, configs)
    _check_fit(parts, configs, source, folder)
    scheduler = _read_json(folder / _SCHEDULER, ("_class_name",))
    said = "v" if "v_pred" in tensors else usual_prediction(BaseModel(family.title), files.metadata)
    scheduler["prediction_type"] = _V_PREDICTION if (prediction or said) == "v" else "epsilon"
    texts = {f"{part}/config.json": _json(values) for part, values in configs.items()}
    tokenizers = {tower.tokenizer: tokenizer(tower.pad_token) for tower in family.towers} if tokenizer else {}
    texts |= {_SCHEDULER: _json(scheduler), _INDEX: _json(_model_index(family, configs, scheduler, tokenizers))}
    texts |= {f"{name}/{file}": content for name, made in tokenizers.items() for file, content in made.items()}
    sizes = {part: file_size(source, own, _FORMAT) for part, own in parts.items()}
    size = sum(sizes.values()) + sum(map(len, texts.values()))
    disk = check_output(out, size)
    if not preview:
        with making_folder(out) as made:
            _write_folder(made, parts, texts, sizes, files.watched(progress))
    notes = [f"the UNet is taken to predict {scheduler['prediction_type']}"]
    if not tokenizers or not all(tokenizers.values()):
        notes.append("the folder has no tokenizer; copy one from a model of the same family")
    return ModelConversion(
        paths=(out,),
        size=size,
        disk=disk,
        metadata=_FORMAT,
        notes=tuple(notes),
        written=not preview,
        source=str(source),
        layout="diffusers",
        base_model=family.title,
        tensors=sum(map(len, parts.values())),
        left_out=_groups(set(tensors) - used),
    )


def to_single(
    source: Path,
    out: Path,
    *,
    variant: str | None = None,
    overwrite: bool = False,
    preview: bool = False,
    progress: Progress = no_progress,
) -> ModelConversion:
    """Write a folder of diffusers as one checkpoint file.

    Args:
        source: Folder of an SD1, SD2 or SDXL model, its weights in .safetensors files, whole or in shards.
        out: The file to be.
        variant: Which weights, such as ``fp16``; None for those without a variant, or the only one there is.
        overwrite: Whether an older file is replaced.
        preview: Whether all is checked and nothing is written.
        progress: Told the bytes written.

    Raises:
        FileError: If a file can not be read.
        ModelError: If it is no such folder, lacks a part, or has several variants and none was asked for.
        OutputError: If the file can not be written.
    """
    index = _read_json(source / _INDEX)
    names = [part for part in _ALL_PARTS if index.get(part) not in (None, [None, None])]
    files = {part: MappedFiles(weight_files(source / part, variant)) for part in names}
    parts = {part: mapped.tensors for part, mapped in files.items()}
    family = family_of(parts, source)
    tensors, used = all_original_tensors(parts, family)
    recognise(_shapes(tensors), shown(source))
    said = _read_json(source / _SCHEDULER).get("prediction_type")
    prediction = "v" if said == _V_PREDICTION else "epsilon"
    metadata = model_spec(BaseModel(family.title), title=out.stem, is_lora=False, prediction=prediction)
    size = file_size(out, tensors, metadata)
    disk = check_output(out, size, overwrite=overwrite)
    work = Work(progress)
    work.expect(size)
    progress = work.stage(size)
    for mapped in files.values():
        progress = mapped.watched(progress)
    if not preview:
        save_tensors(out, tensors, metadata, overwrite=overwrite, progress=progress)
    return ModelConversion(
        paths=(out,),
        size=size,
        disk=disk,
        metadata=metadata,
        written=not preview,
        source=str(source),
        layout="single",
        base_model=family.title,
        tensors=len(tensors),
        left_out=_groups({f"{part}.{name}" for part in parts for name in parts[part]} - used),
    )


def _groups(names: Iterable[str]) -> dict[str, int]:
    """How many names begin alike."""
    return dict(sorted(Counter(".".join(name.split(".")[:_SHOWN_PARTS]) for name in names).items()))


def _parts(family: Family) -> tuple[str, ...]:
    return ("unet", "vae", *(tower.component for tower in family.towers))


def _shapes(tensors: Mapping[str, Tensor | LazyTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_fit(
    parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]], source: Path, folder: Path
) -> None:
    """Refuse a configuration of another size than the weights."""
    for part, tensors in parts.items():
        for kind, ending, dimension, key in _SIZES:
            if not part.startswith(kind):
                continue
            value: Any = configs[part].get(key)
            expected = cast("list[Any]", value)[0] if isinstance(value, list) else value
            found = {tensor.shape[dimension] for name, tensor in tensors.items() if name.endswith(ending)}
            if expected is not None and found and found != {expected}:
                raise ModelError(
                    f"{shown(source)}: {ending} of the {part} has the size {min(found)}, the configuration in {folder} "
                    f"says {key} {expected}; give the model's own with --config"
                )


def _model_index(
    family: Family, configs: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, Any], tokenizers: Iterable[str]
) -> dict[str, Any]:
    """What diffusers makes the pipeline of."""
    index: dict[str, Any] = {"_class_name": _PIPELINES[family.config]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for tower in family.towers:
        index[tower.component] = [
            "transformers",
            "CLIPTextModelWithProjection" if "2" in tower.component else "CLIPTextModel",
        ]
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    absent = ("feature_extractor", "image_encoder")
    if family.config != "sdxl":
        absent = (*absent, "safety_checker")
        index["requires_safety_checker"] = False
    return index | {name: [None, None] for name in absent}


def _write_folder(
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, bytes],
    sizes: Mapping[str, int],
    progress: Progress,
) -> None:
    work = Work(progress)
    work.expect(sum(sizes.values()))
    for part, tensors in parts.items():
        (folder / part).mkdir()
        name = _WEIGHTS.get(part, "model.safetensors")
        save_tensors(folder / part / name, tensors, _FORMAT, progress=work.stage(sizes[part]))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_bytes(folder / name, content)


def _read_json(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can not be read as a configuration: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is no configuration: it holds no JSON object")
    if missing := [key for key in needed if key not in values]:
        raise ModelError(f"{path} is no complete configuration: it has no {missing[0]}")
    return cast("dict[str, Any]", values)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
