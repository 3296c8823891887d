"""What is to be fused where, as data: checks of names, shapes and families end here, before a weight is touched."""

from __future__ import annotations

import hashlib
import math
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from lib_lora.core.adapters import is_low_rank
from lib_lora.core.adapters.ia3 import Ia3Adapter
from lib_lora.core.adapters.padded import PaddedAdapter
from lib_lora.core.adapters.rows import rows_of
from lib_lora.core.naming import BIAS
from lib_lora.core.numerics import Term, largest_sum
from lib_lora.errors import BaseModelMismatchError, NamingError, NoLayersError, ShapeMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.keymap import KeyMap, Part
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.network import Network

Compat = Literal["exact", "a1111"]
PatchKey = tuple[tuple[str, ...], tuple[float, ...]]

ROUNDED = "rounded"
"""In a key, between the networks whose sum was rounded and those that were added to it."""


@dataclass(frozen=True)
class Scale:
    """All strengths of one network: the one place where they meet.

    Attributes:
        te: Strength of the text encoders.
        unet: Strength of the UNet.
        layers: Layer key → block weight; a layer that is not listed has 1.
    """

    te: float = 1.0
    unet: float = 1.0
    layers: Mapping[str, float] = field(default_factory=dict[str, float])

    def factor(self, layer: LayerRef) -> float:
        """What ΔW of this layer is multiplied by."""
        strength = self.te if layer.component.startswith("te") else self.unet
        return strength * self.layers.get(layer.key, 1.0)


@dataclass(frozen=True, eq=False)
class Match:
    """A network laid over a model.

    Attributes:
        network: The network.
        layers: Where each adapter acts.
        unmatched: Layer names of the network that the model has not.
    """

    network: Network
    layers: Sequence[tuple[LayerRef, WeightAdapter]]
    unmatched: Sequence[str]

    @cached_property
    def matched(self) -> int:
        """How many layers of the network the model has; a weight and its bias are one."""
        missing = set(self.unmatched)
        return _count_layers(name for name in self.network.adapters if name not in missing)

    @cached_property
    def total(self) -> int:
        """How many layers the network has."""
        return self.matched + _count_layers(self.unmatched)

    @cached_property
    def note(self) -> str:
        """A sentence about what is missing, or nothing."""
        if not self.unmatched:
            return ""
        first = ", ".join(name.partition(":")[2] for name in self.unmatched[:3])
        return f"{self.network.name}: {self.matched} of {self.total} layers exist in this model; missing: {first}" + (
            ", …" if len(self.unmatched) > 3 else ""
        )


def _count_layers(names: Iterable[str]) -> int:
    return len({name.removesuffix(BIAS) for name in names})


def match_network(keymap: KeyMap, network: Network) -> Match:
    """Lay a network over a model.

    Raises:
        BaseModelMismatchError: If it was made for another family than the model's.
        NamingError: If two names of the network mean one layer of the model.
        NoLayersError: If the model has none of its layers.
        ShapeMismatchError: If a layer's ΔW has not the shape of the weight, or can not be divided where the model has
            several layers for it.
    """
    if not network.base_model.compatible(keymap.base_model):
        raise BaseModelMismatchError(
            f"{network.name} was made for {network.base_model.value}, this model is {keymap.base_model.value}"
        )
    places = _places(keymap, network)
    _check_spellings(network, places)
    unmatched = [name for name, parts in places.items() if not parts]
    layers = [pair for name, parts in places.items() for pair in _divided(network, name, parts)]
    layers += _scaled_biases(keymap, network)
    if not layers:
        first = ", ".join([*unmatched, *network.unused][:3]) or "the file holds no tensors"
        raise NoLayersError(
            f"{network.name}: none of its {len(unmatched)} layers exists in this model ({keymap.base_model.value}); "
            f"{len(network.unused)} keys are not LoRA tensors (first: {first})"
        )
    _check_shapes(network, layers)
    return Match(network, layers, unmatched)


def _places(keymap: KeyMap, network: Network) -> dict[str, Sequence[Part]]:
    """Where each layer of the network acts; what it says of a ControlNet's layer itself goes before the UNet's."""
    places = {name: keymap.parts(name) for name in network.adapters}
    named = {part.layer for parts in places.values() for part in parts if not part.is_copy}
    return {
        name: [part for part in parts if not (part.is_copy and part.layer in named)] for name, parts in places.items()
    }


def _divided(network: Network, name: str, parts: Sequence[Part]) -> Iterator[tuple[LayerRef, WeightAdapter]]:
    """The layers of the model that one of the file's acts on, and the adapter of each."""
    adapter = network.adapters[name]
    if not any(part.rows for part in parts):
        yield from ((part.layer, _fitted(adapter, part.layer)) for part in parts)
        return
    whole = (sum(part.layer.shape[0] for part in parts), *parts[0].layer.shape[1:])
    keys = ", ".join(part.layer.key for part in parts)
    if not adapter.fits(whole):
        raise ShapeMismatchError(
            f"{network.name}: {name} has another shape than the model's {keys}: "
            f"{whole} here, {adapter.shape_text()} in the LoRA"
        )
    for part in parts:
        rows = rows_of(adapter, part.rows, part.layer.shape)
        if rows is None:
            raise ShapeMismatchError(
                f"{network.name}: the rows of {name}, {adapter.algorithm} {adapter.shape_text()}, can not be divided "
                f"among {keys}; a plain LoRA can be"
            )
        yield part.layer, rows


def _scaled_biases(keymap: KeyMap, network: Network) -> Iterator[tuple[LayerRef, WeightAdapter]]:
    """The biases that PEFT's IA3 scales with their outputs, where the model has them."""
    for name, adapter in network.adapters.items():
        if isinstance(adapter, Ia3Adapter) and adapter.scales_bias:
            yield from ((part.layer, adapter) for part in keymap.parts(f"{name}{BIAS}"))


