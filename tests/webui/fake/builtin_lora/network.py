"""The built-in extension's files and loaded networks."""

import json
import os

from modules import shared


class NetworkOnDisk:
    def __init__(self, name, filename):
        self.name, self.filename = name, filename
        self.metadata = read_metadata(filename)
        self.alias = self.metadata.get("ss_output_name", name)
        self.hash = self.shorthash = ""
        self.set_hash(self.metadata.get("sshs_model_hash", ""))

    def get_alias(self):
        import networks

        by_file = (
            shared.opts.lora_preferred_name == "Filename" or self.alias.lower() in networks.forbidden_network_aliases
        )
        return self.name if by_file else self.alias

    def set_hash(self, v):
        import networks

        self.hash, self.shorthash = v, v[:12]
        if self.shorthash:
            networks.available_network_hash_lookup[self.shorthash] = self


class Network:
    def __init__(self, name, network_on_disk):
        self.name, self.network_on_disk = name, network_on_disk
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim = None
        self.modules = {}
        self.bundle_embeddings = {}
        self.mtime = None
        self.mentioned_name = None


def lora_files(folder):
    found = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return sorted(name for name in found if name.endswith(".safetensors"))


def read_metadata(filename):
    with open(filename, "rb") as file:
        try:
            return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})
        except ValueError:
            return {}
