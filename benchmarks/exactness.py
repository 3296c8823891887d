"""Bits that differ from fresh weights after 1,000 random switches, and how far other systems' weights drift.

On a small UNet of Stable Diffusion 1's block structure: eight LoRAs, random sets, orders and strengths, every strength
also negative and 0, empty sets in between.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

import torch

from benchmarks import synthetic
from benchmarks.common import DTYPES, Claim, Options, Ours, Report, Table, lora_folder, parse_options
from benchmarks.peers import ComfyAlgorithm, DiffusersApi, WebuiAlgorithm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

    from benchmarks.peers import Switcher
    from benchmarks.synthetic import LoraSet

SWITCHES = 1000
CYCLES = 100
RANKS = (4, 8, 16, 2)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("exactness", __doc__.splitlines()[0], argv, ("fp32", "bf16", "fp16"), model="small")
    for dtype in options.dtypes:
        report = Report("exactness", options, dtype)
        unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
        with lora_folder() as folder:
            names = write_files(folder, unet)
            measure_ourselves(options, report, unet, folder, names)
            if not options.alone:
                measure_drift(options, report, unet, folder, names)
        report.save()
    return 0


def write_files(folder: Path, unet: nn.Module) -> list[str]:
    """Eight LoRA files, both kinds, fp16 and fp32; returns their names."""
    half = synthetic.write_loras(folder, unet, "LierLa", RANKS)
    full = synthetic.write_loras(folder, unet, "C3Lier", RANKS, dtype=torch.float32)
    return [name for name, _ in (*half, *full)]


def random_sets(names: Sequence[str], count: int) -> Iterator[LoraSet]:
    """Random sets: new ones, the last one with one strength changed, and empty ones."""
    chance = random.Random(synthetic.SEED)
    loras: LoraSet = ()
    for _ in range(count):
        kind = chance.random()
        if kind < 0.15:
            loras = ()
        elif kind < 0.4 and loras:
            changed = chance.randrange(len(loras))
            loras = tuple((name, _strength(chance) if i == changed else old) for i, (name, old) in enumerate(loras))
        else:
            chosen = chance.sample(names, chance.randint(1, len(names)))
            loras = tuple((name, _strength(chance)) for name in chosen)
        yield loras


def _strength(chance: random.Random) -> float:
    return chance.choice((0.0, 1.0, -1.0, round(chance.uniform(-2, 2), 3)))


def differing_bits(unet: nn.Module, other: nn.Module) -> int:
    """Number of bits in which the parameters of two models differ."""
    pairs = zip(unet.parameters(), other.parameters(), strict=True)
    return sum(_differing_bits(a, b) for a, b in pairs)


def _differing_bits(a: Tensor, b: Tensor) -> int:
    changed = a.contiguous().view(torch.uint8) ^ b.contiguous().view(torch.uint8)
    return sum(int(((changed >> bit) & 1).sum()) for bit in range(8)) if changed.any() else 0


def measure_ourselves(
    options: Options, report: Report, unet: UNet2DConditionModel, folder: Path, names: Sequence[str]
) -> None:
    """After each switch, compare with a fresh copy of the model that a new session fuses for the first time."""
    live = synthetic.sibling(unet, unet.parameters())
    ours, fused_bits, base_bits, fused, empty = Ours(live, folder), 0, 0, 0, 0
    for loras in random_sets(names, options.rounds(SWITCHES)):
        ours.switch(loras)
        if not any(strength for _, strength in loras):
            base_bits, empty = base_bits + differing_bits(live, unet), empty + 1
            continue
        fresh = synthetic.sibling(unet, unet.parameters())
        Ours(fresh, folder).switch(loras)
        fused_bits, fused = fused_bits + differing_bits(live, fresh), fused + 1
    ours.unload()
    base_bits += differing_bits(live, unet)
    rows = [("fused sets, against a fresh model and session", str(fused), str(fused_bits))]
    rows += [("no LoRA, and after unload, against the base", str(empty + 1), str(base_bits))]
    claim = Claim(f"bits that differ after {fused + empty} random switches", fused_bits + base_bits, 0)
    report.add(Table("Ours", ("weights", "comparisons", "bits that differ"), rows), [claim])


def measure_drift(
    options: Options, report: Report, unet: UNet2DConditionModel, folder: Path, names: Sequence[str]
) -> None:
    """What cycles of fuse and undo leave in the weights, by every method."""
    layers = {kind: list(synthetic.target_layers(unet, kind)) for kind in synthetic.KINDS}
    dtype, device = DTYPES[report.dtype], options.device
    networks = {
        name: synthetic.read_factors(folder / f"{name}.safetensors", layers[name.partition("-")[0]], dtype, device)
        for name in names
    }
    rows: list[tuple[str, ...]] = []
    for name, make in (
        ("ours", lambda own: Ours(own, folder)),
        ("WebUI 1.10 algorithm", lambda own: WebuiAlgorithm(own, networks)),
        ("ComfyUI algorithm", lambda own: ComfyAlgorithm(own, networks)),
        ("diffusers fuse + unfuse", lambda own: DiffusersApi(own, networks)),
    ):
        own = synthetic.sibling(unet, unet.parameters())
        live = synthetic.target_layers(own, "C3Lier")
        _cycle(make(own), names, options.rounds(CYCLES))
        rows.append((name, *_drift(live, synthetic.target_layers(unet, "C3Lier"))))
    columns = ("method", "weights changed", "RMS drift / RMS weight")
    notes = (f"after {options.rounds(CYCLES)} cycles of two random LoRAs fused and taken back",)
    report.add(Table("Drift", columns, rows, notes))


def _cycle(who: Switcher, names: Sequence[str], count: int) -> None:
    chance = random.Random(synthetic.SEED)
    for _ in range(count):
        who.switch(tuple((name, round(chance.uniform(-1, 1), 3)) for name in chance.sample(list(names), 2)))
        who.clear()


def _drift(live: dict[str, nn.Module], base: dict[str, nn.Module]) -> tuple[str, str]:
    now = torch.cat([layer.weight.flatten() for layer in live.values()]).double()
    before = torch.cat([layer.weight.flatten() for layer in base.values()]).double()
    changed = (now != before).double().mean().item()
    return f"{changed:.1%}", f"{((now - before).norm() / before.norm()).item():.1e}"


if __name__ == "__main__":
    sys.exit(main())
