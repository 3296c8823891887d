"""Makes the embedded demo model and its two LoRAs from nothing.

    python -m lib_lora.hosts.standalone.demo.build --out FOLDER

About 45 minutes on two CPU cores. Stages can be made one by one; each takes what the earlier ones left in FOLDER. The
LoRAs are made by the trainer, from `configs`; for the model as it is shipped, after the stage "pictures":

    python -m lib_lora train CONFIG.toml --in_json FOLDER/pictures/NAME/metadata.jsonl --output_dir FOLDER/loras
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from lib_lora.core.saving import save_tensors
from lib_lora.hosts.standalone.training import load_model, model_to_train
from lib_lora.train.option_values import read_toml
from lib_lora.train.options import TrainOptions
from lib_lora.train.trainer import train

from . import CONFIG_DIR
from .lora_pictures import EFFECTS, LIST, write_pictures
from .networks import new_scheduler
from .tokenizer import new_tokenizer
from .train_unet import train_unet
from .train_vae import ROUNDS, train_vae

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lib_lora.train.progress import TrainProgress

    from .train_unet import Denoiser

UNET_STEPS = 2800
log = logging.getLogger(__name__)

PARTS = {
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "safety_checker": (None, None),
    "feature_extractor": (None, None),
    "image_encoder": (None, None),
}


class Trained(NamedTuple):
    """How a stage ended.

    Attributes:
        steps: Of the optimizer.
        loss: Mean of the last steps.
    """

    steps: int
    loss: float


class Build:
    """One model in the making, in `out`/model, `out`/pictures and `out`/loras."""

    def __init__(self, out: Path, seed: int) -> None:
        self.model, self.pictures, self.loras = out / "model", out / "pictures", out / "loras"
        self.seed = seed

    def vae(self) -> Trained:
        """Train the autoencoder."""
        return Trained(sum(part.steps for part in ROUNDS), train_vae(self.seed, self._save_vae, ROUNDS)[1])

    def unet(self) -> Trained:
        """Train UNet and text encoder."""
        tokenizer = new_tokenizer(self.model / "tokenizer")
        vae = AutoencoderKL.from_pretrained(self.model / "vae")
        new_scheduler().save_pretrained(self.model / "scheduler")
        index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
        write_json(self.model / "model_index.json", {**index, "requires_safety_checker": False, **PARTS})
        return Trained(UNET_STEPS, train_unet(vae, tokenizer, self.seed, UNET_STEPS, self._save_denoiser)[1])

    def draw_pictures(self) -> None:
        """Draw what the LoRAs learn."""
        for name in EFFECTS:
            write_pictures(name, self.pictures / name, seed=self.seed)

    def lora(self, name: str) -> Trained:
        """Train one demo LoRA as its configuration says."""
        places = {
            "pretrained_model_name_or_path": str(self.model),
            "in_json": self.pictures / name / LIST,
            "output_dir": self.loras,
        }
        given = {"seed": self.seed, "force": True, "save_state_every_n_steps": 0}
        options = TrainOptions.of({**read_toml(CONFIG_DIR / f"{name}.toml"), **places, **given})
        loaded = load_model(options.model)
        outcome = train(model_to_train(loaded, options.model), options, progress=_tell)
        return Trained(outcome.step, outcome.loss)

    def _save_vae(self, vae: AutoencoderKL) -> None:
        vae.save_config(self.model / "vae")
        save_half(self.model / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict())

    def _save_denoiser(self, denoiser: Denoiser) -> None:
        denoiser.unet.save_config(self.model / "unet")
        save_half(self.model / "unet" / "diffusion_pytorch_model.safetensors", denoiser.unet.state_dict())
        denoiser.text_encoder.config.save_pretrained(self.model / "text_encoder")
        # transformers 5 drops this prefix in memory; files have it, and both 4 and 5 read it.
        weights = denoiser.text_encoder.state_dict().items()
        named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights}
        save_half(self.model / "text_encoder" / "model.safetensors", named)

    def note(self, stage: str, minutes: float, trained: Trained) -> None:
        """Add one stage to PROVENANCE.json and hash every file anew."""
        path = self.model / "PROVENANCE.json"
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"stages": {}}
        known["stages"][stage] = {
            "steps": trained.steps,
            "minutes": round(minutes, 1),
            "last_loss": round(trained.loss, 5),
        }
        known |= {
            "command": f"python -m lib_lora.hosts.standalone.demo.build --seed {self.seed} --out FOLDER",
            "seed": self.seed,
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads",
            "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
            "sha256": self._hashes(),
        }
        write_json(path, known)

    def _hashes(self) -> dict[str, str]:
        files = sorted(f for folder in (self.model, self.loras) for f in folder.rglob("*.safetensors"))
        root = self.model.parent
        return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def save_half(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """fp16 safetensors at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, halves, {"format": "pt"}, overwrite=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable JSON at `path`."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def _tell(now: TrainProgress) -> None:
    if now.step % 100 == 0 or now.step == now.steps:
        log.info("%d/%d loss %.4f, %.0f s left", now.step, now.steps, now.mean_loss, now.seconds_left)


def main() -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, pictures/ and loras/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("vae", "unet", "pictures", *EFFECTS, "all"), default="all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build = Build(options.out, options.seed)
    jobs = {
        "vae": build.vae,
        "unet": build.unet,
        "pictures": build.draw_pictures,
        **{name: partial(build.lora, name) for name in EFFECTS},
    }
    for stage in jobs if options.stage == "all" else [options.stage]:
        start = time.monotonic()
        trained = jobs[stage]()
        if trained is not None:
            build.note(stage, (time.monotonic() - start) / 60, trained)


if __name__ == "__main__":
    main()
