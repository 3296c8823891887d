"""The form of a call: what decides whether a graph that was compiled for one call serves another.

A form says enough to make a call like it: zeros of the same shapes warm a graph up, before the real call comes.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

PLAIN = (type(None), bool, int, float, str)
TENSORS = (Tensor, nn.Parameter)

Form: TypeAlias = "TensorForm | PlainForm | ListForm | DictForm"


class TensorForm(NamedTuple):
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_inference: bool


class PlainForm(NamedTuple):
    """A number, a word or None; ``1``, ``1.0`` and ``True`` differ."""

    kind: type
    value: object


class ListForm(NamedTuple):
    """A list or a tuple."""

    kind: type
    items: tuple[Form, ...]


class DictForm(NamedTuple):
    """A dictionary; its order counts."""

    names: tuple[object, ...]
    values: tuple[Form, ...]


class Surroundings(NamedTuple):
    """What a graph is specialised on beside its arguments.

    Attributes:
        inference: Whether the call is made in inference mode.
        autocast: dtype of the autocast that is on, or None.
        threads: Of the CPU.
        weight: dtype and device of the block's first parameter.
    """

    inference: bool
    autocast: torch.dtype | None
    threads: int
    weight: tuple[torch.dtype, torch.device] | None


class CallForm(NamedTuple):
    """A call without numbers."""

    args: Form
    kwargs: Form
    surroundings: Surroundings

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of this form, with zeros in them."""
        return make(self.args), make(self.kwargs)


class UnknownFormError(TypeError):
    """An argument is an object of some other kind."""


def call_form(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallForm | None:
    """The form of ``module(*args, **kwargs)`` here and now; None if an argument is of another kind."""
    try:
        return CallForm(form_of(args), form_of(kwargs), _surroundings(module))
    except UnknownFormError:
        return None


def form_of(value: object) -> Form:
    """The form of one argument.

    Raises:
        UnknownFormError: If it is no tensor, number, text, None, or list, tuple or dictionary of these.
    """
    kind = type(value)
    if kind in TENSORS:
        tensor = cast("Tensor", value)
        return TensorForm(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.is_inference())
    if kind in PLAIN:
        return PlainForm(kind, value)
    if kind in (list, tuple):
        return ListForm(kind, tuple(map(form_of, cast("tuple[object, ...]", value))))
    if kind is dict:
        items = cast("dict[object, object]", value)
        return DictForm(tuple(items), tuple(map(form_of, items.values())))
    raise UnknownFormError(kind.__name__)


def make(form: Form) -> Any:
    """Something of this form; tensors are zero."""
    if isinstance(form, TensorForm):
        with torch.inference_mode(form.is_inference):
            return _zeros(form)
    if isinstance(form, ListForm):
        return form.kind(map(make, form.items))
    if isinstance(form, DictForm):
        return dict(zip(form.names, map(make, form.values), strict=True))
    return form.value


def _zeros(form: TensorForm) -> Tensor:
    """Memory of its own wherever the form allows it: what is compiled for a view asks for a view."""
    zeros = torch.zeros_like(torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device))
    if zeros.stride() == form.strides:
        return zeros
    extent = 1 + sum((size - 1) * stride for size, stride in zip(form.shape, form.strides, strict=True))
    return zeros.new_zeros(extent).as_strided(form.shape, form.strides)


def copied(value: Any) -> Any:
    """Arguments of the same form with memory of their own, but for views that a copy would not be."""
    if isinstance(value, Tensor):
        copy = value.clone()
        return copy if copy.stride() == value.stride() else value
    if type(value) is dict:
        items = cast("dict[object, object]", value)
        return {name: copied(item) for name, item in items.items()}
    return type(value)(map(copied, cast("list[object]", value))) if type(value) in (list, tuple) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a value, in its lists, tuples and dictionaries too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in cast("dict[Any, Any]", value).values() if isinstance(value, dict) else cast("list[Any]", value):
            yield from tensors_in(item)


def _surroundings(module: nn.Module) -> Surroundings:
    weight = next(module.parameters(), None)
    kind = "cpu" if weight is None else weight.device.type
    place = None if weight is None else (weight.dtype, weight.device)
    return Surroundings(torch.is_inference_mode_enabled(), _autocast(kind), torch.get_num_threads(), place)


def _autocast(device: str) -> torch.dtype | None:
    """The dtype of the autocast that is on for a kind of device."""
    torch_ = cast("Any", torch)
    if hasattr(torch, "get_autocast_dtype"):
        return torch_.get_autocast_dtype(device) if torch_.is_autocast_enabled(device) else None
    if device == "cpu":  # torch before 2.4
        return torch_.get_autocast_cpu_dtype() if torch_.is_autocast_cpu_enabled() else None
    return torch_.get_autocast_gpu_dtype() if torch_.is_autocast_enabled() else None


@contextmanager
def within(surroundings: Surroundings) -> Generator[None]:
    """Another thread in the state of the one that made a call."""
    device = surroundings.weight[1].type if surroundings.weight else "cpu"
    if torch.get_num_threads() != surroundings.threads:
        torch.set_num_threads(surroundings.threads)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(surroundings.inference))
        stack.enter_context(torch.no_grad())
        if surroundings.autocast is not None:
            stack.enter_context(torch.autocast(device, surroundings.autocast))
        yield
