"""`compat="a1111"`: the WebUI's arithmetic, told here once more operation by operation, bit for bit.

Told from extensions-builtin/Lora of AUTOMATIC1111's WebUI 1.10.1: network.py (`finalize_updown`), network_*.py
(`calc_updown`), lyco_helpers.py and networks.py (`network_apply_weights`).
"""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor

from lib_lora.catalog import LoraCatalog
from lib_lora.session import LoraSession
from tests.family_files import FAMILIES, family_tensors, noise, toys, write

DTYPES = (torch.float32, torch.float16)
BEYOND_THE_WEBUI = {
    ("IA3 of outputs", "1x1"),
    ("IA3 of outputs", "3x3"),
    ("GLoRA of the first layout", "1x1"),
    ("GLoRA of the first layout", "3x3"),
    *(("GLoRA", kind) for kind in ("linear", "1x1", "3x3")),
}
"""Where its own code ends in an exception, so that there is nothing to reproduce."""


def lora(t: dict, weight: Tensor) -> Tensor:
    """Its factors are modules of the model's type."""
    up, down = t["lora_up.weight"].to(weight.dtype), t["lora_down.weight"].to(weight.dtype)
    if "lora_mid.weight" not in t:
        return up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    mid = t["lora_mid.weight"].to(weight.dtype)
    return torch.einsum("n m k l, i n, m j -> i j k l", mid, up.flatten(1), down.flatten(1))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    half = torch.einsum("i j k l, j r -> i r k l", core, b)
    return torch.einsum("i j k l, i r -> r j k l", half, a)


def hada(t: dict, weight: Tensor) -> Tensor:
    halves = []
    for number in "12":
        a, b, core = t[f"hada_w{number}_a"], t[f"hada_w{number}_b"], t.get(f"hada_t{number}")
        halves.append(a @ b if core is None else tucker(core, a, b))
    return halves[0] * halves[1]


def lokr(t: dict, weight: Tensor) -> Tensor:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    w1 = w1.unsqueeze(2).unsqueeze(2) if w2.ndim == 4 else w1
    return torch.kron(w1, w2.contiguous())


def ia3(t: dict, weight: Tensor) -> Tensor:
    return weight * (t["weight"] if t["on_input"].item() else t["weight"].reshape(-1, 1))


