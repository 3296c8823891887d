"""Makes the embedded demo model and its two LoRAs from nothing.

    python -m lib_lora.hosts.standalone.demo.build --out FOLDER

About 45 minutes on two CPU cores. Stages can be made one by one; each takes what the earlier ones left in FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lib_lora.core.saving import save_tensors

from .networks import new_scheduler
from .tokenizer import new_tokenizer
from .train_loras import RECIPES, train_lora
from .train_unet import Denoiser, train_unet
from .train_vae import ROUNDS, train_vae

if TYPE_CHECKING:
    from collections.abc import Mapping

STEPS = {"vae": sum(part.steps for part in ROUNDS), "unet": 2800, "stripes": 600, "outline": 600}
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


class Build:
    """One model in the making, in `out`/model and `out`/loras."""

    def __init__(self, out: Path, seed: int) -> None:
        self.model, self.loras = out / "model", out / "loras"
        self.seed = seed

    def vae(self) -> float:
        """Train the autoencoder; its last error."""
        return train_vae(self.seed, self._save_vae, ROUNDS)[1]

    def unet(self) -> float:
        """Train UNet and text encoder; the last error of the noise."""
        tokenizer = new_tokenizer(self.model / "tokenizer")
        vae = AutoencoderKL.from_pretrained(self.model / "vae")
        new_scheduler().save_pretrained(self.model / "scheduler")
        index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
        write_json(self.model / "model_index.json", {**index, "requires_safety_checker": False, **PARTS})
        return train_unet(vae, tokenizer, self.seed, STEPS["unet"], self._save_denoiser)[1]

    def lora(self, name: str) -> float:
        """Train one demo LoRA; the last error of the noise."""
        recipe = RECIPES[name]
        tokenizer = CLIPTokenizer.from_pretrained(self.model / "tokenizer")
        vae = AutoencoderKL.from_pretrained(self.model / "vae")
        tensors, error = train_lora(self._load_denoiser(tokenizer), vae, tokenizer, recipe, self.seed, STEPS[name])
        metadata = {
            "modelspec.title": name,
            "ss_output_name": name,
            "ss_base_model_version": "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(recipe.rank),
            "ss_network_alpha": str(recipe.rank / 2),
        }
        if recipe.conv_rank:
            conv = {"conv_dim": str(recipe.conv_rank), "conv_alpha": str(recipe.conv_rank / 2)}
            metadata["ss_network_args"] = json.dumps(conv)
        self.loras.mkdir(parents=True, exist_ok=True)
        save_tensors(self.loras / f"{name}.safetensors", tensors, metadata, overwrite=True)
        return error

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

    def _load_denoiser(self, tokenizer: CLIPTokenizer) -> Denoiser:
        denoiser = Denoiser(tokenizer)
        denoiser.unet = UNet2DConditionModel.from_pretrained(self.model / "unet")
        denoiser.text_encoder = CLIPTextModel.from_pretrained(self.model / "text_encoder", dtype=torch.float32)
        return denoiser

    def note(self, stage: str, minutes: float, error: float) -> None:
        """Add one stage to PROVENANCE.json and hash every file anew."""
        path = self.model / "PROVENANCE.json"
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"stages": {}}
        known["stages"][stage] = {"steps": STEPS[stage], "minutes": round(minutes, 1), "last_loss": round(error, 5)}
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


def main() -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and loras/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("vae", "unet", *RECIPES, "all"), default="all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build = Build(options.out, options.seed)
    jobs = {"vae": build.vae, "unet": build.unet, **{name: lambda n=name: build.lora(n) for name in RECIPES}}
    for stage in jobs if options.stage == "all" else [options.stage]:
        start = time.monotonic()
        error = jobs[stage]()
        build.note(stage, (time.monotonic() - start) / 60, error)


if __name__ == "__main__":
    main()
