"""Unfused mode: the forwards of Linear and Conv2d add the stacked low-rank path, whatever the number of LoRAs.

For weights that can not be rewritten, or where the user asks for it. y += up @ (down @ x) with one `down` and one `up`
for all LoRAs of a layer, so a layer costs two small GEMMs (or a convolution and a GEMM) more.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn
from torch.nn import functional

from lib_lora.core import numerics
from lib_lora.core.adapters import is_low_rank
from lib_lora.core.layers import is_fp8
from lib_lora.core.patch_state import ApplyReport
from lib_lora.core.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lib_lora.core.layers import LayerRef
    from lib_lora.core.plan import FusePlan, LayerPatch, PatchKey


def is_hookable(layer: LayerRef) -> bool:
    """Whether the layer's module computes with its own forward: a Linear or a Conv2d.

    MultiheadAttention reads its weights past any forward; such layers are fused in hook mode too.
    """
    return isinstance(layer.module, (nn.Linear, nn.Conv2d)) and layer.attribute == "weight"


def is_wrapped(layer: LayerRef) -> bool:
    """Whether other code put a forward on the module, which may change the input first.

    A hook gets the module's input, not what such a forward makes of it: ControlNet-LLLite adds to it there.
    """
    return "forward" in vars(layer.module)


class Path(Protocol):
    """What a forward hook adds to the output of its layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        ...

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output, and ΔW times its input added."""
        ...


@dataclass(frozen=True, eq=False)
class LinearPath:
    """y[..., rows] += up @ (down @ x), or delta @ x where that needs fewer multiplications.

    Attributes:
        down: (rank, in), or None if `up` is the dense ΔW.
        up: (out, rank), or (out, in).
        rows: The part of the output it adds to, or None for all of it.
    """

    down: Tensor | None
    up: Tensor
    rows: tuple[int, int] | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return _nbytes(self.up, self.down)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Args: args: x (..., in) first; output: (..., out)."""
        x = args[0].to(self.up.dtype)
        hidden = x if self.down is None else functional.linear(x, self.down)
        if self.rows is not None:
            part = slice(*self.rows)
            output = output.clone() if torch.is_grad_enabled() else output
            output[..., part] += functional.linear(hidden, self.up)
            return output
        if torch.is_grad_enabled() or not output.is_contiguous() or output.dtype != self.up.dtype:
            return output + functional.linear(hidden, self.up).to(output.dtype)
        output.view(-1, output.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), self.up.t())
        return output


