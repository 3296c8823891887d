"""A small Stable Diffusion 1 with random weights as the WebUI loads it, and LoRAs for it, good and bad.

    python -m tests.webui_real.make_models FOLDER [--channels 32] [--seed 0]

`FOLDER` becomes a WebUI data folder: two checkpoints with a ``.yaml`` each in ``models/Stable-diffusion``, the second
one's VAE in ``models/VAE``, LoRAs in ``models/Lora``, the text encoder's configuration and tokenizer in ``clip``.
The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_bytes, save_tensors
from tests.family_files import family_tensors
from tests.ldm_files import clip_tensors, ldm_tensors, vae_name, vae_tensor, write_checkpoint
from tests.toys import c3lier, golden_names, kohya_name, lierla, sd1_unet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

CONTEXT = 64
TOWER = "cond_stage_model.transformer."
CHECKPOINTS = ("tiny", "tinytwo")
OTHER_VAE = "othervae.safetensors"
GOOD = ("a", "b", "c", "d", "e")
ALIAS = "echo"
"""What `e` calls itself in its metadata."""
FAMILIES = {"loha": "LoHa", "dora": "DoRA of outputs"}
BUNDLE, WORD = "bundle", "zzword"
"""A LoRA that brings an embedding, and the word that stands for it."""
TRUNCATED, NOT_FINITE, FOR_SDXL = "cutshort", "notfinite", "forsdxl"
VOCABULARY = 49408
CONFIG = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: {channels}
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_heads: 8
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: {context}
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 32
          ch_mult: [1, 1, 1, 1]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: {clip}
"""


def make_models(folder: Path, *, channels: int = 32, seed: int = 0) -> None:
    """Write everything.

    Args:
        folder: The data folder.
        channels: Width of the UNet's first level, a multiple of 32; SD1 has 320.
        seed: Of all weights.
    """
    for number, name in enumerate(CHECKPOINTS):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed + number)
            unet, vae, tower = small_unet(channels), _vae(), _tower()
        _write_checkpoint(folder, name, channels, ldm_tensors(unet, vae, {TOWER: clip_tensors(tower)}))
    _write_vae(folder / "models/VAE" / OTHER_VAE, vae)
    _write_clip(folder / "clip")
    write_loras(folder / "models/Lora", KeyMap.from_modules({"unet": unet, "te1": tower}), seed)


def write_loras(folder: Path, keymap: KeyMap, seed: int = 0) -> None:
    """All LoRAs for the layers of a model of SD1's structure."""
    folder.mkdir(parents=True, exist_ok=True)
    unet_only = [layer for layer in lierla(keymap) if layer.component == "unet"]
    layers = {"a": lierla(keymap), "b": c3lier(keymap), "c": unet_only, "d": c3lier(keymap), "e": lierla(keymap)}
    for number, name in enumerate(GOOD, 1):
        metadata = {"ss_base_model_version": "sd_v1", "ss_output_name": ALIAS if name == "e" else name}
        tensors = _lora(layers[name], rank=4 * number, seed=100 * seed + number)
        save_tensors(folder / f"{name}.safetensors", tensors, metadata, overwrite=True)
    for number, (name, family) in enumerate(FAMILIES.items(), 11):
        tensors = _of_family(family, unet_only, 100 * seed + number)
        save_tensors(folder / f"{name}.safetensors", tensors, overwrite=True)
    vectors = torch.randn(2, CONTEXT, generator=torch.Generator().manual_seed(100 * seed + 20))
    bundled = _lora(layers["a"], rank=4, seed=100 * seed + 20) | {f"bundle_emb.{WORD}.string_to_param.*": vectors}
    save_tensors(folder / f"{BUNDLE}.safetensors", bundled, overwrite=True)
    _write_bad(folder, lierla(keymap), seed)


