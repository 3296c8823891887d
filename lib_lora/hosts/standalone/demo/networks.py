"""The demo model's networks: Stable Diffusion 1's block structure at a hundredth of its width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from .drawing import SIZE

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# With SD's 32 groups every group is one channel at these widths: colour is lost and nothing is learned.
NORM_GROUPS = 8
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
TOKENS = 77


_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": NORM_GROUPS,
    "sample_size": SIZE,
}
_UNET: dict[str, Any] = {
    "sample_size": SIZE // 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (32, 64, 96, 96),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": NORM_GROUPS,
}
_TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "projection_dim": TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "dtype": "float32",  # of the model in use; the file is fp16
}


def new_vae() -> AutoencoderKL:
    """Autoencoder, (N, 3, 64, 64) in -1..1 to (N, 4, 8, 8)."""
    return AutoencoderKL(**_VAE)


def new_unet() -> UNet2DConditionModel:
    """SD1's UNet: 12 input blocks, a middle block, 12 output blocks, attention where SD1 has it."""
    return UNet2DConditionModel(**_UNET)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text transformer with two layers."""
    tokens: dict[str, Any] = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **tokens, **_TEXT))


def new_scheduler() -> DDIMScheduler:
    """SD1's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
