"""Where the untouched weights are kept while LoRAs are fused: on the device, in pinned RAM, or in the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from lib_lora.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.layers import LayerRef

StoreKind = Literal["auto", "device", "pinned", "checkpoint"]

HEADROOM = 1.25
"""The device must have this many times the bytes of the touched weights free before a copy is kept there."""


class BaseStore(Protocol):
    """Keeps the base weight of each touched layer, keyed by `LayerRef.key`."""

    @property
    def label(self) -> str:
        """Where the weights are, as the user is told it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds beside the model and the checkpoint's file."""
        ...

    @property
    def is_near(self) -> bool:
        """Whether the weights lie in the model's own memory, so that reading one costs no transfer."""
        ...

    def capture(self, layer: LayerRef, weight: Tensor) -> None:
        """Remember `weight`, which must be the untouched one. A layer that is known already is replaced."""
        ...

    def source(self, layer: LayerRef, like: Tensor) -> Tensor:
        """The base weight as it is kept, in the shape of `like`, on any device, of any dtype; not to be written to."""
        ...

    def get(self, layer: LayerRef, like: Tensor) -> Tensor:
        """The base weight in the shape, dtype and on the device of `like`; read it, never write to it."""
        ...

    def restore(self, layer: LayerRef, out: Tensor) -> None:
        """Copy the base weight to `out` without allocating memory on its device."""
        ...

    def restore_all(self, layers: Sequence[LayerRef], outs: Sequence[Tensor]) -> None:
        """`restore` for many."""
        ...

    def __contains__(self, key: object) -> bool:
        """Whether a layer of this key was captured."""
        ...

    def forget(self, key: str) -> None:
        """Free one layer."""
        ...


class CopyStore:
    """A copy of each touched weight in memory: on its own device, or in pinned RAM of the host."""

    def __init__(self, label: Literal["device", "pinned"]) -> None:
        self._label = label
        self._copies: dict[str, Tensor] = {}

    @property
    def label(self) -> str:
        """``device`` or ``pinned``."""
        return self._label

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())

    @property
    def is_near(self) -> bool:
        """Not if the copies are in pinned RAM."""
        return self._label == "device"

    def capture(self, layer: LayerRef, weight: Tensor) -> None:
        """Copy the weight."""
        if self._label == "device" or weight.device.type == "cpu":
            self._copies[layer.key] = weight.detach().clone()
        else:
            pinned = torch.empty_like(weight, device="cpu", pin_memory=True)
            self._copies[layer.key] = pinned.copy_(weight.detach())

    def source(self, layer: LayerRef, like: Tensor) -> Tensor:
        """The copy."""
        return self._copies[layer.key]

    def get(self, layer: LayerRef, like: Tensor) -> Tensor:
        """The copy itself where device and dtype agree, else a converted one."""
        return self._copies[layer.key].to(like.device, like.dtype, non_blocking=True)

    def restore(self, layer: LayerRef, out: Tensor) -> None:
        """Copy the copy back."""
        out.copy_(self._copies[layer.key], non_blocking=True)

    def restore_all(self, layers: Sequence[LayerRef], outs: Sequence[Tensor]) -> None:
        """Copy the copies back; on a GPU some dozens by one kernel."""
        copy_all(outs, [self._copies[layer.key] for layer in layers])

    def __contains__(self, key: object) -> bool:
        """Whether the layer was copied."""
        return key in self._copies

    def __len__(self) -> int:
        return len(self._copies)

    def forget(self, key: str) -> None:
        """Free the copy."""
        self._copies.pop(key, None)