def _write_bad(folder: Path, layers: list, seed: int) -> None:
    whole = (folder / "a.safetensors").read_bytes()
    save_bytes(folder / f"{TRUNCATED}.safetensors", whole[: len(whole) * 6 // 10], overwrite=True)
    tensors = _lora(layers, rank=4, seed=100 * seed + 21)
    next(tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")).view(-1)[5] = math.nan
    save_tensors(folder / f"{NOT_FINITE}.safetensors", tensors, overwrite=True)
    generator = torch.Generator().manual_seed(100 * seed + 22)
    tensors = {}
    for name in golden_names("sdxl")["lierla"][::8]:
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 640, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(640, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    save_tensors(folder / f"{FOR_SDXL}.safetensors", tensors, metadata, overwrite=True)


def _lora(layers: Iterable, rank: int, seed: int) -> dict[str, Tensor]:
    """Random factors of about a third of the weights' size, alpha = rank / 2, half precision as trainers save them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        out, *rest = layer.shape
        ones = (1,) * len(rest[1:])
        down = torch.randn(rank, *rest, generator=generator) / math.sqrt(math.prod(rest))
        up = torch.randn(out, rank, *ones, generator=generator) / math.sqrt(rank)
        name = kohya_name(layer).replace("lora_te1_", "lora_te_")
        tensors[f"{name}.lora_down.weight"] = down.half()
        tensors[f"{name}.lora_up.weight"] = up.half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2).half()
    return tensors


def _of_family(family: str, layers: Iterable, seed: int) -> dict[str, Tensor]:
    tensors = {}
    for number, layer in enumerate(layers):
        made = family_tensors(family, tuple(layer.shape), 1000 * seed + number)
        tensors |= {f"{kohya_name(layer)}.{suffix}": tensor.contiguous() for suffix, tensor in made.items()}
    return tensors


def small_unet(channels: int) -> nn.Module:
    widths = tuple(channels * factor for factor in (1, 2, 4, 4))
    unet = sd1_unet(block_out_channels=widths, cross_attention_dim=CONTEXT, attention_head_dim=8, norm_num_groups=32)
    for module in unet.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight *= math.sqrt(3)
    seen = unet(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 77, CONTEXT)).sample
    _scale(unet.conv_out, 1.0, seen)
    return unet


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=2,
    ).eval()
    _scale(vae.decoder.conv_out, 0.25, vae.decode(5 * torch.randn(1, 4, 16, 16)).sample)
    return vae


def _scale(conv: nn.Module, spread: float, seen: Tensor) -> None:
    """Bring what `conv` gives to about `spread`; by a power of two, so that every machine takes the same."""
    conv.weight *= 2.0 ** round(math.log2(spread / seen.std().item()))
    conv.bias.zero_()


def _tower() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    tower = CLIPTextModel(CLIPTextConfig(**clip_config())).eval()
    for name, parameter in tower.named_parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape) * (1.0 if "embedding" in name else parameter.shape[1] ** -0.5))
        if "final_layer_norm.bias" in name:  # the WebUI divides by the mean of the whole encoding
            parameter.copy_(0.5 + 0.1 * torch.randn(parameter.shape))
    return tower


def clip_config() -> dict[str, int]:
    """Of the text encoder."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": CONTEXT,
        "intermediate_size": 2 * CONTEXT,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": CONTEXT,
        "max_position_embeddings": 77,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": 1,
    }


def _write_checkpoint(folder: Path, name: str, channels: int, tensors: dict[str, Tensor]) -> None:
    place = folder / f"models/Stable-diffusion/{name}.safetensors"
    write_checkpoint(place, tensors)
    text = CONFIG.format(channels=channels, context=CONTEXT, clip=json.dumps(str((folder / "clip").resolve())))
    save_bytes(place.with_suffix(".yaml"), text.encode(), overwrite=True)


def _write_vae(path: Path, vae: nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {vae_name(name): vae_tensor(name, value.detach()) for name, value in vae.named_parameters()}
    save_tensors(path, tensors, overwrite=True)


def _write_clip(folder: Path) -> None:
    """Configuration and tokenizer, from the list of byte pairs that open_clip ships."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges()
    letters = [_shown(byte) for byte in sorted(range(256), key=lambda byte: (not _printable(byte), byte))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    config = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], **clip_config()}
    ends = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": tokens[-1]}
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **ends}
    files = {
        "config.json": json.dumps(config, indent=1),
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(kind),
        "special_tokens_map.json": json.dumps(ends),
    }
    for name, text in files.items():
        save_bytes(folder / name, text.encode(), overwrite=True)


def _merges() -> list[str]:
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise SystemExit("open_clip is needed for its list of byte pairs: pip install open_clip_torch")
    with gzip.open(Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        return file.read().split("\n")[1 : VOCABULARY - 2 - 512 + 1]


def _printable(byte: int) -> bool:
    return 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255


def _shown(byte: int) -> str:
    """The letter that stands for a byte in byte-level pair encodings (Radford et al. 2019)."""
    if _printable(byte):
        return chr(byte)
    return chr(256 + sum(not _printable(smaller) for smaller in range(byte)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A small SD1 checkpoint and LoRAs for the WebUI, random weights.")
    parser.add_argument("folder", type=Path, help="becomes a data folder of the WebUI (--data-dir)")
    parser.add_argument("--channels", type=int, default=32, help="width of the UNet's first level (SD1: 320)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_models(options.folder, channels=options.channels, seed=options.seed)


if __name__ == "__main__":
    main()
