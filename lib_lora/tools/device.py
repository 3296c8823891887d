"""The device that a job calculates on."""

from __future__ import annotations

import torch

from lib_lora.errors import JobError


def usable_device(name: str) -> torch.device:
    """The device of a name such as ``cpu`` or ``cuda:1``.

    Raises:
        JobError: If it can not be used here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
        raise JobError(f"the device {name} can not be used: {str(error).splitlines()[0]}") from error
