"""LoRAs on SD3 and Flux, in diffusers' and the original structure: what they change, whole and divided."""

from __future__ import annotations

import pytest
import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap
from lib_lora.core.plan import match_network
from lib_lora.core.saving import save_tensors
from lib_lora.errors import NamingError, ShapeMismatchError
from lib_lora.session import LoraSession
from tests.toys import digest
from tests.transformer_layers import (
    BLOCKS,
    FAMILIES,
    FLUX_WIDTH,
    WIDTH,
    close,
    diffusers,
    keymap,
    layer_name,
    network,
    original,
    original_shapes,
    rows_of,
    updates,
)
from tests.transformer_models import delta, flux, flux_shapes, linears, lora

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_in_original_names_on_diffusers_changes_what_its_rows_are(family):
    shapes = original_shapes(family)
    tensors = lora({f"lora_unet_{name.replace('.', '_')}": shape for name, shape in shapes.items()})
    found = updates(keymap(family, "diffusers"), tensors)
    direct = updates(keymap(family, "original"), tensors)
    assert len(found) == len(linears(diffusers(family)))
    for name in shapes:
        whole = delta(tensors, f"lora_unet_{name.replace('.', '_')}")
        assert close(direct[f"{name}.weight"], whole), name
        for part in keymap(family, "diffusers").parts(layer_name(f"lora_unet_{name.replace('.', '_')}")):
            assert close(found[part.layer.parameter], rows_of(whole, part.rows)), name
    qkv = delta(tensors, f"lora_unet_{BLOCKS[family[:4] if family == 'flux' else 'sd3'].replace('.', '_')}_qkv")
    assert close(found["transformer_blocks.0.attn.to_v.weight"], qkv[2 * WIDTH :])
    head = delta(tensors, "lora_unet_final_layer_adaLN_modulation_1")
    assert close(found["norm_out.linear.weight"], head.roll(WIDTH, 0)), "shift and scale change places"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diffusers_lora_on_the_original_structure_changes_the_rows_of_the_fused_weights(family):
    names = linears(diffusers(family))
    tensors = lora({f"transformer.{name}": shape for name, shape in names.items()})
    found = updates(keymap(family, "original"), tensors)
    assert set(found) == {f"{name}.weight" for name in original_shapes(family)}
    separate = {name: delta(tensors, f"transformer.{name}") for name in names}
    qkv = torch.cat([separate[f"transformer_blocks.0.attn.to_{letter}"] for letter in "qkv"])
    assert close(found[f"{BLOCKS['flux' if family == 'flux' else 'sd3']}.qkv.weight"], qkv)
    assert close(found["final_layer.adaLN_modulation.1.weight"], separate["norm_out.linear"].roll(WIDTH, 0))
    if family == "flux":
        block = "single_transformer_blocks.1"
        parts = [separate[f"{block}.attn.to_{letter}"] for letter in "qkv"] + [separate[f"{block}.proj_mlp"]]
        assert close(found["single_blocks.1.linear1.weight"], torch.cat(parts))
        assert close(found["single_blocks.1.linear2.weight"], separate[f"{block}.proj_out"])
    else:
        last = separate["transformer_blocks.1.norm1_context.linear"]
        assert close(found["joint_blocks.1.context_block.adaLN_modulation.1.weight"], last.roll(WIDTH, 0))
        first = separate["transformer_blocks.0.norm1_context.linear"]
        assert close(found["joint_blocks.0.context_block.adaLN_modulation.1.weight"], first)


def test_a_kohya_lora_for_flux_becomes_what_diffusers_own_conversion_makes_of_it():
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    shapes = flux_shapes(FLUX_WIDTH, double=1, single=1)
    head = "final_layer.adaLN_modulation.1"
    spelled = {name: f"lora_unet_{name.replace('.', '_')}" for name in shapes if name != "final_layer.linear"}
    # diffusers forgets the alpha of the head
    tensors = lora({key: shapes[name] for name, key in spelled.items() if name != head}, rank=2, alpha=1.0)
    tensors |= lora({spelled[head]: shapes[head]}, rank=2, alpha=None)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    with torch.device("meta"):
        model = KeyMap.from_modules({"transformer": flux(heads=24, size=128, num_layers=1, num_single_layers=1)})
    match = match_network(model, network(tensors))
    assert not match.unmatched
    assert 2 * len(match.layers) == len(theirs)
    for layer, adapter in match.layers:
        name = layer.key.removeprefix("transformer.")
        up, down, scale = adapter.factors()
        assert torch.equal(up, theirs[f"{name}.lora_B.weight"]), name
        assert torch.equal(down * scale, theirs[f"{name}.lora_A.weight"]), name


