"""Taking ``<lora:…>`` and ``<lyco:…>`` over from the built-in extension, and giving them back."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from modules import extra_networks, patches, sd_models

from lib_lora.hosts.webui.builtin import builtin_networks, file_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from lib_lora.report import AppliedLora

TAG = "lora"
ALIAS = "lyco"
OWNER = "prefuse"
APPLY = "network_apply_weights"
"""What the built-in extension's forwards call before torch's own."""


class TakeOver:
    """Who applies LoRAs: we, or the built-in extension, which stays registered behind us.

    Attributes:
        fallback: The built-in extension's extra network, or None if the extension is off.
        in_charge: Whether LoRAs are ours at the moment.
    """

    def __init__(self) -> None:
        self.fallback: Any = None
        self.in_charge = False
        self._shown: list[tuple[Any, AppliedLora]] = []

    def register(self, network: Any) -> None:
        """Put `network` in the place of the built-in one; once, however often it is called."""
        registered = extra_networks.extra_network_registry.get(TAG)
        if registered is not network:
            self.fallback = registered
            extra_networks.register_extra_network(network)
        extra_networks.register_extra_network_alias(network, ALIAS)

    def take(self) -> None:
        """The built-in extension lets go of the weights and of the forwards of torch's classes.

        To be called where no model is being loaded: its loader would put the forwards that it found back in the end.
        """
        from lib_lora.hosts.webui.hashes import UnambiguousHashes  # with the catalog, which the start does not wait for

        networks = builtin_networks()
        if not self.in_charge and networks is not None:
            networks.load_networks([])
            for sd_model in _models():
                _restore_merged(networks, sd_model)
            networks.available_network_hash_lookup = UnambiguousHashes(networks.available_networks.values())
            patches.patch(OWNER, networks, APPLY, _nothing)
        self.in_charge = True
        if networks is not None:
            _unpatch(networks)

    def give_back(self, *, patch: bool = True) -> None:
        """The built-in extension as it was.

        Args:
            patch: Whether its forwards are put back too; not before a reload, which does that itself.
        """
        networks = builtin_networks()
        if self.in_charge and networks is not None:
            patches.undo(OWNER, networks, APPLY)
            networks.loaded_networks.clear()
            networks.available_network_hash_lookup = dict(networks.available_network_hash_lookup)
            if patch:
                _patch(networks)
        self.in_charge = False

    def show(self, applied: Iterable[AppliedLora]) -> None:
        """Tell extensions that read ``networks.loaded_networks`` what is applied."""
        networks = builtin_networks()
        if networks is not None:
            self._shown = [(_entry(networks, lora), lora) for lora in applied]
            networks.loaded_networks[:] = [entry for entry, _ in self._shown]

    def changed_by_others(self) -> list[str]:
        """Names of LoRAs whose listed strengths another extension has changed since, which has no effect."""
        return [
            lora.name
            for entry, lora in self._shown
            if (entry.te_multiplier, entry.unet_multiplier) != (lora.te, lora.unet)
        ]


def _entry(networks: Any, lora: AppliedLora) -> Any:
    """What the built-in extension would list, without layers of its own."""
    on_disk = file_on_disk(lora.path) or sys.modules["network"].NetworkOnDisk(lora.path.stem, str(lora.path))
    entry = sys.modules["network"].Network(lora.name, on_disk)
    entry.mentioned_name = lora.name
    entry.te_multiplier, entry.unet_multiplier, entry.dyn_dim = lora.te, lora.unet, lora.dyn
    return entry


def _models() -> Iterator[nn.Module]:
    data = sd_models.model_data
    yield from {id(model): model for model in (data.sd_model, *data.loaded_sd_models) if model is not None}.values()


def _restore_merged(networks: Any, sd_model: nn.Module) -> None:
    """Take out of the weights what the built-in merged, which it would do in the next forward."""
    with torch.no_grad():
        for module in sd_model.modules():
            if getattr(module, "network_weights_backup", None) is None:
                continue
            if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                networks.network_restore_weights_from_backup(module)
            networks.network_reset_cached_weight(module)


def _applied_patches() -> dict[tuple[type, str], Any]:
    """Class and method → the original, of what the built-in extension has replaced in torch."""
    return patches.originals.get("lora_patches", {})


def _unpatch(networks: Any) -> None:
    """Torch's own methods again, unless something else was put on top of the built-in's.

    A forward that another extension took from a module before, as ControlNet-LLLite does for good, is still the
    built-in's and calls what it stands before: that stays known there.
    """
    applied = dict(_applied_patches())
    ours = (getattr(kind, method) is getattr(networks, f"network_{_name(kind, method)}") for kind, method in applied)
    if applied and all(ours):
        networks.originals.undo()
        for (kind, method), original in applied.items():
            setattr(networks.originals, _name(kind, method), original)
        # Its own script undoes them once more when it is unloaded, which raises if there is nothing to undo.
        networks.originals.undo = _nothing


def _name(kind: type, method: str) -> str:
    """As the built-in extension calls the original."""
    return f"{kind.__name__}_{method.removeprefix('_').replace('load_from', 'load')}"


def _patch(networks: Any) -> None:
    if not _applied_patches() and networks.originals is not None:
        vars(networks.originals).pop("undo", None)
        networks.originals.__init__()


def _nothing(*_: Any) -> None:
    """What is left to undo and to apply."""
