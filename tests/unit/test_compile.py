"""Compiled models beside the same models run eagerly, while LoRAs are switched."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor_config

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.compile.choose import prepare, prepare_by_name
from lib_lora.compile.inductor import Inductor
from lib_lora.core.keymap import KeyMap
from tests.toys import c3lier, lierla, sd1_unet, write_lora

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative to the largest number
SWITCHES = 100
WAIT_SECONDS = 300
SIZES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
}
STRENGTHS = (0.8, -0.4, 1.0, 0.3)


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """What tests set in torch's configuration is taken back."""
    before = dynamo_config.error_on_recompile, inductor_config.freezing
    yield
    dynamo_config.error_on_recompile, inductor_config.freezing = before


def tiny_unet() -> nn.Module:
    torch.manual_seed(0)
    return sd1_unet(**SIZES)


@torch.no_grad()
def step(unet, size=8, batch=1, tokens=7):
    generator = torch.Generator().manual_seed(1)
    dtype = next(unet.parameters()).dtype
    latent = torch.randn(batch, 4, size, size, generator=generator).to(dtype)
    context = torch.randn(batch, tokens, 32, generator=generator).to(dtype)
    return unet(latent, torch.tensor(500), encoder_hidden_states=context).sample


def difference(got, expected) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def warm(unet, handle, **inputs) -> None:
    """Ask, wait, compare; from then on the compiled blocks answer."""
    step(unet, **inputs)
    assert handle.wait(WAIT_SECONDS)
    step(unet, **inputs)


@pytest.fixture(scope="module")
def compiled():
    """A UNet with all blocks compiled, its handle, and the same UNet without."""
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    handle = Inductor(lowering=lookup_backend("aot_eager")).prepare(unet)
    warm(unet, handle)
    yield unet, handle, plain
    handle.release()


