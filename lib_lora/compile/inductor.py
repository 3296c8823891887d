"""torch.compile for each block; LoRAs are switched under it because they are written into the same storage.

The weights are inputs of the compiled graphs, so what is written into them counts from the next call on. Sizes of the
latents are symbols in the graphs: another resolution is no other graph.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch

from lib_lora.compile.blockwise import BlockwiseHandle
from lib_lora.compile.forms import tensors_in, within
from lib_lora.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.fx import GraphModule

    from lib_lora.compile.block import Block
    from lib_lora.compile.forms import CallForm
    from lib_lora.core.layers import LayerRef

    Lowering = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FROZEN = (
    "torch._inductor.config.freezing is on, and a frozen graph would ignore every change of LoRAs without a word; "
    "switch it off (TORCHINDUCTOR_FREEZING=0)"
)


class Inductor:
    """torch.compile.

    Attributes:
        name: ``inductor``.
    """

    name = "inductor"

    def __init__(
        self, cache: Path | None = None, *, cuda_graphs: bool = False, lowering: Lowering | None = None
    ) -> None:
        """A backend; nothing is compiled yet.

        Args:
            cache: Folder in which compiled code survives a restart; None for torch's own, a temporary one. A folder
                that TORCHINDUCTOR_CACHE_DIR names goes before.
            cuda_graphs: Record each block as a CUDA graph, for GPUs that wait for their launches.
            lowering: What makes code of a graph, in place of inductor.
        """
        self._cache = cache
        self._options: dict[str, Any] = {"triton.cudagraphs": True} if cuda_graphs else {}
        self._lowering = lowering

    def prepare(self, model: nn.Module) -> BlockwiseHandle:
        """Blocks are compiled after their first call.

        Raises:
            CompileError: If inductor would freeze the weights, torch is too old for CUDA graphs, or the model has no
                blocks.
        """
        _refuse_freezing()
        if self._options and not hasattr(torch.compiler, "cudagraph_mark_step_begin"):
            raise CompileError(f"torch {torch.__version__} is too old for CUDA graphs; compile without them.")
        if self._cache is not None and _is_temporary(os.environ.get(CACHE_VARIABLE)):
            os.environ[CACHE_VARIABLE] = str(self._cache)
        return BlockwiseHandle(model, self.name, _BlockCompiler(self._lowering or self._lower, self._options))

    def _lower(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        known = {"fx_graph_cache": True} if hasattr(config, "fx_graph_cache") else {}
        return cast("Callable[..., Any]", compile_fx(graph, inputs, config_patches={**known, **self._options}))


class _BlockCompiler:
    """Counts what is compiled, and when.

    Attributes:
        recompiles: Graphs that were compiled in a call, for a guard of all that were there had failed.
    """

    def __init__(self, lowering: Lowering, options: dict[str, Any]) -> None:
        self.recompiles = 0
        self._lowering = lowering
        self._copies = bool(options)
        self._graphs = 0
        self._builder: int | None = None
        # torch never forgets a backend, and this must not keep the model alive
        self._compiled = WeakKeyDictionary["Block", "Callable[..., Any]"]()

    def build(self, block: Block, form: CallForm) -> Callable[..., Any]:
        """Warm a block up with a call of this form; all forms share one compiled function, which finds its graph."""
        if block not in self._compiled:
            own = _with_own_code(block.eager)
            self._compiled[block] = cast("Any", torch).compile(own, backend=self._lower)
        compiled = self._compiled[block]
        from torch._dynamo import config

        exempt = cast("Any", config).patch(error_on_recompile=False)  # no picture waits for this one
        args, kwargs = form.example()
        _mark_sizes((args, kwargs))
        self._builder = threading.get_ident()
        try:
            with within(form.surroundings), exempt:
                compiled(*args, **kwargs)
        finally:
            self._builder = None
        if not self._graphs:
            raise CompileError("torch.compile is switched off (TORCHDYNAMO_DISABLE=1); nothing is compiled")
        return _copying(compiled) if self._copies else compiled

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """Graphs read the weights where they are written."""

    def _lower(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        _refuse_freezing()
        self._graphs += 1
        self.recompiles += threading.get_ident() != self._builder
        return self._lowering(graph, inputs)


def _with_own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    torch keeps compiled graphs at the code object, which all blocks of a class share: each call would try the guards
    of all of them, and after eight (its limit) the rest would stay eager.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def _mark_sizes(arguments: tuple[Any, ...]) -> None:
    """Height and width of pictures, and the length of texts, become symbols; batch and channels stay numbers.

    Symbols for all sizes make the compilation take twice as long.
    """
    from torch._dynamo import maybe_mark_dynamic

    for tensor in tensors_in(arguments):
        for size in {3: (1,), 4: (2, 3)}.get(tensor.ndim, ()):
            maybe_mark_dynamic(tensor, size)


def _copying(recorded: Callable[..., Any]) -> Callable[..., Any]:
    """A CUDA graph writes its results to the same memory each time, and a UNet keeps them for its later blocks."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return _copy(recorded(*args, **kwargs))

    return call


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value


def _is_temporary(cache: str | None) -> bool:
    """Whether nobody chose this folder: torch writes its own choice into the variable when it is first asked."""
    return cache is None or Path(cache).parent == Path(tempfile.gettempdir())


def _refuse_freezing() -> None:
    from torch._inductor import config

    if config.freezing:
        raise CompileError(FROZEN)
