"""Switches of LoRA sets on a GPU: layer by layer, grouped, as a graph; beside the memory's floor and A1111's algorithm.

What a switch to five LoRAs costs in calls to the GPU, counted in the code for C3Lier (SD1.5's 278 layers, SDXL's 788):

- layer by layer, factors in RAM: ten transfers of factors and one of strengths a layer, each waited for, and six
  launches (factors joined, scaled, converted; a copy of the base, the product). 4,700 and 13,400.
- grouped, factors on the device: 44 and 93 launches join the factors, 11 and 15 fold the strengths in, 90 and 296 copy
  bases, and each layer has one product. 423 and 1,192. A set that comes again is not planned again.
- graph: copies and products are replayed at once. 57 and 112.

Bytes: 2 for each of the weights and the factors are the floor. The copy before the product doubles what is moved of the
weights, but the product finds them in the cache where that holds 16 MB twice. The one wait for the device is the
comparison of samples before anything is written.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from benchmarks import synthetic
from benchmarks.common import DTYPES, Claim, Options, Ours, Report, Table, TwoSets, lora_folder, parse_options, seconds
from benchmarks.gpu_machine import Rates, file_name, is_missing, on_cuda, versions
from benchmarks.peers import WebuiAlgorithm
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora.core.base_store import choose_store
from lib_lora.core.keymap import KeyMap
from lib_lora.core.network import load_network
from lib_lora.core.patcher import ModelPatcher
from lib_lora.core.plan import Scale, make_plan, match_network

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from benchmarks.peers import Switcher
    from benchmarks.synthetic import LoraSet
    from lib_lora.core.base_store import StoreKind
    from lib_lora.core.gpu.switch import SwitchKind
    from lib_lora.core.network import Network

SET_SIZE = 5
ROUNDS = 20
PEER_ROUNDS = 3
VARIANTS: tuple[SwitchKind, ...] = ("layers", "grouped", "graph")
LARGEST_ERROR = {"fp32": 1e-5, "fp16": 2**-10, "bf16": 2**-7}
"""Largest difference to the float64 sum, in units of the layer's largest weight: one in its last place."""
TIMES_FLOOR, TIMES_TRANSFER, TIMES_WEBUI = 3.0, 1.2, 50.0


@dataclass(frozen=True)
class Bench(TwoSets):
    """The model itself stays as it is."""

    @property
    def weight_bytes(self) -> int:
        """Of all of them."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def factor_bytes(self) -> int:
        """Of one set's factors, in the model's dtype."""
        edges = sum((len(weight) + weight[0].numel()) * weight.element_size() for weight in self.weights)
        return SET_SIZE * synthetic.RANK * edges

    @cached_property
    def networks(self) -> dict[str, Network]:
        """The files, read."""
        names = (name for loras in self.sets for name, _ in loras)
        return {name: load_network(self.folder / f"{name}.safetensors") for name in names}

    def copy(self) -> UNet2DConditionModel:
        """A model whose touched weights are its own."""
        return synthetic.sibling(self.unet, self.weights)


class Prepared:
    """The patcher alone, with plans that are made before."""

    def __init__(self, bench: Bench, unet: UNet2DConditionModel, switch: SwitchKind, store: StoreKind) -> None:
        keymap = KeyMap.from_modules({"unet": unet})
        matches = {name: match_network(keymap, network) for name, network in bench.networks.items()}
        self._plans = {loras: make_plan((matches[name], Scale(s, s)) for name, s in loras) for loras in bench.sets}
        self._patcher = ModelPatcher({"unet": unet}, choose_store(store, bench.weights, None), switch=switch)

    def switch(self, loras: LoraSet) -> None:
        """Write one of the plans."""
        self._patcher.apply(self._plans[loras])

    def clear(self) -> None:
        """Base weights back."""
        self._patcher.restore()


class Watched:
    """An action, and how long it takes until it returns."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self._seconds: list[float] = []

    def __call__(self) -> None:
        """Do it."""
        start = time.perf_counter()
        self._action()
        self._seconds.append(time.perf_counter() - start)

    @property
    def seconds(self) -> float:
        """Median."""
        return statistics.median(self._seconds)


def main(argv: list[str] | None = None) -> int:
    options = parse_options("gpu_switch", __doc__.splitlines()[0], on_cuda(argv), ("fp16", "bf16"))
    if is_missing(options.device):
        return 2
    try:
        for dtype in options.dtypes:
            measure(options, dtype)
    except WrongWeightsError as error:
        print(f"Nothing is written: {error}.", file=sys.stderr)
        return 1
    return 0


