"""Each block as TensorRT engines, whose weights are refitted from the device when LoRAs are switched.

Needs an NVIDIA GPU, torch built for it, and torch_tensorrt with the TensorRT that belongs to it. An engine is built of
a copy of the block with random numbers: so each weight of the engine is told by its numbers, and building does not meet
a switch that happens meanwhile. Then the block's own weights are brought in.
"""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from lib_lora.compile.attempt import Failure, attempt
from lib_lora.compile.blockwise import BlockwiseHandle
from lib_lora.compile.engines import DirectEngines, PackageEngines, find_parameters
from lib_lora.compile.flat_calls import FlatBlock
from lib_lora.compile.forms import within
from lib_lora.compile.tensorrt_cache import cache_folder, engine_cache
from lib_lora.compile.tensorrt_package import load_package, recorded_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from lib_lora.compile.forms import CallForm
    from lib_lora.compile.tensorrt_package import Package
    from lib_lora.compile.variants import Variant
    from lib_lora.core.layers import LayerRef

SEED = 7
SPREAD = 0.02
"""Of the random numbers: about that of a trained model's, so that no sum overflows."""


class TensorRT:
    """torch_tensorrt.

    Attributes:
        name: ``tensorrt``.
    """

    name = "tensorrt"

    def __init__(self, cache: Path | None = None) -> None:
        """A backend; nothing is imported yet.

        Args:
            cache: Folder in which engines survive a restart; None for no such folder.
        """
        self._cache = cache

    def prepare(self, model: nn.Module) -> BlockwiseHandle:
        """Blocks are compiled after their first call.

        Raises:
            CompileError: If TensorRT can not be used here, or the model has no blocks.
        """
        return BlockwiseHandle(model, self.name, EngineBuilder(load_package(), self._cache))


class EngineBuilder:
    """Builds engines in the background's thread, and refits them in the session's."""

    def __init__(self, package: Package, cache: Path | None, *, direct: bool = True) -> None:
        """Nothing is built yet.

        Args:
            package: torch_tensorrt.
            cache: Folder for engines, or None.
            direct: Whether engines whose weights are all known are refitted by us, not by the package.
        """
        self._package, self._cache, self._direct = package, cache, direct
        self._lock = threading.Lock()
        self._built: list[Built] = []

    @property
    def built(self) -> tuple[Built, ...]:
        """All that were built."""
        return tuple(self._built)

    def build(self, block: Variant, form: CallForm) -> Callable[..., Any]:
        """Engines for calls of one form; parts that TensorRT can not compute are left to torch.

        Raises:
            RuntimeError: If other code replaced the block's forward. What the package raises passes through.
        """
        args, kwargs = form.example()
        with within(form.surroundings):
            flat = FlatBlock(_random_copy(block), args, kwargs)
            program = torch.export.export(flat, flat.tensors(args, kwargs), strict=False)
            engines = self._engines(program, flat, form)
        with self._lock:  # what is written from here on is told to `weights_changed`
            engines.refit(_weights(block.module))
            self._built.append(Built(block.module, engines))
        return partial(flat.call, engines)

    def renew(self) -> bool:
        """Engines of the cache are checked one by one."""
        return False

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """Refit the engines in which these layers are, with nothing but them where TensorRT allows."""
        touched = {(id(layer.module), layer.attribute) for layer in layers}
        with self._lock:
            for built in self._built:
                if weights := built.among(touched):
                    built.engines.refit(weights)

    def _engines(self, program: Any, flat: FlatBlock, form: CallForm) -> DirectEngines | PackageEngines:
        tensors = flat.tensors(*form.example())
        options: dict[str, Any] = {
            "arg_inputs": tensors,
            "immutable_weights": False,
            "require_full_compilation": False,
            "min_block_size": 1,
        }
        with recorded_weights(self._package) as recorded:
            graph = self._compile(program, options, cache_folder(self._cache, flat.block, form, self._package))
        random = flat.parameters_by_name()
        found = find_parameters(self._package, graph, recorded, random)
        known = {place.parameter for engine in found.values() for place in engine.values()}
        if self._direct and known == _used(program):
            return DirectEngines(self._package, graph, found)
        return PackageEngines(self._package, graph, program, flat)

    def _compile(self, program: Any, options: dict[str, Any], folder: Path | None) -> Any:
        """The graph with engines in it; where one from the cache does not fit, all are built anew."""
        if folder is None:
            return self._package.compile(program, **options)
        cache = engine_cache(self._package, folder)
        known: dict[str, Any] = {**options, "cache_built_engines": True, "custom_engine_cache": cache}
        graph = attempt(partial(self._package.compile, program, reuse_cached_engines=True, **known))
        if isinstance(graph, Failure):
            return self._package.compile(program, reuse_cached_engines=False, **known)
        return graph


class Built:
    """Engines, and the block whose weights they have.

    Attributes:
        engines: For calls of one form.
    """

    def __init__(self, module: nn.Module, engines: DirectEngines | PackageEngines) -> None:
        self.engines = engines
        self._module = module
        parts = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
        self._places: dict[tuple[int, str], str] = {
            (id(part), attribute): f"{path}.{attribute}".lstrip(".")
            for path, part in parts
            for attribute, _ in part.named_parameters(recurse=False)
        }

    def weights(self) -> dict[str, Tensor]:
        """Name → weight as it is now, of the whole block."""
        return _weights(self._module)

    def among(self, touched: Iterable[tuple[int, str]]) -> Mapping[str, Tensor]:
        """Name → weight as it is now, of those that are in this block."""
        names = {self._places[place] for place in touched if place in self._places}
        return {name: weight for name, weight in self.weights().items() if name in names}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def _random_copy(block: Variant) -> nn.Module:
    """The block with a forward and weights of its own, random ones, no two of which are alike.

    Raises:
        RuntimeError: If other code replaced its forward.
    """
    if getattr(block.eager, "__func__", None) is not type(block.module).forward:
        raise RuntimeError(f"other code replaced the forward of {block.name}")
    copied = copy.deepcopy(block.module)
    vars(copied).pop("forward", None)
    generator = torch.Generator().manual_seed(SEED)
    numbers = {
        name: (torch.randn(weight.shape, generator=generator) * SPREAD).to(weight)
        for name, weight in copied.named_parameters()
    }
    copied.load_state_dict(numbers, strict=False)
    return copied.requires_grad_(False)


def _used(program: Any) -> set[str]:
    """Parameters that decide what the program computes, as the block calls them."""
    named: dict[str, str] = program.graph_signature.inputs_to_parameters
    return {
        named[node.name].removeprefix(FlatBlock.PREFIX)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in named and node.users
    }
