"""A LoRA file in the other layout: kohya's, or PEFT's as diffusers loads and saves it.

Tensors are not touched: up is lora_B, down is lora_A. What differs are names and where alpha is: a tensor of each
layer, or PEFT's settings in the header. Both ways back give the same file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from lib_lora.core.files import read_lora_file
from lib_lora.core.header import DTYPES
from lib_lora.core.lora_names import kohya_name, peft_name
from lib_lora.core.naming import split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.opening import shown
from lib_lora.core.peft_settings import PEFT_SETTINGS, PeftAlphas, Rank, peft_settings
from lib_lora.core.saving import check_output, file_size, no_progress, save_tensors
from lib_lora.errors import JobError
from lib_lora.tools.metadata import lora_metadata, sshs_hashes
from lib_lora.tools.outcome import Outcome, shapes_only
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.files import LoraFile
    from lib_lora.core.models import BaseModel
    from lib_lora.core.network import Network
    from lib_lora.core.saving import Progress

    Layout = Literal["kohya", "peft"]
    Layers = Mapping[str, Mapping[str, Tensor]]

ALPHA_KINDS = "prefuse_alpha_kinds"
"""The header's key in a file of PEFT's layout: how the alphas were stored where that is not the usual way."""

_PLAIN = ("lora_up", "lora_down", "alpha")
_FACTORS = {
    "kohya": {"lora_up": ".lora_up.weight", "lora_down": ".lora_down.weight"},
    "peft": {"lora_up": ".lora_B.weight", "lora_down": ".lora_A.weight"},
}
_NAMES = {"kohya": kohya_name, "peft": peft_name}


@dataclass(frozen=True, kw_only=True)
class LoraConversion(Outcome):
    """A LoRA file in another layout.

    Attributes:
        source: What it was made of.
        layout: ``kohya`` or ``peft``.
        base_model: The family that it is for.
        layers: How many.
    """

    source: str
    layout: str
    base_model: str
    layers: int

    def __str__(self) -> str:
        """For people."""
        made = f"{self.path}: {self.layers} layers for {self.base_model} in {self.layout}'s layout, {self.size_text()}"
        return "\n".join([made, *self.preview_lines()])


def convert_lora(
    source: Path,
    to: Layout,
    out: Path,
    *,
    family: BaseModel | None = None,
    overwrite: bool = False,
    preview: bool = False,
    progress: Progress = no_progress,
) -> LoraConversion:
    """Write a LoRA file in the other layout; its tensors stay bit for bit.

    Args:
        source: The file, in any layout.
        to: ``kohya``, as kohya's trainer and the WebUI write names, or ``peft``, as diffusers does.
        out: The file to be.
        family: What it is for; None to tell it from the file.
        overwrite: Whether an older file is replaced.
        preview: Whether all is checked and nothing is written.
        progress: Told the bytes hashed and written.

    Raises:
        FileError: If `source` can not be read.
        NamingError: If a layer's name is none of the family's, or the family is not SD1, SD2 or SDXL.
        AdapterError: If a layer's tensors do not fit together.
        NonFiniteError: If it holds NaN or infinity.
        JobError: If it has that layout already, or holds what the layout has no place for.
        OutputError: If the file can not be written.
    """
    check_output(out, overwrite=overwrite)
    work = Work(progress)
    file = read_lora_file(source)
    network = network_from_file(file)
    family = family or network.base_model
    layers = _plain_layers(file, network, to)
    tensors = _renamed(layers, file, family, to) | (_alpha_tensors(layers, file, family) if to == "kohya" else {})
    shapes = shapes_only(tensors)
    metadata = _metadata(layers, file, family, to, shapes, out.stem)
    size = file_size(out, shapes, metadata)
    disk = check_output(out, size, overwrite=overwrite)
    if not preview:
        work.expect(file.identity.size + 2 * size)
        work.add(file.identity.size)
        metadata |= sshs_hashes(tensors, metadata, work.stage(size))
        save_tensors(out, tensors, metadata, overwrite=overwrite, progress=work.stage(size))
    return LoraConversion(
        paths=(out,),
        size=size,
        disk=disk,
        metadata=metadata,
        written=not preview,
        source=str(source),
        layout=to,
        base_model=family.value,
        layers=len(layers),
    )


def _metadata(
    layers: Layers, file: LoraFile, family: BaseModel, to: Layout, shapes: Mapping[str, Tensor], title: str
) -> dict[str, str]:
    """That of the new file, but for its hashes."""
    metadata = {key: text for key, text in file.metadata.items() if key not in (PEFT_SETTINGS, ALPHA_KINDS)}
    if to == "peft":
        metadata |= _alpha_texts(layers, file, family)
    elif "ss_network_module" not in metadata:
        metadata = lora_metadata(shapes, metadata, family=family, title=title)
    return metadata | sshs_hashes(shapes, metadata)


def _plain_layers(file: LoraFile, network: Network, to: Layout) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and role, of a file that holds LoRA's two factors and alphas alone."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        parts = split_key(key)
        if parts is None or parts.role not in _PLAIN:
            adapter = network.adapters.get(parts.layer) if parts else None
            what = adapter.algorithm if adapter else "no part of a LoRA"
            raise JobError(f"{shown(file.path)}: {key} is {what}; files in {to}'s layout hold plain LoRA layers alone")
        layers.setdefault(parts.layer, {})[parts.role] = tensor
    if network.notes or not layers:
        raise JobError(f"{shown(file.path)} can not be converted: {'; '.join(network.notes) or 'it has no layers'}")
    return layers


def _renamed(layers: Layers, file: LoraFile, family: BaseModel, to: Layout) -> dict[str, Tensor]:
    """Both factors of each layer under their names in the other layout."""
    tensors: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        name = _NAMES[to](layer, family)
        tensors |= {name + suffix: parts[role] for role, suffix in _FACTORS[to].items()}
    if tensors.keys() <= file.tensors.keys():
        raise JobError(f"{shown(file.path)} is in {to}'s layout already")
    if len(tensors) < len(layers) * len(_FACTORS[to]):
        raise JobError(f"{shown(file.path)} names a layer in two spellings; which one is meant can not be told")
    return tensors


def _alpha_texts(layers: Layers, file: LoraFile, family: BaseModel) -> dict[str, str]:
    """The alphas for the header of a file in PEFT's layout, and what is needed to make the same tensors of them."""
    alphas = PeftAlphas(file.metadata)
    ranks: dict[str, Rank] = {}
    kinds: dict[str, list[str | int] | None] = {}
    for layer, parts in layers.items():
        name = peft_name(layer, family)
        ranks[name] = Rank(parts["lora_down"].shape[0], _alpha(layer, parts, alphas))
        if (kind := _kind(parts.get("alpha"))) != _kind(torch.empty((), dtype=parts["lora_down"].dtype)):
            kinds[name] = kind
    return {PEFT_SETTINGS: peft_settings(ranks)} | ({ALPHA_KINDS: json.dumps(kinds)} if kinds else {})


