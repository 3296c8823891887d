"""Weights kept in fp8, with and without a wider master, and weights that can not be rewritten at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.core.layers import is_fp8
from lib_lora.core.saving import save_tensors

OUT, IN, RANK = 24, 16, 4
NAMES = ("one", "two", "three", "four", "five")
STRENGTHS = (0.8, -0.3, 0.5, 1.0, 0.25)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF_ERROR = 2e-3  # of outputs of order 1, in fp16


class Block(nn.Module):
    """One layer where a LoRA for `unet.proj` acts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer


class Fp8Linear(nn.Linear):
    """Kept in fp8, computed in the input's type, as the WebUI does it."""

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class PackedLinear(nn.Linear):
    """Kept as bytes with one scale, as quantising libraries do it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.compute_dtype = torch.float16
        self.scale = self.weight.detach().abs().max() / 127
        packed = (self.weight.detach() / self.scale).round().to(torch.int8).flatten()
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return functional.linear(x, (self.weight.view(OUT, IN).float() * self.scale).to(x.dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    for name in NAMES:
        layer = {"lora_up.weight": random(OUT, RANK), "lora_down.weight": random(RANK, IN)}
        save_tensors(folder / f"{name}.safetensors", {f"lora_unet_proj.{key}": t for key, t in layer.items()}, {})
    loha = {f"hada_w{i}_{side}": random(*shape) for i in (1, 2) for side, shape in (("a", (OUT, 2)), ("b", (2, IN)))}
    save_tensors(folder / "loha.safetensors", {f"lora_unet_proj.{key}": t for key, t in loha.items()}, {})
    oft = {"lora_unet_proj.oft_blocks": random(4, 6, 6), "lora_unet_proj.alpha": torch.tensor(0.0)}
    save_tensors(folder / "oft.safetensors", oft, {})
    glora = {"a1": random(IN, 2), "a2": random(2, IN), "b1": random(OUT, 2), "b2": random(2, IN)}
    save_tensors(folder / "glora.safetensors", {f"lora_unet_proj.{k}.weight": t for k, t in glora.items()}, {})
    dora = {"lora_up.weight": random(OUT, 2), "lora_down.weight": random(2, IN), "dora_scale": random(OUT, 1)}
    save_tensors(folder / "dora.safetensors", {f"lora_unet_proj.{key}": t for key, t in dora.items()}, {})
    return folder


def session_on(layer: nn.Module, folder, **options) -> LoraSession:
    return LoraSession({"unet": Block(layer)}, LoraCatalog([folder]), **options)


def fp8_layer(dtype: torch.dtype, *, with_master: bool) -> Fp8Linear:
    torch.manual_seed(1)
    layer = Fp8Linear(IN, OUT, bias=False).requires_grad_(False)
    if with_master:
        layer.fp16_weight = layer.weight.detach().half()
    layer.weight = nn.Parameter(layer.weight.detach().half().to(dtype), requires_grad=False)
    return layer


def exact(base: torch.Tensor, folder, names, strengths=STRENGTHS) -> torch.Tensor:
    from safetensors.torch import load_file

    total = base.double()
    for name, strength in zip(names, strengths, strict=False):
        tensors = load_file(folder / f"{name}.safetensors")
        up, down = (tensors[f"lora_unet_proj.lora_{role}.weight"].double() for role in ("up", "down"))
        total = total + strength * up @ down
    return total


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.uint8).clone()


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """fp8 numbers as integers whose difference counts the fp8 numbers between."""
    raw = tensor.view(torch.uint8).to(torch.int32)
    return torch.where(raw < 128, raw, 128 - raw)


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("with_master", [True, False])
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_any_number_of_loras_on_fp8_is_within_one_step_of_the_exact_sum(folder, dtype, with_master, count):
    layer = fp8_layer(dtype, with_master=with_master)
    base = layer.fp16_weight if with_master else layer.weight.detach().float()
    session_on(layer, folder).set(list(zip(NAMES[:count], STRENGTHS, strict=False)))
    nearest = exact(base, folder, NAMES[:count]).to(dtype)
    assert (ordered(layer.weight.detach()) - ordered(nearest)).abs().max() <= 1
    assert (bits(layer.weight) == bits(nearest)).float().mean() > 0.99


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_order_of_loras_does_not_change_a_bit_of_fp8(folder, rounding):
    results = []
    for pairs in (list(zip(NAMES, STRENGTHS, strict=True)), list(zip(NAMES, STRENGTHS, strict=True))[::-1]):
        layer = fp8_layer(FP8[0], with_master=True)
        session_on(layer, folder, fp8_rounding=rounding).set(pairs)
        results.append(bits(layer.weight))
    assert torch.equal(*results)


@pytest.mark.parametrize("with_master", [True, False])
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8_weights_come_back_bit_for_bit(folder, dtype, with_master):
    layer = fp8_layer(dtype, with_master=with_master)
    before = bits(layer.weight)
    session = session_on(layer, folder)
    session.set([("one", 1.0), ("loha", 0.5), ("oft", 0.7)])
    assert not torch.equal(bits(layer.weight), before)
    session.clear()
    assert torch.equal(bits(layer.weight), before)


def test_fp8_without_a_master_is_said_to_cost_quality_and_with_one_it_is_not(folder):
    said = [
        "\n".join(session_on(fp8_layer(FP8[0], with_master=with_master), folder).set([("one", 1.0)]).notes)
        for with_master in (True, False)
    ]
    assert "fp8" not in said[0]
    assert "1 layers are kept in fp8 without a wider copy" in said[1]


def test_stochastic_rounding_is_repeatable_and_takes_a_neighbour_of_the_exact_sum(folder):
    def fused(rounding, strength):
        layer = fp8_layer(FP8[0], with_master=True)
        session_on(layer, folder, fp8_rounding=rounding).set([("one", strength)])
        return layer

    first, second = fused("stochastic", 0.01), fused("stochastic", 0.01)
    assert torch.equal(bits(first.weight), bits(second.weight))
    assert not torch.equal(bits(first.weight), bits(fused("nearest", 0.01).weight))
    steps = ordered(first.weight.detach()) - ordered(exact(first.fp16_weight, folder, ["one"], [0.01]).to(FP8[0]))
    assert steps.abs().max() <= 1


@pytest.mark.newest
@pytest.mark.parametrize("mode", ["prefuse", "hook"])
def test_quantised_layers_are_hooked_by_themselves_and_the_report_says_so(folder, mode):
    torch.manual_seed(1)
    layer = PackedLinear(IN, OUT)
    before = bits(layer.weight)
    x = torch.randn(3, IN).half()
    plain = layer(x)
    session = session_on(layer, folder, mode=mode)
    report = session.set([("one", 0.8), ("loha", 0.5)])
    assert [lora.name for lora in report.applied] == ["one", "loha"]
    assert "1 layers are quantised (PackedLinear) and are hooked, not fused" in report.notes
    delta = sum(strength * session_delta(folder, name) for name, strength in (("one", 0.8), ("loha", 0.5)))
    torch.testing.assert_close(layer(x), plain + (x.float() @ delta.T).half(), atol=HALF_ERROR, rtol=HALF_ERROR)
    assert torch.equal(bits(layer.weight), before)
    session.clear()
    assert torch.equal(layer(x), plain)


def session_delta(folder, name: str) -> torch.Tensor:
    from lib_lora.core.network import load_network

    return load_network(folder / f"{name}.safetensors").adapters["unet:proj"].delta_weight(torch.zeros(OUT, IN))


def test_a_family_that_must_change_quantised_weights_is_refused_and_the_others_apply(folder):
    layer = PackedLinear(IN, OUT)
    report = session_on(layer, folder).set([("one", 0.8), ("oft", 1.0)])
    assert [lora.name for lora in report.applied] == ["one"]
    (refused,) = report.refused
    assert refused.name == "oft"
    assert "OFT has to change the weights of unet.proj, which are quantised (PackedLinear)" in refused.reason


@pytest.mark.parametrize("name", ["one", "loha", "oft", "glora", "dora"])
def test_hook_mode_and_prefuse_draw_the_same(folder, name):
    torch.manual_seed(2)
    layer = nn.Linear(IN, OUT)
    x = torch.randn(5, IN)
    outputs = []
    for mode in ("prefuse", "hook"):
        session = session_on(layer, folder, mode=mode)
        session.set([(name, 0.7), ("two", 0.4)])
        with torch.no_grad():
            outputs.append(layer(x))
        session.unload()
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "fused"), [("one", False), ("loha", False), ("oft", True), ("glora", True)])
def test_hook_mode_fuses_only_what_depends_on_the_weights_and_says_so(folder, name, fused):
    layer = nn.Linear(IN, OUT)
    before = layer.weight.detach().clone()
    report = session_on(layer, folder, mode="hook").set([(name, 1.0)])
    assert torch.equal(layer.weight, before) is not fused
    assert any("depends on the weights and is fused" in note for note in report.notes) is fused


@pytest.mark.parametrize("name", ["one", "oft", "dora"])
def test_a_slider_ends_in_the_exact_weights_of_every_family(folder, name):
    layer = nn.Linear(IN, OUT)
    session = session_on(layer, folder)
    session.set([(name, 1.0), ("two", 0.4)])
    with session.tuning(name) as turn:
        turn(0.3)
    turned = layer.weight.detach().clone()
    session.set([(name, 0.3), ("two", 0.4)])
    assert torch.equal(layer.weight, turned)


def test_both_fp8_types_and_no_other_are_told_as_fp8():
    assert all(map(is_fp8, FP8))
    assert not any(map(is_fp8, (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8)))
