"""Puts the forwards into torch's class; there it is five of them."""

import networks
import torch
from modules import patches


class LoraPatches:
    def __init__(self):
        self.Linear_forward = patches.patch(__name__, torch.nn.Linear, "forward", networks.network_Linear_forward)
        self.Linear_load_state_dict = patches.patch(
            __name__, torch.nn.Linear, "_load_from_state_dict", networks.network_Linear_load_state_dict
        )

    def undo(self):
        self.Linear_forward = patches.undo(__name__, torch.nn.Linear, "forward")
        self.Linear_load_state_dict = patches.undo(__name__, torch.nn.Linear, "_load_from_state_dict")
