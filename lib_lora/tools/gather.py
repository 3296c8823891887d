"""Layers of several LoRA files that meet, whatever layout each is written in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.blocks import OUTSIDE
from lib_lora.core.files import read_lora_file
from lib_lora.core.lora_names import FAMILIES, dotted_name, kohya_name
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import BIAS
from lib_lora.core.network import network_from_file
from lib_lora.errors import AdapterError, BaseModelMismatchError, JobError, NamingError, ShapeMismatchError
from lib_lora.presets import PresetFiles
from lib_lora.prompt.block_weights import BlockWeights
from lib_lora.tools.factored import storage_dtype
from lib_lora.tools.inspect import block_of_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.files import LoraFile
    from lib_lora.core.network import Network
    from lib_lora.prompt.tags import LoraRequest
    from lib_lora.tools.given import GivenLora
    from lib_lora.tools.work import Work

_KERNEL_3 = (".conv1", ".conv2", ".conv_in", ".conv_out", "samplers.0.conv")
_KERNEL_1 = (".conv_shortcut",)
_KERNEL_1_SD1 = (*_KERNEL_1, ".proj_in", ".proj_out")
"""Ends of the UNet's convolutions in diffusers' spelling; the other layers are Linear."""
_UNET_BLOCKS = {BaseModel.SD1: 12, BaseModel.SD2: 12, BaseModel.SDXL: 9}


class LayerTerm(NamedTuple):
    """What one file does to a layer.

    Attributes:
        source: Name of the file.
        adapter: The update.
        factor: All strengths in one number, not 0.
    """

    source: str
    adapter: WeightAdapter
    factor: float


@dataclass(frozen=True)
class SharedLayer:
    """One layer and everything that acts on it.

    Attributes:
        key: What its keys begin with in kohya's layout.
        shape: (out, in) or (out, in, kh, kw).
        terms: At least one, in the order of the files.
    """

    key: str
    shape: tuple[int, ...]
    terms: tuple[LayerTerm, ...]

    @property
    def rank(self) -> int:
        """Sum of the ranks."""
        return sum(term.adapter.rank for term in self.terms)

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in·kh·kw)."""
        return self.shape[0], math.prod(self.shape[1:])


@dataclass(frozen=True)
class GatheredLoras:
    """Some LoRA files.

    Attributes:
        networks: Their contents, in order.
        family: What all of them are for.
        dtype: The narrowest type that holds the numbers of all.
        layers: In the order in which they first occur.
    """

    networks: Sequence[Network]
    family: BaseModel
    dtype: torch.dtype
    layers: Sequence[SharedLayer]

    def notes(self) -> tuple[str, ...]:
        """Sentences about what was tolerated and what is not in the layers."""
        notes = [f"{network.name}: {note}" for network in self.networks for note in network.notes]
        left_out = {network.name: len(network.embeddings) + len(network.unused) for network in self.networks}
        told = "that are no layer's, such as embeddings, were left out"
        return (*notes, *(f"{name}: {count} entries {told}" for name, count in left_out.items() if count))


def gather(loras: Sequence[GivenLora], work: Work) -> GatheredLoras:
    """Read LoRA files and lay their layers over each other.

    Args:
        loras: At least one.
        work: Has an occasion to end the job after each file.

    Raises:
        FileError, NamingError, AdapterError, NonFiniteError: If a file is no good LoRA.
        BaseModelMismatchError: If they are for different families.
        ShapeMismatchError: If a layer has different shapes.
        JobError: If there is no file, no layer is left, or block weights are asked for that need a model.
    """
    if not loras:
        raise JobError("no LoRA is given")
    files: list[LoraFile] = []
    networks: list[Network] = []
    for lora in loras:
        files.append(read_lora_file(lora.entry.path))
        networks.append(_network(files[-1], lora.request))
        work.tick()
    family = _common_family(networks)
    layers: dict[str, list[LayerTerm]] = {}
    shapes: dict[str, str] = {}
    for network, lora in zip(networks, loras, strict=True):
        for layer, term in _terms(network, lora.request, family).items():
            layers.setdefault(key := _key(layer, family), []).append(term)
            shapes.setdefault(key, layer)
    if not layers:
        raise JobError("nothing is left: every layer of every LoRA has strength 0 or rank 0")
    numbers = (tensor for file in files for tensor in file.tensors.values())
    matrices = [tensor for tensor in numbers if tensor.ndim > 1 and tensor.is_floating_point()]
    shared = [SharedLayer(key, _shape(shapes[key], family, terms), tuple(terms)) for key, terms in layers.items()]
    return GatheredLoras(networks, family, storage_dtype(*matrices), shared)


