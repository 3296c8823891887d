"""torch.compile for each block; LoRAs are switched under it because they are written into the same storage.

The weights are inputs of the compiled graphs, so what is written into them counts from the next call on. Sizes of the
latents are symbols in the graphs: another resolution is no other graph.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch

from lib_lora.compile.attempt import NoGraphError
from lib_lora.compile.background import is_running
from lib_lora.compile.block import MOST_FORMS
from lib_lora.compile.blockwise import BlockwiseHandle
from lib_lora.compile.code_cache import CodeCache
from lib_lora.compile.forms import tensors_in, within
from lib_lora.compile.recorded import Recorded
from lib_lora.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from torch.fx import GraphModule

    from lib_lora.compile.forms import CallForm, Surroundings
    from lib_lora.compile.variants import Variant
    from lib_lora.core.layers import LayerRef

    Lowering = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]

FROZEN = (
    "torch._inductor.config.freezing is on, and a frozen graph would ignore every change of LoRAs without a word; "
    "switch it off (TORCHINDUCTOR_FREEZING=0)"
)

DISABLED = "torch.compile is switched off (TORCHDYNAMO_DISABLE=1); nothing is compiled"


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
            cuda_graphs: Record small blocks as CUDA graphs, for GPUs that wait for their launches.
            lowering: What makes code of a graph, in place of inductor.
        """
        self._cache = cache
        self._records = cuda_graphs
        self._lowering = lowering

    def prepare(self, model: nn.Module) -> BlockwiseHandle:
        """Blocks are compiled after their first call.

        Raises:
            CompileError: If inductor would freeze the weights, or the model has no blocks.
        """
        _refuse_freezing()
        cache = None if self._lowering else CodeCache(self._cache)
        compiler = _BlockCompiler(self._lowering or self._lower, cache, records=self._records)
        return BlockwiseHandle(model, self.name, compiler)

    def _lower(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        patches: dict[str, Any] = {"triton.cudagraphs": False}  # they would belong to the thread that compiles
        if hasattr(config, "fx_graph_cache"):
            patches["fx_graph_cache"] = True
        if _is_on_cpu(inputs):  # each call would reorder the convolutions' weights, and take up to twice the time
            patches["layout_optimization"] = False
        return cast("Callable[..., Any]", compile_fx(graph, inputs, config_patches=patches))


class _BlockCompiler:
    """Compiles in the background; where a picture is drawn, graphs are only ever looked up."""

    def __init__(self, lowering: Lowering, cache: CodeCache | None, *, records: bool) -> None:
        self._lowering, self._cache, self._records = lowering, cache, records
        self._graphs = 0
        # torch never forgets a backend, and this must not keep the model alive
        self._compiled = WeakKeyDictionary["Variant", "dict[Surroundings, _Compiled]"]()

    def build(self, block: Variant, form: CallForm) -> Callable[..., Any]:
        """Warm a block up with a call of this form.

        All forms that differ in shapes alone share one compiled function, which finds its graph.
        """
        if self._cache:
            self._cache.open()
        found = self._compiled.setdefault(block, {})
        compiled = found.setdefault(form.surroundings, _Compiled(block.eager, self._lower))
        args, kwargs = form.example()
        _mark_sizes((args, kwargs))
        try:
            with within(form.surroundings):
                compiled.warm_up(args, kwargs)
        except NoGraphError:
            raise (CompileError(DISABLED) if not self._graphs else RuntimeError("torch makes no graph of it")) from None
        if self._cache:
            self._cache.keep()
        return Recorded(compiled.run, block.module) if self._records else compiled.run

    def renew(self) -> bool:
        """Compile in an empty folder from now on."""
        return self._cache is not None and self._cache.suspect()

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """Graphs read the weights where they are written."""

    def _lower(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        _refuse_freezing()
        if not is_running():
            raise CompileError("the program ends")
        self._graphs += 1
        return self._lowering(graph, inputs)


class _Compiled:
    """A function with a code object of its own, and the graphs of it.

    torch keeps compiled graphs at the code object, which all blocks of a class share: each call would try the guards
    of all of them, and after eight (its limit) the rest would stay eager. By the name of the code it keeps which
    sizes have differed, which it makes symbols then.
    """

    def __init__(self, forward: Callable[..., Any], lower: Lowering) -> None:
        from torch import _dynamo
        from torch._C._dynamo import eval_frame

        dynamo = cast("Any", _dynamo)

        # defaults and no closure, for torch 2.1 never lets go of the cells of one
        def call(*args: Any, _forward: Any = forward, _is_compiling: Any = dynamo.is_compiling, **kwargs: Any) -> Any:
            if not _is_compiling():  # Python itself runs this line, for torch found no graph
                raise NoGraphError("torch.compile has no graph for it")
            return _forward(*args, **kwargs)

        call.__code__ = call.__code__.replace(co_name=f"call_{id(self)}")
        self._compile = cast("Any", torch).compile(call, backend=lower)
        self._run = dynamo.run(call)
        weakref.finalize(self, cast("Any", eval_frame).reset_code, call.__code__).atexit = False

    def warm_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile what this call needs; no picture waits for it, so that nobody's ``error_on_recompile`` counts."""
        from torch._dynamo import config

        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        with cast("Any", config).patch({"error_on_recompile": False, limit: MOST_FORMS}):
            self._compile(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Look a graph up.

        Raises:
            NoGraphError: If no graph serves this call, whatever it is that changed.
        """
        return self._run(*args, **kwargs)


def _is_on_cpu(inputs: Sequence[object]) -> bool:
    """Whether a graph computes there; sizes are among its inputs."""
    return any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in inputs)


def _mark_sizes(arguments: tuple[Any, ...]) -> None:
    """Height and width of pictures, and the length of texts, become symbols; batch and channels stay numbers.

    Symbols for all sizes make the compilation take twice as long.
    """
    from torch._dynamo import maybe_mark_dynamic

    for tensor in tensors_in(arguments):
        for size in {3: (1,), 4: (2, 3)}.get(tensor.ndim, ()):
            maybe_mark_dynamic(tensor, size)


def _refuse_freezing() -> None:
    from torch._inductor import config

    if config.freezing:
        raise CompileError(FROZEN)
