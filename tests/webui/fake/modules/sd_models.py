"""Checkpoints and models. A checkpoint is a state dict by title; a model is what `build` makes."""

import threading
from collections import OrderedDict
from types import SimpleNamespace

import torch

from modules import extra_networks, script_callbacks, shared

checkpoints = {}  # title -> (CheckpointInfo, state dict); filled by the tests
checkpoints_loaded = OrderedDict()  # title -> state dict that is kept in memory
build = None  # () -> model; set by the tests
in_place = True  # whether another checkpoint is loaded into the model that is there


class SdModelData:
    def __init__(self):
        self.sd_model = None
        self.loaded_sd_models = []
        self.was_loaded_at_least_once = False
        self.lock = threading.Lock()

    def get_sd_model(self):
        if self.was_loaded_at_least_once:
            return self.sd_model
        with self.lock:
            if self.sd_model is None:
                load_model()
        return self.sd_model

    def set_sd_model(self, v):
        self.sd_model = v
        self.loaded_sd_models = [v, *(one for one in self.loaded_sd_models if one is not v)]


model_data = SdModelData()


def add_checkpoint(title, state_dict):
    checkpoints[title] = SimpleNamespace(filename=f"/models/{title}.ckpt", name=title), state_dict


def select_checkpoint():
    title = shared.opts.sd_model_checkpoint or next(iter(checkpoints))
    return checkpoints[title][0]


def load_model_weights(model, checkpoint_info):
    title = checkpoint_info.name
    state_dict = checkpoints_loaded.get(title) or {key: one.clone() for key, one in checkpoints[title][1].items()}
    if shared.opts.sd_checkpoint_cache > 0:
        checkpoints_loaded[title] = state_dict.copy()
        checkpoints_loaded.move_to_end(title)
    while len(checkpoints_loaded) > shared.opts.sd_checkpoint_cache:
        checkpoints_loaded.popitem(last=False)
    model.load_state_dict(state_dict)
    model.sd_checkpoint_info = checkpoint_info


def load_model(checkpoint_info=None):
    checkpoint_info = checkpoint_info or select_checkpoint()
    model = build()
    load_model_weights(model, checkpoint_info)
    model_data.set_sd_model(model)
    model_data.was_loaded_at_least_once = True
    script_callbacks.run("model_loaded", model)
    with torch.no_grad():
        get_empty_cond(model)
    return model


def get_empty_cond(sd_model):
    from modules import processing

    p = processing.StableDiffusionProcessingTxt2Img()
    extra_networks.activate(p, {})
    return sd_model.get_learned_conditioning([""])


def reload_model_weights(sd_model=None, info=None, forced_reload=False):
    checkpoint_info = info or select_checkpoint()
    sd_model = sd_model or model_data.sd_model
    if sd_model.sd_checkpoint_info is checkpoint_info and not forced_reload:
        return sd_model
    known = [one for one in model_data.loaded_sd_models if one.sd_checkpoint_info is checkpoint_info]
    if known and not forced_reload:
        model_data.set_sd_model(known[0])  # nobody is told
        return known[0]
    if not in_place:
        return load_model(checkpoint_info)
    load_model_weights(sd_model, checkpoint_info)
    script_callbacks.run("model_loaded", sd_model)
    model_data.set_sd_model(sd_model)
    return sd_model
