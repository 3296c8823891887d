"""What every LoRA algorithm offers, whatever its mathematics."""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from lib_lora.core.workspace import Workspace
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import TypeGuard

    from torch import Tensor


AUTOCAST = ("cpu", "cuda", "xpu")
"""Devices whose products autocast can change."""


class Factors(NamedTuple):
    """A low-rank update as the file has it: ΔW = scale · up @ down.

    The scale stays a number, so that all factors of a sum are folded into `up` in one multiplication.

    Attributes:
        up: (out, rank), in the file's dtype.
        down: (rank, in) or (rank, in·kh·kw), in the file's dtype.
        scale: alpha / rank.
    """

    up: Tensor
    down: Tensor
    scale: float


class WeightAdapter(Protocol):
    """The update of one parameter by one network, at strength 1.

    A parameter is a weight, (out, in) or (out, in, kh, kw), or a vector, (out,): a bias or a norm's weight.
    """

    @property
    def algorithm(self) -> str:
        """Short name of the mathematics, such as ``LoRA`` or ``LoHa``."""
        ...

    @property
    def rank(self) -> int:
        """Rank of the update; for algorithms without one, 1 or the size of a block."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """What the adapter says of its weight: (out, in, …); shorter or empty where it does not tell."""
        ...

    @property
    def row_step(self) -> int:
        """Rows of ΔW that are computed together: 1, the size of a block, or 0 for all of them."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on the weight it is added to."""
        ...

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ΔW has the shape of a parameter."""
        ...

    def shape_text(self) -> str:
        """ΔW's shape as the user is told it, such as ``(320, 768)``."""
        ...

    def bound(self, base_peak: float = 1.0) -> float:
        """An upper bound of max |ΔW|; not finite if a tensor of the adapter holds NaN or infinity.

        Args:
            base_peak: An upper bound of max |W0|, for algorithms that depend on it.
        """
        ...

    def delta_weight(self, base: Tensor) -> Tensor:
        """ΔW at strength 1.

        Args:
            base: The untouched parameter in any floating dtype; algorithms that do not depend on it read its shape
                and device only.

        Returns:
            float32, of the shape and on the device of `base`.
        """
        ...

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · ΔW[rows].

        Args:
            total: (rows, in·kh·kw) float32; a vector's is (rows, 1). Its rows may lie apart.
            base: The whole untouched parameter in any floating dtype.
            rows: Start and stop, multiples of `row_step`.
            factor: All strengths in one number.
            workspace: Scratch memory.
        """
        ...


class LowRankAdapter(WeightAdapter, Protocol):
    """An adapter whose ΔW is a product of two small matrices, so that many can be stacked into one GEMM."""

    def factors(self) -> Factors:
        """The two matrices and their scale."""
        ...

    def sliced(self, rank: int) -> LowRankAdapter:
        """The first `rank` ranks alone, at the scale of the whole (DyLoRA, ``dyn=``)."""
        ...


class DenseAdapter:
    """What adapters share whose ΔW is computed by `add_to`."""

    row_step = 1
    needs_base = False
    rank = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ΔW, (out, in·kh·kw) where the kernel is not known apart."""
        raise NotImplementedError

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ΔW fills a parameter of `shape`; a 1x1 convolution and a Linear are alike."""
        own = self.shape
        return own[0] == shape[0] and math.prod(own) == math.prod(shape)

    def shape_text(self) -> str:
        """ΔW's shape."""
        return str(self.shape)

    def delta_weight(self, base: Tensor) -> Tensor:
        """ΔW in float32, of the shape and on the device of `base`."""
        total = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
        with full_precision(base.device):
            self.add_to(matrix(total), base, slice(0, len(base)), 1.0, Workspace())
        return total

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """See `WeightAdapter.add_to`."""
        raise NotImplementedError


def is_low_rank(adapter: WeightAdapter) -> TypeGuard[LowRankAdapter]:
    """Whether an adapter has factors; asked once for each class, because a switch asks some thousand times."""
    return _has_factors(type(adapter))