@pytest.mark.parametrize("structure", ["diffusers", "original"])
def test_an_x_flux_lora_changes_what_diffusers_own_conversion_of_it_does(structure):
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    fused, square = (3 * WIDTH, WIDTH), (WIDTH, WIDTH)
    names = {f"double_blocks.1.processor.{kind}": fused for kind in ("qkv_lora1", "qkv_lora2")}
    names |= {f"double_blocks.1.processor.{kind}": square for kind in ("proj_lora1", "proj_lora2")}
    names |= {"single_blocks.0.processor.qkv_lora": fused, "single_blocks.0.processor.proj_lora": (WIDTH, 5 * WIDTH)}
    sides = (("lora_A", "down"), ("lora_B", "up"))
    tensors = {
        name.replace(peft, xlabs): tensor
        for peft, xlabs in sides
        for name, tensor in lora(names, alpha=None).items()
        if peft in name
    }
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    found, expected = (updates(keymap("flux", structure), file) for file in (tensors, theirs))
    assert found.keys() == expected.keys()
    assert all(close(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("structure", ["diffusers", "original"])
@pytest.mark.parametrize("algorithm", ["full", "LoHa"])
def test_other_algorithms_are_divided_too(structure, algorithm):
    name, shape = "lora_unet_single_blocks_0_linear1", (7 * WIDTH, WIDTH)
    whole, tensors = dense(algorithm, name, shape)
    found = updates(keymap("flux", structure), tensors)
    ordered = sorted(keymap("flux", structure).parts(layer_name(name)), key=lambda part: part.rows)
    assert close(torch.cat([found[part] for part in dict.fromkeys(part.layer.parameter for part in ordered)]), whole)
    assert len(found) == (4 if structure == "diffusers" else 1)


def dense(algorithm: str, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """ΔW, and the tensors of a file that has it."""
    generator = torch.Generator().manual_seed(1)
    if algorithm == "full":
        whole = torch.randn(shape, generator=generator)
        return whole, {f"{name}.diff": whole}
    out, width = shape
    sizes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, width), "hada_w2_a": (out, 2), "hada_w2_b": (2, width)}
    parts = {role: torch.randn(size, generator=generator) for role, size in sizes.items()}
    whole = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return whole, {f"{name}.{role}": tensor for role, tensor in parts.items()}


def test_dora_with_magnitudes_of_the_outputs_is_divided_as_its_rows_are():
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = lora({name: (3 * WIDTH, WIDTH)}) | {f"{name}.dora_scale": torch.rand(3 * WIDTH, 1) + 0.5}
    model, base = keymap("flux", "original"), original("flux").get_parameter("double_blocks.0.img_attn.qkv.weight")
    direction = base.double() + delta(tensors, name)
    expected = direction / direction.norm(dim=1, keepdim=True) * tensors[f"{name}.dora_scale"] - base
    for layer, adapter in match_network(model, network(tensors)).layers:
        assert close(adapter.delta_weight(layer.live()), expected[slice(*layer.rows)])


@pytest.mark.parametrize("structure", ["diffusers", "original"])
def test_biases_of_fused_layers_are_divided_as_the_weights(structure):
    bias, head = torch.randn(3 * WIDTH), torch.randn(2 * WIDTH)
    tensors = {
        "lora_unet_double_blocks_0_img_attn_qkv.diff_b": bias,
        "lora_unet_final_layer_adaLN_modulation_1.diff_b": head,
    }
    found = updates(keymap("flux", structure), tensors)
    if structure == "original":
        assert close(found["double_blocks.0.img_attn.qkv.bias"], bias)
        assert close(found["final_layer.adaLN_modulation.1.bias"], head)
        return
    assert close(torch.cat([found[f"transformer_blocks.0.attn.to_{letter}.bias"] for letter in "qkv"]), bias)
    assert close(found["norm_out.linear.bias"], head.roll(WIDTH))


def test_a_fused_layer_counts_as_one_of_the_file():
    tensors = lora(
        {"lora_unet_single_blocks_0_linear1": (7 * WIDTH, WIDTH), "lora_unet_single_blocks_9_linear1": (1, 1)}
    )
    match = match_network(keymap("flux", "diffusers"), network(tensors))
    assert (match.matched, match.total, len(match.layers)) == (1, 2, 4)
    assert match.note == "style: 1 of 2 layers exist in this model; missing: single_blocks_9_linear1"


def test_what_can_not_be_divided_is_refused_with_its_layer_and_shape():
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = lora({name: (3 * WIDTH, WIDTH)}) | {f"{name}.dora_scale": torch.ones(1, WIDTH)}
    sentence = (
        r"^style: the rows of unet:double_blocks_0_img_attn_qkv, DoRA of LoRA \(96, 32\) with magnitudes of 32 inputs, "
        r"can not be divided among transformer\.transformer_blocks\.0\.attn\.to_q, "
    )
    with pytest.raises(ShapeMismatchError, match=sentence):
        match_network(keymap("flux", "diffusers"), network(tensors))


def test_a_fused_layer_of_another_height_is_refused_with_both_shapes():
    tensors = lora({"lora_unet_double_blocks_0_img_attn_qkv": (WIDTH, WIDTH)})
    with pytest.raises(ShapeMismatchError, match=r"to_q, .*: \(96, 32\) here, \(32, 32\) in the LoRA"):
        match_network(keymap("flux", "diffusers"), network(tensors))


def test_a_file_that_names_a_fused_layer_and_its_part_is_refused():
    names = {"lora_unet_double_blocks_0_img_attn_qkv": (96, 32), "transformer.transformer_blocks.0.attn.to_k": (32, 32)}
    with pytest.raises(NamingError, match=r"two spellings of the layer transformer\.transformer_blocks\.0\.attn\.to_k"):
        match_network(keymap("flux", "diffusers"), network(lora(names)))


@pytest.mark.parametrize("structure", ["diffusers", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loras_of_both_spellings_are_fused_and_taken_back_together(family, structure, tmp_path):
    shapes, names = original_shapes(family), linears(diffusers(family))
    kohya = lora({f"lora_unet_{name.replace('.', '_')}": shape for name, shape in shapes.items()}, seed=1)
    peft = lora({f"transformer.{name}": shape for name, shape in names.items()}, seed=2)
    for name, tensors in {"kohya": kohya, "peft": peft}.items():
        save_tensors(tmp_path / f"{name}.safetensors", tensors, {})
    module = original(family) if structure == "original" else diffusers(family)
    before, bits = {name: tensor.clone() for name, tensor in module.state_dict().items()}, digest(module)
    model = keymap(family, structure)
    added = [updates(model, kohya), updates(model, peft)]
    session = LoraSession({model.components[0]: module}, LoraCatalog([tmp_path]))
    session.set([("kohya", 0.5), ("peft", -1.0)])
    for name in added[0]:
        expected = before[name] + 0.5 * added[0][name] - added[1][name]
        assert close(module.state_dict()[name], expected), name
    session.clear()
    assert digest(module) == bits
    session.unload()


@pytest.mark.parametrize("layer", ["single_blocks.1.linear1", "final_layer.adaLN_modulation.1"])
def test_hook_mode_adds_the_rows_of_fused_layers(layer, tmp_path):
    names = ("attn.to_q", "attn.to_v", "proj_mlp")
    shapes = linears(diffusers("flux"))
    spelled = [f"single_transformer_blocks.1.{name}" for name in names] + ["norm_out.linear"]
    tensors = lora({f"transformer.{name}": shapes[name] for name in spelled})
    save_tensors(tmp_path / "style.safetensors", tensors, {})
    module = original("flux")
    linear, x = module.get_submodule(layer), torch.randn(2, 5, WIDTH)
    whole = updates(keymap("flux", "original"), tensors)[f"{layer}.weight"]
    before, expected = linear(x), linear(x) + x @ whole.T
    session = LoraSession({"transformer": module}, LoraCatalog([tmp_path]), mode="hook")
    session.set([("style", 1.0)])
    assert close(linear(x), expected)
    session.clear()
    assert torch.equal(linear(x), before)
    session.unload()
