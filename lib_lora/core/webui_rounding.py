"""ΔW in the arithmetic of the WebUI 1.10: the types of its files, one rounding for each operation.

For making pictures again bit for bit that were made there; every other use computes in float32. What its code can not
compute (GLoRA in the present layout, IA3 on convolutions) is computed in float32 here too.

Source: https://github.com/AUTOMATIC1111/stable-diffusion-webui, extensions-builtin/Lora/network*.py at v1.10.1.
"""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lib_lora.core.adapters.base import full_precision
from lib_lora.core.adapters.boft import BoftAdapter
from lib_lora.core.adapters.dora import DoraAdapter
from lib_lora.core.adapters.full import FullAdapter
from lib_lora.core.adapters.glora import GloraAdapter
from lib_lora.core.adapters.ia3 import Ia3Adapter
from lib_lora.core.adapters.loha import Half, LohaAdapter
from lib_lora.core.adapters.lokr import LokrAdapter, Part
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.adapters.oft import TINY, OftAdapter
from lib_lora.core.adapters.padded import PaddedAdapter
from lib_lora.core.layers import is_fp8

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.numerics import Term


def fuse_layer_a1111(base: Tensor, terms: Sequence[Term], out: Tensor, layer: LayerRef | None = None) -> None:
    """As the WebUI does it: one LoRA after another in prompt order, rounded at every operation.

    Args:
        base: The untouched parameter; of another dtype than `out` it is an fp8 weight's master, to which all are added
            before one rounding (the WebUI itself starts from the master for each LoRA and keeps the last one only).
        terms: The summands in prompt order.
        out: Of base's shape and device.
        layer: Whose parameter it is; None stands for a Linear's or a convolution's weight.
    """
    weight = base
    for adapter, factor in terms:
        wide = weight.to(_computed_in(weight, out.dtype))
        with _as_called(wide, out.dtype):
            updown = delta_weight(adapter, wide) * factor
        addend = wide if layer is not None and _is_added_to(layer) else wide.to(updown.dtype)
        weight = (addend + updown).to(weight.dtype)
    out.copy_(weight)


def _is_added_to(layer: LayerRef) -> bool:
    """Whether ΔW is added in the wider of the two types: to biases and to MultiheadAttention's projections.

    Any other weight is brought to ΔW's type before.
    """
    return layer.attribute != "weight" or isinstance(layer.module, NonDynamicallyQuantizableLinear)


def _computed_in(weight: Tensor, kept: torch.dtype) -> torch.dtype:
    """The type to which the WebUI brings factors: its model's; of one in fp8, what its forwards compute from."""
    if not is_fp8(kept):
        return weight.dtype
    return torch.float32 if weight.device.type == "cpu" else torch.float16


def _as_called(weight: Tensor, kept: torch.dtype) -> AbstractContextManager[object]:
    """The WebUI computes ΔW inside of a forward: under autocast if the model is in fp16 on CUDA, or in fp8 on a CPU."""
    if weight.device.type == "cuda" and weight.dtype == torch.float16:
        return torch.autocast("cuda", torch.float16)
    if weight.device.type == "cpu" and is_fp8(kept):
        return torch.autocast("cpu", torch.bfloat16)
    return full_precision(weight.device)


@singledispatch
def delta_weight(adapter: WeightAdapter, weight: Tensor) -> Tensor:
    """ΔW at strength 1, of weight's shape.

    Args:
        adapter: The update.
        weight: What it is added to: the base with all earlier LoRAs of the prompt.
    """
    return adapter.delta_weight(weight).to(weight.dtype)


@delta_weight.register(LoraAdapter)
def _lora(adapter: LoraAdapter, weight: Tensor) -> Tensor:
    """Factors in the model's type."""
    up, down = adapter.up.to(weight.device, weight.dtype), adapter.down.to(weight.device, weight.dtype)
    if adapter.core is None:
        product = up @ down.flatten(1)
    else:
        core = adapter.core.to(weight.device, weight.dtype)
        product = torch.einsum("nmkl,in,mj->ijkl", core, up, down)
    return product.reshape(weight.shape) * adapter.scale


@delta_weight.register(LohaAdapter)
def _loha(adapter: LohaAdapter, weight: Tensor) -> Tensor:
    """Factors in the file's type."""
    first, second = (_half(half, weight) for half in (adapter.first, adapter.second))
    return (first * second).reshape(weight.shape) * adapter.scale


def _half(half: Half, weight: Tensor) -> Tensor:
    up, down = half.up.to(weight.device), half.down.to(weight.device)
    return up @ down.flatten(1) if half.core is None else _cp(half.core.to(weight.device), up, down).flatten(1)


