"""What TensorBoard shows of a training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from pathlib import Path

    from lib_lora.train.progress import TrainProgress


class Board:
    """Writes loss, rates and speed for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        """Begin a log.

        Raises:
            JobError: If TensorBoard is not installed.
        """
        try:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise JobError("logging_dir needs TensorBoard; install it with: pip install tensorboard") from error
        self._writer: Any = writer(str(folder))

    def add(self, now: TrainProgress) -> None:
        """Take a step in."""
        numbers = {"loss/step": now.loss, "loss/mean": now.mean_loss, "steps per second": now.steps_per_second}
        numbers |= {f"lr/{name}": rate for name, rate in now.rates.items()}
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, now.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