def _alpha_tensors(layers: Layers, file: LoraFile, family: BaseModel) -> dict[str, Tensor]:
    """The alpha of each layer under kohya's name; where the file has none, of the kind that it once had."""
    alphas, kinds = PeftAlphas(file.metadata), _kinds(file.metadata)
    tensors: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        kind = kinds.get(peft_name(layer, family), ())
        if "alpha" in parts or kind is not None:
            made = _tensor(_alpha(layer, parts, alphas), kind or (parts["lora_down"].dtype,))
            tensors[f"{kohya_name(layer, family)}.alpha"] = parts.get("alpha", made)
    return tensors


def _alpha(layer: str, parts: Mapping[str, Tensor], alphas: PeftAlphas) -> float:
    """A layer's alpha, such that alpha / rank is its scale."""
    if "alpha" in parts:
        return float(parts["alpha"].item())
    said = alphas.of(layer)
    return float(parts["lora_down"].shape[0]) if said is None else said


def _kind(alpha: Tensor | None) -> list[str | int] | None:
    """Dtype and shape of a tensor of one number, as the header tells them; None of none."""
    if alpha is None:
        return None
    return [next(name for name, dtype in DTYPES.items() if dtype is alpha.dtype), *alpha.shape]


def _kinds(metadata: Mapping[str, str]) -> dict[str, tuple[Any, ...] | None]:
    """Layer's name in PEFT's layout → dtype and shape of its alpha, or None where it had none."""
    try:
        kinds: Any = json.loads(metadata.get(ALPHA_KINDS, "{}"))
        items = cast("dict[str, Any]", kinds).items()
        return {name: kind and (DTYPES[kind[0]], *kind[1:2]) for name, kind in items}
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return {}  # somebody edited it; the usual kind is as good


def _tensor(value: float, kind: tuple[Any, ...]) -> Tensor:
    """The number in a tensor of a dtype and shape; in a scalar of float32 where that dtype has not this number."""
    dtype, *shape = kind
    exact = torch.tensor(value, dtype=torch.float64)
    made = exact.to(dtype)
    if made.double() != exact:
        return exact.float()
    return made.reshape([1 for _ in shape])
