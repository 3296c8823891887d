"""A UNet and its ControlNet compiled together: recompiles over LoRA switches in both, steps beside eager ones.

Both models are compiled under one handle; a second pair that shares no weights with them is not. Every LoRA has layers
of the UNet and of the ControlNet.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel
from torch import nn
from torch._dynamo import config as dynamo_config

from benchmarks import synthetic
from benchmarks.common import DTYPES, Claim, Report, Table, busy_label, lora_folder, parse_options, seconds
from benchmarks.compile import GPU_LATENT, LARGEST_DIFFERENCE, LATENT, warm_up
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.compile.together import CompiledModels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from benchmarks.common import Options
    from benchmarks.synthetic import LoraSet

NAMES = ("a", "b", "c")
RANK = 16
SWITCHES = 100
ROUNDS = 8
PIXELS = 8
"""For each number of a latent."""
OF_ZEROS = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
TIMES_FASTER = 1.7
"""Promised of a GPU."""


@dataclass(frozen=True)
class Pair:
    """A UNet, its ControlNet, and the LoRAs in them."""

    models: dict[str, nn.Module]
    session: LoraSession
    inputs: dict[str, Any]
    picture: Tensor

    def switch(self, loras: LoraSet) -> None:
        """Set, and refuse to go on with a set that is not whole."""
        report = self.session.set(list(loras))
        if report.refused or len(report.applied) != len(loras):
            raise RuntimeError(f"not applied: {report}")

    @torch.no_grad()
    def step(self) -> Tensor:
        """One denoising step with the control image."""
        unet, control = self.models["unet"], self.models["controlnet"]
        down, mid = control(**self.inputs, controlnet_cond=self.picture, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(**self.inputs, **added, return_dict=False)[0]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("compile_controlnet", __doc__.splitlines()[0], argv, ("fp32",))
    for dtype in options.dtypes:
        report = Report("compile_controlnet", options, dtype)
        with lora_folder() as folder:
            plain = _models(options, dtype)
            compiled = {name: synthetic.sibling(model, model.parameters()) for name, model in plain.items()}
            _write_loras(folder, plain, options.kinds[-1])
            start = time.perf_counter()
            handle = CompiledModels(compiled, "inductor")
            pairs = _pair(options, folder, plain), _pair(options, folder, compiled, handle)
            warm_up(pairs[1].step, handle)
            measure_switches(report, dtype, pairs, handle, time.perf_counter() - start)
            measure_steps(report, pairs, handle)
            handle.release()
        report.save()
    return 0


def _models(options: Options, dtype: str) -> dict[str, nn.Module]:
    """A UNet of real shape, and the half of it whose convolutions of zeros are not zero."""
    unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
    net = ControlNetModel.from_unet(unet).eval().requires_grad_(False)
    control = nn.Module.to(net, options.device, DTYPES[dtype])  # diffusers' own `to` warns
    generator = torch.Generator(options.device).manual_seed(synthetic.SEED)
    for name, weight in control.named_parameters():
        if name.startswith(OF_ZEROS) and weight.ndim > 1:
            weight.normal_(std=0.3 / weight[0].numel() ** 0.5, generator=generator)
    return {"unet": unet, "controlnet": control}


def _write_loras(folder: Path, models: dict[str, nn.Module], kind: str) -> None:
    unet, control = (synthetic.target_layers(model, kind) for model in models.values())
    for name in NAMES:
        synthetic.write_lora(folder / f"{name}.safetensors", unet, RANK, others={"lora_controlnet": control})


def _pair(options: Options, folder: Path, models: dict[str, nn.Module], handle: CompiledModels | None = None) -> Pair:
    changed = handle.weights_changed if handle else None
    session = LoraSession(models, LoraCatalog([folder]), on_weights_changed=changed)
    latents = GPU_LATENT if options.device.type == "cuda" else LATENT
    inputs = synthetic.step_inputs(models["unet"], latents[options.model])
    edge = PIXELS * latents[options.model]
    return Pair(models, session, inputs, inputs["sample"].new_full((1, 3, edge, edge), 0.5))


def _requests() -> Iterator[LoraSet]:
    """No LoRA, one, all, others, none again; other strengths each time."""
    sets = ((), NAMES[:1], NAMES, NAMES[1:], (), NAMES[::2])
    for number, names in zip(range(SWITCHES), itertools.cycle(sets)):
        yield tuple((name, 0.2 + number / 1000) for name in names)


def measure_switches(
    report: Report, dtype: str, pairs: tuple[Pair, Pair], handle: CompiledModels, warm_seconds: float
) -> None:
    """Switch LoRAs of both models under ``error_on_recompile``; each prediction is compared with the eager one."""
    plain, compiled = pairs
    before, dynamo_config.error_on_recompile = dynamo_config.error_on_recompile, True
    worst = 0.0
    try:
        for loras in _requests():
            for pair in pairs:
                pair.switch(loras)
            expected, got = plain.step(), compiled.step()
            worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
    finally:
        dynamo_config.error_on_recompile = before
    status = handle.status
    if len(status.compiled) < status.blocks:
        raise RuntimeError(f"blocks were given up: {status}")
    table = Table(
        f"{SWITCHES} switches between no LoRA and {len(NAMES)}, in UNet and ControlNet",
        ("blocks compiled", "until they were", "switches", "recompiles", "largest difference to eager"),
        [(str(status.blocks), seconds(warm_seconds), str(SWITCHES), str(status.recompiles), f"{worst:.1e}")],
    )
    claims = [
        Claim(f"recompiles over {SWITCHES} switches in UNet and ControlNet", status.recompiles, 0),
        Claim("with ControlNet, compiled / eager prediction, difference", worst, LARGEST_DIFFERENCE[dtype]),
    ]
    report.add(table, claims)


def measure_steps(report: Report, pairs: tuple[Pair, Pair], handle: CompiledModels) -> None:
    """Steps of both pairs in turns, and switches of all LoRAs."""
    loras = tuple((name, 0.5) for name in NAMES)
    cases = [
        Case(f"{what}, {kind}", action, before)
        for kind, pair in zip(("eager", "compiled"), pairs, strict=True)
        for what, action, before in (
            ("step with ControlNet", pair.step, partial(pair.switch, ())),
            (f"switch 0 → {len(NAMES)}", partial(pair.switch, loras), partial(pair.switch, ())),
        )
    ]
    take_turns(cases, report.options.rounds(ROUNDS), Stopwatch(report.options.device))
    for pair in pairs:
        pair.session.unload()
    eager_step, eager_switch, compiled_step, compiled_switch = cases
    faster, switch = ratio(eager_step, compiled_step), ratio(compiled_switch, eager_switch)
    claims = [Claim("switch in UNet and ControlNet, compiled / eager", switch.median, 1.1, detail=switch.range)]
    if report.options.device.type == "cuda":
        text = "with ControlNet: times faster than eager"
        claims.append(Claim(text, faster.median, TIMES_FASTER, at_most=False, detail=faster.range))
    notes = (f"a compiled step with ControlNet is {faster} times as fast as an eager one", str(handle.status))
    rows = [(case.name, seconds(case.wall), seconds(case.busy)) for case in cases]
    report.add(Table("Times with ControlNet", ("what", "wall", busy_label(report.options)), rows, notes), claims)


if __name__ == "__main__":
    sys.exit(main())
