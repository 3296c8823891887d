"""The built-in extension's files and loaded networks."""

import os


class NetworkOnDisk:
    def __init__(self, name, filename):
        self.name, self.filename = name, filename
        self.alias = name
        self.hash = self.shorthash = ""

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
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors"))
