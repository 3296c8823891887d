"""What LoRAs cost on this computer: the time of a step, of a switch and of a restore, as medians of paired repeats."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.files import read_lora_file
from lib_lora.core.saving import save_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.session import LoraSession, Mode

STRENGTH = 0.05
FACTOR_STD = 0.02
PROMPT_TOKENS = 77


@dataclass(frozen=True)
class StepTime:
    """One UNet call with guidance (a batch of 2) at some number of LoRAs.

    Attributes:
        loras: How many are active.
        mode: ``prefuse`` or ``hook``.
        milliseconds: Median.
        ratio: Median over the rounds of time / time without LoRAs in the same round.
    """

    loras: int
    mode: Mode
    milliseconds: float
    ratio: float


@dataclass(frozen=True)
class SwitchTime:
    """One kind of change of the active LoRAs: median in milliseconds."""

    change: str
    milliseconds: float


def similar_loras(pattern: Path, folder: Path, count: int) -> list[str]:
    """Write LoRAs with another one's names and shapes and small random factors; returns their names."""
    file = read_lora_file(pattern)
    names = [f"random{number}" for number in range(1, count + 1)]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: _small(tensor, generator) for key, tensor in file.tensors.items()}
        save_tensors(folder / f"{name}.safetensors", tensors)
    return names


def _small(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random factors; numbers such as alpha are kept."""
    if tensor.ndim < 2:
        return tensor
    return (torch.randn(tensor.shape, generator=generator) * FACTOR_STD).to(tensor.dtype)


def step_times(
    unet: Any, session: LoraSession, names: Sequence[str], counts: Sequence[int], *, rounds: int, calls: int
) -> list[StepTime]:
    """Time UNet calls with the first n LoRAs for every n, both modes, in turns.

    Args:
        unet: The session's UNet.
        session: Left with no LoRA, in the mode it was in.
        names: LoRAs that the session finds.
        counts: Numbers of LoRAs; the first must be 0, which the ratios are relative to.
        rounds: Repeats of the whole comparison.
        calls: UNet calls timed together in each.
    """
    call = unet_call(unet)
    mode_before = session.mode
    cases: list[tuple[Mode, int]] = [(mode, count) for mode in ("prefuse", "hook") for count in counts]
    seconds: dict[tuple[Mode, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for mode, count in cases:
            session.mode = mode
            session.set([(name, STRENGTH) for name in names[:count]])
            call()
            seconds[mode, count].append(timed(call, calls))
    session.clear()
    session.mode = mode_before
    return [_step_time(mode, count, seconds[mode, count], seconds[mode, counts[0]]) for mode, count in cases]


def _step_time(mode: Mode, count: int, seconds: Sequence[float], without: Sequence[float]) -> StepTime:
    ratios = [with_loras / base for with_loras, base in zip(seconds, without, strict=True)]
    return StepTime(count, mode, statistics.median(seconds) * 1e3, statistics.median(ratios))


def unet_call(unet: Any) -> Callable[[], Any]:
    """One step with guidance: latents (2, 4, size, size) and contexts (2, 77, width) that never change."""
    parameter = next(unet.parameters())
    options: Mapping[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    size = unet.config.sample_size
    latents = torch.zeros(2, unet.config.in_channels, size, size, **options)
    context = torch.zeros(2, PROMPT_TOKENS, unet.config.cross_attention_dim, **options)

    @torch.no_grad()
    def call() -> Any:
        return unet(latents, 500, encoder_hidden_states=context).sample

    return call


def timed(call: Callable[[], Any], calls: int) -> float:
    """Seconds of one of `calls` calls."""
    start = time.perf_counter()
    results = [call() for _ in range(calls)]
    results[-1].flatten()[0].item()  # waits for a GPU
    return (time.perf_counter() - start) / calls


def switch_times(session: LoraSession, first: Sequence[str], second: Sequence[str], rounds: int) -> list[SwitchTime]:
    """Time changes of the active set; the session is left with no LoRA.

    Args:
        session: In the mode to measure.
        first: One set of LoRAs.
        second: Another one of the same size.
        rounds: Repeats.
    """
    sets = [[(name, STRENGTH) for name in names] for names in (first, second)]
    louder = [(first[0], 2 * STRENGTH), *sets[0][1:]]
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        session.set(sets[1])
        done = {
            f"{len(second)} LoRAs to {len(first)} others": session.set(sets[0]),
            f"one strength of {len(first)}": session.set(louder),
            "back to no LoRA": session.clear(),
        }
        for change, report in done.items():
            times.setdefault(change, []).append(report.milliseconds)
    return [SwitchTime(change, statistics.median(values)) for change, values in times.items()]
