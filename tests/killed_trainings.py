"""Trainings that are killed and gone on with: ``python killed_trainings.py FOLDER KILLS`` prints what became of each.

It is a process of its own that forks each training, with all libraries and the model in memory. It never trains by
itself: torch's backward pass does not work in a process whose parent has begun one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate  # noqa: F401 - once, before the forks
import torch
import transformers.optimization  # noqa: F401
from diffusers.optimization import get_scheduler  # noqa: F401
from train_runs import load_tiny, options_for, tiny_folder, write_pictures

from lib_lora.core.files import data_sha256
from lib_lora.core.replacing import TempFile
from lib_lora.errors import PrefuseError
from lib_lora.train import trainer
from lib_lora.train.control import Wish

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib_lora.train.model import TrainModel
    from lib_lora.train.options import TrainOptions

STEPS = 8
NEVER = 1 << 40
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dropouts, accumulation, average": {
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "network_dropout": 0.2,
        "rank_dropout": 0.2,
        "module_dropout": 0.2,
        "gradient_accumulation_steps": 2,
        "noise_offset": 0.05,
        "ema": True,
    },
    "DyLoRA, shuffled captions, cached latents": {
        "network_module": "dylora",
        "unit": 2,
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_dropout_rate": 0.3,
        "caption_tag_dropout_rate": 0.2,
        "cache_latents": True,
        "flip_aug": True,
        "optimizer_type": "SGDNesterov",
        "lr_scheduler": "linear",
    },
    "files of encoded pictures and captions": {
        "network_train_unet_only": True,
        "cache_latents_to_disk": True,
        "cache_text_encoder_outputs_to_disk": True,
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 2,
        "min_snr_gamma": 5,
        "save_every_n_steps": 3,
    },
    "convolutions, checkpointing, bf16, reading ahead": {
        "conv_dim": 2,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "random_crop": True,
        "max_data_loader_n_workers": 2,
        "optimizer_type": "Adafactor",
        "scale_weight_norms": 0.1,
        "save_state_every_n_steps": 2,
    },
    "the whole UNet, regularisation pictures": {
        "full": True,
        "learning_rate": 1e-3,
        "reg_data_dir": "reg",
        "prior_loss_weight": 0.5,
        "caption_dropout_rate": 0.2,
        "ema": True,
    },
}
MOMENTS = ("after a step", "while a file is written", "while a file gets its name", "at any time")


@dataclass
class Death:
    """How much a training may do before it is killed; a count of what it did, if that is all it does.

    Attributes:
        steps: Until right after so many.
        bytes: Until so many are written.
        names: Until right before so many files of those that are whole get their names, or with a half, right after.
    """

    steps: float = NEVER
    bytes: float = NEVER
    names: float = NEVER

    def spend(self, kind: str, amount: float) -> None:
        """Die with the last of it."""
        setattr(self, kind, getattr(self, kind) - amount)
        if getattr(self, kind) <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_files(self) -> None:
        """From now on, in this process."""
        write, publish = TempFile.write, TempFile.publish

        def written(temp: TempFile, data: Any) -> None:
            write(temp, data[: int(min(self.bytes, len(data)))])
            self.spend("bytes", len(data))

        def published(temp: TempFile, path: Path) -> None:
            self.spend("names", 0.5)
            publish(temp, path)
            self.spend("names", 0.5)

        TempFile.write, TempFile.publish = written, published


@dataclass(frozen=True)
class Place:
    """One training: where it is, and what it is to be."""

    folder: Path
    model: TrainModel
    pictures: Path
    given: dict[str, Any]

    @property
    def states(self) -> Path:
        return self.folder / "made-state"

    def options(self) -> TrainOptions:
        """To go on where there is something to go on from."""
        more = {"resume": self.states} if list(self.states.glob("*.safetensors")) else {}
        own = {"reg_data_dir": self.pictures.with_name("reg")} if self.given.get("reg_data_dir") else {}
        common = {"max_train_steps": STEPS, "save_state_every_n_steps": 1, "cache_dir": self.folder / "cache"}
        return options_for(self.pictures, self.folder, **{**common, **self.given, **own, **more})

    def losses(self) -> dict[int, set[str]]:
        """Step → what its loss was, to the bit; two if they differ."""
        found: dict[int, set[str]] = {}
        for line in (self.folder / "losses").read_text().splitlines():
            step, loss = line.split()
            found.setdefault(int(step), set()).add(loss)
        return found

    def result(self) -> dict[str, Any]:
        """All that a training leaves, to the bit: losses, the last state, and what was learned."""
        last = self.states / f"step-{STEPS:08d}.safetensors"
        learned = [path for path in self.folder.rglob("*.safetensors") if "cache" not in path.parts]
        results = {
            str(path.relative_to(self.folder)): data_sha256(path) for path in learned if path.parent != self.states
        }
        return {"losses": self.losses(), "state": last.read_bytes(), "results": results}


def train(place: Place, death: Death) -> None:
    """In a process of its own; its last step is followed by a pause, for which all that it knows is saved."""
    place.folder.mkdir(exist_ok=True)
    death.watch_files()
    trainer.PAUSE_SECONDS = 0
    wishes = [Wish.GO, Wish.PAUSE]
    with (place.folder / "losses").open("a", buffering=1) as log:

        def progress(now: Any) -> None:
            log.write(f"{now.step} {now.loss.hex()}\n")
            if now.step < STEPS:
                wishes.append(Wish.GO)
            death.spend("steps", 1)

        trainer.train(place.model, place.options(), progress=progress, wishes=wishes.pop)


def forked(work: Callable[[], None]) -> int:
    """The process that does it."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except PrefuseError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(1)
    finally:
        sys.stderr.flush()
    os._exit(0)


