"""What a training did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class TrainOutcome:
    """What a training did.

    Attributes:
        paths: What was learned: one LoRA file, or a folder of diffusers and a checkpoint.
        step: Steps that are done.
        steps: That were to be done.
        loss: Mean of the last steps.
        seconds: It took.
        stopped: Whether it was ended before its time.
        state: To go on from; None if none was written.
        samples: Pictures that were drawn.
        skipped: Pictures of the training set that could not be used.
        notes: Sentences for the user.
    """

    paths: tuple[Path, ...]
    step: int
    steps: int
    loss: float
    seconds: float
    stopped: bool
    state: Path | None
    samples: tuple[Path, ...]
    skipped: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """For people."""
        done = f"{self.step} of {self.steps} steps in {self.seconds:,.0f} s, mean loss {self.loss:.4f}"
        lines = [*self.notes, f"{', '.join(map(str, self.paths))}: {done}"]
        lines += [f"{self.skipped} pictures were skipped"] if self.skipped else []
        lines += [f"go on with --resume {self.state}"] if self.stopped and self.state else []
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {
            "paths": [str(path) for path in self.paths],
            "state": self.state and str(self.state),
            "samples": [str(path) for path in self.samples],
        }
