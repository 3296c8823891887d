"""What the built-in extension does each time that the scripts are loaded."""

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
    networks.list_available_networks()


def unload():
    networks.originals.undo()


def before_ui():
    networks.extra_network_lora = ExtraNetworkLora()
    extra_networks.register_extra_network(networks.extra_network_lora)
    extra_networks.register_extra_network_alias(networks.extra_network_lora, "lyco")
