"""What ends a training from outside: memory that runs out, and processes that are lost."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.errors import TrainError

if TYPE_CHECKING:
    from collections.abc import Generator

    from lib_lora.train.options import TrainOptions


@contextmanager
def told(options: TrainOptions, when: str, processes: int = 1) -> Generator[None]:
    """Tell it in a sentence.

    Args:
        options: Of the training.
        when: A clause, such as "in step 3".
        processes: That train together.

    Raises:
        TrainError: If memory ran out, or the processes can not reach each other any more.
    """
    try:
        yield
    except OUT_OF_MEMORY as error:
        raise TrainError(f"memory ran out {when}; what takes less: {', '.join(_savings(options))}") from error
    except RuntimeError as error:
        if processes == 1:
            raise
        reason = " ".join(str(error).split())[:300]
        raise TrainError(
            f"one of the {processes} processes failed {when} ({reason}); end those that are left, and start all of "
            "them again with resume"
        ) from error


def _savings(options: TrainOptions) -> list[str]:
    """What takes less memory, of what is not done yet."""
    values = options.values()
    wishes = {
        "gradient_checkpointing": not values["gradient_checkpointing"],
        "mixed_precision bf16": values["mixed_precision"] == "no",
        "cache_latents": not options.data.caches_latents,
        "a smaller train_batch_size with gradient_accumulation_steps": values["train_batch_size"] > 1,
        "an optimizer_type of 8 bits": not values["optimizer_type"].lower().endswith("8bit"),
        "a smaller resolution": True,
    }
    return [name for name, helps in wishes.items() if helps]
