"""What a file is: kind, base model, algorithms, ranks, alphas, how much it changes each block, what is wrong in it."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.adapters import is_low_rank
from lib_lora.core.blocks import OUTSIDE, block_of
from lib_lora.core.checkpoint import layer_tensors, model_files, model_keymap
from lib_lora.core.files import data_sha256, read_lora_file
from lib_lora.core.keymap import KeyMap
from lib_lora.core.naming import BIAS, group_names, split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.norms import delta_norm, shares
from lib_lora.core.plan import match_network
from lib_lora.core.saving import no_progress
from lib_lora.errors import PrefuseError
from lib_lora.tools.training import Training, read_training
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.files import LoraFile
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.network import Network
    from lib_lora.core.saving import Progress

DIFFUSERS_LAYERS_PER_BLOCK = 2
_DOWN = re.compile(r"down_blocks_(\d+)_(?:resnets|attentions)_(\d+)_")
_UP = re.compile(r"up_blocks_(\d+)_(?:resnets|attentions|upsamplers)_(\d+)_")
_DOWNSAMPLER = re.compile(r"down_blocks_(\d+)_downsamplers_")
_LDM = re.compile(r"(input_blocks|output_blocks|middle_block)_(\d+)_")


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a LoRA file.

    Attributes:
        name: As in `naming`: ``component:path``.
        block: ``BASE``, ``IN00`` to ``IN11``, ``M00``, ``OUT00`` to ``OUT11``, or ``other``.
        algorithm: Such as ``LoRA``.
        rank: Of the update.
        alpha: scale x rank; None where the algorithm has none.
        norm: Frobenius norm of the weight change at strength 1; None where it depends on the model's weight.
    """

    name: str
    block: str
    algorithm: str
    rank: int
    alpha: float | None
    norm: float | None


def _no_weights(_: Iterable[LayerRef]) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class GivenModel:
    """A model that a LoRA is laid over.

    Attributes:
        keymap: Its layers.
        weights: Gives the untouched weights of layers by `LayerRef.key`, of those that are at hand.
    """

    keymap: KeyMap
    weights: Callable[[Iterable[LayerRef]], Mapping[str, Tensor]] = _no_weights

    @classmethod
    def of(cls, model: Path | GivenModel) -> GivenModel:
        """A model on disk.

        Args:
            model: A checkpoint (.safetensors) or diffusers folder; or itself.

        Raises:
            FileError: If a file can not be read.
            ModelError: If the model has no weights in .safetensors files.
        """
        if isinstance(model, GivenModel):
            return model
        return cls(model_keymap(model), partial(layer_tensors, files=model_files(model)))


@dataclass(frozen=True)
class Fit:
    """How a LoRA lies over a model.

    Attributes:
        model: The model's family.
        matched: Layers of the file that the model has.
        total: Layers of the file.
        missing: Component → number of the layers that the model has not, and the first three.
        problem: Why it can not be applied there, or None.
    """

    model: str
    matched: int
    total: int
    missing: Mapping[str, tuple[int, tuple[str, ...]]]
    problem: str | None


@dataclass(frozen=True)
class Inspection:
    """Everything that can be said of a file.

    Attributes:
        path: The file.
        size: Bytes.
        sha256: Of the bytes after the header: what the WebUI calls a LoRA's hash, in full.
        kind: ``LoRA``, ``checkpoint`` or ``unknown``.
        base_model: The family.
        base_model_from: What tells it.
        tensors: How many.
        dtypes: Number of tensors of each dtype.
        layouts: Number of keys of each way of writing layer names.
        layers: The layers of a LoRA that can be applied.
        unused: Keys that are no LoRA tensors.
        embeddings: Names of textual inversions that come with the LoRA.
        not_finite: Names of tensors with NaN or infinity.
        notes: What was tolerated.
        problem: Why the file can not be applied, or None.
        metadata: The header's texts.
        fit: How it lies over the model that was given, or None.
    """

    path: str
    size: int
    sha256: str
    kind: str
    base_model: str
    base_model_from: str
    tensors: int
    dtypes: Mapping[str, int]
    layouts: Mapping[str, int]
    layers: tuple[LayerFacts, ...]
    unused: tuple[str, ...]
    embeddings: tuple[str, ...]
    not_finite: tuple[str, ...]
    notes: tuple[str, ...]
    problem: str | None
    metadata: Mapping[str, str]
    fit: Fit | None = None

    @property
    def training(self) -> Training:
        """What the metadata tells of the training."""
        return read_training(self.metadata)

    def block_shares(self) -> dict[str, float]:
        """Block → part of the whole change (Σ‖ΔW‖²) that lies there."""
        return shares((layer.block, layer.norm) for layer in self.layers)

    def block_norms(self) -> dict[str, float]:
        """Block → √Σ‖ΔW‖², in the order of the blocks' names; layers without a norm are left out."""
        squares: defaultdict[str, float] = defaultdict(float)
        for layer in self.layers:
            if layer.norm is not None:
                squares[layer.block] += layer.norm**2
        return {block: math.sqrt(squares[block]) for block in sorted(squares)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        blocks = {"blocks": self.block_norms(), "block_shares": self.block_shares()}
        return asdict(self) | blocks | {"training": asdict(self.training)}


def inspect_file(path: Path, model: Path | GivenModel | None = None, *, progress: Progress = no_progress) -> Inspection:
    """Look at a file; a LoRA that could not be applied is described too, with the reason.

    Args:
        path: The file.
        model: What the LoRA is laid over: a checkpoint (.safetensors), a diffusers folder, a loaded model, or None.
        progress: Told the bytes checked and hashed; what it raises ends the looking.

    Raises:
        FileError: If a file can not be read at all.
        ModelError: If the model has no weights in .safetensors files.
    """
    work = Work(progress)
    file = read_lora_file(path)
    work.expect(2 * file.identity.size)
    network, problem = _interpret(file)
    fit, norms = lay_over(network, GivenModel.of(model)) if network and model else (None, {})
    checkpoint = KeyMap.from_checkpoint({name: tuple(tensor.shape) for name, tensor in file.tensors.items()})
    is_checkpoint = len(checkpoint) > 0 and not (network and network.adapters)
    base_model = checkpoint.base_model if is_checkpoint else network.base_model if network else None
    parts = [] if is_checkpoint else [split_key(name) for name in file.tensors]
    return Inspection(
        path=str(path),
        size=file.identity.size,
        sha256=data_sha256(path, work.stage(file.identity.size)),
        kind="checkpoint" if is_checkpoint else "LoRA" if any(parts) else "unknown",
        base_model=base_model.value if base_model else "",
        base_model_from=network.base_model_from if network and not is_checkpoint else "",
        tensors=len(file.tensors),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values())),
        layouts=dict(Counter(part.layout for part in parts if part)),
        layers=layer_facts(network.adapters, norms) if network and not is_checkpoint else (),
        unused=network.unused if network and not is_checkpoint else (),
        embeddings=tuple(network.embeddings) if network else (),
        not_finite=tuple(_not_finite(file.tensors, work)),
        notes=network.notes if network else (),
        problem=None if is_checkpoint else problem,
        metadata=dict(file.metadata),
        fit=fit,
    )


