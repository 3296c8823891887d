"""A block as a function from tensors to tensors: what else its calls hold is fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

if TYPE_CHECKING:
    from collections.abc import Callable

_TREES: Any = _pytree


class FlatBlock(nn.Module):
    """A block for calls of one form.

    Attributes:
        block: The block.
        PREFIX: What stands before the names of its parameters here.
    """

    PREFIX: ClassVar[str] = "block."

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the block once, to see what it gives."""
        super().__init__()
        self.block = block
        leaves, self._inputs = _TREES.tree_flatten((args, kwargs))
        self._fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        with torch.no_grad():
            _, self._outputs = _TREES.tree_flatten(block(*args, **kwargs))

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of a call, in order."""
        return tuple(leaf for leaf in _TREES.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Parameters as the block calls them."""
        return {name: weight.detach() for name, weight in self.block.named_parameters()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the block gives for them, its tensors in order."""
        given = iter(tensors)
        leaves = [next(given) if fixed is None else fixed[0] for fixed in self._fixed]
        args, kwargs = _TREES.tree_unflatten(leaves, self._inputs)
        return tuple(_TREES.tree_leaves(self.block(*args, **kwargs)))

    def call(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As the block is called, by what was made of `forward`."""
        results = run(*self.tensors(args, kwargs))
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        return _TREES.tree_unflatten(results, self._outputs)