def _cp(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("ijkl,ir->rjkl", torch.einsum("ijkl,jr->irkl", core, down), up)


@delta_weight.register(LokrAdapter)
def _lokr(adapter: LokrAdapter, weight: Tensor) -> Tensor:
    """Factors in the file's type."""
    w1, w2 = (_part(part, weight) for part in (adapter.first, adapter.second))
    w1 = w1[:, :, None, None] if w2.ndim == 4 else w1
    return torch.kron(w1, w2.contiguous()).reshape(weight.shape) * adapter.scale


def _part(part: Part, weight: Tensor) -> Tensor:
    whole, *factors = (tensor.to(weight.device) for tensor in part.tensors)
    if len(factors) == 2:
        return _cp(factors[1], whole, factors[0])
    return whole @ factors[0].flatten(1) if factors else whole


@delta_weight.register(FullAdapter)
def _full(adapter: FullAdapter, weight: Tensor) -> Tensor:
    """The file's numbers."""
    return adapter.diff.to(weight.device).reshape(weight.shape) * adapter.scale


@delta_weight.register(Ia3Adapter)
def _ia3(adapter: Ia3Adapter, weight: Tensor) -> Tensor:
    """In the wider of the two types; outputs of convolutions are beyond the WebUI."""
    factors = adapter.weight.to(weight.device)
    if adapter.on_input:
        return weight * factors.view(-1, *[1] * (weight.ndim - 2))
    return weight * factors.view(-1, 1) if weight.ndim == 2 else adapter.delta_weight(weight).to(weight.dtype)


@delta_weight.register(GloraAdapter)
def _glora(adapter: GloraAdapter, weight: Tensor) -> Tensor:
    """The first layout in the file's type; the WebUI does not know its alpha."""
    if not adapter.old_layout or weight.ndim != 2 or adapter.branch is None:
        return adapter.delta_weight(weight).to(weight.dtype)
    up, down, b_up, b_down = (
        part.to(weight.device) for part in (adapter.up, adapter.down, adapter.branch.up, adapter.branch.down)
    )
    return (b_up @ b_down) + ((weight.to(up.dtype) @ up) @ down)


@delta_weight.register(OftAdapter)
def _oft(adapter: OftAdapter, weight: Tensor) -> Tensor:
    """Rotations in float32, their product with the weight in the weight's type."""
    turns = adapter.blocks if adapter.is_rotation else _rotations(adapter.blocks, adapter.constraint)
    parts = weight.reshape(len(turns), -1, *weight.shape[1:])
    merged = torch.einsum("knm,kn...->km...", turns.to(weight.device, weight.dtype), parts).flatten(0, 1)
    return _rescaled(merged, adapter.rescale) - weight


@delta_weight.register(BoftAdapter)
def _boft(adapter: BoftAdapter, weight: Tensor) -> Tensor:
    """As OFT, stage by stage."""
    merged, rest = weight, weight.shape[1:]
    for stage, turn in enumerate(_rotations(adapter.blocks, adapter.constraint).to(weight.device, weight.dtype)):
        distance = 2**stage * turn.shape[-1] // 2
        merged = merged.reshape(-1, 2, distance, *rest).transpose(1, 2).reshape(*turn.shape[:2], *rest)
        merged = torch.einsum("bij,bj...->bi...", turn, merged).reshape(-1, distance, 2, *rest)
        merged = merged.transpose(1, 2).reshape(weight.shape)
    return _rescaled(merged, adapter.rescale) - weight


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    skew, eye = blocks - blocks.transpose(-1, -2), torch.eye(blocks.shape[-1], device=blocks.device)
    if constraint:
        length = _norm(skew.flatten())
        limit = torch.tensor(constraint, dtype=skew.dtype)
        skew = skew * ((length.clamp(max=limit) + TINY) / (length + TINY))
    return torch.matmul(eye + skew, (eye - skew).float().inverse())


def _norm(tensor: Tensor, **options: Any) -> Tensor:
    untyped: Any = tensor
    return untyped.norm(**options)


def _rescaled(merged: Tensor, rescale: Tensor | None) -> Tensor:
    if rescale is None:
        return merged
    return rescale.reshape(-1, *[1] * (merged.ndim - 1)).to(merged) * merged


@delta_weight.register(DoraAdapter)
def _dora(adapter: DoraAdapter, weight: Tensor) -> Tensor:
    """The length of the inputs' columns, whatever the magnitudes' shape says; PEFT's are beyond the WebUI."""
    magnitude = adapter.magnitude
    if magnitude.ndim != weight.ndim or adapter.per_output != (len(magnitude) == magnitude.numel()):
        return adapter.delta_weight(weight).to(weight.dtype)
    updown = delta_weight(adapter.inner, weight)
    merged = updown + weight.to(updown.dtype)
    columns = merged.transpose(0, 1)
    length = _norm(columns.reshape(len(columns), -1), dim=1, keepdim=True)
    length = length.reshape(len(columns), *[1] * (weight.ndim - 1)).transpose(0, 1)
    return merged * (magnitude.to(updown) / length) - weight.to(updown.dtype)


@delta_weight.register(PaddedAdapter)
def _padded(adapter: PaddedAdapter, weight: Tensor) -> Tensor:
    """Zeros for the channels that are not known."""
    known = delta_weight(adapter.inner, weight[:, : adapter.channels])
    return torch.nn.functional.pad(known, (0, 0, 0, 0, 0, weight.shape[1] - adapter.channels))
