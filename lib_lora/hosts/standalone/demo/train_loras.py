"""Trains the demo LoRAs: a plain trainer, for these two files only.

A picture drawn with an effect at strength s is learned with the LoRA at strength s, so half the strength is half the
effect. Captions do not name the effect: no trigger word is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .drawing import random_scene
from .train_unet import Dataset, Denoiser, noise_loss, short_caption, tokenize
from .train_vae import as_batch, encode
from .training import Average, cosine_steps, seeded

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Mapping

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch.utils.hooks import RemovableHandle
    from transformers import CLIPTokenizer

PICTURES = 4000
BATCH = 32

_TRANSFORMER = ("Transformer2DModel",)
_CONVOLUTIONAL = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_TEXT = ("CLIPAttention", "CLIPMLP")


@dataclass(frozen=True)
class Recipe:
    """One demo LoRA.

    Attributes:
        effect: Field of Scene that it learns.
        rank: Of Linear and 1x1 convolutions.
        conv_rank: Of 3x3 convolutions (C3Lier); 0 leaves the layers outside the transformers alone (LierLa).
        text: Whether the text encoder gets layers too.
    """

    effect: str
    rank: int
    conv_rank: int = 0
    text: bool = False

    @property
    def unet_blocks(self) -> tuple[str, ...]:
        """Class names of the UNet blocks whose layers are trained."""
        return _TRANSFORMER + (_CONVOLUTIONAL if self.conv_rank else ())

    def rank_of(self, layer: nn.Module) -> int:
        """Rank for this layer."""
        return self.conv_rank if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) else self.rank


RECIPES = {
    "stripes": Recipe("stripes", rank=8, text=True),
    "outline": Recipe("outline", rank=4, conv_rank=4),
}


class LoraLayer(nn.Module):
    """(alpha / rank) · up(down(x)) for one Linear or Conv2d, with alpha half of the rank."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.alpha = rank / 2
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            shape = layer.kernel_size, layer.stride, layer.padding
            self.down = nn.Conv2d(layer.in_channels, rank, *shape, bias=False)  # pyright: ignore[reportArgumentType]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The change of the layer's output at strength 1."""
        return self.up(self.down(x)) * (self.alpha / self.down.weight.shape[0])


class LoraNetwork(nn.Module):
    """LoRA layers hooked into a denoiser.

    Attributes:
        strengths: One for each picture of the next batch, (N,).
    """

    def __init__(self, model: Denoiser, recipe: Recipe) -> None:
        super().__init__()
        self.strengths = torch.ones(1)
        self.layers: dict[str, LoraLayer] = {}
        self._hooks: list[RemovableHandle] = []
        for name, layer in target_layers(model, recipe):
            lora = self.layers[name] = LoraLayer(layer, recipe.rank_of(layer))
            self.add_module(name, lora)
            self._hooks.append(layer.register_forward_hook(self._hook(lora)))

    def _hook(self, lora: LoraLayer) -> Callable[..., torch.Tensor]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + lora(inputs[0]) * self.strengths.reshape(-1, *[1] * (output.ndim - 1))

        return add

    def remove(self) -> None:
        """Take the hooks out of the denoiser."""
        for hook in self._hooks:
            hook.remove()

    def kohya_tensors(self) -> dict[str, torch.Tensor]:
        """fp16 tensors under kohya's names."""
        tensors: dict[str, torch.Tensor] = {}
        for name, lora in self.layers.items():
            tensors[f"{name}.lora_down.weight"] = lora.down.weight.detach().half()
            tensors[f"{name}.lora_up.weight"] = lora.up.weight.detach().half()
            tensors[f"{name}.alpha"] = torch.tensor(lora.alpha).half()
        return tensors


def target_layers(model: Denoiser, recipe: Recipe) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Key in kohya's format and layer of everything that `recipe` trains."""
    for name, layer in _layers_in(model.unet, recipe.unet_blocks):
        yield f"lora_unet_{name}".replace(".", "_"), layer
    for name, layer in _layers_in(model.text_encoder, _TEXT if recipe.text else ()):
        yield f"lora_te_text_model_{name.removeprefix('text_model.')}".replace(".", "_"), layer


def _layers_in(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for block_name, block in model.named_modules():
        if type(block).__name__ in blocks:
            for name, layer in block.named_modules(prefix=block_name):
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    yield name, layer


def train_lora(
    model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, recipe: Recipe, seed: int, steps: int
) -> tuple[Mapping[str, torch.Tensor], float]:
    """Tensors in kohya's format and the last mean squared error of the noise; `model` is left as it was."""
    rng = seeded(seed)
    model.requires_grad_(False)
    data, strengths = effect_dataset(vae, tokenizer, recipe, rng)
    network, error = LoraNetwork(model, recipe), Average()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0)
    for _ in cosine_steps(optimizer, steps, recipe.effect, error):
        picks = torch.randint(PICTURES, (BATCH,))
        network.strengths = strengths[picks]
        loss = noise_loss(model, data.latents[picks], data.tokens[picks])
        loss.backward()
        error.add(loss.item())
    network.remove()
    return network.kohya_tensors(), error.value


def effect_dataset(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, recipe: Recipe, rng: random.Random
) -> tuple[Dataset, torch.Tensor]:
    """Scenes that show the effect at random strengths, and these strengths (PICTURES,): half of them 1."""
    strengths = [rng.choice((1.0, rng.random())) for _ in range(PICTURES)]
    scenes = [replace(random_scene(rng), **{recipe.effect: strength}) for strength in strengths]
    tokens = tokenize(tokenizer, [short_caption(scene, rng) for scene in scenes])
    return Dataset(encode(vae, as_batch(scenes)), tokens), torch.tensor(strengths)