def ended(child: int) -> int:
    """0, or the signal that ended it."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a training ended with {status}")
    return -status


def whole(place: Place) -> tuple[Death, float]:
    """Train without a kill: what was done for it, and how many seconds it took."""
    counts = place.folder.with_suffix(".json")

    def counted() -> None:
        death = Death()
        train(place, death)
        counts.write_text(json.dumps({key: NEVER - left for key, left in asdict(death).items()}))

    start = time.perf_counter()
    if ended(forked(counted)):
        raise RuntimeError("a training was killed by somebody else")
    return Death(**json.loads(counts.read_text())), time.perf_counter() - start


def killed(place: Place, moment: str, done: Death, seconds: float, chance: random.Random) -> int:
    """Begin it and kill it; how often it ended before."""
    deaths = {
        "after a step": lambda: Death(steps=chance.randrange(1, STEPS)),
        "while a file is written": lambda: Death(bytes=chance.randrange(1, int(done.bytes))),
        "while a file gets its name": lambda: Death(names=chance.randrange(1, int(2 * done.names)) / 2),
    }
    for attempt in range(10):
        child = forked(partial(train, place, deaths.get(moment, Death)()))
        if moment not in deaths:
            time.sleep(chance.uniform(0, seconds) / 2**attempt)
            os.kill(child, signal.SIGKILL)
        if ended(child):
            return attempt
    raise RuntimeError("a training ended ten times before it was killed")


def tell(number: int, places: dict[str, Place], wholes: dict[str, Any]) -> dict[str, Any]:
    """Kill one training, go on with it, and compare."""
    name, moment = list(places)[number % len(places)], MOMENTS[number % len(MOMENTS)]
    one = places[name]
    place = Place(one.folder.with_name(f"killed-{number}"), one.model, one.pictures, one.given)
    (done, seconds), expected = wholes[name]
    place.folder.mkdir()
    (place.folder / "losses").touch()
    killed(place, moment, done, seconds, random.Random(number))
    begun, states = max(place.losses(), default=0), len(list(place.states.glob("*.safetensors")))
    if ended(forked(partial(train, place, Death()))):
        raise RuntimeError("a training was killed by somebody else")
    found = place.result()
    differing = [key for key in expected if found[key] != expected[key]]
    return {"name": name, "moment": moment, "step": begun, "states": states, "differing": differing}


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    model, pictures = load_tiny(tiny_folder(folder / "made")), write_pictures(folder / "pictures")
    write_pictures(folder / "reg", 2)
    for text in pictures.rglob("*.txt"):
        text.write_text(", ".join(text.read_text().split()))
    places = {
        name: Place(folder / f"whole-{index}", model, pictures, given)
        for index, (name, given) in enumerate(CONFIGURATIONS.items())
    }
    wholes = {name: (whole(place), place.result()) for name, place in places.items()}
    for number in range(kills):
        sys.stdout.write(f"{json.dumps(tell(number, places, wholes))}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
