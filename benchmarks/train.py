"""Steps of a LoRA training: diffusers' train_text_to_image_lora, written anew with PEFT's adapters, beside ours.

Both train the same layers of UNets that share their frozen weights, on the same pictures, with AdamW at one rate. The
peer gets its batch as tensors, ready made; ours reads its pictures from files, which is in its time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import synthetic
from benchmarks.common import Claim, Options, Report, Table, busy_label, lora_folder, parse_options, seconds
from benchmarks.memory import peak_bytes
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora.hosts.standalone.demo import MODEL_DIR
from lib_lora.hosts.standalone.demo.networks import new_vae
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.engine import make_accelerator
from lib_lora.train.model import TrainModel
from lib_lora.train.options import TrainOptions
from lib_lora.train.trainees import NetworkTrainee
from lib_lora.train.trainer import Training, silent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

RANK, BATCH, PICTURES = 16, 2, 8
ROUNDS = 12
STEPS = 100_000
RATE = 1e-4
LESS_MEMORY = 0.95
"""The weights of the model are in both."""
SIDE = {"sd15": 256, "small": 64}
GPU_SIDE = {"sd15": 512, "small": 64}
PRECISIONS = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CAPTION = "a red circle on a blue background"
MEMORY = "--memory"
"""Marks the process that trains two steps and prints the most memory that it had."""


@dataclass(frozen=True)
class Bench:
    """What one report is about."""

    options: Options
    dtype: str

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return (GPU_SIDE if self.options.device.type == "cuda" else SIDE)[self.options.model]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 if a promise does not hold."""
    given = list(sys.argv[1:] if argv is None else argv)
    if MEMORY in given:
        return measure_peak(given)
    options = parse_options("train", __doc__.splitlines()[0], given, ("fp32",))
    misses = 0
    for dtype in options.dtypes:
        report = Report("train", options, dtype)
        with lora_folder() as folder:
            measure_steps(Bench(options, dtype), write_pictures(folder, Bench(options, dtype).side), report)
        measure_memory(Bench(options, dtype), given, report)
        report.save()
        misses += sum(not claim.met for claim in report.claims)
    return min(1, misses)


def write_pictures(folder: Path, side: int) -> Path:
    """A training set."""
    within = folder / "1_noise"
    within.mkdir()
    rng = np.random.default_rng(0)
    for index in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(within / f"{index}.png")
        (within / f"{index}.txt").write_text(CAPTION)
    return folder


def make_pipe(bench: Bench) -> Any:
    """The parts of a pipeline with random weights, on the device."""
    small, device = bench.options.model == "small", bench.options.device
    torch.manual_seed(synthetic.SEED)
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = new_vae() if small else AutoencoderKL(**widths, **blocks)
    width, layers = (64, 2) if small else (768, 12)
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": layers, "vocab_size": 49408, "eos_token_id": 49407}
    encoder = CLIPTextModel(CLIPTextConfig(**text, **heads))
    return SimpleNamespace(
        unet=synthetic.make_unet(bench.options.model, torch.float32, device),
        vae=vae.to(device).requires_grad_(False),
        text_encoder=encoder.to(device).requires_grad_(False),
        tokenizer=CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer"),
    )


def ours(bench: Bench, pipe: Any, pictures: Path, **given: Any) -> Training:
    """Our training, ready for its first step."""
    options = TrainOptions.of(
        {
            "train_data_dir": pictures,
            "resolution": bench.side,
            "train_batch_size": BATCH,
            "network_dim": RANK,
            "network_alpha": RANK,
            "network_train_unet_only": True,
            "learning_rate": RATE,
            "max_train_steps": STEPS,
            "mixed_precision": PRECISIONS[bench.dtype],
            "device": "cpu" if bench.options.device.type == "cpu" else "auto",
            **given,
        }
    )
    model = TrainModel(pipe, "random", pictures, SD)
    accelerator = make_accelerator(options.run, 1)
    return Training(accelerator, model, options, open_dataset(options.data), NetworkTrainee(model, options), silent)