@functools.cache
def _has_factors(kind: type) -> bool:
    return callable(getattr(kind, "factors", None))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: a host may load and apply LoRAs under it, and every product would be rounded to half precision.

    On a GPU also `exact_products`.
    """
    if device.type not in AUTOCAST:
        return nullcontext()
    autocast_off = torch.autocast(device.type, enabled=False)
    if device.type != "cuda":
        return autocast_off
    both = ExitStack()
    both.enter_context(autocast_off)
    both.enter_context(exact_products(device))
    return both


def exact_products(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU: no TF32, and no sums in half precision, which a host may have allowed for the sake of its pictures."""
    return _cublas_as_told() if device.type == "cuda" else nullcontext()


@contextmanager
def _cublas_as_told() -> Generator[None]:
    matmul: Any = torch.backends.cuda.matmul  # its attributes are made by hand
    before = {name: getattr(matmul, name) for name in _shortcuts()}
    try:
        for name, exact in _shortcuts().items():
            setattr(matmul, name, exact)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


@functools.cache
def _shortcuts() -> dict[str, object]:
    """What may cost bits in a product → how it is forbidden; torch 2.1 knows less of it than 2.13."""
    wanted = {
        "allow_fp16_reduced_precision_reduction": False,
        "allow_bf16_reduced_precision_reduction": False,
        "allow_fp16_accumulation": False,
    }
    tf32 = ("fp32_precision", "ieee") if _is_known("fp32_precision") else ("allow_tf32", False)
    return dict([*((name, value) for name, value in wanted.items() if _is_known(name)), tf32])


def _is_known(name: str) -> bool:
    try:
        return getattr(torch.backends.cuda.matmul, name) is not None
    except (AttributeError, AssertionError):  # the second is what torch 2.1 says
        return False


def matrix(parameter: Tensor) -> Tensor:
    """A parameter as (out, everything else); a vector as (out, 1). A view where its memory allows."""
    return parameter.reshape(parameter.shape[0], -1)


def wide(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in float32 on the device of `like`."""
    return tensor.to(like.device, torch.float32)


def norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in float32 or wider; not finite if a number is not."""
    linalg: Any = torch.linalg  # has no types
    values = tensor.float() if tensor.element_size() == 1 else tensor
    return linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)).item()


def peak(tensor: Tensor) -> float:
    """Max |t|; NaN if a number is NaN."""
    return tensor.float().abs().max().item()


def number(tensor: Tensor, role: str) -> float:
    """A tensor that must hold one finite number.

    Raises:
        AdapterError: If it has another shape than () or (1,), or is not finite.
    """
    if tensor.shape not in ((), (1,)):
        raise AdapterError(f"{role} is a tensor of shape {tuple(tensor.shape)}, not one number")
    if not math.isfinite(value := tensor.float().item()):
        raise AdapterError(f"{role} is {value}, not a finite number")
    return value


def scale_of(tensors: Mapping[str, Tensor], rank: int | None, default_alpha: float | None) -> float:
    """The layer's own scale, else alpha / rank, else 1.

    Args:
        tensors: Role → tensor of one layer; ``scale`` and ``alpha`` are read.
        rank: Rank of the layer, or None where nothing is factored and alpha says nothing.
        default_alpha: Alpha of a layer that has none, or None for its rank.

    Raises:
        AdapterError: If one of them is not one finite number.
    """
    if "scale" in tensors:
        return number(tensors["scale"], "scale")
    alpha = number(tensors["alpha"], "alpha") if "alpha" in tensors else default_alpha
    return 1.0 if alpha is None or rank is None else alpha / rank


def check_rank(*factors: Tensor) -> None:
    """Refuse factors of rank 0.

    Raises:
        AdapterError: If a factor has no elements.
    """
    if any(factor.numel() == 0 for factor in factors):
        raise AdapterError(f"rank 0: {', '.join(str(tuple(factor.shape)) for factor in factors)}")


def fold_core(core: Tensor, down: Tensor) -> Tensor:
    """Tucker's core times down: (r, r, kh, kw) and (r, in) → (r, in·kh·kw), float32."""
    with full_precision(core.device):
        return torch.einsum("ijhw,jq->iqhw", core.float(), down.float()).flatten(1)
