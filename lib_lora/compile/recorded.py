"""Compiled blocks as CUDA graphs, for GPUs that wait for their launches. Written from torch's source, not run yet.

inductor's own graphs (``triton.cudagraphs``) belong to the thread of their first call, here the one that compiles, and
must not be replayed in another; so a graph is recorded where it is replayed, of code that was compiled without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from lib_lora.compile.forms import copied, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

MOST_ELEMENTS = 1 << 21
"""Of all arguments: where they are larger the GPU computes longer than launches take, and each graph has its memory."""
WARM_UPS = 3


class Recorded:
    """What was compiled for calls of one form, recorded in the first of them.

    Weights are read where they are, so LoRAs may be written there; where they are moved, it is recorded again.
    """

    def __init__(self, compiled: Callable[..., Any], module: nn.Module) -> None:
        """Nothing is recorded yet.

        Args:
            compiled: Takes the arguments of the form.
            module: Whose weights it reads.
        """
        self._compiled, self._module = compiled, module
        self._fits: bool | None = None
        self._places: list[int] = []
        self._graph: Any = None
        self._arguments = self._result = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block computes, in memory of its own: a UNet keeps results for its later blocks."""
        if self._fits is None:
            self._fits = _fits((args, kwargs))
        if not self._fits:
            return self._compiled(*args, **kwargs)
        places = [weight.data_ptr() for weight in self._module.parameters()]
        if places != self._places:
            self._record(args, kwargs)
            self._places = places
        cast("Any", torch)._foreach_copy_(list(tensors_in(self._arguments)), list(tensors_in((args, kwargs))))
        self._graph.replay()
        return _cloned(self._result)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._graph, self._arguments = torch.cuda.CUDAGraph(), copied((args, kwargs))
        given, named = self._arguments
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self._compiled(*given, **named)
        torch.cuda.current_stream().wait_stream(beside)
        # other threads may go on to allocate memory
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = self._compiled(*given, **named)


def _fits(arguments: Any) -> bool:
    """Whether it pays, and a copy of the arguments is of the same form."""
    tensors = list(tensors_in(arguments))
    size = sum(tensor.numel() for tensor in tensors)
    return size <= MOST_ELEMENTS and all(tensor.is_cuda and copied(tensor) is not tensor for tensor in tensors)


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value