class CheckpointStore:
    """The checkpoint's own file, memory-mapped: no memory beside the page cache.

    Every layer is compared with the live weight, bit for bit, when it is captured; one that differs (a merged VAE, a
    converted dtype that lost bits, other weights than the file's) is copied instead, so a restore is always right.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Args: tensors: `LayerRef.key` → the layer's weight in the mapped file."""
        self._tensors = tensors
        self._verified: set[str] = set()
        self._copies = CopyStore("device")

    @property
    def label(self) -> str:
        """``checkpoint``, and how many layers had to be copied."""
        copied = len(self._copies)
        return f"checkpoint ({copied} layers differ or are not in it, and are copied)" if copied else "checkpoint"

    @property
    def nbytes(self) -> int:
        """Bytes of the copied layers."""
        return self._copies.nbytes

    @property
    def is_near(self) -> bool:
        """No: the file is mapped into the host's memory."""
        return False

    def capture(self, layer: LayerRef, weight: Tensor) -> None:
        """Verify the file's weight, or copy the live one."""
        self.forget(layer.key)
        stored = self._tensors.get(layer.key)
        if stored is not None and stored.numel() == weight.numel() and _same_bits(_as(stored, weight), weight):
            self._verified.add(layer.key)
        else:
            self._copies.capture(layer, weight)

    def source(self, layer: LayerRef, like: Tensor) -> Tensor:
        """A view of the mapped file, or the copy."""
        if layer.key in self._verified:
            return self._tensors[layer.key].reshape(like.shape)
        return self._copies.source(layer, like)

    def get(self, layer: LayerRef, like: Tensor) -> Tensor:
        """A view of the mapped file where dtypes agree, else a converted copy that lives as long as it is used."""
        if layer.key in self._verified:
            return _as(self._tensors[layer.key], like)
        return self._copies.get(layer, like)

    def restore(self, layer: LayerRef, out: Tensor) -> None:
        """Copy from the mapped file, or from the copy where the file differs."""
        if layer.key in self._verified:
            out.copy_(self._tensors[layer.key].reshape(out.shape))
        else:
            self._copies.restore(layer, out)

    def restore_all(self, layers: Sequence[LayerRef], outs: Sequence[Tensor]) -> None:
        """One after the other."""
        for layer, out in zip(layers, outs, strict=True):
            self.restore(layer, out)

    def __contains__(self, key: object) -> bool:
        """Whether the layer was captured."""
        return key in self._verified or key in self._copies

    def forget(self, key: str) -> None:
        """Verify again at the next capture."""
        self._verified.discard(key)
        self._copies.forget(key)


def copy_all(outs: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its tensor; between tensors of one GPU and dtype some dozens by one kernel.

    Nobody waits for a GPU: what is asked of it next comes after, and sources in pinned RAM must stay as they are.
    """
    foreach: Any = torch.ops.aten._foreach_copy_  # has no types
    if outs and outs[0].device.type == "cuda":
        foreach(list(outs), list(sources), True)
        return
    for out, source in zip(outs, sources, strict=True):
        out.copy_(source, non_blocking=True)


def _as(stored: Tensor, like: Tensor) -> Tensor:
    return stored.reshape(like.shape).to(like.device, like.dtype)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of bytes: NaN equals itself, -0 is not 0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def choose_store(
    kind: StoreKind, weights: Sequence[Tensor], checkpoint: Mapping[str, Tensor] | None
) -> CopyStore | CheckpointStore:
    """Make the store for a model.

    Args:
        kind: ``auto`` takes the checkpoint where weights are in RAM and a file is given, a copy on the device where
            memory for it is free, and pinned RAM else.
        weights: The weights that may be touched.
        checkpoint: `LayerRef.key` → the layer's weight in the mapped file, where there is one.

    Raises:
        ModelError: If ``checkpoint`` is asked for and there is none.
    """
    if kind == "auto":
        kind = _best_kind(weights, checkpoint)
    if kind == "checkpoint":
        if checkpoint is None:
            raise ModelError("the base weights can not be kept in the checkpoint: no checkpoint file was given")
        return CheckpointStore(checkpoint)
    return CopyStore(kind)


def _best_kind(
    weights: Sequence[Tensor], checkpoint: Mapping[str, Tensor] | None
) -> Literal["device", "pinned", "checkpoint"]:
    device = weights[0].device if weights else torch.device("cpu")
    if device.type == "cpu":
        return "device" if checkpoint is None else "checkpoint"
    if device.type != "cuda":
        return "device"
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    return "device" if free > HEADROOM * needed else "pinned"
