"""ONNX on the disk: a graph with its weights inside, or beside a .safetensors file that holds them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.compile.unet_inputs import PREFIX
from lib_lora.core.files import read_header
from lib_lora.core.header import CHECKPOINT_LIMITS
from lib_lora.core.saving import LazyTensor, save_bytes, save_tensors
from lib_lora.errors import JobError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.compile.unet_inputs import Tensors

GRAPH, WEIGHTS = "model.onnx", "model.safetensors"
MOST_BYTES = (2 << 30) - (64 << 20)
"""Of weights in one file: protobuf ends at 2 GiB, and the graph needs room too."""
SMALL_BYTES = 1024
"""Constants up to this size stay in the graph, if they are no weights."""


class CannotRunError(Exception):
    """A file is well formed, and there is nothing here that runs it; the reason is a clause."""


def save_onnx(program: Any, path: Path) -> None:
    """Write a translated program.

    Args:
        program: A ``torch.onnx.ONNXProgram``; its weights are taken out where `path` is a folder.
        path: An existing folder, or a file to be.

    Raises:
        JobError: If the weights are too large for one file.
    """
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # which lines of whose code each came from, with folders of this computer
    if path.is_dir():
        _save_apart(program.model, path)
        return
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size > MOST_BYTES:
        raise JobError(
            f"{path.name} can not hold {size / 1e9:.1f} GB, an ONNX file ends at 2 GB; "
            "give --out a name without a suffix, for a folder of a graph and its weights."
        )
    save_bytes(path, program.model_proto.SerializeToString())


def load_onnx(path: Path) -> Callable[[Mapping[str, Tensors]], Tensor]:
    """What runs a file or folder of `save_onnx`, on the CPU.

    Raises:
        OutputError: If what is in it is no ONNX graph.
        CannotRunError: If there is no onnxruntime, or it has no kernels for these dtypes.
    """
    graph = path / GRAPH if path.is_dir() else path
    onnx: Any = importlib.import_module("onnx")
    try:
        onnx.checker.check_model(str(graph))
    except onnx.checker.ValidationError as error:
        raise OutputError(f"{path.name} was not saved, ONNX's own checker refuses it: {error}") from error
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        raise CannotRunError("onnxruntime is not installed") from None
    faults = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    try:
        session = runtime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    except (faults.NotImplemented, faults.Fail, faults.InvalidGraph) as error:
        raise CannotRunError(f"onnxruntime can not run it on the CPU: {str(error).splitlines()[0][:200]}") from error
    return lambda inputs: torch.as_tensor(session.run(None, _flat(inputs))[0])


def _flat(inputs: Mapping[str, Tensors]) -> dict[str, Any]:
    """Inputs as ONNX calls them: those of a list by number."""
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        named = {f"{name}_{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {name: tensor.cpu().numpy() for name, tensor in named.items()}
    return flat


def _save_apart(model: Any, folder: Path) -> None:
    """Weights by name into a .safetensors file, and into the graph where in that file they are."""
    ir: Any = importlib.import_module("onnx_ir")
    large = {
        name: value
        for name, value in model.graph.initializers.items()
        if name.startswith(PREFIX) or value.const_value.nbytes > SMALL_BYTES
    }
    tensors = {
        name: LazyTensor(_dtype(value), tuple(value.const_value.shape), lambda value=value: _tensor(value))
        for name, value in large.items()
    }
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    header = read_header(folder / WEIGHTS, CHECKPOINT_LIMITS)
    for name, value in large.items():
        info, known = header.tensors[name], value.const_value
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            header.data_start + info.begin,
            info.end - info.begin,
            known.dtype,
            shape=known.shape,
            name=name,
            base_dir=folder,
        )
    save_bytes(folder / GRAPH, ir.to_proto(model).SerializeToString())


def _dtype(value: Any) -> torch.dtype:
    name: str = value.const_value.dtype.name.lower()
    return getattr(torch, {"float": "float32", "double": "float64"}.get(name, name))


def _tensor(value: Any) -> Tensor:
    """The numbers of an initializer, without a copy where that can be."""
    raw = value.const_value.raw
    if isinstance(raw, torch.Tensor):
        return raw
    return torch.frombuffer(bytearray(value.const_value.tobytes()), dtype=_dtype(value)).view(
        tuple(value.const_value.shape)
    )
