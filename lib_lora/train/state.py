"""Checkpoints of a training: one file with all that is needed to go on, to the same bits.

Chance needs no place in it: all of it is drawn from the seed and the step.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.files import map_checkpoint
from lib_lora.core.opening import shown
from lib_lora.core.saving import remove_file, save_tensors
from lib_lora.errors import CorruptFileError, FileError, TrainError
from lib_lora.train.data.tensor_cache import checksum

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer

_KEY, _SUM = "prefuse_training_state", "crc32"
_NAME = re.compile(r"step-\d{8}\.safetensors")
_OPTIMIZER = "optimizer."
_DIFFERENCES_SHOWN = 4


@dataclass(frozen=True)
class State:
    """Where a training is.

    Attributes:
        step: Steps of the optimizer that are done.
        course: Option or fact → value, of all that decides how it goes on.
        tensors: What is trained, its average, and the optimizer's memory, by name.
        numbers: Of optimizer, learning rates and scaler.
    """

    step: int
    course: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def write_state(folder: Path, state: State, keep: int) -> Path:
    """Write a state, and remove older ones.

    Args:
        folder: Of states; made if it is not there.
        state: The new one.
        keep: So many are left, this one among them.

    Raises:
        OutputError: If it can not be written; older ones are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state.step:08d}.safetensors"
    facts = json.dumps({"step": state.step, "course": state.course, "numbers": state.numbers})
    save_tensors(path, state.tensors, {_KEY: facts, _SUM: checksum(state.tensors, facts)}, overwrite=True)
    for old in _states(folder)[:-keep]:
        remove_file(old)
    return path


def read_state(path: Path, course: Mapping[str, Any]) -> State:
    """A state to go on from.

    Args:
        path: Its file, or a folder of states, of which the last written is taken.
        course: What the state must agree with.

    Raises:
        TrainError: If there is none, it can not be read, or it is of a training with other options.
    """
    file = _newest(path)
    try:
        state = _read(file)
    except FileError as error:
        older = [one for one in _states(file.parent) if one.name < file.name]
        advice = f"; the state before it is {older[-1].name}, give that to --resume" if older else ""
        raise TrainError(f"{error}{advice}") from error
    differing = [key for key in sorted({*course, *state.course}) if course.get(key) != state.course.get(key)]
    if differing:
        raise TrainError(f"{shown(file)} is of another training: {_differences(differing, state.course, course)}")
    return state


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its memory as tensors and numbers."""
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, memory in content["state"].items():
        for key, value in memory.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    return tensors, {"memory": numbers, "groups": content["param_groups"]}


def unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Give it the memory that `pack_optimizer` took."""
    memory: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in numbers["memory"].items()}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, _, key = name[len(_OPTIMIZER) :].partition(".")
            memory.setdefault(int(index), {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": memory, "param_groups": numbers["groups"]})


def _read(file: Path) -> State:
    """All of a file.

    Raises:
        TrainError: If it is another kind of file.
        FileError: If it can not be read, or is not what was written.
    """
    tensors = map_checkpoint(file)
    metadata = tensors.header.metadata
    if (text := metadata.get(_KEY)) is None:
        raise TrainError(f"{shown(file)} is no state of a training; to go on from a LoRA, give it as network_weights")
    if metadata.get(_SUM) != checksum(tensors, text):
        raise CorruptFileError(f"{shown(file)} is damaged: it does not hold what was written")
    facts = json.loads(text)
    return State(facts["step"], facts["course"], dict(tensors), facts["numbers"])


def _states(folder: Path) -> list[Path]:
    """Files of states, the last written last: those of an older training may be of later steps."""
    found = [path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _newest(path: Path) -> Path:
    if path.is_file():
        return path
    found = _states(path) if path.is_dir() else []
    if not found:
        raise TrainError(f"{shown(path)} holds no state of a training, step-….safetensors; look at --resume")
    return found[-1]


def _differences(keys: list[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    told = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys[:_DIFFERENCES_SHOWN]]
    more = len(keys) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")
