"""Time of a set switch of LoHa, LoKr, IA3, DoRA and OFT beside their floors and beside LyCORIS's own merge.

On the layers that kohya's LierLa trains, of an SD1.5-shaped UNet. LoHa's floor is the products that build its ΔW, each
once, into memory that is there already; for the others it is a plain copy of the touched bytes.
"""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from lycoris.functional import factorization

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
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora.core.files import read_lora_file
from lib_lora.core.saving import save_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

    from benchmarks.synthetic import LoraSet

    Layers = Mapping[str, nn.Linear | nn.Conv2d]

KIND = "LierLa"
RANK = 8
KRON_SIDE = 8
OFT_SIDE = 8
ROUNDS, PEER_ROUNDS = 6, 3
COUNTS = {"LoHa": (5,), "LoKr": (1, 5), "IA3": (1, 5), "DoRA": (1,), "OFT": (1,)}
MODULES = {
    "LoHa": ("loha", "LohaModule"),
    "LoKr": ("lokr", "LokrModule"),
    "DoRA": ("locon", "LoConModule"),
    "OFT": ("diag_oft", "DiagOFTModule"),
}
AT_FULL_STRENGTH = ("DoRA",)
"""LyCORIS's merge of it at another strength is not between the base and the whole."""
TARGETS = {"LoHa": 1.3, "LoKr": 2.0, "IA3": 2.0}


@dataclass(frozen=True)
class Bench:
    """One model, and the LoRAs of one family in two sets."""

    options: Options
    dtype: str
    family: str
    folder: Path
    unet: UNet2DConditionModel
    sets: tuple[LoraSet, LoraSet]

    @property
    def layers(self) -> Layers:
        """Path in the UNet → layer."""
        return synthetic.target_layers(self.unet, KIND)

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        """What one of the files holds."""
        return read_lora_file(self.folder / f"{name}.safetensors").tensors


def main(argv: Sequence[str] | None = None) -> int:
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    options = parse_options("families", __doc__.splitlines()[0], argv, ("fp32", "bf16"))
    for dtype in options.dtypes:
        report = Report("families", options, dtype)
        unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
        for family, counts in COUNTS.items():
            for count in counts:
                with lora_folder() as folder:
                    sets = tuple(write_set(folder, unet, family, count, prefix) for prefix in "ab")
                    measure(Bench(options, dtype, family, folder, unet, sets), report)
        report.save()
    return 0


def write_set(folder: Path, unet: nn.Module, family: str, count: int, prefix: str) -> LoraSet:
    """Files of one family in LyCORIS's format, random; returns their names and strengths."""
    names = [f"{prefix}-{family}-{number}" for number in range(count)]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(synthetic.SEED + seed + 100 * ord(prefix))
        tensors = {
            f"lora_unet_{path.replace('.', '_')}.{role}": tensor.half()
            for path, layer in synthetic.target_layers(unet, KIND).items()
            for role, tensor in layer_tensors(family, layer, generator).items()
        }
        save_tensors(folder / f"{name}.safetensors", tensors, {})
    strengths = (1.0,) * count if family in AT_FULL_STRENGTH else synthetic.STRENGTHS
    return tuple(zip(names, strengths, strict=False))