class WrongWeightsError(Exception):
    """A variant computes something else."""


def measure(options: Options, dtype: str) -> None:
    report = Report("gpu_switch", options, dtype, file=file_name("gpu-switch", options.device, options.model, dtype))
    unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
    for kind in options.kinds:
        with lora_folder() as folder, torch.no_grad():
            ranks = (synthetic.RANK,) * SET_SIZE
            first, second = (synthetic.write_loras(folder, unet, kind, ranks, prefix) for prefix in "ab")
            bench = Bench(options, dtype, kind, folder, unet, (first, second))
            rates = Rates.of(options.device)
            measure_variants(bench, rates, report)
            measure_pinned(bench, rates, report)
            if not options.alone:
                measure_webui(bench, report)
    report.save()


def measure_variants(bench: Bench, rates: Rates, report: Report) -> None:
    """The patcher with each way to write, and whole sessions."""
    methods: dict[str, Switcher] = {}
    rounded: dict[str, str] = {}
    for variant in VARIANTS:
        for name, make in (
            (f"patcher, {variant}", partial(prepared, bench, switch=variant, store="device")),
            (f"session, {variant}", partial(session, bench, switch=variant)),
        ):
            unet = bench.copy()
            methods[name] = make(unet)
            rounded[name] = checked(bench, name, methods[name], unet)
    cases, watched = timed(bench, methods)
    moved = 2 * bench.weight_bytes + bench.factor_bytes
    floor = moved / rates.device
    rows = [
        _row(case, watched[name], floor, launches(bench, methods[name]), rounded[name]) for name, case in cases.items()
    ]
    patcher = methods["patcher, grouped"]
    restore = Case("restore", patcher.clear, partial(patcher.switch, bench.sets[0]))
    plain = Case("plain copy", copies(bench))
    take_turns([restore, plain], bench.options.rounds(ROUNDS), Stopwatch(bench.options.device))
    rows += [(case.name, seconds(case.wall), "", seconds(case.busy), "", "", "") for case in (restore, plain)]
    columns = ("switch", "wall", "until it returns", "GPU time", "launches", "times the floor", "correctly rounded")
    notes = (
        f"floor: {seconds(floor)}, {moved:,} bytes at {rates.device / 1e12:.3f} TB/s, "
        "a measured copy, bytes read and written counted",
        versions(),
    )
    title = f"{bench.kind}: {SET_SIZE} → {SET_SIZE} LoRAs of rank {synthetic.RANK}, {len(bench.weights)} layers"
    claims = [
        Claim(f"{bench.kind}: set switch, {name} / memory floor", cases[name].wall / floor, TIMES_FLOOR)
        for name in ("session, grouped", "session, graph", "patcher, grouped", "patcher, graph")
    ]
    restored = ratio(restore, plain)
    claims.append(Claim(f"{bench.kind}: restore / plain copy", restored.median, 1.2, detail=restored.range))
    report.add(Table(title, columns, rows, notes), claims)


def _row(case: Case, watched: Watched, floor: float, launched: str, rounded: str) -> tuple[str, ...]:
    times = (seconds(case.wall), seconds(watched.seconds), seconds(case.busy))
    return (case.name, *times, launched, f"{case.wall / floor:.2f}", rounded)


def measure_pinned(bench: Bench, rates: Rates, report: Report) -> None:
    """Base weights in pinned RAM: the transfer is the floor."""
    unet = bench.copy()
    method = prepared(bench, unet, switch="grouped", store="pinned")
    rounded = checked(bench, "pinned RAM", method, unet)
    cases, _ = timed(bench, {"switch": method})
    cases["restore"] = Case("restore", method.clear, partial(method.switch, bench.sets[0]))
    take_turns([cases["restore"]], bench.options.rounds(ROUNDS), Stopwatch(bench.options.device))
    floor = bench.weight_bytes / rates.host
    rows = [(name, seconds(case.wall), seconds(case.busy), f"{case.wall / floor:.2f}") for name, case in cases.items()]
    notes = (
        f"{bench.weight_bytes:,} bytes at {rates.host / 1e9:.1f} GB/s: {seconds(floor)}",
        f"{rounded} correctly rounded",
    )
    claim = Claim(f"{bench.kind}: base in pinned RAM / transfer", cases["switch"].wall / floor, TIMES_TRANSFER)
    columns = ("base in pinned RAM", "wall", "GPU time", "times the transfer")
    report.add(Table(f"{bench.kind}: base in pinned RAM", columns, rows, notes), [claim])