def glora(t: dict, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    return (b2 @ b1) + ((weight.to(a1.dtype) @ a2) @ a1)


def oft(t: dict, weight: Tensor) -> Tensor:
    if "oft_diag" in t:
        turns = t["oft_diag"]
    else:
        blocks = t["oft_blocks"]
        skew, eye = blocks - blocks.transpose(-1, -2), torch.eye(blocks.shape[-1])
        constraint = t["alpha"] * len(weight)
        if constraint != 0:
            length = torch.norm(skew.flatten())
            skew = skew * ((torch.clamp(length, max=constraint) + 1e-8) / (length + 1e-8))
        turns = torch.matmul(eye + skew, (eye - skew).float().inverse())
    turns = turns.to(weight.dtype)  # the WebUI leaves that to autocast, which casts what einsum multiplies
    turned = butterfly(turns, weight) if turns.ndim == 4 else diagonal(turns, weight)
    if "rescale" in t:
        turned = t["rescale"].reshape(-1, *[1] * (weight.ndim - 1)).to(turned) * turned
    return turned - weight


def diagonal(turns: Tensor, weight: Tensor) -> Tensor:
    parts = rearrange(weight, "(k n) ... -> k n ...", k=len(turns))
    return rearrange(torch.einsum("k n m, k n ... -> k m ...", turns, parts), "k m ... -> (k m) ...")


def butterfly(turns: Tensor, weight: Tensor) -> Tensor:
    size = turns.shape[-1]
    for stage, turn in enumerate(turns):
        distance = 2**stage * (size // 2)
        weight = rearrange(weight, "(c g k) ... -> (c k g) ...", g=2, k=distance)
        weight = torch.einsum("b i j, b j ... -> b i ...", turn, rearrange(weight, "(d b) ... -> d b ...", b=size))
        weight = rearrange(rearrange(weight, "d b ... -> (d b) ..."), "(c k g) ... -> (c g k) ...", g=2, k=distance)
    return weight


CALC = {
    "lora_up.weight": lora,
    "hada_w1_a": hada,
    "lokr_w1": lokr,
    "lokr_w1_a": lokr,
    "diff": lambda t, weight: t["diff"],
    "w_norm": lambda t, weight: t["w_norm"],
    "on_input": ia3,
    "a1.weight": glora,
    "oft_blocks": oft,
    "oft_diag": oft,
}
RANKS = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Whose first dimension is what alpha is divided by, the first that is there."""


def updown(t: dict, weight: Tensor, multiplier: float) -> Tensor:
    change = next(calc for name, calc in CALC.items() if name in t)(t, weight).reshape(weight.shape)
    ranks = [t[name].shape[0] for name in RANKS if name in t]
    change = change * (t["alpha"].item() / ranks[0] if ranks else 1.0)
    if "dora_scale" in t:
        merged = change + weight.to(change.dtype)
        columns = merged.transpose(0, 1)
        length = columns.reshape(weight.shape[1], -1).norm(dim=1, keepdim=True)
        length = length.reshape(weight.shape[1], *[1] * (weight.ndim - 1)).transpose(0, 1)
        change = merged * (t["dora_scale"].to(change.dtype) / length) - weight.to(change.dtype)
    return change * multiplier


def applied(weight: Tensor, files: list[tuple[dict, float]]) -> Tensor:
    for tensors, multiplier in files:
        change = updown(tensors, weight, multiplier)
        weight = (weight.to(change.dtype) + change).to(weight.dtype)
    return weight


def set_on(components, tmp_path, *requests: tuple[str, float]) -> None:
    session = LoraSession(components, LoraCatalog([tmp_path]), compat="a1111")
    assert not session.set(list(requests)).refused


def layers(components) -> dict[str, Tensor]:
    unet = components["unet"]
    return {"linear": unet.linear.weight, "1x1": unet.conv1.weight, "3x3": unet.conv3.weight}


@pytest.mark.parametrize("of_file", DTYPES, ids=lambda dtype: f"{dtype} file")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_webuis(tmp_path, family, dtype, of_file):
    expected, components = {}, toys(dtype)
    for kind, weight in layers(components).items():
        if (family, kind) in BEYOND_THE_WEBUI:
            continue
        tensors = family_tensors(family, tuple(weight.shape), seed=len(kind), dtype=of_file)
        write(tmp_path / f"{kind}.safetensors", {kind: tensors})
        expected[kind] = applied(weight.clone(), [(tensors, -0.7)])
    if expected:
        set_on(components, tmp_path, *((kind, -0.7) for kind in expected))
    assert all(torch.equal(layers(components)[kind], weight) for kind, weight in expected.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
def test_many_families_on_one_layer_are_added_in_prompt_order(tmp_path, kind, dtype):
    families = [family for family in FAMILIES if (family, kind) not in BEYOND_THE_WEBUI]
    strengths = [0.1 + 0.05 * number for number in range(len(families))]
    shape = tuple(layers(toys())[kind].shape)
    files = [family_tensors(family, shape, seed, torch.float16) for seed, family in enumerate(families)]
    for number, tensors in enumerate(files):
        write(tmp_path / f"{number}.safetensors", {kind: tensors})
    orders = [range(len(files)), range(len(files) - 1, -1, -1)]
    results = []
    for order in orders:
        components = toys(dtype)
        set_on(components, tmp_path, *((str(number), strengths[number]) for number in order))
        results.append(layers(components)[kind])
        exact = applied(layers(toys(dtype))[kind].clone(), [(files[number], strengths[number]) for number in order])
        assert torch.equal(results[-1], exact)
    assert not torch.equal(*results)


@pytest.mark.parametrize("of_file", DTYPES, ids=lambda dtype: f"{dtype} file")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_biases_are_the_webuis(tmp_path, dtype, of_file):
    """A norm's weight is brought to the file's type before the sum, a bias is not."""
    generator = torch.Generator().manual_seed(0)
    norm = {name: noise(generator, 24).to(of_file) for name in ("w_norm", "b_norm")}
    full = {"diff": noise(generator, 24, 16).to(of_file), "diff_b": noise(generator, 24).to(of_file)}
    write(tmp_path / "x.safetensors", {"layer norm": norm, "group norm": norm, "linear": full})
    before, after = toys(dtype)["unet"], toys(dtype)
    set_on(after, tmp_path, ("x", 0.3))
    for name, tensors, bias in (("norm", norm, "b_norm"), ("group", norm, "b_norm"), ("linear", full, "diff_b")):
        theirs, ours = before.get_submodule(name), after["unet"].get_submodule(name)
        assert torch.equal(ours.weight, applied(theirs.weight, [(tensors, 0.3)]))
        assert torch.equal(ours.bias, (theirs.bias + tensors[bias] * 0.3).to(dtype))


@pytest.mark.parametrize("of_file", DTYPES, ids=lambda dtype: f"{dtype} file")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["LoRA", "LoHa", "LoKr", "DoRA of outputs"])
def test_the_projections_of_multihead_attention_are_the_webuis(tmp_path, family, dtype, of_file):
    """There it adds in place, in the wider of the two types."""
    prefix = "lora_te1_text_model_encoder_layers_0_self_attn"
    files = {name: family_tensors(family, (16, 16), seed, of_file) for seed, name in enumerate(("q", "k", "v", "out"))}
    write(tmp_path / "x.safetensors", {f"{prefix}_{name}_proj": tensors for name, tensors in files.items()})
    before, after = (components["te1"].transformer.resblocks[0].attn for components in (toys(dtype), toys(dtype)))
    set_on({"te1": root_of(after)}, tmp_path, ("x", -0.7))
    q, k, v = (
        updown(files[name], part, -0.7) for name, part in zip("qkv", before.in_proj_weight.chunk(3), strict=True)
    )
    out = updown(files["out"], before.out_proj.weight, -0.7)
    before.in_proj_weight += torch.vstack([q, k, v])
    before.out_proj.weight += out
    assert torch.equal(after.in_proj_weight, before.in_proj_weight)
    assert torch.equal(after.out_proj.weight, before.out_proj.weight)


def root_of(attention) -> torch.nn.Module:
    components = toys(attention.in_proj_weight.dtype)
    components["te1"].transformer.resblocks[0].attn = attention
    return components["te1"]


def test_what_the_webui_can_not_compute_is_exact(tmp_path):
    for family, kind in sorted(BEYOND_THE_WEBUI):
        components, exact = toys(), toys()
        shape = tuple(layers(components)[kind].shape)
        write(tmp_path / "x.safetensors", {kind: family_tensors(family, shape)})
        set_on(components, tmp_path, ("x", 1.0))
        assert not LoraSession(exact, LoraCatalog([tmp_path])).set([("x", 1.0)]).refused
        assert torch.allclose(layers(components)[kind], layers(exact)[kind], rtol=0, atol=1e-6)
