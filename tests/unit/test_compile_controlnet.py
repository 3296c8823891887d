"""A UNet and its ControlNet compiled together, beside the same models run eagerly, while LoRAs are switched in both."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.registry import lookup_backend

import lib_lora.compile.choose as choose
from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.compile.inductor import Inductor
from lib_lora.compile.together import CompiledModels
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_tensors
from tests.controlnets import controlnet_lora, controlnet_of
from tests.toys import c3lier, lora_tensors, sd1_unet

TOLERANCE = 1e-5  # of float32, relative to the largest number
SWITCHES = 60
WAIT_SECONDS = 300
SIZES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
}


@pytest.fixture(autouse=True)
def torch_as_it_was():
    before = dynamo_config.error_on_recompile
    yield
    dynamo_config.error_on_recompile = before


@pytest.fixture(scope="module")
def inductor():
    """Inductor with torch's tracing and without making code of it, which would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        kind = type("Fast", (Inductor,), {"__init__": _fast_init})
        patch.setattr(choose, "Inductor", kind)
        yield


def _fast_init(self, cache=None):
    Inductor.__init__(self, cache, lowering=lookup_backend("aot_eager"))


@torch.no_grad()
def step(models, size=8, scale=1.0, steered=True):
    """A denoising step as diffusers' pipelines make it."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, size, size, generator=generator)
    context = torch.randn(2, 7, 32, generator=generator)
    image = torch.rand(2, 3, 8 * size, 8 * size, generator=generator)
    more = {}
    if steered:
        control = models["controlnet"]
        down, mid = control(latent, torch.tensor(500), context, image, conditioning_scale=scale, return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return models["unet"](latent, torch.tensor(500), encoder_hidden_states=context, **more).sample


def difference(got, expected) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def make_models():
    torch.manual_seed(0)
    unet = sd1_unet(**SIZES)
    return {"unet": unet, "controlnet": controlnet_of(unet)}


@pytest.fixture(scope="module")
def compiled(inductor):
    """Both models with all blocks compiled, their handle, and the same models without."""
    models = make_models()
    plain = copy.deepcopy(models)
    handle = CompiledModels(models, "inductor")
    step(models)
    assert handle.wait(WAIT_SECONDS)
    step(models)
    yield models, handle, plain
    handle.release()


@pytest.fixture(scope="module")
def folder(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    layers = c3lier(KeyMap.from_modules({"unet": compiled[2]["unet"]}))
    halves = [layer for layer in layers if not layer.key.startswith("unet.up_blocks")]
    save_tensors(folder / "style.safetensors", lora_tensors(layers, seed=1))
    save_tensors(folder / "sharp.safetensors", controlnet_lora(halves, seed=2, rank=2))
    save_tensors(folder / "both.safetensors", {**lora_tensors(layers, seed=3), **controlnet_lora(halves, seed=4)})
    return folder


def test_all_blocks_of_both_models_are_compiled_under_one_status(compiled):
    status = compiled[1].status
    assert (status.backend, status.blocks, status.done, status.reason) == ("inductor", 8, status.asked, "")
    assert {name for name in status.compiled if name.startswith("controlnet.")} == {
        "controlnet.down_blocks.0",
        "controlnet.down_blocks.1",
        "controlnet.mid_block",
    }
    assert len(status.compiled) == 8
    assert "8 of 8 blocks compiled" in str(status)


@pytest.mark.parametrize("follows", [False, True])
def test_switches_in_both_models_compile_nothing_and_give_what_eager_models_give(compiled, folder, follows):
    models, handle, plain = compiled
    dynamo_config.error_on_recompile = True
    options = {"control_follows": follows}
    session = LoraSession(models, LoraCatalog([folder]), on_weights_changed=handle.weights_changed, **options)
    reference = LoraSession(plain, LoraCatalog([folder]), **options)
    base, before, answers = step(models), handle.status.switches, []
    sets = ((), ("sharp",), ("style", "sharp"), ("both",), (), ("style",), ("both", "style", "sharp"))
    for number, names in zip(range(SWITCHES), itertools.cycle(sets)):
        request = [(name, 0.2 + number / 1000) for name in names]
        session.set(request)
        reference.set(request)
        expected = step(plain)
        assert difference(step(models), expected) < TOLERANCE
        assert bool(names) == (difference(expected, base) > 10 * TOLERANCE)
        answers.append(expected)
    assert difference(answers[5], step(plain)) > 10 * TOLERANCE
    assert (handle.status.recompiles, handle.status.reason) == (0, "")
    assert handle.status.switches > before + SWITCHES // 2
    assert handle.status.switch_ms < 100
    session.unload()
    reference.unload()
    assert torch.equal(step(models), base)


def test_the_unet_stays_compiled_when_a_controlnet_comes_and_goes_and_at_other_sizes_and_scales(compiled):
    models, handle, plain = compiled
    dynamo_config.error_on_recompile = True
    for options in ({"size": 16}, {"size": 12}, {"steered": False}, {"scale": 0.3}, {"steered": False, "size": 16}):
        for _ in range(2):
            step(models, **options)
            assert handle.wait(WAIT_SECONDS)
        assert difference(step(models, **options), step(plain, **options)) < TOLERANCE
    assert difference(step(plain), step(plain, steered=False)) > 10 * TOLERANCE
    assert (handle.status.recompiles, handle.status.reason) == (0, "")
    assert len(handle.status.compiled) == 8


def test_another_backend_is_taken_while_the_models_live(inductor):
    models = make_models()
    handle = CompiledModels(models)
    assert (handle.backend, str(handle.status)) == ("off", "not compiled")
    handle.use("inductor")
    assert (handle.backend, handle.status.blocks) == ("inductor", 8)
    assert "forward" in vars(models["unet"].mid_block)
    handle.use("off")
    assert "forward" not in vars(models["unet"].mid_block)
    assert (str(handle.status), handle.wait(0)) == ("not compiled", True)


def test_a_reason_that_both_models_have_is_told_once_and_that_of_one_with_its_name(inductor):
    models = make_models()
    assert str(CompiledModels(models, "tensorrt").status).count(".") < 4
    models["controlnet"] = torch.nn.Linear(2, 2)
    handle = CompiledModels(models, "inductor")
    assert handle.status.blocks == 5
    assert handle.status.reason.startswith("controlnet: Linear has no blocks")
    handle.release()


def test_each_model_is_told_of_its_own_layers_alone(inductor):
    models = make_models()
    handle, told = CompiledModels(models, "inductor"), []
    for name, part in handle._handles.items():
        part.weights_changed = lambda layers, name=name: told.append((name, {layer.component for layer in layers}))
    layers = KeyMap.from_modules(models).parameters
    handle.weights_changed(layers)
    handle.weights_changed([layer for layer in layers if layer.component == "unet"][:1])
    assert told == [("unet", {"unet"}), ("controlnet", {"controlnet"}), ("unet", {"unet"})]
    assert handle.status.switches == 2
    handle.release()


@pytest.mark.slow
@pytest.mark.newest
def test_pictures_of_a_compiled_pipeline_with_a_controlnet_are_those_of_an_eager_one(inductor, tmp_path):
    from PIL import Image, ImageChops

    from lib_lora.hosts.host import Control, GenerateRequest
    from lib_lora.hosts.standalone.demo import LORA_DIR
    from lib_lora.hosts.standalone.generate import generate
    from lib_lora.hosts.standalone.host import open_session
    from lib_lora.hosts.standalone.loading import load_pipeline

    controlnet_of(load_pipeline("demo", "cpu").pipe.unet).save_pretrained(tmp_path / "edges")
    control = Control(Image.radial_gradient("L").convert("RGB"))
    options = {"device": "cpu", "controlnets": [tmp_path / "edges"], "control_follows": True}

    def pictures(compiler):
        loaded, session = open_session("demo", LoraCatalog([LORA_DIR]), compiler=compiler, **options)
        texts = ("a red circle", "a red circle <lora:stripes:1>", "a red circle <lora:outline:0.5>", "a red circle")
        for warming in (texts[0], texts[0]) if compiler != "off" else ():
            generate(loaded, session, GenerateRequest(warming, steps=2, controls=(control,)))
            assert loaded.handle.wait(WAIT_SECONDS)
        dynamo_config.error_on_recompile = True
        drawn = [generate(loaded, session, GenerateRequest(text, steps=3, controls=(control,)))[0] for text in texts]
        status = loaded.handle.status
        loaded.handle.release()
        return [one.image for one in drawn], status

    eager, _ = pictures("off")
    got, status = pictures("inductor")
    assert (len(status.compiled), status.recompiles, status.reason) == (status.blocks, 0, "")
    differences = [ImageChops.difference(*pair).getextrema() for pair in zip(got, eager, strict=True)]
    assert max(most for channels in differences for _, most in channels) <= 1
    assert ImageChops.difference(eager[0], eager[1]).getbbox()