def _fitted(adapter: WeightAdapter, place: LayerRef) -> WeightAdapter:
    """The adapter itself; for an inpainting model's first convolution, padded with zeros where it was made without."""
    narrow = place.narrow_shape
    if narrow is None or adapter.fits(place.shape) or not adapter.fits(narrow):
        return adapter
    return PaddedAdapter(adapter, place.shape, narrow[1])


def _check_spellings(network: Network, places: Mapping[str, Sequence[Part]]) -> None:
    seen: dict[str, str] = {}
    for name, parts in places.items():
        for part in parts:
            if (other := seen.setdefault(part.layer.key, name)) != name:
                raise NamingError(f"{network.name}: {other} and {name} are two spellings of the layer {part.layer.key}")


def _check_shapes(network: Network, layers: Sequence[tuple[LayerRef, WeightAdapter]]) -> None:
    wrong = [(layer, adapter) for layer, adapter in layers if not adapter.fits(layer.shape)]
    if wrong:
        first = "; ".join(f"{layer.key} is {layer.shape} here, {a.shape_text()} in the LoRA" for layer, a in wrong[:3])
        raise ShapeMismatchError(
            f"{network.name}: {len(wrong)} of {len(layers)} layers have another shape than the model's: {first}"
        )


@dataclass(frozen=True, eq=False)
class LayerPatch:
    """What is added to one layer.

    Attributes:
        layer: Where.
        terms: The summands.
        networks: The network of each term; two patches with the same networks and factors have the same effect.
        held: What is added and rounded before the terms are, and kept from one strength of theirs to the next: then
            the terms alone cost time, at the price of a second rounding. None for one sum.
    """

    layer: LayerRef
    terms: tuple[Term, ...]
    networks: tuple[Network, ...]
    held: LayerPatch | None = None

    @cached_property
    def key(self) -> PatchKey:
        """Everything that decides the result of this layer."""
        uids, factors = tuple(network.uid for network in self.networks), tuple(term.factor for term in self.terms)
        if self.held is None:
            return uids, factors
        before, first = self.held.key
        return ((*before, ROUNDED, *uids), (*first, *factors)) if self.terms else self.held.key

    @property
    def summands(self) -> tuple[Term, ...]:
        """All terms, those that are held too."""
        return (*(self.held.terms if self.held else ()), *self.terms)

    @cached_property
    def is_low_rank(self) -> bool:
        """Whether all terms are products of small matrices, and nothing is held."""
        return self.held is None and all(is_low_rank(term.adapter) for term in self.terms)

    def largest(self, base_peak: float) -> float:
        """An upper bound of the sum's numbers, kept for the next switch.

        Args:
            base_peak: An upper bound of max |W0|.
        """
        if base_peak not in self._largest:
            self._largest[base_peak] = largest_sum(self.summands, base_peak)
        return self._largest[base_peak]

    @cached_property
    def _largest(self) -> dict[float, float]:
        return {}

    @cached_property
    def seed(self) -> int:
        """The same number for the same request, another one for each layer."""
        names = [network.name for network in self.networks]
        return zlib.crc32(repr((self.layer.key, names, self.key[1])).encode())

    def heaviest(self) -> Network:
        """The network that can add the largest number."""
        networks = (*(self.held.networks if self.held else ()), *self.networks)
        pairs = zip(self.summands, networks, strict=True)
        return max(pairs, key=lambda pair: abs(pair[0].factor) * pair[0].adapter.bound())[1]


@dataclass(frozen=True, eq=False)
class FusePlan:
    """Pure data: the patches of all layers that differ from the base.

    Attributes:
        patches: Layer key → patch.
        compat: ``exact``: one float32 sum, one rounding; ``a1111``: as the WebUI rounds, in prompt order.
    """

    patches: Mapping[str, LayerPatch]
    compat: Compat = "exact"

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the result; the empty plan has the key ``""``."""
        if not self.patches:
            return ""
        digest = hashlib.sha256(self.compat.encode())
        for name in sorted(self.patches):
            digest.update(repr((name, self.patches[name].key)).encode())
        return digest.hexdigest()


def make_plan(matches: Iterable[tuple[Match, Scale]], compat: Compat = "exact") -> FusePlan:
    """Collect the terms of every layer.

    In ``exact`` the networks are sorted and the factors of one network are summed, so the order of the request and
    repetitions in it do not change a bit of the result. In ``a1111`` the prompt's order stands.
    """
    groups = [(match, [scale]) for match, scale in matches]
    if compat == "exact":
        groups = _by_network(groups)
    collected: dict[str, tuple[LayerRef, list[Term], list[Network]]] = {}
    for match, scales in groups:
        for layer, adapter in match.layers:
            factor = math.fsum(scale.factor(layer) for scale in scales)
            if factor and adapter.rank:
                _, terms, networks = collected.setdefault(layer.key, (layer, [], []))
                terms.append(Term(adapter, factor))
                networks.append(match.network)
    patches = {
        key: LayerPatch(layer, tuple(terms), tuple(networks)) for key, (layer, terms, networks) in collected.items()
    }
    return FusePlan(patches, compat)


def _by_network(groups: Iterable[tuple[Match, list[Scale]]]) -> list[tuple[Match, list[Scale]]]:
    """One entry a network, with all its scales, sorted by its identity."""
    merged: dict[str, tuple[Match, list[Scale]]] = {}
    for match, scales in groups:
        merged.setdefault(match.network.uid, (match, []))[1].extend(scales)
    return [merged[uid] for uid in sorted(merged)]
