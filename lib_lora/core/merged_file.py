"""One file of a checkpoint with a plan fused in: its tensors are made one after the other, as they are written."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lib_lora.core.checkpoint import component_of
from lib_lora.core.files import FileIdentity, map_checkpoint
from lib_lora.core.kohya_rounding import fuse_layer_kohya
from lib_lora.core.layers import is_fp8
from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.core.numerics import fuse_layer
from lib_lora.core.opening import shown
from lib_lora.core.saving import FLOPS_PER_BYTE, LazyTensor
from lib_lora.core.workspace import Workspace
from lib_lora.errors import FileChangedError, FuseMemoryError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.plan import FusePlan, LayerPatch

WEIGHTS = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.embedders.",
    "text_encoders.",
    "vae.",
)
"""Beginnings of the names in a single file that a precision of saving is meant for; schedules and the like are not."""


class MergeTypes(NamedTuple):
    """How numbers are calculated and stored.

    Attributes:
        precision: What each step is rounded to, as kohya's script does; None for one sum in float32, rounded once.
        saved: Dtype of the result's weights; None for the source's own.
        device: Where it is calculated.
    """

    precision: torch.dtype | None = None
    saved: torch.dtype | None = None
    device: torch.device = torch.device("cpu")


class MergedFile:
    """A checkpoint's file and what a plan makes of it.

    Attributes:
        path: The source.
        metadata: The source's.
    """

    def __init__(self, path: Path, plan: FusePlan, types: MergeTypes, *, is_part: bool) -> None:
        """Read the header.

        Args:
            path: The file.
            plan: For the model that the file belongs to.
            types: How to calculate and store.
            is_part: Whether it belongs to a diffusers folder, and holds one component.

        Raises:
            FileError: If it can not be read.
        """
        self.path = path
        self._source = map_checkpoint(path)
        self.metadata: Mapping[str, str] = self._source.header.metadata
        self._types = types
        self._component = component_of(path) or ("other" if is_part else None)
        self._patches: dict[str, list[LayerPatch]] = {}
        for patch in plan.patches.values():
            if self._component in (None, patch.layer.component) and patch.layer.parameter in self._source:
                self._patches.setdefault(patch.layer.parameter, []).append(patch)
        self._workspace = Workspace()
        self._last = ""

    @property
    def is_changed(self) -> bool:
        """Whether the result differs from the source."""
        infos = self._source.header.tensors
        return bool(self._patches) or any(self._dtype(name) != info.dtype for name, info in infos.items())

    @property
    def work(self) -> int:
        """Bytes of the result's tensors, and what making them costs, as `Progress` is told."""
        tensors = self.tensors().values()
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize + tensor.work for tensor in tensors)

    def tensors(self) -> dict[str, LazyTensor]:
        """The result by name; one is in memory at a time.

        Their `make` raises NonFiniteError if a weight that is changed holds NaN or infinity before or after,
        FuseMemoryError, and FileChangedError if the source is written to meanwhile.
        """
        infos = self._source.header.tensors
        made = {name: self._fused if name in self._patches else self._unfused for name in infos}
        return {
            name: LazyTensor(self._dtype(name), info.shape, partial(made[name], name), self._fusing(name))
            for name, info in infos.items()
        }

    def _fusing(self, name: str) -> int:
        """What the products cost that are fused into a tensor."""
        patches = self._patches.get(name, ())
        ranks = [(math.prod(patch.layer.shape), sum(term.adapter.rank for term in patch.terms)) for patch in patches]
        return sum(2 * numbers * rank // FLOPS_PER_BYTE for numbers, rank in ranks)

    def _dtype(self, name: str) -> torch.dtype:
        own = self._source.header.tensors[name].dtype
        meant = self._component is not None or name.startswith(WEIGHTS)
        return self._types.saved if self._types.saved and meant and own.is_floating_point else own

    def _take(self, name: str) -> Tensor:
        """A tensor of the source; the memory of the one before goes back to the system."""
        if FileIdentity.of(self.path) != self._source.identity:
            raise FileChangedError(f"{shown(self.path)} is being written to; try again when that is done")
        if self._last:
            self._source.release(self._last)
        self._last = name
        return self._source[name]

    def _unfused(self, name: str) -> Tensor:
        return self._take(name).to(self._dtype(name))

    def _fused(self, name: str) -> Tensor:
        patches, dtype = self._patches[name], self._dtype(name)
        try:
            base = self._take(name).to(self._types.device)
            if patches[0].layer.rows is None:
                shape = (len(base), base[0].numel())
                out = self._workspace.take("out", shape, dtype, base.device).view(base.shape)
            else:  # another layer in the same weight may stay as it is
                out = base.to(dtype, copy=True)
            for patch in patches:
                rows = slice(*(patch.layer.rows or (None,)))
                self._fuse(patch, base[rows], out[rows])
        except OUT_OF_MEMORY as error:
            device = self._types.device
            raise FuseMemoryError(f"not enough memory on {device} to fuse {patches[0].layer.key}: {error}") from error
        return out

    def _fuse(self, patch: LayerPatch, base: Tensor, out: Tensor) -> None:
        if self._types.precision is None:
            fuse_layer(base, patch.terms, out, self._workspace)
        else:
            fuse_layer_kohya(base, patch.terms, out, self._types.precision)
        if _is_finite(out):
            return
        if not _is_finite(base):
            raise NonFiniteError(f"{shown(self.path)}: {patch.layer.parameter} holds NaN or infinity; get another copy")
        raise NonFiniteError(
            f"{patch.heaviest().name}: layer {patch.layer.key} would overflow {out.dtype} "
            f"(largest number {torch.finfo(out.dtype).max:g}); lower its strength, or save in a wider type"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are."""
    values = tensor.float() if is_fp8(tensor.dtype) else tensor
    # The sum takes no memory and a tenth of the time, but may itself overflow.
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())
