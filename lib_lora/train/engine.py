"""Hugging Face Accelerate, set up for a training: device, precision, several processes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.errors import JobError
from lib_lora.train.control import Wish

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lib_lora.train.settings import RunOptions

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(run: RunOptions, accumulated: int) -> Any:
    """A new one, whatever an earlier training in this process used.

    Args:
        run: Device and precision.
        accumulated: Batches that make one step.

    Raises:
        JobError: If Accelerate is not installed, or the device has not this precision.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise JobError(f"training needs accelerate ({error}); install it with: pip install accelerate") from error
    # What is shared in a process knows one precision and one device; a second training may have others.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # Layers that a dropout leaves out have no gradient; the model has no buffers that change.
    sharing = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    try:
        return Accelerator(
            gradient_accumulation_steps=accumulated,
            mixed_precision=run.mixed_precision,
            cpu=run.device == "cpu",
            kwargs_handlers=[sharing],
        )
    except ValueError as error:
        raise JobError(f"mixed_precision {run.mixed_precision} can not be had here: {error}") from error


def frozen_dtype(run: RunOptions) -> torch.dtype:
    """Of weights that are not trained."""
    return _DTYPES[run.mixed_precision]


def keep_fewer_activations(unet: Any, text_encoders: Iterable[Any], *, on: bool = True) -> None:
    """Switch gradient checkpointing, without reentrance, so that inputs need no gradients.

    Before transformers 4.35, which the WebUI has, text encoders know the other kind alone: they keep all activations,
    which are few.
    """
    if on:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    for encoder in text_encoders:
        # transformers renamed it in version 5
        old = "gradient_checkpointing" if not hasattr(encoder, "activation_checkpointing_enable") else ""
        switch = getattr(encoder, f"{old or 'activation_checkpointing'}_{'enable' if on else 'disable'}")
        if not on:
            switch()
        elif inspect.signature(switch).parameters:
            switch({"use_reentrant": False})


def agreed(accelerator: Any, wish: Wish) -> Wish:
    """The strongest wish of all processes."""
    if accelerator.num_processes == 1:
        return wish
    wishes = accelerator.gather(torch.tensor([int(wish)], device=accelerator.device))
    return Wish(int(wishes.max()))


def is_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether there is no NaN and no infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
