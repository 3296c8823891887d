"""Where in a LoRA its change lies: by block, by element, and by kind of layer, from the file alone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lib_lora.core.blocks import OUTSIDE
from lib_lora.core.lora_names import FAMILIES, original_name
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import BIAS
from lib_lora.core.network import load_network
from lib_lora.core.opening import shown
from lib_lora.errors import JobError, NamingError
from lib_lora.prompt.block_names import BASE, CLIP, LISTS, ORDER, T5
from lib_lora.prompt.block_weights import T5_LAYER
from lib_lora.tools.inspect import GivenModel, lay_over, layer_facts
from lib_lora.tools.table import csv_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from lib_lora.core.keymap import KeyMap
    from lib_lora.core.network import Network
    from lib_lora.tools.inspect import LayerFacts

_LENGTHS = {
    BaseModel.SD1: (17, 26),
    BaseModel.SD2: (17, 26),
    BaseModel.SDXL: (12, 20),
    BaseModel.FLUX: (61,),
    BaseModel.UNKNOWN: (17, 26),  # SDXL's layers are always known for what they are
}
"""Of lists of block weights, the shorter first."""

# What is in front of an element: a block and what it stands in. Names have dots or, in files, underscores.
_PLACE = re.compile(
    r"(?s:.*)(?:(?:input|output)_blocks[._]\d+[._]\d+|(?<!input_)(?<!output_)blocks?[._]\d+"
    r"|(?:resnets|attentions|samplers|resblocks|(?<=encoder[._])layers|layer)[._]\d+)[._]"
)


@dataclass(frozen=True)
class Cell:
    """An element of a block.

    Attributes:
        layers: How many there are.
        norm: √Σ‖ΔW‖² of those whose norm is known.
    """

    layers: int
    norm: float


@dataclass(frozen=True)
class BlockAnalysis:
    """Where a LoRA's change lies.

    Attributes:
        path: The file.
        base_model: The family.
        length: Of the shortest list of block weights that has all its blocks: 12, 17, 20 or 26, or 61 for Flux; None
            where the family's blocks have no names.
        blocks: Of that list, in its order, and ``other`` if the LoRA changes layers outside of all.
        elements: Parts of layers' names, as rules of ``lbwe=`` understand them, sorted.
        cells: (block, element) → what is there.
        notes: Sentences about what could not be told.
    """

    path: str
    base_model: str
    length: int | None
    blocks: tuple[str, ...]
    elements: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    notes: tuple[str, ...]

    @cached_property
    def shares(self) -> dict[tuple[str, str], float]:
        """(block, element) → part of the whole change, Σ‖ΔW‖²."""
        squares = {place: cell.norm**2 for place, cell in self.cells.items()}
        whole = math.fsum(squares.values()) or 1.0
        return {place: square / whole for place, square in squares.items()}

    @property
    def present(self) -> tuple[str, ...]:
        """The blocks that it has layers in, in order."""
        there = {block for block, _ in self.cells}
        return tuple(block for block in self.blocks if block in there)

    def block_shares(self) -> dict[str, float]:
        """Block → share, of all blocks."""
        return dict.fromkeys(self.blocks, 0.0) | self._sums(lambda block, _: block)

    def element_shares(self) -> dict[str, float]:
        """Element → share."""
        return self._sums(lambda _, element: element)

    def kind_shares(self) -> dict[str, float]:
        """Kind of layer, the first word of an element such as ``attn1`` or ``ff`` → share."""
        return self._sums(lambda _, element: element.partition(".")[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in ("path", "base_model", "length", "notes")}
        rows = [dict(zip(_HEADER, row, strict=True)) for row in self._rows()]
        sums = {"blocks": self.block_shares(), "elements": self.element_shares(), "kinds": self.kind_shares()}
        return plain | sums | {"cells": rows}

    def to_csv(self) -> str:
        """A line for each element of each block."""
        return csv_of(_HEADER, self._rows())

    def _rows(self) -> list[tuple[str, str, int, float, float]]:
        order = {block: index for index, block in enumerate(self.blocks)}
        places = sorted(self.cells, key=lambda place: (order[place[0]], place[1]))
        return [(*place, self.cells[place].layers, self.cells[place].norm, self.shares[place]) for place in places]

    def _sums(self, name: Callable[[str, str], str]) -> dict[str, float]:
        sums: defaultdict[str, float] = defaultdict(float)
        for (block, element), share in self.shares.items():
            sums[name(block, element)] += share
        return {key: sums[key] for key in sorted(sums)}


_HEADER = ("block", "element", "layers", "norm", "share")


def analyse_blocks(path: Path, model: Path | GivenModel | None = None) -> BlockAnalysis:
    """Where the change of a LoRA lies, without making a picture.

    Args:
        path: A LoRA of any layout.
        model: What some algorithms' change depends on, and what knows the original names of layers of other families
            than SD 1, SD 2 and SDXL: a checkpoint (.safetensors), a diffusers folder, a loaded model, or None.

    Raises:
        FileError: If a file can not be read.
        PrefuseError: If the file is no LoRA that could be applied.
    """
    network = load_network(path)
    if not network.adapters:
        raise JobError(f"{shown(path)} has nothing to analyse: none of its {len(network.unused)} tensors is a LoRA's")
    given = None if model is None else GivenModel.of(model)
    fit, norms = (None, {}) if given is None else lay_over(network, given)
    keymap = given.keymap if given and not (fit and fit.problem) else None
    layers = layer_facts(network.adapters, norms)
    blocks, length = _blocks_of(network.base_model, {layer.block for layer in layers})
    cells = _cells(network, layers, keymap, is_flux=length == max(LISTS))
    notes = [fit.problem] if fit and fit.problem else []
    if unknown := sum(layer.norm is None for layer in layers):
        notes.append(f"{unknown} of {len(layers)} layers change by how much depends on the model, and count as nothing")
    elements = tuple(sorted({element for _, element in cells}))
    return BlockAnalysis(str(path), network.base_model.value, length, blocks, elements, cells, tuple(notes))


def element_of(name: str) -> str:
    """The part of a layer's name behind its block, such as ``attn1.to_q``; the name itself where there is none.

    Args:
        name: Path in its component, with dots or as files have it.
    """
    place = _PLACE.match(name)
    inner = name[place.end() :] if place else re.sub(r"\Atext_model[._]", "", name)
    return inner or name


def _blocks_of(family: BaseModel, there: Collection[str]) -> tuple[tuple[str, ...], int | None]:
    """Blocks in the order of the shortest list that has all that are there, and its length."""
    named = set(there) - {OUTSIDE}
    outside = (OUTSIDE,) if OUTSIDE in there else ()
    if family not in _LENGTHS or named.isdisjoint(ORDER):
        known = sorted(named, key=lambda block: (ORDER.index(block) if block in ORDER else len(ORDER), block))
        return (*known, *outside), None
    lengths = _LENGTHS[family]
    length = next((one for one in lengths if named <= {*LISTS[one]}), lengths[-1])
    strange = sorted(named - {*LISTS[length], BASE})
    return (*LISTS[length], *strange, *outside), length


def _cells(
    network: Network, layers: Iterable[LayerFacts], keymap: KeyMap | None, *, is_flux: bool
) -> dict[tuple[str, str], Cell]:
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    squares: defaultdict[tuple[str, str], float] = defaultdict(float)
    for layer in layers:
        block = layer.block
        if is_flux and block == BASE:
            block = T5 if T5_LAYER in layer.name else CLIP
        place = block, element_of(_original(layer.name, network.base_model, keymap))
        counts[place] += 1
        squares[place] += (layer.norm or 0.0) ** 2
    return {place: Cell(count, math.sqrt(squares[place])) for place, count in counts.items()}


def _original(layer: str, family: BaseModel, keymap: KeyMap | None) -> str:
    """A layer's path in its component as rules of ``lbwe=`` see it; as the file has it where that is not known."""
    weight = layer.removesuffix(BIAS)
    if keymap is not None and (parts := keymap.parts(weight)):
        return parts[0].layer.original
    # Behind the block all families that are known name alike.
    for known in (family,) if family is not BaseModel.UNKNOWN else FAMILIES:
        with suppress(NamingError):
            return original_name(weight, known)
    return weight.partition(":")[2]