class Peer:
    """The loop of diffusers' script."""

    def __init__(self, bench: Bench, pipe: Any, pictures: Path) -> None:
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[bench.dtype])
        self.vae, self.text_encoder = pipe.vae, pipe.text_encoder
        unet = pipe.unet
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LAYERS))
        weights = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for weight in weights:
            weight.data = weight.float()
        self.weights, self.scheduler = weights, DDPMScheduler(**SD)
        optimizer = torch.optim.AdamW(weights, lr=RATE)
        rates = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
        self.unet, self.optimizer, self.rates = self.accelerator.prepare(unet, optimizer, rates)
        self.unet.train()
        read = [np.asarray(Image.open(path), np.float32) for path in sorted(pictures.rglob("*.png"))[:BATCH]]
        device = self.accelerator.device
        self.pixels = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).to(device) / 127.5 - 1
        self.tokens = pipe.tokenizer(
            [CAPTION] * BATCH, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids.to(device)

    def step(self) -> float:
        """As the script's loop, without its bar."""
        with self.accelerator.accumulate(self.unet):
            with torch.no_grad():
                latents = self.vae.encode(self.pixels).latent_dist.sample() * self.vae.config.scaling_factor
                states = self.text_encoder(self.tokens)[0]
            noise = torch.randn_like(latents)
            times = torch.randint(0, 1000, (BATCH,), device=latents.device)
            noisy = self.scheduler.add_noise(latents, noise, times)
            predicted = self.unet(noisy, times, states, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            mean: Tensor = self.accelerator.gather(loss.repeat(BATCH)).mean()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
        return mean.item()


def measure_steps(bench: Bench, pictures: Path, report: Report) -> None:
    """Steps per second, and the part of a step that is waiting for pictures."""
    pipes = [make_pipe(bench) for _ in range(3)]
    for pipe in pipes[1:]:
        pipe.unet = synthetic.sibling(pipes[0].unet)
    plain = ours(bench, pipes[0], pictures)
    cached = ours(bench, pipes[1], pictures, cache_latents=True, cache_text_encoder_outputs=True)
    peer = Peer(bench, pipes[2], pictures)
    with closing(plain.batches(0)) as first, closing(cached.batches(0)) as second:
        cases = [
            Case("diffusers' loop with PEFT", peer.step),
            Case("ours", lambda: plain.step(first, 0)),
            Case("ours, latents and text cached", lambda: cached.step(second, 0)),
        ]
        take_turns(cases, bench.options.rounds(ROUNDS), Stopwatch(bench.options.device), warmup=2)
        waits = [_waited(second) for _ in range(bench.options.rounds(ROUNDS))]
    rows = [
        (case.name, seconds(case.wall), seconds(case.busy), f"{1 / case.wall:.3g}", str(ratio(cases[0], case)))
        for case in cases
    ]
    share = sum(waits) / len(waits) / cases[2].wall
    columns = ("loop", "step", busy_label(bench.options), "steps/s", "times the peer's speed")
    size = f"{bench.side} x {bench.side} pixels, batch {BATCH}, rank {RANK}, AdamW, {bench.dtype}"
    notes = (size, f"waiting for a batch of the cached set: {100 * share:.2g} % of its step")
    promised = [(1, "speed of diffusers' loop with PEFT", 1.0), (2, "the same with cached latents and text", 1.3)]
    claims = [
        Claim(text, ratio(cases[0], cases[index]).median, target, at_most=False) for index, text, target in promised
    ]
    claims.append(Claim("part of a step that is data loading", share, 0.05))
    report.add(Table("Steps of a training", columns, rows, notes), claims)


def _waited(batches: Any) -> float:
    start = time.perf_counter()
    next(batches)
    return time.perf_counter() - start


def measure_memory(bench: Bench, given: Sequence[str], report: Report) -> None:
    """The most memory of a process that trains two steps, with and without gradient checkpointing."""
    kept = [word for word in given if word != "--tiny"] + (["--model=small"] if bench.options.model == "small" else [])
    words = [*kept, f"--dtype={bench.dtype}"]
    peaks = [
        float(
            subprocess.run(  # noqa: S603
                [sys.executable, "-m", "benchmarks.train", MEMORY, which, *words],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
        )
        for which in ("off", "on")
    ]
    rows = [(which, f"{peak / 2**30:.2f} GiB") for which, peak in zip(("off", "on"), peaks, strict=True)]
    promise = "peak memory with gradient checkpointing, of that without"
    # Of a small model nearly all memory is that of the libraries.
    claims = [Claim(promise, peaks[1] / peaks[0], LESS_MEMORY)] if bench.options.model != "small" else []
    columns = ("gradient checkpointing", "on the GPU" if bench.options.device.type == "cuda" else "of the process")
    report.add(Table("Peak memory, latents and text cached", columns, rows), claims)


def measure_peak(given: list[str]) -> int:
    """Train two steps and print the bytes that were taken at most."""
    place = given.index(MEMORY)
    on = given[place + 1] == "on"
    options = parse_options("train", "", given[:place] + given[place + 2 :], ("fp32",))
    bench = Bench(options, options.dtypes[0])
    cached = {"cache_latents": True, "cache_text_encoder_outputs": True}
    with lora_folder() as folder:
        pictures = write_pictures(folder, bench.side)
        training = ours(bench, make_pipe(bench), pictures, gradient_checkpointing=on, **cached)
        with closing(training.batches(0)) as batches:
            for step in range(2):
                training.step(batches, step)
    print(peak_bytes(options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
