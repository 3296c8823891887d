"""Where the base weights are kept: every store gives back the same bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_lora.catalog import LoraCatalog
from lib_lora.core.base_store import CheckpointStore, CopyStore, choose_store
from lib_lora.core.layers import LayerRef
from lib_lora.errors import ModelError
from lib_lora.session import LoraSession
from tests.golden.kohya_model import HERE, build
from tests.toys import digest, lierla, sd1_unet, write_lora


def layer(key: str = "unet.x") -> LayerRef:
    return LayerRef(key, "unet", "", (3, 4), "x.weight")


def test_a_copy_gives_the_bits_back():
    store, weight = CopyStore("device"), torch.randn(3, 4)
    weight[0, 0], weight[0, 1] = float("nan"), -0.0
    store.capture(layer(), weight)
    out = torch.zeros(3, 4)
    store.restore(layer(), out)
    assert out.numpy().tobytes() == weight.numpy().tobytes()
    assert store.nbytes == 48
    assert store.get(layer(), weight).data_ptr() == store.get(layer(), weight).data_ptr()
    store.forget("unet.x")
    assert store.nbytes == 0
    assert "unet.x" not in store


def test_a_weight_that_is_in_the_checkpoint_takes_no_memory():
    weight = torch.randn(3, 4)
    store = CheckpointStore({"unet.x": weight.clone()})
    store.capture(layer(), weight)
    assert store.nbytes == 0
    assert store.label == "checkpoint"
    assert torch.equal(store.get(layer(), weight), weight)


@pytest.mark.parametrize("change", ["value", "sign of zero", "shape", "missing"])
def test_a_weight_that_differs_from_the_checkpoint_is_copied(change):
    weight = torch.randn(3, 4)
    weight[1, 1] = 0.0
    stored = weight.clone()
    if change == "value":
        stored[2, 3] += 1e-6
    elif change == "sign of zero":
        stored[1, 1] = -0.0
    elif change == "shape":
        stored = torch.randn(3, 5)
    store = CheckpointStore({} if change == "missing" else {"unet.x": stored})
    store.capture(layer(), weight)
    assert store.nbytes == 48
    out = torch.zeros(3, 4)
    store.restore(layer(), out)
    assert out.numpy().tobytes() == weight.numpy().tobytes()


def test_a_checkpoint_in_half_precision_serves_a_float_model():
    stored = torch.randn(3, 4).half()
    store = CheckpointStore({"unet.x": stored})
    store.capture(layer(), stored.float())
    assert store.nbytes == 0
    assert torch.equal(store.get(layer(), torch.empty(3, 4)), stored.float())


def test_the_checkpoint_is_chosen_where_there_is_one():
    weights = [torch.zeros(2, 2)]
    assert choose_store("auto", weights, {}).label == "checkpoint"
    assert choose_store("auto", weights, None).label == "device"
    assert choose_store("pinned", weights, {}).label == "pinned"
    with pytest.raises(ModelError, match="no checkpoint file was given"):
        choose_store("checkpoint", weights, None)


@pytest.mark.parametrize("kind", ["device", "pinned", "checkpoint"])
def test_a_session_gives_the_same_weights_with_every_store(kind):
    """The checkpoint here is kohya's LDM file: other names than the live model's."""
    model = build()
    base = digest(*model)
    session = LoraSession(
        {"unet": model[0], "te1": model[1]}, LoraCatalog([HERE]), store=kind, checkpoint=HERE / "base.safetensors"
    )
    report = session.set([("lora_D_c3lier", 0.7)])
    assert report.store == kind
    assert report.store_bytes == (0 if kind == "checkpoint" else report.store_bytes)
    fused = digest(*model)
    other = build()
    LoraSession({"unet": other[0], "te1": other[1]}, LoraCatalog([HERE])).set([("lora_D_c3lier", 0.7)])
    assert fused == digest(*other)
    session.clear()
    assert digest(*model) == base


def test_a_diffusers_folder_serves_as_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    unet = sd1_unet()
    unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]), store="checkpoint", checkpoint=[file])
    write_lora(tmp_path / "l.safetensors", lierla(session.keymap))
    base = digest(unet)
    assert session.set([("l", 1.0)]).store_bytes == 0
    session.clear()
    assert digest(unet) == base


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_checkpoint_store_takes_no_anonymous_memory(tmp_path):
    big = torch.nn.Module()
    big.conv_in = torch.nn.Conv2d(4, 4, 1)
    names = {f"model.diffusion_model.input_blocks.{n}.1.proj_in.weight": torch.randn(1024, 1024) for n in (1, 2, 4, 5)}
    path = tmp_path / "big.safetensors"
    save_file(names, path)
    from lib_lora.core.files import map_checkpoint

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024

    live = {name: tensor.clone() for name, tensor in names.items()}
    del names
    mapped = map_checkpoint(path)
    store = CheckpointStore({name: mapped[name] for name in mapped})
    out = torch.zeros(1024, 1024)
    before = anonymous()
    for name, weight in live.items():
        store.capture(LayerRef(name, "unet", "", (1024, 1024), name), weight)
        store.restore(LayerRef(name, "unet", "", (1024, 1024), name), out)
        assert torch.equal(out, weight)
    assert store.nbytes == 0
    assert anonymous() - before < 1 << 20  # of 16 MiB that were read
