"""How other systems switch LoRA sets: two algorithms in our own words, and diffusers' own API.

Weights only, as far as these files need it: no biases, other LoRA families, hooks or prompt handling. Every class has
the verbs that `Ours` in `switch` has: `switch(loras)` and `clear()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from benchmarks.synthetic import target_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from benchmarks.synthetic import Factors, LoraSet

    Networks = Mapping[str, Mapping[str, Factors]]


class Switcher(Protocol):
    """Something that puts LoRA sets into a UNet."""

    def switch(self, loras: LoraSet) -> None:
        """Make the weights those of this set, whatever is in them now."""
        ...

    def clear(self) -> None:
        """Take the LoRAs out."""
        ...


class WebuiAlgorithm:
    """The built-in extension of the AUTOMATIC1111 WebUI 1.10.1.

    A copy of every hooked layer's weight lies in RAM, also of layers that no LoRA touches. A change of the set copies
    all of them back, then adds one LoRA after the other: product, times alpha / rank, times strength, sum, copy, each
    in the model's dtype.
    """

    HOOKED = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)

    def __init__(self, unet: nn.Module, networks: Networks) -> None:
        self._networks = networks
        self._layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, self.HOOKED)}
        self._backup = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in self._layers.items()}

    @torch.no_grad()
    def switch(self, loras: LoraSet) -> None:
        """Restore everything, then add."""
        for name, layer in self._layers.items():
            layer.weight.copy_(self._backup[name])
            for lora, strength in loras:
                if (factors := self._networks[lora].get(name)) is not None:
                    delta = (factors.up.flatten(1) @ factors.down.flatten(1)).reshape(layer.weight.shape)
                    delta = delta * factors.scale * strength
                    layer.weight.copy_(layer.weight + delta)

    def clear(self) -> None:
        """Restore everything."""
        self.switch(())


class ComfyAlgorithm:
    """ComfyUI's model patcher: a float32 working copy of each layer, one LoRA after the other, rounded once.

    By default the patched weight becomes a new parameter, and the old one is kept as the backup; on a GPU the backup
    is a copy in RAM. With `in_place` the backup is a copy and the parameter keeps its storage, as it must where graphs
    are compiled; every change of the set takes its backups anew.
    """

    def __init__(self, unet: nn.Module, networks: Networks, *, in_place: bool = False) -> None:
        self._layers = dict(unet.named_modules())
        self._networks = networks
        self._in_place = in_place
        self._backup: dict[str, Tensor] = {}

    @torch.no_grad()
    def switch(self, loras: LoraSet) -> None:
        """Put the backups back, then patch the layers of the new set."""
        self.clear()
        for name in dict.fromkeys(name for lora, _ in loras for name in self._networks[lora]):
            layer = self._layers[name]
            self._backup[name] = layer.weight.detach().to("cpu", copy=self._in_place)
            self._write(layer, self._patched(name, layer.weight, loras).to(layer.weight.dtype))

    def _patched(self, name: str, weight: Tensor, loras: LoraSet) -> Tensor:
        result = weight.detach().to(torch.float32, copy=True)
        present = ((self._networks[lora][name], strength) for lora, strength in loras if name in self._networks[lora])
        for (up, down, scale), strength in present:
            delta = torch.mm(up.to(torch.float32).flatten(1), down.to(torch.float32).flatten(1))
            result += (strength * scale) * delta.reshape(weight.shape)
        return result

    def _write(self, layer: nn.Module, weight: Tensor) -> None:
        if self._in_place:
            layer.weight.data.copy_(weight)
        else:
            layer.weight = nn.Parameter(weight.to(layer.weight.device), requires_grad=False)

    @torch.no_grad()
    def clear(self) -> None:
        """Put the backups back."""
        for name, weight in self._backup.items():
            self._write(self._layers[name], weight)
        self._backup.clear()


class DiffusersApi:
    """diffusers with PEFT, called: every LoRA is loaded as an adapter; a change is unfuse, set_adapters, fuse."""

    def __init__(self, unet: UNet2DConditionModel, networks: Networks) -> None:
        self._unet = unet
        self._fused = False
        load_adapters(unet, networks)

    def switch(self, loras: LoraSet) -> None:
        """Subtract what is fused, add the new set."""
        self.clear()
        names, strengths = zip(*loras, strict=True)
        self._unet.set_adapters(list(names), list(strengths))
        self._unet.fuse_lora(adapter_names=list(names))
        self._fused = True

    def clear(self) -> None:
        """Subtract what is fused."""
        if self._fused:
            self._unet.unfuse_lora()
            self._fused = False


def load_adapters(unet: UNet2DConditionModel, networks: Networks) -> None:
    """Load LoRAs into a UNet through diffusers' own loader, as PEFT adapters in the model's dtype."""
    for lora, layers in networks.items():
        tensors = {f"unet.{name}.lora_A.weight": factors.down for name, factors in layers.items()}
        tensors |= {f"unet.{name}.lora_B.weight": factors.up for name, factors in layers.items()}
        alphas = {f"unet.{name}.alpha": factors.scale * factors.down.shape[0] for name, factors in layers.items()}
        unet.load_lora_adapter(tensors, prefix="unet", network_alphas=alphas, adapter_name=lora, low_cpu_mem_usage=True)


class GemmFloor:
    """What no method on this machine can go below: one `torch.addmm` a layer.

    The factors are concatenated, scaled and in the model's dtype before; results go to memory that is there already.
    No plan, no names, no checks.
    """

    def __init__(self, unet: nn.Module, kind: str, networks: Networks, sets: Iterable[LoraSet]) -> None:
        weights = {name: layer.weight.detach() for name, layer in target_layers(unet, kind).items()}
        self._outputs = {name: torch.zeros_like(weight).flatten(1) for name, weight in weights.items()}
        self._bases = {name: weight.flatten(1) for name, weight in weights.items()}
        self._stacks = {loras: self._stack(networks, loras) for loras in sets}

    def _stack(self, networks: Networks, loras: LoraSet) -> dict[str, tuple[Tensor, Tensor]]:
        stacks: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self._bases:
            entries = [(networks[lora][name], strength) for lora, strength in loras]
            up = torch.cat([factors.up.flatten(1) * (factors.scale * strength) for factors, strength in entries], 1)
            down = torch.cat([factors.down.flatten(1) for factors, _ in entries])
            stacks[name] = up, down
        return stacks

    @torch.no_grad()
    def switch(self, loras: LoraSet) -> None:
        """The products."""
        stacks = self._stacks[loras]
        for name, base in self._bases.items():
            torch.addmm(base, *stacks[name], out=self._outputs[name])

    @torch.no_grad()
    def clear(self) -> None:
        """A plain copy of the same bytes."""
        for name, base in self._bases.items():
            self._outputs[name].copy_(base)
