"""torch_tensorrt and tensorrt for computers without a GPU: the calls of the real ones, checked, computed by torch.

Engines read and write memory through the addresses that they are given, as the real ones do, and hold weights of their
own: linear layers' the other way round, as the real package folds them.
"""

from __future__ import annotations

import ctypes
import json
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from signatures import signature
from torch import nn

from lib_lora.compile.engines import TYPES
from lib_lora.compile.tensorrt_package import Package

if TYPE_CHECKING:
    from collections.abc import Callable

RECORD = json.loads((Path(__file__).parent / "golden/torch_tensorrt_signatures.json").read_text(encoding="utf-8"))


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called only as the real one can be called."""
    real = signature(RECORD["signatures"][name])

    def call(*args: Any, **kwargs: Any) -> Any:
        real.bind(*args, **kwargs)
        unknown = kwargs.keys() - real.parameters.keys()
        assert not unknown, f"{name} of {RECORD['version']} has no {unknown}"
        return function(*args, **kwargs)

    return call


def take(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A copy of the numbers at an address."""
    result = torch.empty(shape, dtype=dtype)
    ctypes.memmove(result.data_ptr(), address, result.nbytes)
    return result


class Engine:
    """Weights of its own, and a program that computes with them."""

    def __init__(self, spec: SimpleNamespace) -> None:
        self.spec = spec
        self.weights = dict(spec.weights)

    def create_execution_context(self) -> Context:
        return Context(self)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        kinds = {dtype: kind for kind, dtype in TYPES.items()}
        return SimpleNamespace(name=kinds[self.spec.outputs[name].dtype])

    def run(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        state = {
            parameter: (self.weights[name].t() if turned else self.weights[name])
            for name, (parameter, turned) in self.spec.places.items()
        }
        with torch.no_grad():
            return torch.func.functional_call(self.spec.module, state, tuple(inputs))


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return shape == tuple(self.engine.spec.inputs[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.engine.spec.outputs[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        given = self.engine.spec.inputs.items()
        results = self.engine.run([take(self.addresses[name], like.shape, like.dtype) for name, like in given])
        for name, result in zip(self.engine.spec.outputs, results, strict=True):
            plain = result.contiguous()
            ctypes.memmove(self.addresses[name], plain.data_ptr(), plain.nbytes)
        return True


class Refitter:
    def __init__(self, engine: Engine, logger: object) -> None:
        self.engine, self.new = engine, {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.weights)

    def set_named_weights(self, name: str, weights: SimpleNamespace, location: str) -> bool:
        known = self.engine.weights.get(name)
        self.engine.spec.locations.add(location)
        if known is None or known.numel() != weights.size:
            return False
        self.new[name] = take(weights.address, tuple(known.shape), TYPES[weights.type])
        return True

    def refit_cuda_engine(self) -> bool:
        self.engine.spec.refits.append(sorted(self.new))
        self.engine.weights.update(self.new)
        return True

    def get_missing_weights(self) -> list[str]:
        return []


class FakeTensorRT:
    """The two packages.

    Attributes:
        builds: Engines that were built, not taken from a cache.
        refits: Names of weights, for each refit of an engine.
        locations: From where weights were taken.
        package_refits: Refits by the package's own function.
        hides: Whether no weight is recorded, as of one that went through an unknown folding.
        fault: Raised by compile.
    """

    def __init__(self) -> None:
        self.builds = self.package_refits = 0
        self.refits: list[list[str]] = []
        self.locations: set[str] = set()
        self.hides = False
        self.fault: Exception | None = None
        self.specs: dict[bytes, SimpleNamespace] = {}
        self.trt = SimpleNamespace(
            Logger=Logger,
            Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=self.load),
            Refitter=Refitter,
            Weights=lambda kind, address, size: SimpleNamespace(type=kind, address=address, size=size),
            DataType=SimpleNamespace(**{name: name for name in TYPES}),
            TensorLocation=SimpleNamespace(DEVICE="DEVICE", HOST="HOST"),
        )

    def package(self) -> Package:
        compile_ = checked("dynamo.compile", self.compile)
        refit = checked("dynamo.refit_module_weights", self.refit)
        return Package(self.trt, compile_, refit, BaseEngineCache, ConversionContext, (RECORD["version"], "11.0.0"))

    def load(self, serialized: bytes) -> Engine | None:
        return Engine(self.specs[serialized]) if serialized in self.specs else None

    def compile(self, program: Any, **options: Any) -> nn.Module:
        if self.fault:
            raise self.fault
        assert options["immutable_weights"] is False
        cache = options.get("custom_engine_cache")
        blob = cache.check("graph" * 40) if cache and options["reuse_cached_engines"] else None
        spec = self._spec(program, options["arg_inputs"])
        if blob is None:
            self.builds += 1
            blob = uuid.uuid4().bytes
            if cache:
                cache.insert("graph" * 40, blob)
        else:
            assert len(blob) == 16
        self.specs[blob] = spec
        return Graph(blob, spec)

    def refit(self, graph: nn.Module, program: Any, in_place: bool = False) -> nn.Module:
        assert in_place
        self.package_refits += 1
        fresh = self._spec(program, tuple(graph.spec.inputs.values()))
        graph.own = Engine(fresh)
        return graph

    def _spec(self, program: Any, inputs: tuple[torch.Tensor, ...]) -> SimpleNamespace:
        module = program.module()
        context = ConversionContext()
        weights, places = {}, {}
        for parameter, weight in module.named_parameters():
            turned = weight.ndim == 2
            name = f"[CONSTANT]-[aten_ops]-[{parameter}] KERNEL"
            weights[name] = (weight.t() if turned else weight).detach().contiguous().clone()
            places[name] = (parameter, turned)
            if not self.hides:
                context.record_weight(name, weights[name])
        with torch.no_grad():
            outputs = module(*inputs)
        return SimpleNamespace(
            module=module,
            weights=weights,
            places=places,
            inputs={f"in_{index}": tensor for index, tensor in enumerate(inputs)},
            outputs={f"out_{index}": tensor for index, tensor in enumerate(outputs)},
            refits=self.refits,
            locations=self.locations,
        )


class Logger:
    WARNING = 2

    def __init__(self, level: int) -> None:
        self.level = level


class TorchTensorRTModule(nn.Module):
    """What the package puts into a graph; its engine is out of reach."""

    def __init__(
        self, serialized_engine: bytes, input_binding_names: list[str], output_binding_names: list[str]
    ) -> None:
        super().__init__()
        self.serialized_engine = serialized_engine
        self.input_binding_names, self.output_binding_names = input_binding_names, output_binding_names


class Graph(nn.Module):
    """A graph of one engine."""

    def __init__(self, blob: bytes, spec: SimpleNamespace) -> None:
        super().__init__()
        make = checked("TorchTensorRTModule", TorchTensorRTModule)
        self._run_on_acc_0 = make(
            serialized_engine=blob, input_binding_names=list(spec.inputs), output_binding_names=list(spec.outputs)
        )
        self.spec = spec
        self.own = Engine(spec)

    def forward(self, *tensors: torch.Tensor) -> Any:
        if isinstance(self._run_on_acc_0, TorchTensorRTModule):
            return self.own.run(list(tensors))
        return self._run_on_acc_0(*tensors)


class BaseEngineCache:
    def insert(self, hash: str, entry: bytes, *args: Any, **kwargs: Any) -> None:  # noqa: A002
        self.save(hash, entry, *args, **kwargs)

    def check(self, hash: str, *args: Any, **kwargs: Any) -> bytes | None:  # noqa: A002
        return self.load(hash, *args, **kwargs)


class ConversionContext:
    def record_weight(self, name: str, weight: torch.Tensor) -> None:
        pass
