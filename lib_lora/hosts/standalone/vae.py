"""Another autoencoder than that of a model, from a file or a folder, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.files import map_checkpoint
from lib_lora.core.model_folder import weight_files
from lib_lora.core.single_file import VAE_PREFIX
from lib_lora.core.vae_names import PARTS, vae_to_diffusers, vae_to_ldm
from lib_lora.errors import ModelError
from lib_lora.hosts.standalone.checkpoints import owned

if TYPE_CHECKING:
    from pathlib import Path


def load_vae(path: Path, like: Any) -> Any:
    """An autoencoder on the CPU in float32.

    Args:
        path: A .safetensors file under LDM's or diffusers' names, such as a WebUI's VAE, or a folder of diffusers.
        like: An autoencoder of the same architecture: SD1, SD2 and SDXL have the same one.

    Raises:
        FileError: If it can not be read.
        ModelError: If it is none of that architecture.
    """
    folder = path / "vae" if (path / "vae").is_dir() else path
    file = weight_files(folder)[0] if path.is_dir() else path
    tensors = map_checkpoint(file)
    named = {name.removeprefix(VAE_PREFIX): name for name in tensors}
    kept = {name: tensors[full] for name, full in named.items() if name.partition(".")[0] in PARTS}
    weights = vae_to_diffusers(vae_to_ldm(kept))  # of either's names, the first does nothing to LDM's
    vae = type(like).from_config(like.config)
    try:
        vae.load_state_dict(owned(weights, torch.float32))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{file.name} is no autoencoder of SD1, SD2 or SDXL: {reason}") from error
    return vae.eval().requires_grad_(False)