@pytest.fixture(scope="module")
def folder(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    keymap = KeyMap.from_modules({"unet": compiled[2]})
    write_lora(folder / "ink.safetensors", lierla(keymap), seed=1)
    write_lora(folder / "wash.safetensors", c3lier(keymap), seed=2, rank=2)
    write_lora(folder / "dots.safetensors", c3lier(keymap), seed=3, rank=8, dtype=torch.float16)
    return folder


def requests():
    """None, one, several, none again; other files and other strengths each time."""
    sets = ((), ("ink",), ("ink", "wash"), ("wash", "dots"), (), ("dots", "ink", "wash"))
    for number, names in zip(range(SWITCHES), itertools.cycle(sets)):
        yield [(name, STRENGTHS[(number + place) % 4] + number / 1000) for place, name in enumerate(names)]


def test_all_blocks_are_compiled(compiled):
    status = compiled[1].status
    assert set(status.compiled) == {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert (status.blocks, status.asked, status.done, status.progress, status.reason) == (5, 5, 5, 1.0, "")
    assert "5 of 5 blocks compiled" in str(status)


def test_a_hundred_switches_compile_nothing_and_give_what_an_eager_model_gives(compiled, folder):
    unet, handle, plain = compiled
    dynamo_config.error_on_recompile = True
    session = LoraSession({"unet": unet}, LoraCatalog([folder]), on_weights_changed=handle.weights_changed)
    reference = LoraSession({"unet": plain}, LoraCatalog([folder]))
    base, before = step(plain), handle.status.switches
    for request in requests():
        session.set(request)
        reference.set(request)
        expected = step(plain)
        assert difference(step(unet), expected) < TOLERANCE[torch.float32]
        assert bool(request) == (difference(expected, base) > 10 * TOLERANCE[torch.float32])
    assert handle.status.switches > before + SWITCHES // 2
    assert (handle.status.recompiles, handle.status.reason) == (0, "")
    session.unload()
    reference.unload()
    assert torch.equal(step(unet), base)


def test_another_resolution_and_another_length_of_text_need_no_compilation(compiled):
    unet, handle, plain = compiled
    dynamo_config.error_on_recompile = True
    for inputs in ({"size": 16}, {"size": 24}, {"tokens": 14}, {"size": 16, "tokens": 21}):
        warm(unet, handle, **inputs)
        assert difference(step(unet, **inputs), step(plain, **inputs)) < TOLERANCE[torch.float32]
    assert (handle.status.recompiles, handle.status.reason) == (0, "")


def test_blocks_that_are_called_one_by_one_stay_compiled(compiled):
    """As ControlNet does, which replaces the UNet's own forward."""
    unet, handle, plain = compiled
    generator = torch.Generator().manual_seed(2)
    hidden, temb, context = (torch.randn(shape, generator=generator) for shape in ((1, 8, 8, 8), (1, 32), (1, 7, 32)))
    inputs = {"hidden_states": hidden, "temb": temb, "encoder_hidden_states": context}
    block, called = handle._blocks[0], []
    with torch.no_grad():
        expected, _ = plain.down_blocks[0](**inputs)
        for _ in range(2):
            unet.down_blocks[0](**inputs)
            assert handle.wait(WAIT_SECONDS)
        for form, made in list(block.variant.trusted.items()):
            block.variant.trusted[form] = lambda *args, made=made, **kwargs: called.append(1) or made(*args, **kwargs)
        got, _ = unet.down_blocks[0](**inputs)
    assert difference(got, expected) < TOLERANCE[torch.float32]
    assert called


def test_a_hook_inside_a_block_counts_at_once_and_without_it_the_compiled_block_is_back(compiled):
    unet, handle, plain = compiled
    layer = unet.mid_block.resnets[0].conv1
    hook = layer.register_forward_hook(lambda module, args, output: output.flip(1))
    try:
        assert difference(step(unet), step(plain)) > 1e-3
        assert "mid_block" in handle.status.reason
    finally:
        hook.remove()
    assert difference(step(unet), step(plain)) < TOLERANCE[torch.float32]
    assert handle.status.reason == ""
    assert handle.status.recompiles == 0


def test_hook_mode_on_a_compiled_model_adds_its_loras(compiled, folder):
    unet, handle, plain = compiled
    catalog = LoraCatalog([folder])
    session = LoraSession({"unet": unet}, catalog, mode="hook", on_weights_changed=handle.weights_changed)
    reference = LoraSession({"unet": plain}, catalog)
    session.set([("wash", 0.7)])
    reference.set([("wash", 0.7)])
    assert difference(step(unet), step(plain)) < TOLERANCE[torch.float32]
    session.unload()
    reference.unload()
    assert difference(step(unet), step(plain)) < TOLERANCE[torch.float32]


def test_gradients_flow_as_without_compilation(compiled):
    unet, _, _ = compiled
    latent = torch.randn(1, 4, 8, 8, requires_grad=True)
    unet(latent, torch.tensor(500), encoder_hidden_states=torch.zeros(1, 7, 32)).sample.sum().backward()
    assert latent.grad is not None


def test_release_gives_every_forward_back():
    unet = tiny_unet()
    own = unet.mid_block.forward = unet.mid_block.forward
    handle = Inductor(lowering=lookup_backend("eager")).prepare(unet)
    assert vars(unet.down_blocks[0])["forward"].__wrapped__.__self__ is unet.down_blocks[0]
    handle.release()
    assert [name for name, module in unet.named_modules() if "forward" in vars(module)] == ["mid_block"]
    assert vars(unet.mid_block)["forward"] is own


def test_a_released_model_can_be_freed():
    unet = tiny_unet()
    handle = Inductor(lowering=lookup_backend("eager")).prepare(unet)
    warm(unet, handle)
    assert handle.status.compiled
    handle.release()
    model = weakref.ref(unet.mid_block)
    del unet, handle
    gc.unfreeze()
    gc.collect()
    assert model() is None


@pytest.mark.slow
def test_inductor_itself_follows_switches(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    unet = nn.Module()
    unet.down_blocks = nn.ModuleList([tiny_unet().down_blocks[0]])
    block = unet.down_blocks[0]
    inputs = {"temb": torch.randn(2, 32), "encoder_hidden_states": torch.randn(2, 7, 32)}
    hidden = torch.randn(2, 8, 16, 16)

    @torch.no_grad()
    def run(size=8):
        return block(hidden_states=hidden[..., :size, :size].contiguous(), **inputs)[0]

    expected = {size: run(size) for size in (8, 16)}
    handle = Inductor().prepare(unet)
    run()
    assert handle.wait(WAIT_SECONDS)
    run()
    assert handle.status.compiled == ("down_blocks.0",), handle.status.reason
    dynamo_config.error_on_recompile = True
    run(16)
    assert handle.wait(WAIT_SECONDS)
    for size in (8, 16):
        run(size)
        assert difference(run(size), expected[size]) < TOLERANCE[torch.float32]
    with torch.no_grad():
        block.resnets[0].conv1.weight.mul_(-1)
    changed = run()
    handle.release()
    assert difference(changed, run()) < TOLERANCE[torch.float32] < difference(changed, expected[8])
    assert handle.status.recompiles == 0
    assert any(tmp_path.rglob("*.so"))


def test_a_model_without_blocks_and_the_word_off_stay_eager():
    model = nn.Linear(2, 2)
    assert "no blocks" in prepare(model, Inductor()).status.reason
    assert str(prepare_by_name(tiny_unet(), "off").status) == "not compiled"