def lay_over(network: Network, model: GivenModel) -> tuple[Fit, dict[str, float | None]]:
    """How a network lies over a model, and ‖ΔW‖ of its layers that depend on the model's weight, by layer name."""
    family = model.keymap.base_model.value
    try:
        match = match_network(model.keymap, network)
    except PrefuseError as error:
        return Fit(family, 0, len(network.adapters), {}, str(error)), {}
    weights = model.weights(layer for layer, adapter in match.layers if adapter.needs_base)
    norms = {
        name: delta_norm(network.adapters[name], weights[place.key])
        for name in network.adapters
        if (place := model.keymap.find(name)) is not None and place.key in weights
    }
    return Fit(family, match.matched, match.total, group_names(match.unmatched), None), norms


def _interpret(file: LoraFile) -> tuple[Network | None, str | None]:
    try:
        return network_from_file(file), None
    except PrefuseError as error:
        return None, str(error)


def not_finite(tensors: Mapping[str, Tensor]) -> Iterable[str]:
    """Names of the floating tensors that hold NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch does not add up fp8
        # The sum takes no memory, but may itself overflow.
        if not math.isfinite(values.sum(dtype=torch.float64).item()) and not values.isfinite().all():
            yield name


def _not_finite(tensors: Mapping[str, Tensor], work: Work) -> Iterable[str]:
    for name, tensor in tensors.items():
        yield from not_finite({name: tensor})
        work.add(tensor.nbytes)


def layer_facts(
    adapters: Mapping[str, WeightAdapter], norms: Mapping[str, float | None] = MappingProxyType({})
) -> tuple[LayerFacts, ...]:
    """Facts of each layer of a network.

    Args:
        adapters: Layer name → adapter.
        norms: Layer name → ‖ΔW‖ that is known already.
    """
    return tuple(_layer_facts(name, adapter, norms.get(name)) for name, adapter in adapters.items())


def _layer_facts(name: str, adapter: WeightAdapter, known: float | None) -> LayerFacts:
    alpha = adapter.factors().scale * adapter.rank if is_low_rank(adapter) else None
    value = delta_norm(adapter) if known is None else known
    return LayerFacts(name, block_of_layer(name.removesuffix(BIAS)), adapter.algorithm, adapter.rank, alpha, value)


def block_of_layer(name: str) -> str:
    """Block of a layer that is known by its name in a file only; ``other`` outside of all blocks.

    Args:
        name: ``component:path`` with underscores, in diffusers' or LDM's spelling. Every SD family has two layers
            in each block of diffusers, which are three blocks of LDM with the resampling.
    """
    component, _, path = name.partition(":")
    return block_of(component, _ldm_place(path)) or OUTSIDE


def _ldm_place(path: str) -> str:
    """First two parts of the LDM path, such as ``input_blocks.4``, or ``""``."""
    stride = DIFFUSERS_LAYERS_PER_BLOCK + 1
    if found := _LDM.match(path):
        return f"{found[1]}.{found[2]}"
    if found := _DOWNSAMPLER.match(path):
        return f"input_blocks.{stride * (int(found[1]) + 1)}"
    if found := _DOWN.match(path):
        return f"input_blocks.{stride * int(found[1]) + int(found[2]) + 1}"
    if found := _UP.match(path):
        layer = DIFFUSERS_LAYERS_PER_BLOCK if "upsamplers" in found[0] else int(found[2])
        return f"output_blocks.{stride * int(found[1]) + layer}"
    return "middle_block.0" if path.startswith("mid_block_") else "input_blocks.0" if path == "conv_in" else ""
