"""Failures while weights are written: whatever happens, the base weights are bit-identical afterwards."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core import numerics, patcher
from lib_lora.errors import ApplyError, ForeignWriteError, FuseMemoryError
from lib_lora.session import LoraSession
from tests.toys import digest, lierla, lora_tensors, sd1_unet, sdxl_unet, write_lora

LAYERS = 722
"""LierLa layers of an SDXL UNet."""


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return sdxl_unet()


@pytest.fixture(scope="module")
def folder(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    layers = lierla(LoraSession({"unet": unet}, LoraCatalog([folder])).keymap)
    for number in range(4):
        write_lora(folder / f"l{number}.safetensors", layers, rank=2, seed=number)
    for number in range(8):  # some layers each, overlapping
        some = random.Random(number).sample(layers, 60)
        write_lora(folder / f"s{number}.safetensors", some, rank=2, seed=number)
    return folder


@pytest.fixture
def session(unet, folder):
    session = LoraSession({"unet": unet}, LoraCatalog([folder]))
    yield session
    session.unload()


def test_the_toy_has_the_layers_of_sdxl(session):
    assert session.set([("l0", 1.0)]).layers_written == LAYERS


class Interrupting:
    """Stands in for the kernel and raises at one layer, or from one layer on; what it wrote is wrong anyway."""

    def __init__(self, at: int, error: BaseException, *, lasting: bool = False, fuse=None) -> None:
        self.at, self.error, self.lasting, self.count, self.fuse = at, error, lasting, 0, fuse

    def __call__(self, base, terms, out, workspace=None, seed=None):
        self.count += 1
        if self.fuse is None or self.count == self.at + 1:
            out.fill_(7.0)
        else:
            self.fuse(base, terms, out, workspace, seed)
        if self.count == self.at + 1 or (self.lasting and self.count > self.at):
            raise self.error


ERRORS = (RuntimeError("kernel"), ValueError("value"), KeyboardInterrupt(), KeyError("key"))


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_exception_at_any_layer_leaves_the_base_weights(session, unet, monkeypatch, error):
    weights = dict(unet.named_parameters())
    base = {name: weight.clone() for name, weight in weights.items()}
    for at in range(LAYERS):
        monkeypatch.setattr(patcher.numerics, "fuse_layer", Interrupting(at, error))
        with pytest.raises(type(error)):
            session.set([("l0", 1.0)])
        assert not session.active
        assert all(map(torch.equal, weights.values(), base.values()))
    monkeypatch.undo()
    assert session.set([("l0", 1.0)]).layers_written == LAYERS


def test_out_of_memory_at_any_layer_is_tried_once_more_on_the_host(session, unet, monkeypatch):
    session.set([("l0", 1.0)])
    expected = digest(unet)
    for at in range(0, LAYERS, 38):
        session.set([])
        error = torch.cuda.OutOfMemoryError("full")
        monkeypatch.setattr(patcher.numerics, "fuse_layer", Interrupting(at, error, fuse=numerics.fuse_layer))
        session.set([("l0", 1.0)])
        monkeypatch.undo()
        assert digest(unet) == expected


def test_lasting_out_of_memory_is_told_and_leaves_the_base_weights(session, unet, monkeypatch):
    base = digest(unet)
    for at in range(0, LAYERS, 7):
        error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        monkeypatch.setattr(patcher.numerics, "fuse_layer", Interrupting(at, error, lasting=True))
        with pytest.raises(FuseMemoryError, match=r"not enough memory to fuse 722 layers.*base weights are back"):
            session.set([("l0", 1.0)])
        assert not session.active
    monkeypatch.undo()
    assert digest(unet) == base
    assert session.set([("l0", 1.0)]).layers_written == LAYERS


def test_out_of_memory_is_an_apply_error_and_not_a_bad_layer():
    assert issubclass(torch.cuda.OutOfMemoryError, RuntimeError)
    assert issubclass(FuseMemoryError, ApplyError)


def test_interrupts_at_random_moments_never_spoil_the_next_job(session, unet, monkeypatch):
    rng = random.Random(3)
    requests = [[(f"s{n}", 0.5)] for n in range(4)] + [[("s0", 1.0), ("s3", -0.5)], []]
    reference = {}
    for number, request in enumerate(requests):
        session.set([])
        session.set(request)
        reference[number] = digest(unet)
    interrupts = 0
    for job in range(50):
        while interrupts < 4 * (job + 1):
            broken = Interrupting(rng.randrange(60), KeyboardInterrupt(), fuse=numerics.fuse_layer)
            monkeypatch.setattr(patcher.numerics, "fuse_layer", broken)
            try:
                session.set(rng.choice(requests))
            except KeyboardInterrupt:
                interrupts += 1
                assert not session.active
            monkeypatch.undo()
        number = rng.randrange(len(requests))
        session.set(requests[number])
        assert digest(unet) == reference[number], job
    assert interrupts == 200


@pytest.mark.slow
def test_a_thousand_random_requests_equal_fresh_weights_bit_for_bit(session, unet):
    """After any walk the weights are those that the request gives on an untouched model."""
    rng = random.Random(1)
    base = digest(unet)
    pool = [[]] + [
        [(f"s{n}", rng.choice([-1.0, 0.3, 0.5, 1.0])) for n in rng.sample(range(8), rng.randint(1, 5))]
        for _ in range(15)
    ]
    fresh = []
    for request in pool:
        session.unload()
        session.set(request)
        fresh.append(digest(unet))
    for step in range(1000):
        number = rng.randrange(len(pool))
        session.set(rng.sample(pool[number], len(pool[number])))  # the order does not matter
        assert digest(unet) == fresh[number], f"step {step}"
    session.clear()
    assert digest(unet) == base == fresh[0]


def test_eight_threads_never_see_another_threads_weights(tmp_path):
    torch.manual_seed(0)
    unet = sd1_unet()
    session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]))
    layers, names, reference = lierla(session.keymap), [f"t{n}" for n in range(8)], {}
    for number, name in enumerate(names):  # some layers each, overlapping
        write_lora(tmp_path / f"{name}.safetensors", layers[number : number + 10], rank=2, seed=number)
        session.set([(name, 1.0)])
        reference[name] = digest(unet)
    done: list[bool] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(100):
            name = rng.choice(names)
            with session.lease([(name, 1.0)]):
                done.append(digest(unet) == reference[name])

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert done == [True] * 800


def test_new_weights_loaded_into_a_fused_model_become_the_base(session, unet):
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    session.set([("l0", 1.0)])
    torch.manual_seed(5)
    fresh = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    unet.load_state_dict(fresh)
    base = digest(unet)
    report = session.set([("l0", 1.0)])
    assert any("new base weights" in note for note in report.notes)
    assert digest(unet) != base
    session.clear()
    assert digest(unet) == base
    unet.load_state_dict(state)


def writers(weight: torch.Tensor):
    yield "copy_", lambda: weight.data.copy_(torch.zeros_like(weight))
    yield "add_", lambda: weight.data.add_(1.0)
    yield "assigning data", lambda: setattr(weight, "data", torch.ones_like(weight))
    yield "under no_grad", lambda: weight.mul_(2.0)
    yield "fill_", lambda: weight.detach().fill_(float("nan"))


@pytest.mark.parametrize("number", range(5))
def test_a_foreign_writer_is_noticed_and_not_overwritten(unet, folder, number):
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    session = LoraSession({"unet": unet}, LoraCatalog([folder]))
    session.set([("l0", 1.0)])
    layer = session.keymap.find("unet:mid_block_attentions_0_transformer_blocks_0_attn1_to_q")
    name, write = list(writers(layer.weight()))[number]
    write()
    foreign = layer.weight().clone()
    with pytest.raises(ForeignWriteError, match="another program changed 1 of 722 fused layers of unet"):
        session.set([("l1", 1.0)])
    assert torch.equal(layer.weight(), foreign) or name == "fill_"
    unet.load_state_dict(state)  # the way out that the sentence names
    base = digest(unet)
    session.set([("l1", 1.0)])
    session.clear()
    assert digest(unet) == base
    session.unload()


def test_a_model_converted_while_fused_keeps_its_base(folder):
    torch.manual_seed(0)
    unet = sdxl_unet()
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    session = LoraSession({"unet": unet}, LoraCatalog([folder]))
    session.set([("l0", 1.0)])
    unet.to(torch.bfloat16)
    session.clear()
    assert all(torch.equal(tensor, base[name].bfloat16()) for name, tensor in unet.state_dict().items())


def test_a_second_session_on_the_same_model_takes_the_state_over(unet, folder):
    base = digest(unet)
    first = LoraSession({"unet": unet}, LoraCatalog([folder]))
    first.set([("l0", 1.0)])
    del first
    second = LoraSession({"unet": unet}, LoraCatalog([folder]))
    second.set([("l1", 1.0)])
    fused = digest(unet)
    second.clear()
    assert digest(unet) == base
    second.set([("l1", 1.0)])
    assert digest(unet) == fused
    second.unload()


def test_unload_frees_the_store_and_leaves_no_trace(unet, folder):
    session = LoraSession({"unet": unet}, LoraCatalog([folder]))
    before = set(vars(unet))
    assert session.set([("l0", 1.0)]).store_bytes > 0
    session.unload()
    assert set(vars(unet)) == before
    assert session.set([]).store_bytes == 0


def test_strength_on_fp16_that_overflows_refuses_that_lora_and_names_the_layer(folder, tmp_path):
    torch.manual_seed(0)
    unet = sdxl_unet().half()
    base = digest(unet)
    session = LoraSession({"unet": unet}, LoraCatalog([folder, tmp_path]))
    layers = lierla(session.keymap)
    tensors = lora_tensors(layers[:1], rank=2, alpha=None, std=30.0)
    write_lora(tmp_path / "loud.safetensors", layers[:1], rank=2, alpha=None, std=30.0)
    assert tensors
    report = session.set([("loud", 100.0), ("l0", 0.5)])
    assert [refused.name for refused in report.refused] == ["loud"]
    assert layers[0].key in report.refused[0].reason
    assert "overflow" in report.refused[0].reason
    assert [lora.name for lora in report.applied] == ["l0"]
    both = digest(unet)
    assert both != base
    session.set([("l0", 0.5)])
    assert digest(unet) == both
    session.clear()
    assert digest(unet) == base