def layer_tensors(family: str, layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of one layer, ΔW a few per cent of the weights' size."""
    height, width = layer.weight.shape[0], layer.weight[0].numel()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    alpha = {"alpha": torch.tensor(float(RANK))}
    if family == "LoHa":
        sides = {"a": (height, RANK), "b": (RANK, width)}
        return alpha | {f"hada_w{i}_{side}": random(*shape) for i in (1, 2) for side, shape in sides.items()}
    if family == "LoKr":
        (a, b), (c, d) = (factorization(side, KRON_SIDE) for side in (height, width))
        return alpha | {"lokr_w1": random(a, c), "lokr_w2": random(b, d).reshape(b, d, *layer.weight.shape[2:])}
    if family == "IA3":
        return {"weight": random(height), "on_input": torch.tensor(0.0)}
    if family == "DoRA":
        up, down = random(height, RANK), random(RANK, width)
        tail = layer.weight.shape[2:]
        lengths = layer.weight.flatten(1).norm(dim=1).float().cpu().reshape(-1, *[1] * (layer.weight.ndim - 1))
        factors = {
            "lora_up.weight": up.reshape(height, RANK, *tail),
            "lora_down.weight": down.reshape(RANK, width, *tail),
        }
        return alpha | factors | {"dora_scale": lengths}
    side, blocks = factorization(height, OFT_SIDE)
    return {"oft_blocks": random(blocks, side, side) * 0.1, "alpha": torch.tensor(0.0)}


def measure(bench: Bench, report: Report) -> None:
    """Our switch in turns with its floor, then with LyCORIS's merge."""
    first, second = bench.sets
    ours = Ours(bench.unet, bench.folder)
    switch = Case("set switch", partial(ours.switch, second), partial(ours.switch, first))
    floors = _floors(bench)
    stopwatch = Stopwatch(bench.options.device)
    take_turns([switch, *floors.values()], bench.options.rounds(ROUNDS), stopwatch)
    ours.unload()
    rows = [(case.name, seconds(case.wall), seconds(case.busy), str(ratio(switch, case))) for case in floors.values()]
    rows.insert(0, (switch.name, seconds(switch.wall), seconds(switch.busy), ""))
    notes = [f"{len(switch.samples)} rounds"]
    if bench.family in MODULES and not bench.options.alone:
        notes.append(_beside_lycoris(bench, rows, stopwatch))
    title = f"{len(second)} {bench.family}"
    columns = ("what", "wall", busy_label(bench.options), "our set switch is so many times it (quartiles)")
    claims: list[Claim] = []
    if bench.family in TARGETS:
        floor = floors["products" if bench.family == "LoHa" else "copy"]
        value = ratio(switch, floor)
        claims = [Claim(f"{title}: set switch / {floor.name}", value.median, TARGETS[bench.family], detail=value.range)]
    report.add(Table(title, columns, rows, tuple(notes)), claims)


def _floors(bench: Bench) -> dict[str, Case]:
    weights = [layer.weight.detach() for layer in bench.layers.values()]
    copies = [weight.clone() for weight in weights]

    def copy() -> None:
        for target, source in zip(copies, weights, strict=True):
            target.copy_(source)

    floors = {"copy": Case("floor: plain copy of the same bytes", copy)}
    if bench.family == "LoHa":
        floors["products"] = Case("floor: the products that build each ΔW, once", _products(bench))
    return floors


def _products(bench: Bench) -> Callable[[], None]:
    """The two products of every LoHa of the second set, float32, into memory that is there already."""
    device = bench.options.device
    factors: list[tuple[Tensor, Tensor]] = []
    for name, _ in bench.sets[1]:
        tensors = bench.tensors(name)
        for path in bench.layers:
            key = f"lora_unet_{path.replace('.', '_')}"
            sides = ([tensors[f"{key}.hada_w{i}_{side}"].to(device, torch.float32) for side in "ab"] for i in (1, 2))
            factors += [(up, down) for up, down in sides]
    largest = max(len(up) * down.shape[1] for up, down in factors)
    memory = torch.empty(largest, device=device)

    def build() -> None:
        for up, down in factors:
            out = memory[: len(up) * down.shape[1]].view(len(up), down.shape[1])
            torch.mm(up, down, out=out)

    return build


def _beside_lycoris(bench: Bench, rows: list[tuple[str, ...]], stopwatch: Stopwatch) -> str:
    """Add LyCORIS's time for the same set, and say how far its weights are from ours."""
    layers = bench.layers
    path = min(layers, key=lambda path: layers[path].weight.numel())
    ours, theirs = Ours(bench.unet, bench.folder), LycorisMerge(bench)
    cases = [
        Case("ours", partial(ours.switch, bench.sets[1]), partial(ours.switch, bench.sets[0])),
        Case("LyCORIS: weights back, then `merge_to` of each", theirs.switch, theirs.clear),
    ]
    # Each works on the same weights, so one after the other
    take_turns(cases[:1], bench.options.rounds(PEER_ROUNDS), stopwatch)
    merged = layers[path].weight.detach().clone()
    ours.unload()
    take_turns(cases[1:], bench.options.rounds(PEER_ROUNDS), stopwatch)
    difference = (layers[path].weight - merged).abs().max().item()
    theirs.clear()
    peer = cases[1]
    rows.append((peer.name, seconds(peer.wall), seconds(peer.busy), str(ratio(cases[0], peer))))
    return f"largest difference of the merged {path} to LyCORIS's: {difference:.1e}"


class LycorisMerge:
    """LyCORIS's modules on the UNet's layers, made from the same files; its merge is called as its users call it."""

    def __init__(self, bench: Bench) -> None:
        name, kind = MODULES[bench.family]
        module = getattr(importlib.import_module(f"lycoris.modules.{name}"), kind)
        self._base = {path: layer.weight.detach().clone() for path, layer in bench.layers.items()}
        self._layers = bench.layers
        self._modules = [
            (_lycoris_module(module, path, layer, tensors), strength)
            for lora, strength in bench.sets[1]
            for tensors in [bench.tensors(lora)]
            for path, layer in bench.layers.items()
        ]

    @torch.no_grad()
    def switch(self) -> None:
        """Weights back, then one LoRA after the other."""
        self.clear()
        for module, strength in self._modules:
            module.merge_to(strength)

    @torch.no_grad()
    def clear(self) -> None:
        """Weights back."""
        for path, layer in self._layers.items():
            layer.weight.copy_(self._base[path])


@torch.no_grad()
def _lycoris_module(kind: type, path: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    key = f"lora_unet_{path.replace('.', '_')}"
    found = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(f"{key}.")}
    return kind.make_module_from_state_dict(key, layer, *kind.extract_state_dict(found, key))


if __name__ == "__main__":
    sys.exit(main())
