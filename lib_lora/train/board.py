"""What TensorBoard shows of a training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lib_lora.core.opening import reason_of, shown
from lib_lora.errors import JobError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from lib_lora.train.progress import TrainProgress


def summary_writer() -> Callable[..., Any]:
    """TensorBoard's class that writes logs.

    Raises:
        JobError: If TensorBoard is not installed.
    """
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise JobError("logging_dir needs TensorBoard; install it with: pip install tensorboard") from error


class Board:
    """Writes loss, rates, speed and sample pictures for TensorBoard."""

    def __init__(self, folder: Path, first: int) -> None:
        """Begin a log, or go on with it.

        Args:
            folder: Of the log.
            first: Steps that were done before; what an earlier log in the folder says of later ones is not shown.

        Raises:
            JobError: If TensorBoard is not installed.
            OutputError: If the log can not be written.
        """
        try:
            self._writer = summary_writer()(str(folder), purge_step=first + 1)
        except OSError as error:
            raise OutputError(f"the log in {shown(folder)} can not be written: {reason_of(error)}") from error

    def add(self, now: TrainProgress) -> None:
        """Take a step in."""
        numbers = {"loss/step": now.loss, "loss/mean": now.mean_loss, "steps per second": now.steps_per_second}
        numbers |= {f"lr/{name}": rate for name, rate in now.rates.items()}
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, now.step)

    def add_samples(self, step: int, files: Iterable[Path]) -> None:
        """Take pictures in that were drawn after a step, in the order of their prompts."""
        for index, file in enumerate(files):
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"sample/{index:02d}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
