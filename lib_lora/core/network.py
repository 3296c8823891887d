"""A LoRA file as a network: one adapter for each layer it names."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lib_lora.core.adapters import WeightAdapter, is_low_rank, load_adapter
from lib_lora.core.adapters.full import FullAdapter
from lib_lora.core.files import read_lora_file
from lib_lora.core.models import guess_of_file
from lib_lora.core.naming import BIAS, split_embedding, split_key
from lib_lora.core.peft_settings import PeftAlphas
from lib_lora.errors import AdapterError, NamingError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.files import FileIdentity, LoraFile
    from lib_lora.core.models import BaseModel


@dataclass(frozen=True, eq=False)
class Network:
    """A loaded LoRA file.

    Attributes:
        name: Name of the file without its suffix.
        identity: Which bytes these are; part of every plan key.
        metadata: The file's header metadata.
        base_model: The family it was made for, read from its layers, else from its metadata.
        base_model_from: What tells it: its layers' names, their widths, or its metadata.
        adapters: Layer name (see `naming`) → adapter; a bias has a name of its own.
        unused: Keys that are no LoRA tensors.
        embeddings: Name → tensors of a textual inversion that comes with the LoRA; kept for the host.
        notes: Sentences for the user about what was tolerated.
        dyn: How many ranks of each layer are used, or None for all.
    """

    name: str
    identity: FileIdentity
    metadata: Mapping[str, str]
    base_model: BaseModel
    adapters: Mapping[str, WeightAdapter]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dyn: int | None = None
    base_model_from: str = ""
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, "Mapping[str, Tensor]"])

    @cached_property
    def uid(self) -> str:
        """Names these bytes, cut to these ranks; two networks of one `uid` have the same effect."""
        return f"{self.identity.path}|{self.identity.size}|{self.identity.mtime_ns}|{self.identity.inode}|{self.dyn}"

    @cached_property
    def nbytes(self) -> int:
        """Bytes its factors keep in memory."""
        return self.identity.size

    @property
    def algorithm(self) -> str:
        """The algorithm of most layers."""
        return next(iter(self.algorithms), "none")

    @cached_property
    def algorithms(self) -> Mapping[str, int]:
        """Algorithm → number of its layers, the most first; biases are not counted beside weights."""
        counts = Counter(adapter.algorithm for layer, adapter in self.adapters.items() if not layer.endswith(BIAS))
        counts = counts or Counter(adapter.algorithm for adapter in self.adapters.values())
        return dict(counts.most_common())

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur in weights, ascending."""
        return tuple(sorted({adapter.rank for layer, adapter in self.adapters.items() if not layer.endswith(BIAS)}))

    def with_rank(self, dyn: int) -> Network:
        """The same network with the first `dyn` ranks of each layer (``dyn=`` in a tag).

        Raises:
            AdapterError: If a layer's algorithm has no ranks to cut.
        """
        sliced: dict[str, WeightAdapter] = {}
        for layer, adapter in self.adapters.items():
            if not is_low_rank(adapter):
                raise AdapterError(f"{self.name}: dyn={dyn} needs LoRA factors, layer {layer} is {adapter.algorithm}")
            sliced[layer] = adapter.sliced(dyn)
        return replace(self, adapters=sliced, dyn=dyn)


def load_network(path: Path) -> Network:
    """Read a LoRA file into a network.

    Raises:
        FileError: If the file can not be read (see `files.read_lora_file`).
        NamingError: If one layer is spelled in two layouts.
        AdapterError: If a layer's tensors form no adapter.
        NonFiniteError: If a layer holds NaN or infinity.
    """
    return network_from_file(read_lora_file(path))


def network_from_file(file: LoraFile) -> Network:
    """Interpret the tensors of a file. See `load_network` for what it raises."""
    name = file.path.stem
    layers, embeddings, unused = _group(file)
    adapters: dict[str, WeightAdapter] = {}
    empty: list[str] = []
    alphas = PeftAlphas(file.metadata)
    for layer in sorted(layers, key=lambda layer: layer.endswith(BIAS)):
        tensors = layers[layer]
        if any(tensor.numel() == 0 for tensor in tensors.values()):
            empty.append(layer)
            continue
        try:
            adapters[layer] = _adapter(layer, tensors, adapters, alphas)
        except AdapterError as error:
            raise AdapterError(f"{name}: layer {layer}: {error}") from None
    _check_finite(name, adapters)
    notes = (f"{len(empty)} of {len(layers)} layers have rank 0 and change nothing",) if empty else ()
    shapes = {layer: adapter.shape for layer, adapter in adapters.items()} | dict.fromkeys(empty, ())
    guess = guess_of_file(shapes, file.metadata)
    return Network(
        name=name,
        identity=file.identity,
        metadata=file.metadata,
        base_model=guess.family,
        base_model_from=guess.evidence,
        adapters=adapters,
        unused=tuple(unused),
        notes=notes,
        embeddings=embeddings,
    )


def _adapter(
    layer: str, tensors: Mapping[str, Tensor], others: Mapping[str, WeightAdapter], alphas: PeftAlphas
) -> WeightAdapter:
    """One layer's adapter. PEFT scales a LoRA's bias as the LoRA beside it."""
    beside = others.get(layer.removesuffix(BIAS))
    if set(tensors) == {"lora_bias"} and beside is not None and is_low_rank(beside):
        return FullAdapter(tensors["lora_bias"], beside.factors().scale, beside.algorithm)
    return load_adapter(tensors, alphas.of(layer))


def _group(file: LoraFile) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by layer and role, those of embeddings by name, and the keys that are none of ours."""
    layers: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, dict[str, Tensor]] = {}
    first_key: dict[tuple[str, str], str] = {}
    spelling: dict[str, tuple[str, str]] = {}
    unused: list[str] = []
    for key, tensor in file.tensors.items():
        if (embedding := split_embedding(key)) is not None:
            embeddings.setdefault(embedding[0], {})[embedding[1]] = tensor
            continue
        parts = split_key(key)
        if parts is None:
            unused.append(key)
            continue
        layout, other = spelling.setdefault(parts.layer.removesuffix(BIAS), (parts.layout, key))
        clash = first_key.setdefault((parts.layer, parts.role), key)
        if layout != parts.layout or clash != key:
            other = other if layout != parts.layout else clash
            raise NamingError(
                f"{file.path.name}: {other} and {key} are two spellings of one layer; "
                "which one is meant can not be told, remove one of them"
            )
        layers.setdefault(parts.layer, {})[parts.role] = tensor
    return layers, embeddings, unused


def _check_finite(name: str, adapters: Mapping[str, WeightAdapter]) -> None:
    bad = [layer for layer, adapter in adapters.items() if not math.isfinite(adapter.bound())]
    if bad:
        raise NonFiniteError(
            f"{name}: {len(bad)} of {len(adapters)} layers hold NaN or infinity, the first is {bad[0]}; "
            "the file is damaged or its training diverged, download or train it again"
        )