@dataclass(frozen=True, eq=False)
class ConvPath:
    """The same for Conv2d, with the layer's own stride, padding, padding mode, dilation and groups.

    Attributes:
        down: (rank · groups, in / groups, kh, kw), or the dense ΔW (out, in / groups, kh, kw) if `up` is None.
        up: (out, rank), or None.
    """

    down: Tensor
    up: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return _nbytes(self.down, self.up)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Args: args: x (batch, in, h, w) first; output: (batch, out, h', w')."""
        conv = cast("nn.Conv2d", module)
        # torch's own, protected: the one place that knows every padding mode
        hidden = conv._conv_forward(args[0].to(self.down.dtype), self.down, None)  # pyright: ignore[reportPrivateUsage]
        if self.up is None:
            return output + hidden.to(output.dtype)
        same = output.dtype == hidden.dtype == self.up.dtype  # autocast changes the first two only
        in_place = same and not torch.is_grad_enabled() and output.is_contiguous()
        if conv.groups > 1 or not in_place:
            return output + functional.conv2d(hidden, self.up[:, :, None, None], groups=conv.groups).to(output.dtype)
        output.flatten(2).baddbmm_(self.up.expand(len(output), -1, -1), hidden.flatten(2))
        return output


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def make_path(patch: LayerPatch, workspace: Workspace) -> Path:
    """Stack the factors of a layer, on the device of its weight and in the dtype the layer computes in.

    The dense ΔW is taken where the layer has adapters without factors, or where it is the smaller computation.
    """
    layer, device, dtype = patch.layer, patch.layer.weight().device, _compute_dtype(patch.layer)
    groups = layer.module.groups if isinstance(layer.module, nn.Conv2d) else 1
    if _is_cheaper_dense(patch):
        zero = torch.zeros(layer.shape, dtype=torch.float32, device=device)
        delta = torch.empty_like(zero)
        numerics.fuse_layer(zero, patch.terms, delta, workspace)
        dense = delta.to(dtype)
        return ConvPath(dense, None) if dense.ndim == 4 else LinearPath(None, dense, layer.rows)
    up, down, gain = numerics.stack(patch.terms, torch.float32, device, workspace)
    up, down = (up * gain).to(dtype), down.to(dtype, copy=True)
    if len(layer.shape) == 2:
        return LinearPath(down, up, layer.rows)
    return ConvPath(down.view(-1, *layer.shape[1:]).repeat(groups, 1, 1, 1), up)


def _compute_dtype(layer: LayerRef) -> torch.dtype:
    """The weight's, or where that is only kept in (fp8, quantised): what the module says, its bias's, or float32."""
    module = layer.module
    candidates = (
        layer.weight().dtype,
        getattr(module, "compute_dtype", None),
        getattr(getattr(module, "bias", None), "dtype", None),
    )
    usable = (dtype for dtype in candidates if isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    return next((dtype for dtype in usable if not is_fp8(dtype)), torch.float32)


def _is_cheaper_dense(patch: LayerPatch) -> bool:
    """Whether rank · (in + out) multiplications for each position are more than in · out."""
    if not all(is_low_rank(term.adapter) for term in patch.terms):
        return True
    rank = sum(term.adapter.rank for term in patch.terms)
    rows, columns = patch.layer.shape[0], math.prod(patch.layer.shape[1:])
    return rank * (rows + columns) > rows * columns


@dataclass(frozen=True, eq=False)
class _Hook:
    key: PatchKey
    layer: LayerRef
    path: Path
    handle: RemovableHandle


class HookedLayers:
    """The hooks of one model. `apply` and `clear` are inverse; the weights are never written."""

    def __init__(self) -> None:
        self._hooks: dict[str, _Hook] = {}
        self._workspace = Workspace()
        self.applied_key = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked factors."""
        return sum(hook.path.nbytes for hook in self._hooks.values())

    def apply(self, plan: FusePlan) -> ApplyReport:
        """Hook what the plan says; layers that are hooked so already are left alone.

        Any exception leaves with no hook at all.
        """
        start = time.perf_counter()
        writes = [patch for key, patch in plan.patches.items() if self._key(key) != patch.key]
        leaving = [key for key in self._hooks if key not in plan.patches]
        removed = tuple(self._remove(key) for key in leaving)
        try:
            with torch.no_grad():
                for patch in writes:
                    self._hook(patch)
        except BaseException:
            self.clear()
            raise
        self.applied_key = plan.key
        milliseconds = (time.perf_counter() - start) * 1e3
        return ApplyReport(tuple(patch.layer for patch in writes), removed, milliseconds)

    def clear(self) -> ApplyReport:
        """Remove every hook."""
        start = time.perf_counter()
        removed = tuple(self._remove(key) for key in list(self._hooks))
        self.applied_key = ""
        self._workspace = Workspace()
        return ApplyReport((), removed, (time.perf_counter() - start) * 1e3)

    def _key(self, layer_key: str) -> PatchKey | None:
        return self._hooks[layer_key].key if layer_key in self._hooks else None

    def _remove(self, key: str) -> LayerRef:
        hook = self._hooks.pop(key)
        hook.handle.remove()
        return hook.layer

    def _hook(self, patch: LayerPatch) -> None:
        layer = patch.layer
        if layer.module is None:
            raise LookupError(f"{layer.key} is a place in a checkpoint, it has no forward")
        path = make_path(patch, self._workspace)
        if layer.key in self._hooks:
            self._remove(layer.key)
        handle = layer.module.register_forward_hook(path)
        self._hooks[layer.key] = _Hook(patch.key, layer, path, handle)
