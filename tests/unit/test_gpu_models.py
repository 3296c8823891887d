"""A model whose layers are written many at once, as on a GPU: the same as one by one, and all or nothing."""

from __future__ import annotations

import pytest
import torch

from lib_lora import resolve
from lib_lora.catalog import LoraCatalog
from lib_lora.core import patcher as patching
from lib_lora.core.base_store import CopyStore
from lib_lora.core.gpu import grouped
from lib_lora.core.gpu.grouped import GroupedKernel
from lib_lora.core.keymap import KeyMap
from lib_lora.core.network import load_network
from lib_lora.core.patcher import ModelPatcher
from lib_lora.core.plan import Scale, make_plan, match_network
from lib_lora.core.saving import save_tensors
from lib_lora.session import LoraSession
from tests.toys import c3lier, digest, lora_tensors, sd1_unet, write_lora

ULP = 2**-23
"""Of float32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(UNet, one plan for each of two sets of LoRA files)."""
    torch.manual_seed(0)
    unet, folder = sd1_unet(), tmp_path_factory.mktemp("loras")
    keymap = KeyMap.from_modules({"unet": unet})
    layers, plans = c3lier(keymap), []
    for which in range(2):
        files = [(folder / f"{which}{n}.safetensors", 0.4 + 0.3 * n) for n in range(3)]
        for n, (path, _) in enumerate(files):
            write_lora(path, layers[n * 20 :], rank=2 + n, seed=10 * which + n, std=0.1)
        write_dense(files[-1][0], layers[-5:])
        matches = [(match_network(keymap, load_network(path)), Scale(s, s)) for path, s in files]
        plans.append(make_plan(matches))
    return unet, plans


def write_dense(path, layers) -> None:
    """LoHa, which is no plain product, in some layers."""
    tensors = {}
    for name, tensor in lora_tensors(layers, rank=2, std=0.1).items():
        own, role = name.split(".", 1)
        flat = tensor if tensor.ndim == 0 else tensor.flatten(1)
        for part in "12":
            if role.startswith("lora_down"):
                tensors[f"{own}.hada_w{part}_b"] = flat.clone()
            elif role.startswith("lora_up"):
                tensors[f"{own}.hada_w{part}_a"] = flat.clone()
            else:
                tensors[f"{own}.alpha"] = flat
    save_tensors(path, tensors, {}, overwrite=True)


@pytest.mark.parametrize("store", ["device", "pinned"])
def test_a_model_is_the_same_whether_layers_are_written_one_by_one_or_together(model, store):
    unet, plans = model
    base, found = digest(unet), {}
    for kind in ("layers", "grouped"):
        own = ModelPatcher({"unet": unet}, CopyStore(store), switch=kind)
        for plan in (plans[0], plans[1], plans[0]):
            own.apply(plan)
        found[kind] = {name: weight.clone() for name, weight in unet.named_parameters()}
        own.release()
        assert digest(unet) == base
    for name, weight in found["layers"].items():
        assert torch.allclose(weight, found["grouped"][name], rtol=0, atol=4 * ULP * weight.abs().max())


def test_memory_that_is_short_for_all_at_once_is_enough_for_one_by_one(model, monkeypatch):
    unet, plans = model
    own = ModelPatcher({"unet": unet}, CopyStore("device"), switch="layers")
    own.apply(plans[0])
    expected = digest(unet)
    own.release()

    def fail(self, sums, *, near):
        sums[0].out.fill_(7.0)
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(GroupedKernel, "write", fail)
    own = ModelPatcher({"unet": unet}, CopyStore("device"), switch="grouped")
    own.apply(plans[0])
    assert digest(unet) == expected
    own.release()


def test_a_failure_halfway_leaves_the_base_weights(model, monkeypatch):
    unet, plans = model
    base = digest(unet)
    own = ModelPatcher({"unet": unet}, CopyStore("device"), switch="grouped")
    own.apply(plans[0])
    real = grouped._add_products

    def fail(steps, products):
        real(steps, products)
        raise KeyboardInterrupt

    monkeypatch.setattr(grouped, "_add_products", fail)
    with pytest.raises(KeyboardInterrupt):
        own.apply(plans[1])
    assert digest(unet) == base
    monkeypatch.undo()
    own.apply(plans[1])
    own.release()
    assert digest(unet) == base


def test_a_switch_waits_for_the_device_only_to_compare_samples(model, monkeypatch):
    unet, plans = model
    own = ModelPatcher({"unet": unet}, CopyStore("device"), switch="grouped")
    own.apply(plans[0])
    own.apply(plans[1])
    waits = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "nonzero"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real, name=name):
            waits.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    own.apply(plans[0])
    monkeypatch.undo()
    own.release()
    assert waits.count("cpu") == 2  # the samples of now, and those that the last switch left on the device
    assert set(waits) <= {"cpu", "numpy"}


def test_a_cpu_writes_one_layer_after_the_other_if_nothing_else_is_asked_for(model, monkeypatch):
    unet, plans = model
    monkeypatch.setattr(patching.GroupedSwitch, "write", None)
    own = ModelPatcher({"unet": unet}, CopyStore("device"))
    own.apply(plans[0])
    own.release()


def test_plans_of_the_last_requests_are_kept_and_forgotten_with_their_files(tmp_path, monkeypatch):
    unet, made = sd1_unet(), []
    session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]))
    for name in "ab":
        write_lora(tmp_path / f"{name}.safetensors", c3lier(session.keymap)[:9], seed=ord(name))
    monkeypatch.setattr(resolve, "make_plan", lambda *given: made.append(1) or make_plan(*given))
    for name in "abab":
        session.set([(name, 0.5)])
    assert len(made) == 2
    session.cache_bytes = 0
    session.set([("a", 0.5)])  # the file of the other is forgotten
    session.set([("b", 0.5)])
    assert len(made) == 3
    session.unload()
