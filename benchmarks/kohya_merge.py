"""The peer of `benchmarks.merge`: what kohya's merge_lora.py computes, re-expressed without its models.

Source: networks/merge_lora.py of sd-scripts: the checkpoint becomes float32 modules, each product is added in float32,
the file is read once more for what the modules do not have, and everything is cast and saved.
"""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file

from lib_lora.core.keymap import KeyMap
from lib_lora.core.naming import split_key


def main(checkpoint: str, given: str, out: str) -> None:
    path, _, strength = given.rpartition(":")
    modules = {name: tensor.float() for name, tensor in load_file(checkpoint).items()}
    keymap = KeyMap.from_checkpoint({name: tuple(tensor.shape) for name, tensor in modules.items()})
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    for key, down in tensors.items():
        if not key.endswith(".lora_down.weight"):
            continue
        base = key.removesuffix(".lora_down.weight")
        layer = keymap.find(split_key(key).layer)
        weight = modules[layer.parameter][slice(*(layer.rows or (None,)))]
        product = tensors[f"{base}.lora_up.weight"].flatten(1) @ down.flatten(1)
        weight += float(strength) * product.view(weight.shape) * (tensors[f"{base}.alpha"] / down.shape[0])
    state = load_file(checkpoint)
    for name in state:
        state[name] = modules[name].half()
    save_file(state, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