def _network(file: LoraFile, request: LoraRequest) -> Network:
    network = network_from_file(file)
    return network if request.dyn is None else network.with_rank(request.dyn)


def _common_family(networks: Iterable[Network]) -> BaseModel:
    known = {network.base_model: network.name for network in networks if network.base_model is not BaseModel.UNKNOWN}
    if len(known) > 1:
        (one, first), (other, second), *_ = known.items()
        raise BaseModelMismatchError(f"{first} is for {one.value} and {second} for {other.value}; nothing fits both")
    return next(iter(known), BaseModel.UNKNOWN)


def _terms(network: Network, request: LoraRequest, family: BaseModel) -> dict[str, LayerTerm]:
    """Layer name → what the network does there, without layers of strength or rank 0."""
    weights = _block_weights(request, family)
    names: dict[str, str] = {}
    terms: dict[str, LayerTerm] = {}
    for layer, adapter in network.adapters.items():
        strength = request.te if layer.startswith("te") else request.unet
        block = block_of_layer(layer)
        factor = strength * weights.of("" if block == OUTSIDE else block, "")
        if factor == 0 or adapter.rank == 0:
            continue
        _check(network.name, layer, adapter)
        if names.setdefault(_key(layer, family), layer) != layer:
            raise NamingError(f"{network.name}: {names[_key(layer, family)]} and {layer} are the same layer")
        terms[layer] = LayerTerm(network.name, adapter, factor)
    return terms


def _block_weights(request: LoraRequest, family: BaseModel) -> BlockWeights:
    if request.blocks is None:
        return BlockWeights()
    if family not in _UNET_BLOCKS or request.blocks.elements:
        raise JobError(f"{request.name}: lbwe, and block weights of {family.value}, need a model; use merge")
    numbers = range(_UNET_BLOCKS[family])
    blocks = [f"{side}{number:02d}" for side in ("IN", "OUT") for number in numbers]
    return request.blocks.resolve(PresetFiles().read(), ["BASE", "M00", *blocks])


def _check(name: str, layer: str, adapter: WeightAdapter) -> None:
    """Refuse what is no matrix of its own."""
    if adapter.needs_base:
        advice = "merge it into a checkpoint and extract that"
        raise AdapterError(
            f"{name}: layer {layer} is {adapter.algorithm}, which depends on the model's weights; {advice}"
        )
    if layer.endswith(BIAS) or len(adapter.shape) < 2:
        raise AdapterError(f"{name}: layer {layer} is a bias or a norm, which have no factors; use merge")


def _key(layer: str, family: BaseModel) -> str:
    """What kohya's keys of a layer begin with; of other families, as the file spells it."""
    if family in FAMILIES:
        return kohya_name(layer, family)
    component, _, path = layer.partition(":")
    if component == "te1":
        return f"lora_te_text_model_{path}"
    return f"lora_{component}_{path}"


def _shape(layer: str, family: BaseModel, terms: Sequence[LayerTerm]) -> tuple[int, ...]:
    """The layer's shape, from those that say most of it."""
    first = max((term.adapter.shape for term in terms), key=len)
    for term in terms:
        shape = term.adapter.shape
        if shape[0] != first[0] or math.prod(shape) != math.prod(first):
            others = ", ".join(f"{term.source} {term.adapter.shape_text()}" for term in terms)
            raise ShapeMismatchError(f"layer {layer} has different shapes: {others}")
    return _with_kernel(first, dotted_name(layer, family), family) if family in FAMILIES else first


def _with_kernel(shape: Sequence[int], path: str, family: BaseModel) -> tuple[int, ...]:
    """The layer's own shape: files may have a convolution as a matrix, and a Linear as a convolution."""
    out, columns = shape[0], math.prod(shape[1:])
    if math.prod(shape[2:]) > 1:
        return tuple(shape)
    if path.endswith(_KERNEL_3) and columns % 9 == 0:
        return (out, columns // 9, 3, 3)
    is_conv = path.endswith(_KERNEL_1_SD1 if family is BaseModel.SD1 else _KERNEL_1)
    return (out, columns, 1, 1) if is_conv else (out, columns)
