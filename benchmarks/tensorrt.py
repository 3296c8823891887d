"""TensorRT engines: a step compiled and eager, and what a switch of LoRAs costs with three ways to refit.

Ours refits what was touched from the device. torch_tensorrt's own refit translates the graph again and takes all
weights through the host. The third is what NVIDIA's extension for the WebUI does: every weight of every engine from
the host. Needs an NVIDIA GPU and torch_tensorrt; `python -m lib_lora doctor` says what is missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import synthetic
from benchmarks.common import (
    DTYPES,
    Claim,
    Options,
    Ours,
    Report,
    Table,
    busy_label,
    lora_folder,
    parse_options,
    seconds,
)
from benchmarks.switch import SET_SIZE
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora.compile.blockwise import BlockwiseHandle
from lib_lora.compile.engines import NUMBERS, DirectEngines
from lib_lora.compile.judge import disagreement
from lib_lora.compile.tensorrt import EngineBuilder
from lib_lora.compile.tensorrt_package import load_package, why_unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from benchmarks.synthetic import LoraSet
    from lib_lora.compile.tensorrt_package import Package

BATCHES = (1, 2)
ROUNDS = {"step": 20, "switch": 10, "package": 2}
FASTER = {"sd15": 1.8, "sdxl": 1.5}
TOKENS = 77


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("tensorrt", __doc__.splitlines()[0], argv, ("fp16",))
    if problem := why_unusable():
        print(f"Nothing was measured: {problem}", file=sys.stderr)
        return 1
    measure(replace(options, device=torch.device("cuda")), load_package())
    return 0


def measure(options: Options, package: Package) -> None:
    """All tables; on the device of `options`."""
    for dtype in options.dtypes:
        report = Report("tensorrt", options, dtype)
        for kind in options.kinds:
            with lora_folder() as folder, torch.no_grad():
                Bench.make(options, package, dtype, kind, folder).measure(report)
        report.save()


@dataclass(frozen=True)
class Compiled:
    """A UNet with engines, and the LoRAs of its session."""

    unet: UNet2DConditionModel
    ours: Ours
    builder: EngineBuilder
    handle: BlockwiseHandle

    @classmethod
    def make(cls, unet: UNet2DConditionModel, folder: Path, package: Package, *, direct: bool) -> Compiled:
        """Nothing is compiled before the first step."""
        builder = EngineBuilder(package, None, direct=direct)
        handle = BlockwiseHandle(unet, "tensorrt", builder)
        return cls(unet, Ours(unet, folder, on_weights_changed=handle.weights_changed), builder, handle)

    def warm(self, step: Callable[[UNet2DConditionModel], Tensor]) -> None:
        """Until every block runs compiled, and has been compared with the eager one."""
        step(self.unet)
        self.handle.wait()
        step(self.unet)
        status = self.handle.status
        if len(status.compiled) != status.blocks:
            raise RuntimeError(f"not all of it is compiled: {status}")


@dataclass(frozen=True)
class Bench:
    """One shape of model with the files of two LoRA sets."""

    options: Options
    package: Package
    dtype: str
    kind: str
    folder: Path
    eager: UNet2DConditionModel
    sets: tuple[LoraSet, LoraSet]

    @classmethod
    def make(cls, options: Options, package: Package, dtype: str, kind: str, folder: Path) -> Bench:
        """A model without engines, and the files."""
        eager = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
        ranks = (synthetic.RANK,) * SET_SIZE
        sets = tuple(synthetic.write_loras(folder, eager, kind, ranks, prefix) for prefix in "ab")
        return cls(options, package, dtype, kind, folder, eager, sets)

    def measure(self, report: Report) -> None:
        """Steps of each batch, then switches."""
        ours = self._compiled(direct=True)
        for batch in BATCHES:
            self._steps(ours, batch, report)
        self._switches(ours, report)

    def _compiled(self, *, direct: bool) -> Compiled:
        """Nothing is compiled before the first step."""
        unet = synthetic.make_unet(self.options.model, DTYPES[self.dtype], self.options.device)
        return Compiled.make(unet, self.folder, self.package, direct=direct)

    def _steps(self, ours: Compiled, batch: int, report: Report) -> None:
        step = partial(self._step, self._inputs(batch))
        ours.warm(step)
        if problem := disagreement(step(self.eager), step(ours.unet)):
            raise RuntimeError(f"the engines compute something else: {problem}")
        cases = [Case("eager", partial(step, self.eager)), Case("TensorRT", partial(step, ours.unet))]
        take_turns(cases, self.options.rounds(ROUNDS["step"]), Stopwatch(self.options.device))
        faster = ratio(*cases)
        rows = [(case.name, seconds(case.wall), seconds(case.busy), str(ratio(cases[0], case))) for case in cases]
        columns = ("step", "wall", busy_label(self.options), "times faster than eager (quartiles)")
        claim = Claim(
            f"{self.kind}: batch {batch}, times faster than eager",
            faster.median,
            FASTER.get(self.options.model, 1.0),
            at_most=False,
            detail=faster.range,
        )
        report.add(Table(f"{self.kind}: one step, batch {batch}, its own size", columns, rows), [claim])

    def _switches(self, ours: Compiled, report: Report) -> None:
        eager = Ours(self.eager, self.folder)
        package = self._compiled(direct=False)
        package.warm(partial(self._step, self._inputs(BATCHES[0])))
        cases = {
            "eager": self._case("eager: no engines", eager, _nothing),
            "ours": self._case("ours: what was touched, from the device", ours.ours, _nothing),
            "all": self._case(
                "ours, then every weight from the host as NVIDIA's extension",
                ours.ours,
                partial(_all, ours, self.package.trt),
            ),
            "package": self._case("torch_tensorrt's refit_module_weights", package.ours, _nothing),
        }
        device = Stopwatch(self.options.device)
        take_turns(list(cases.values())[:3], self.options.rounds(ROUNDS["switch"]), device)
        take_turns([cases["package"]], self.options.rounds(ROUNDS["package"]), device)
        rows = [(case.name, seconds(case.wall), seconds(case.busy)) for case in cases.values()]
        value = ratio(cases["ours"], cases["eager"])
        text = f"{self.kind}: switch under compilation / switch in eager"
        title = f"{self.kind}: set switch {SET_SIZE} → {SET_SIZE}, engines of {len(ours.builder.built)} forms of blocks"
        columns = ("switch", "wall", busy_label(self.options))
        report.add(Table(title, columns, rows), [Claim(text, value.median, 1.1, detail=value.range)])

    def _case(self, name: str, ours: Ours, after: Callable[[], None]) -> Case:
        def switch() -> None:
            ours.switch(self.sets[1])
            after()

        return Case(name, switch, partial(ours.switch, self.sets[0]))

    def _inputs(self, batch: int) -> dict[str, Any]:
        config = self.eager.config
        generator = torch.Generator().manual_seed(synthetic.SEED)

        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.options.device, DTYPES[self.dtype])

        size = config.sample_size
        inputs = {"sample": tensor(batch, 4, size, size), "timestep": torch.tensor(500, device=self.options.device)}
        inputs |= {"encoder_hidden_states": tensor(batch, TOKENS, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": tensor(batch, pooled), "time_ids": tensor(batch, 6)}
        return inputs

    @staticmethod
    def _step(inputs: dict[str, Any], unet: UNet2DConditionModel) -> Tensor:
        return unet(**inputs, return_dict=False)[0]


def _nothing() -> None:
    pass


def _all(compiled: Compiled, trt: Any) -> None:
    """Every weight of every engine, through the host."""
    for built in compiled.builder.built:
        if not isinstance(built.engines, DirectEngines):
            continue
        weights = {name: weight.cpu() for name, weight in built.weights().items()}
        for engine, places in built.engines.places.items():
            refitter = trt.Refitter(built.engines.runners[engine].engine, trt.Logger(trt.Logger.WARNING))
            numbers = {name: place.numbers(weights[place.parameter]) for name, place in places.items()}
            for name, tensor in numbers.items():
                kind = getattr(trt.DataType, NUMBERS[tensor.dtype])
                given = trt.Weights(kind, tensor.data_ptr(), tensor.numel())
                if not refitter.set_named_weights(name, given, trt.TensorLocation.HOST):
                    raise RuntimeError(f"TensorRT takes no numbers for {name}")
            if not refitter.refit_cuda_engine():
                raise RuntimeError(f"TensorRT could not refit {engine}")


if __name__ == "__main__":
    sys.exit(main())
