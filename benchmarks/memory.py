"""Memory that fused LoRAs take beside the model, and what is left of it after `unload()`.

Each case runs in a process of its own: five LoRAs of rank 32 are fused, then unloaded. On the CPU this counts anonymous
memory (RssAnon of /proc, so Linux only): the page cache behind a mapped file can be taken back at any time. The files
of the LoRAs, which stay in memory for the next switch, are counted apart.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import synthetic
from benchmarks.common import DTYPES, Claim, Options, Ours, Report, Table, lora_folder, parse_options
from lib_lora.core.saving import save_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

SET_SIZE = 5
STORES = ("device", "checkpoint")
STATUS = Path("/proc/self/status")
LORAS, CHECKPOINT = "loras", "model/unet/diffusion_pytorch_model.safetensors"
WORKSPACE = 0.01
"""Part of the touched weights that can not be told from nothing: scratch memory, and the allocator's own."""


@dataclass(frozen=True)
class Usage:
    """Bytes in one case.

    Attributes:
        before: With the model loaded, before a session exists.
        fused: With five LoRAs fused.
        peak: The most there was meanwhile.
        after: After `unload()`.
        store: What the base store says it holds.
        files: Sizes of the LoRA files, which the session keeps in memory.
        touched: Sizes of the weights that were changed.
    """

    before: int
    fused: int
    peak: int
    after: int
    store: int
    files: int
    touched: int

    @property
    def extra(self) -> float:
        """What was added beside the LoRAs' own factors, in units of the touched weights."""
        return (self.fused - self.before - self.files) / self.touched

    @property
    def left(self) -> float:
        """What is left after `unload()`, as a part of what there was before."""
        return abs(self.after - self.before) / self.before


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("memory", __doc__.splitlines()[0], argv, ("fp32", "bf16"))
    if options.device.type == "cpu" and not STATUS.exists():
        print("memory is measured on Linux only: this system has no /proc/self/status", file=sys.stderr)
        return 1
    for dtype in options.dtypes:
        report = Report("memory", options, dtype)
        with lora_folder() as folder:
            loras = _write_files(options, dtype, folder)
            rows: list[tuple[str, ...]] = []
            claims: list[Claim] = []
            for kind in options.kinds:
                for store in STORES:
                    usage = _in_own_process(options, dtype, folder, kind, store, loras[kind])
                    rows.append((kind, store, *_cells(usage)))
                    claims += _claims(kind, store, usage)
        report.add(_table(options, rows), claims)
        report.save()
    return 0


def _write_files(options: Options, dtype: str, folder: Path) -> dict[str, synthetic.LoraSet]:
    unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
    for place in (folder / LORAS, (folder / CHECKPOINT).parent):
        place.mkdir(parents=True)
    save_tensors(folder / CHECKPOINT, {name: tensor.cpu() for name, tensor in unet.state_dict().items()})
    ranks = (synthetic.RANK,) * SET_SIZE
    return {kind: synthetic.write_loras(folder / LORAS, unet, kind, ranks) for kind in synthetic.KINDS}


def _in_own_process(
    options: Options, dtype: str, folder: Path, kind: str, store: str, loras: synthetic.LoraSet
) -> Usage:
    job = [str(options.device), dtype, options.model, str(folder), kind, store, json.dumps(loras)]
    command = [sys.executable, "-c", "import benchmarks.memory as m, sys; m.run_case(*sys.argv[1:])", *job]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{kind}, {store}: {done.stderr.strip().splitlines()[-1]}")
    return Usage(**json.loads(done.stdout.splitlines()[-1]))


def run_case(device: str, dtype: str, model: str, folder: str, kind: str, store: str, loras: str) -> None:
    """The child process: fuse, unload, print a `Usage` in JSON."""
    place, loras_at, checkpoint = torch.device(device), Path(folder, LORAS), Path(folder, CHECKPOINT)
    unet = synthetic.make_unet(model, DTYPES[dtype], place)
    weights = synthetic.target_weights(unet, kind)
    torch.addmm(weights[0].flatten(1), weights[0].flatten(1)[:, :8], weights[0].flatten(1)[:8])  # libraries start up
    before = _held(place)
    _forget_peak(place)
    ours = Ours(unet, loras_at, store=store, checkpoint=checkpoint if store == "checkpoint" else None)
    wanted = tuple((name, strength) for name, strength in json.loads(loras))
    ours.switch(wanted)
    fused, peak, bytes_in_store = _held(place), peak_bytes(place), ours.session.report.store_bytes
    ours.unload()
    sizes = 0 if place.type == "cuda" else sum((loras_at / f"{name}.safetensors").stat().st_size for name, _ in wanted)
    touched = sum(weight.nbytes for weight in weights)
    print(json.dumps(asdict(Usage(before, fused, peak, _held(place), bytes_in_store, sizes, touched))))


def _held(device: torch.device) -> int:
    """Bytes of anonymous memory of this process, or of tensors on the GPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("RssAnon")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process had, or its tensors on the GPU. A child begins with none of its parent's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _cells(usage: Usage) -> tuple[str, ...]:
    sizes = (usage.touched, usage.files, usage.before, usage.fused, usage.peak, usage.after, usage.store)
    return *(f"{size / 1e6:.1f}" for size in sizes), f"{usage.extra:.3f}"


def _table(options: Options, rows: list[tuple[str, ...]]) -> Table:
    cuda = options.device.type == "cuda"
    columns = ("kind", "store", "touched weights", "LoRA files", "before", "fused", "peak", "after unload", "in store")
    notes = (
        "MB; before, fused, after: " + ("tensors on the GPU" if cuda else "anonymous memory of the process"),
        "peak: " + ("tensors on the GPU" if cuda else "resident memory, which counts mapped files too"),
        "extra: (fused - before - LoRA files) / touched weights",
    )
    return Table(f"{SET_SIZE} LoRAs of rank {synthetic.RANK} fused", (*columns, "extra"), rows, notes)


def _claims(kind: str, store: str, usage: Usage) -> list[Claim]:
    left = Claim(f"{kind}, {store}: left after unload, part of before", usage.left, 0.01)
    if store == "device":
        return [Claim(f"{kind}, device: extra memory / touched weights", usage.extra, 1.05), left]
    return [
        Claim(f"{kind}, checkpoint: anonymous bytes in the store", usage.store, 0),
        Claim(f"{kind}, checkpoint: extra memory / touched weights", usage.extra, WORKSPACE),
        left,
    ]


if __name__ == "__main__":
    sys.exit(main())
