"""What the built-in extension does each time that the scripts are loaded."""

import re

import lora_patches
import networks
from modules import extra_networks, script_callbacks


class ExtraNetworkLora(extra_networks.ExtraNetwork):
    def __init__(self):
        super().__init__("lora")
        self.calls = []

    def activate(self, p, params_list):
        self.calls.append([one.items for one in params_list])
        names = [one.positional[0] for one in params_list]
        multipliers = [float(one.positional[1]) if len(one.positional) > 1 else 1.0 for one in params_list]
        networks.load_networks(names, multipliers, multipliers)

    def deactivate(self, p):
        pass


def load():
    networks.originals = lora_patches.LoraPatches()
    script_callbacks.on_script_unloaded(unload)
    script_callbacks.on_before_ui(before_ui)
    script_callbacks.on_infotext_pasted(infotext_pasted)
    networks.list_available_networks()


def unload():
    networks.originals.undo()


def before_ui():
    networks.extra_network_lora = ExtraNetworkLora()
    extra_networks.register_extra_network(networks.extra_network_lora)
    extra_networks.register_extra_network_alias(networks.extra_network_lora, "lyco")


def card_tag(name):
    """What a click on a card puts into the prompt."""
    return f"<lora:{networks.available_networks[name].get_alias()}:1>"


def infotext_pasted(infotext, d):
    if not d.get("Lora hashes"):
        return
    pairs = [one.strip().split(":", 1) for one in d["Lora hashes"].split(",")]
    hashes = {name.strip().replace(",", ""): value.strip() for name, value in pairs}

    def network_replacement(m):
        on_disk = networks.available_network_hash_lookup.get(hashes.get(m.group(1)))
        return m.group(0) if on_disk is None else f"<lora:{on_disk.get_alias()}:"

    d["Prompt"] = re.sub("<lora:([^:]+):", network_replacement, d["Prompt"])
