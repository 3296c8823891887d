"""A block as it is at some time: a graph that was made of it serves as long as it is that way.

torch's own guards are not enough: before 2.4 they do not look into modules, and later they compile where a picture
waits. What changes blocks between pictures: FreeU's numbers, processors of attention, seamless tiles, merged tokens.
"""

from __future__ import annotations

from itertools import chain, compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from lib_lora.compile.forms import CallForm

INTERNAL = frozenset(vars(nn.Module()))
"""What torch keeps in each module; of these the parts and weights count, and whether it is in training."""
DTYPE = attrgetter("dtype")


class Variant:
    """A block with the parts, attributes, weights' places and code that it has now.

    Attributes:
        name: The block's in its model.
        module: The block.
        eager: Its forward as it was.
        asked: Forms of calls that are to be built.
        built: Form → compiled, not yet compared.
        trusted: Form → compiled, compared.
        reason: Why it stays eager, a clause, or ``""``.
    """

    def __init__(self, name: str, module: nn.Module, eager: Callable[..., Any]) -> None:
        """Look at the block.

        Args:
            name: In its model.
            module: The block.
            eager: Its forward.
        """
        self.name, self.module, self.eager = name, module, eager
        self.asked = set["CallForm"]()
        self.built: dict[CallForm, Callable[..., Any]] = {}
        self.trusted: dict[CallForm, Callable[..., Any]] = {}
        self.reason = ""
        self._parts = list(module.modules())
        self._attributes = [*map(vars, self._parts), *_vars_inside(self._parts)]
        self._were = [_copied(attributes) for attributes in self._attributes]
        self._children = [children for part in self._parts if (children := vars(part)["_modules"])]
        self._children_were = [dict(children) for children in self._children]
        self._weights: list[dict[str, Tensor | None]] = [
            weights for part in self._parts for kind in ("_parameters", "_buffers") if (weights := vars(part)[kind])
        ]
        self._places_were = self._places()
        self._there = [weight is not None for weight in self._all_weights()]
        self._dtypes_were = self._dtypes()
        self._code_was = self._code()

    @property
    def is_current(self) -> bool:
        """Whether the block is that way; weights may have other numbers, in the same tensors."""
        try:
            same = self._attributes == self._were and self._children == self._children_were
        except (RuntimeError, TypeError, ValueError):
            return False  # another tensor: it can not be compared with a word
        return (
            same
            and self._places() == self._places_were
            and self._dtypes() == self._dtypes_were
            and self._code() == self._code_was
        )

    def _all_weights(self) -> Iterator[Tensor | None]:
        return chain.from_iterable(weights.values() for weights in self._weights)

    def _places(self) -> list[int]:
        return list(map(id, self._all_weights()))

    def _dtypes(self) -> list[torch.dtype]:
        return list(map(DTYPE, compress(self._all_weights(), self._there)))

    def _code(self) -> tuple[list[type], list[Any]]:
        """Classes, which some programs replace at a module, and their forwards, which others replace in the class."""
        kinds: list[Any] = list(map(type, self._parts))
        return kinds, [kind.forward for kind in dict.fromkeys(kinds)]


def _vars_inside(parts: list[nn.Module]) -> Iterator[dict[str, Any]]:
    """The attributes of attributes that are plain objects, as processors of attention are."""
    for part in parts:
        for name, value in vars(part).items():
            if name not in INTERNAL and not isinstance(value, (type, torch.Tensor)) and not _is_code(value):
                yield from [vars(value)] if hasattr(value, "__dict__") else []


def _is_code(value: object) -> bool:
    """Whether it is a function, a method or the like."""
    return hasattr(value, "__code__") or hasattr(value, "__func__")


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared with them later: lists may be changed in place."""
    return {name: value if name in INTERNAL else _copy(value) for name, value in attributes.items()}


def _copy(value: Any) -> Any:
    if type(value) is dict:
        return {name: _copy(item) for name, item in cast("dict[object, object]", value).items()}
    return list(map(_copy, cast("list[object]", value))) if type(value) is list else value
