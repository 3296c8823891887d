"""Engines of one block in one form of call: how they run, and how weights get into them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lib_lora.compile.flat_calls import FlatBlock
    from lib_lora.compile.tensorrt_package import Package

TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""TensorRT's names of types."""
NUMBERS = {dtype: name for name, dtype in TYPES.items()}


class Place(NamedTuple):
    """Where an engine's weight comes from.

    Attributes:
        parameter: Name in the block.
        transposed: Whether the engine has the matrix the other way.
        dtype: In the engine.
    """

    parameter: str
    transposed: bool
    dtype: torch.dtype

    def numbers(self, weight: Tensor) -> Tensor:
        """The parameter as the engine has it: a view if it can be."""
        return (weight.t() if self.transposed else weight).to(self.dtype).contiguous()


Places = dict[str, dict[str, Place]]
"""Engine → weight of it → where that comes from."""


class EngineRunner(nn.Module):
    """One engine; takes the place of the package's module, which does not let others reach the engine."""

    def __init__(self, trt: Any, module: Any) -> None:
        """Load what was serialised.

        Raises:
            RuntimeError: If TensorRT refuses it.
        """
        super().__init__()
        self._trt = trt
        self._inputs: list[str] = list(module.input_binding_names)
        self._outputs: list[str] = list(module.output_binding_names)
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine(module.serialized_engine)
        if self.engine is None:
            raise RuntimeError("TensorRT can not load the engine that it has built")
        self._context = self.engine.create_execution_context()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run it on the current stream."""
        held = [tensor.contiguous() for tensor in inputs]
        for name, tensor in zip(self._inputs, held, strict=True):
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        results = [self._empty(name, held[0].device) for name in self._outputs]
        for name, tensor in zip(self._outputs, results, strict=True):
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run an engine")
        return results[0] if len(results) == 1 else tuple(results)

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Put numbers into the engine, from the device.

        Raises:
            RuntimeError: If TensorRT refuses them.
        """
        trt = self._trt
        refitter = trt.Refitter(self.engine, self._logger)
        for name, tensor in weights.items():
            kind = getattr(trt.DataType, NUMBERS[tensor.dtype])
            given = trt.Weights(kind, tensor.data_ptr(), tensor.numel())
            if not refitter.set_named_weights(name, given, trt.TensorLocation.DEVICE):
                raise RuntimeError(f"TensorRT takes no numbers for {name}")
        torch.cuda.current_stream().synchronize()  # they may be on their way into the weights still
        if not refitter.refit_cuda_engine():
            missing = ", ".join(list(refitter.get_missing_weights())[:3])
            raise RuntimeError(f"TensorRT could not refit an engine{f', it wants {missing} too' if missing else ''}")

    def _empty(self, name: str, device: torch.device) -> Tensor:
        dtype = TYPES[self.engine.get_tensor_dtype(name).name]
        return torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device=device)


class DirectEngines:
    """Engines that we run and refit ourselves: only what was touched, from where it is.

    Attributes:
        runners: Name of an engine → what runs it.
        places: Of all weights of the engines.
    """

    def __init__(self, package: Package, graph: Any, places: Places) -> None:
        self._graph = graph
        self.places = places
        self.runners = {name: EngineRunner(package.trt, getattr(graph, name)) for name in places}
        for name, runner in self.runners.items():
            setattr(graph, name, runner)

    def __call__(self, *tensors: Tensor) -> Any:
        """Run them."""
        return self._graph(*tensors)

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Bring these parameters of the block in.

        Raises:
            RuntimeError: If TensorRT refuses them.
        """
        for engine, places in self.places.items():
            found = {
                name: place.numbers(weights[place.parameter])
                for name, place in places.items()
                if place.parameter in weights
            }
            if found:
                self.runners[engine].refit(found)


class PackageEngines:
    """Engines of which we do not know where each weight comes from: the package finds out, and refits all."""

    def __init__(self, package: Package, graph: Any, program: Any, flat: FlatBlock) -> None:
        self._package, self._graph = package, graph
        self._program, self._flat = program, flat

    def __call__(self, *tensors: Tensor) -> Any:
        """Run them."""
        return self._graph(*tensors)

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Bring these parameters of the block in; the program shares its weights with the copy of the block."""
        self._flat.block.load_state_dict(dict(weights), strict=False)
        self._graph = self._package.refit(self._graph, self._program, in_place=True)


def find_parameters(
    package: Package, graph: Any, recorded: Mapping[str, Tensor], random: Mapping[str, Tensor]
) -> Places:
    """Where each engine's weights come from, told by their numbers.

    Args:
        package: torch_tensorrt.
        graph: With engines in it.
        recorded: Name in an engine → numbers.
        random: Parameter of the block → numbers, no two alike.
    """
    sizes: dict[int, list[str]] = {}
    for name, weight in random.items():
        sizes.setdefault(weight.numel(), []).append(name)
    found = {
        name: place
        for name, numbers in recorded.items()
        if (place := _place(numbers, {key: random[key] for key in sizes.get(numbers.numel(), ())}))
    }
    engines = {name: child for name, child in graph.named_children() if hasattr(child, "serialized_engine")}
    return {
        engine: {name: found[name] for name in _names(package.trt, child) if name in found}
        for engine, child in engines.items()
    }


def _names(trt: Any, module: Any) -> list[str]:
    """Weights that an engine has."""
    logger = trt.Logger(trt.Logger.WARNING)
    engine = trt.Runtime(logger).deserialize_cuda_engine(module.serialized_engine)
    return list(trt.Refitter(engine, logger).get_all_weights())


def _place(numbers: Tensor, candidates: Mapping[str, Tensor]) -> Place | None:
    flat = numbers.flatten()
    for name, weight in candidates.items():
        for transposed in (False, True) if weight.ndim == 2 else (False,):
            place = Place(name, transposed, numbers.dtype)
            if torch.equal(place.numbers(weight).flatten().to(flat.device), flat):
                return place
    return None
