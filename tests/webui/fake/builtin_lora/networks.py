"""The built-in extension's way: torch's classes get forwards that merge into weights and keep a copy of each."""

import os

import network
import torch
from modules import shared

originals = None
extra_network_lora = None
available_networks = {}
forbidden_network_aliases = {}
available_network_hash_lookup = {}
loaded_networks = []


def list_available_networks():
    available_networks.clear()
    forbidden_network_aliases.clear()
    available_network_hash_lookup.clear()
    aliases = set()
    for path in network.lora_files(shared.cmd_opts.lora_dir):
        name = os.path.splitext(os.path.basename(path))[0]
        entry = available_networks[name] = network.NetworkOnDisk(name, path)
        if entry.alias in aliases:
            forbidden_network_aliases[entry.alias.lower()] = 1
        aliases.update((name, entry.alias))


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    loaded_networks.clear()
    for index, name in enumerate(names):
        if name in available_networks:
            net = network.Network(name, available_networks[name])
            net.unet_multiplier = unet_multipliers[index] if unet_multipliers else 1.0
            loaded_networks.append(net)


def network_restore_weights_from_backup(self):
    if getattr(self, "network_weights_backup", None) is not None:
        self.weight.copy_(self.network_weights_backup)


def network_reset_cached_weight(self):
    self.network_current_names = ()
    self.network_weights_backup = None
    self.network_bias_backup = None


def network_apply_weights(self):
    wanted = tuple((one.name, one.unet_multiplier) for one in loaded_networks)
    if getattr(self, "network_current_names", ()) == wanted:
        return
    if getattr(self, "network_weights_backup", None) is None:
        self.network_weights_backup = self.weight.clone()
    network_restore_weights_from_backup(self)
    for _, multiplier in wanted:
        self.weight.mul_(1 + multiplier)
    self.network_current_names = wanted


def network_Linear_forward(self, input):
    with torch.no_grad():
        network_apply_weights(self)
    return originals.Linear_forward(self, input)


def network_Linear_load_state_dict(self, *args, **kwargs):
    network_reset_cached_weight(self)
    return originals.Linear_load_state_dict(self, *args, **kwargs)