def measure_webui(bench: Bench, report: Report) -> None:
    """A1111's algorithm with its backup in RAM, its factors on the device."""
    layers = list(synthetic.target_layers(bench.unet, bench.kind))
    read = partial(synthetic.read_factors, layers=layers, dtype=DTYPES[bench.dtype], device=bench.options.device)
    networks = {name: read(bench.folder / f"{name}.safetensors") for name in bench.networks}
    methods = {"A1111": WebuiAlgorithm(bench.copy(), networks), "ours": session(bench, bench.copy())}
    quick = replace(bench, options=replace(bench.options, repeats=PEER_ROUNDS / ROUNDS))
    cases, _ = timed(quick, methods)
    faster = ratio(cases["A1111"], cases["ours"])
    rows = [(name, seconds(case.wall), seconds(case.busy)) for name, case in cases.items()]
    text = f"{bench.kind}: times faster than A1111's algorithm with its backup in RAM"
    claim = Claim(text, faster.median, TIMES_WEBUI, at_most=False, detail=faster.range)
    report.add(Table(f"{bench.kind}: beside A1111's algorithm", ("switch", "wall", "GPU time"), rows), [claim])


def prepared(bench: Bench, unet: UNet2DConditionModel, *, switch: SwitchKind, store: StoreKind) -> Prepared:
    return Prepared(bench, unet, switch, store)


def session(bench: Bench, unet: UNet2DConditionModel, *, switch: SwitchKind = "auto") -> Ours:
    return Ours(unet, bench.folder, switch=switch, store="device")


def timed(bench: Bench, methods: dict[str, Switcher]) -> tuple[dict[str, Case], dict[str, Watched]]:
    """Switches from the first set to the second, in turns."""
    first, second = bench.sets
    watched = {name: Watched(partial(method.switch, second)) for name, method in methods.items()}
    cases = {name: Case(name, watched[name], partial(method.switch, first)) for name, method in methods.items()}
    take_turns(list(cases.values()), bench.options.rounds(ROUNDS), Stopwatch(bench.options.device), warmup=2)
    return cases, watched


def checked(bench: Bench, name: str, method: Switcher, unet: UNet2DConditionModel) -> str:
    """Part of the weights that are the float64 sum, rounded once.

    Raises:
        WrongWeightsError: If one is off by more than it may be, or the base does not come back.
    """
    layers = synthetic.target_layers(unet, bench.kind)
    right = total = 0
    for loras in (*bench.sets, *bench.sets):  # a graph is recorded and replayed
        method.switch(loras)
    for path, layer in layers.items():
        exact = float64_sum(bench, path)
        error = ((layer.weight.double().flatten(1) - exact).abs().max() / exact.abs().max()).item()
        if not error <= LARGEST_ERROR[bench.dtype]:
            raise WrongWeightsError(f"{name}, {bench.kind}, {bench.dtype}: {path} is off by {error:.1e}")
        right += int((layer.weight.flatten(1) == exact.to(layer.weight.dtype)).sum())
        total += exact.numel()
    method.clear()
    for path, layer in layers.items():
        if not torch.equal(layer.weight, bench.unet.get_submodule(path).weight):
            raise WrongWeightsError(f"{name}, {bench.kind}, {bench.dtype}: {path} is not restored")
    return f"{right / total:.2%}"


def float64_sum(bench: Bench, path: str) -> Tensor:
    """The base + Σ strength · alpha / rank · up @ down of the second set."""
    total = bench.unet.get_submodule(path).weight.double().flatten(1)
    for name, strength in bench.sets[1]:
        low = bench.networks[name].adapters[f"unet:{path.replace('.', '_')}"].factors()
        up, down = (factor.to(total.device, torch.float64) for factor in (low.up, low.down))
        total.addmm_(up, down, alpha=low.scale * strength)
    return total


def launches(bench: Bench, method: Switcher) -> str:
    """Kernels and copies on the GPU in one switch; nothing is counted elsewhere."""
    if bench.options.device.type != "cuda":
        return ""
    method.switch(bench.sets[0])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        method.switch(bench.sets[1])
        torch.cuda.synchronize()
    return str(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))


def copies(bench: Bench) -> Callable[[], None]:
    """A plain copy of the touched weights."""
    pairs = [(torch.empty_like(weight), weight.detach()) for weight in bench.weights]
    return lambda: [target.copy_(weight) for target, weight in pairs] and None


if __name__ == "__main__":
    sys.exit(main())
