"""SD3 and Flux: every layer found in diffusers' and the original structure, by the names of either."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_lora.catalog import LoraCatalog
from lib_lora.core.files import FileIdentity, LoraFile
from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.plan import match_network
from lib_lora.core.saving import save_tensors
from lib_lora.errors import BaseModelMismatchError, NamingError, ShapeMismatchError
from lib_lora.session import LoraSession
from tests.fullsize import diffusers_model, kohya_shapes
from tests.toys import digest
from tests.transformer_models import (
    checkpoint_shapes,
    delta,
    flux,
    flux_shapes,
    linears,
    lora,
    original_model,
    sd3,
    sd3_shapes,
)

pytestmark = pytest.mark.newest

TOLERANCE = 1e-5  # float32, entries of about 1
WIDTH = 32
FLUX_WIDTH = 3072
"""Diffusers' converters know Flux in this width only."""

FAMILIES = ("flux", "sd3", "sd3.5")
BASE_MODELS = {"flux": BaseModel.FLUX, "sd3": BaseModel.SD3, "sd3.5": BaseModel.SD3}
BLOCKS = {"flux": "double_blocks.0.img_attn", "sd3": "joint_blocks.0.x_block.attn"}


def original_shapes(family: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    if family == "flux":
        return flux_shapes(width)
    return sd3_shapes(width, dual=(0,) if family == "sd3.5" else ())


@cache
def original(family: str) -> nn.Module:
    return original_model(original_shapes(family))


@cache
def diffusers(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "flux":
        return flux()
    return sd3(dual_attention_layers=(0,)) if family == "sd3.5" else sd3()


@cache
def keymap(family: str, structure: str) -> KeyMap:
    if structure == "diffusers":
        return KeyMap.from_modules({"transformer": diffusers(family)})
    return KeyMap.from_modules({"unet": original(family)})


@cache
def converted(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint whose rows are numbered, and what diffusers' own converter makes of it."""
    from diffusers.loaders import single_file_utils

    names = checkpoint_shapes(original_shapes(family, FLUX_WIDTH if family == "flux" else WIDTH))
    norms = ("norm.query_norm.scale", "norm.key_norm.scale")
    if family == "flux":
        streams = [f"double_blocks.{number}.{stream}_attn" for number in range(2) for stream in ("img", "txt")]
        names |= {
            f"{block}.{norm}": (1,) for block in (*streams, *map("single_blocks.{}".format, range(2))) for norm in norms
        }
    tensors = {name: number * 100_000 + torch.arange(names[name][0]) for number, name in enumerate(names)}
    # the context embedder's height is read as the width of the model
    result = dict(tensors) | {"pos_embed": torch.zeros(1)}
    convert = "flux" if family == "flux" else "sd3"
    return tensors, getattr(single_file_utils, f"convert_{convert}_transformer_checkpoint_to_diffusers")(result)


def layer_name(spelled: str) -> str:
    parts = split_key(f"{spelled}.alpha")
    assert parts is not None
    return parts.layer


def rows_of(tensor: torch.Tensor, rows) -> torch.Tensor:
    return torch.cat([tensor[start:stop] for start, stop in rows]) if rows else tensor


def network(tensors, name: str = "style"):
    path = Path(f"{name}.safetensors")
    return network_from_file(LoraFile(path, FileIdentity(path, 1, 1, 1), {}, tensors))


def updates(keymap: KeyMap, tensors) -> dict[str, torch.Tensor]:
    """Full name of each parameter that a file changes → what is added to it, in float32."""
    match = match_network(keymap, network(tensors))
    assert not match.unmatched
    shapes = {layer.parameter: tuple(layer.weight().shape) for layer in keymap.parameters}
    totals: dict[str, torch.Tensor] = {}
    for layer, adapter in match.layers:
        total = totals.setdefault(layer.parameter, torch.zeros(shapes[layer.parameter]))
        part = total if layer.rows is None else total[layer.rows[0] : layer.rows[1]]
        part += adapter.delta_weight(part)
    return totals


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.double() - b.double().reshape(a.shape)).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_names_reach_the_rows_of_a_checkpoint_that_diffusers_own_converter_takes(family):
    tensors, theirs = converted(family)
    shapes = checkpoint_shapes(original_shapes(family, FLUX_WIDTH if family == "flux" else WIDTH))
    keymap = KeyMap.from_checkpoint(shapes)
    assert keymap.base_model is BASE_MODELS[family]
    checked = 0
    for name, expected in theirs.items():
        path, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias") or ".norm_" in name:
            continue
        (part,) = keymap.parts(layer_name(f"transformer.{path}") + (".bias" if kind == "bias" else ""))
        own = tensors[part.layer.parameter]
        own = own if part.layer.rows is None else own[slice(*part.layer.rows)]
        assert torch.equal(own, rows_of(expected, part.rows)), name
        checked += 1
    assert checked == 2 * len(linears(diffusers(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_are_divided_among_the_layers_of_diffusers_as_its_own_converter_does(family):
    tensors, theirs = converted(family)
    with torch.device("meta"):
        model = flux(heads=24, size=128) if family == "flux" else diffusers(family)
    keymap = KeyMap.from_modules({"transformer": model})
    reached = set()
    for name, own in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "scale":
            continue
        for part in keymap.parts(layer_name(f"diffusion_model.{path}") + (".bias" if kind == "bias" else "")):
            assert torch.equal(theirs[part.layer.parameter], rows_of(own, part.rows)), name
            reached.add(part.layer.parameter)
    assert reached == {f"{name}.{kind}" for name in linears(model) for kind in ("weight", "bias")}


@pytest.mark.parametrize("structure", ["diffusers", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_found_by_all_names_that_trainers_give_it(family, structure):
    model = keymap(family, structure)
    assert model.base_model is BASE_MODELS[family]
    for name in linears(diffusers(family)):
        flat = name.replace(".", "_")
        spelled = [f"transformer.{name}", f"lora_transformer_{flat}", f"lora_unet_{flat}", f"lycoris_{flat}", name]
        found = {tuple(model.parts(layer_name(spelling))) for spelling in spelled}
        assert len(found) == 1, name
        assert len(found.pop()) == 1, name
    for name in linears(original(family)):
        flat = name.replace(".", "_")
        spelled = [f"lora_unet_{flat}", f"diffusion_model.{name}", f"model.diffusion_model.{name}", name]
        found = {tuple(model.parts(layer_name(spelling))) for spelling in spelled}
        assert len(found) == 1, name
        assert found.pop(), name


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("component", ["unet", "transformer"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_original_structure_is_known_under_any_prefix_and_as_any_component(family, component, prefix):
    shapes = checkpoint_shapes(original_shapes(family), prefix)
    model = KeyMap.from_components({component: shapes})
    layer = model.find("transformer:transformer_blocks_0_attn_to_k")
    assert layer.rows == (WIDTH, 2 * WIDTH)
    assert layer.shape == (WIDTH, WIDTH)
    assert layer.key == f"{component}.transformer_blocks.0.attn.to_k"
    assert layer.parameter == f"{prefix}{BLOCKS[family]}.qkv.weight"


def test_the_rows_of_fluxs_linear1_are_q_k_v_and_the_mlp():
    model = keymap("flux", "original")
    names = ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")
    layers = [model.find(f"transformer:single_transformer_blocks_1_{name}") for name in names]
    assert [layer.rows for layer in layers] == [(0, 32), (32, 64), (64, 96), (96, 224)]
    assert {layer.parameter for layer in layers} == {"single_blocks.1.linear1.weight"}
    biases = [model.find(f"transformer:single_transformer_blocks_1_{name}.bias") for name in names]
    assert [bias.rows for bias in biases] == [(0, 32), (32, 64), (64, 96), (96, 224)]
    assert model.find("transformer:single_transformer_blocks_1_proj_out").parameter == "single_blocks.1.linear2.weight"


def test_flux_schnell_has_no_guidance_and_everything_else():
    model = KeyMap.from_checkpoint(checkpoint_shapes(flux_shapes(WIDTH, guidance=False)))
    assert model.base_model is BaseModel.FLUX
    assert model.parts("unet:guidance_in_in_layer") == ()
    assert model.find("transformer:time_text_embed_text_embedder_linear_1").parameter == "vector_in.in_layer.weight"


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


def test_text_encoders_of_an_sd3_checkpoint_are_three_components():
    model = KeyMap.from_checkpoint(
        checkpoint_shapes(sd3_shapes(WIDTH), "model.diffusion_model.")
        | {
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280),
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
            "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
        }
    )
    assert model.components == ("unet", "te1", "te2", "te3")
    assert model.base_model is BaseModel.SD3
    assert model.find("te1:encoder_layers_0_mlp_fc1").shape == (3072, 768)
    assert model.find("te2:encoder_layers_0_mlp_fc1").shape == (5120, 1280)
    assert model.find("te3:encoder_block_0_layer_0_SelfAttention_q").shape == (4096, 4096)


@pytest.mark.parametrize("component", ["te2", "te3"])
@pytest.mark.parametrize("spelled", ["lora_te3_", "lora_te2_", "text_encoder_2.", "text_encoders.t5xxl.transformer."])
def test_t5_is_found_as_the_second_and_as_the_third_text_encoder(component, spelled):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = KeyMap.from_modules({component: T5EncoderModel(config)})
    path = "encoder.block.0.layer.0.SelfAttention.q"
    layer = model.find(layer_name(spelled + (path if spelled.endswith(".") else path.replace(".", "_"))))
    assert layer.key == f"{component}.{path}"


def test_blocks_of_flux_have_the_names_that_block_weights_give_them():
    blocks = {layer.key: layer.block for layer in keymap("flux", "diffusers")}
    assert blocks["transformer.transformer_blocks.1.ff.net.2"] == "D01"
    assert blocks["transformer.single_transformer_blocks.0.attn.to_q"] == "S00"
    assert (blocks["transformer.x_embedder"], blocks["transformer.proj_out"]) == ("IN", "OUT")
    by_parameter = {layer.parameter: layer.block for layer in keymap("flux", "original")}
    assert by_parameter["single_blocks.1.linear1.weight"] == "S01"
    assert by_parameter["final_layer.adaLN_modulation.1.weight"] == "OUT"


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FILES = {
    "Flux, kohya": ("Flux", {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)}),
    "Flux, double blocks alone": (
        "Flux",
        {f"transformer.transformer_blocks.0.attn.{name}": (3072, 3072) for name in (*ATTENTION, "add_q_proj")},
    ),
    "Flux, single blocks alone": ("Flux", {"transformer.single_transformer_blocks.0.proj_mlp": (12288, 3072)}),
    "SD3, kohya": ("SD 3.x", {"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)}),
    "SD3, diffusers": ("SD 3.x", {f"transformer.transformer_blocks.0.attn.{name}": (1536, 1536) for name in ATTENTION}),
    "SD3.5 large": ("SD 3.x", {f"transformer.transformer_blocks.0.attn.{name}": (2432, 2432) for name in ATTENTION}),
    "SD3 with CLIP-G": (
        "SD 3.x",
        {
            "transformer.transformer_blocks.0.attn.to_q": (1536, 1536),
            "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (1280, 1280),
        },
    ),
    "SD1": ("SD 1.x", {name: shape for name, shape in kohya_shapes("sd1").items() if name.endswith("attn2_to_k")}),
    "SDXL": ("SDXL", {name: shape for name, shape in kohya_shapes("sdxl").items() if name.endswith("attn2_to_k")}),
}


@cache
def full_size(model: str) -> KeyMap:
    if model in ("sd1", "sdxl"):
        return KeyMap.from_modules(diffusers_model(model))
    if model.endswith("original"):
        return KeyMap.from_checkpoint(
            checkpoint_shapes(flux_shapes(3072) if model.startswith("flux") else sd3_shapes(1536))
        )
    with torch.device("meta"):
        return KeyMap.from_modules(
            {"transformer": flux(heads=24, size=128) if model == "flux" else sd3(heads=24, size=64)}
        )


MODELS = {
    "sd1": "SD 1.x",
    "sdxl": "SDXL",
    "flux": "Flux",
    "flux original": "Flux",
    "sd3": "SD 3.x",
    "sd3 original": "SD 3.x",
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file", FILES)
def test_a_lora_for_another_family_is_refused_by_both_names(file, model):
    made_for, shapes = FILES[file]
    loaded = network(lora(shapes, rank=1, alpha=None))
    if made_for != MODELS[model]:
        with pytest.raises(
            BaseModelMismatchError, match=f"^style was made for {made_for}, this model is {MODELS[model]}$"
        ):
            match_network(full_size(model), loaded)
    elif file == "SD3.5 large":
        with pytest.raises(ShapeMismatchError, match=r"\(1536, 1536\) here, \(2432, 2432\) in the LoRA"):
            match_network(full_size(model), loaded)
    else:
        assert match_network(full_size(model), loaded).layers


def test_blocks_of_unknown_width_are_told_by_metadata_alone():
    shapes = {"transformer:transformer_blocks_0_attn_to_q": ()}
    assert BaseModel.of_file(shapes, {}) is BaseModel.UNKNOWN
    assert BaseModel.of_file(shapes, {"ss_v2": "False"}) is BaseModel.UNKNOWN
    assert BaseModel.of_file(shapes, {"modelspec.architecture": "flux-1-dev/lora"}) is BaseModel.FLUX
    assert BaseModel.of_file(shapes, {"ss_base_model_version": "sd3m"}) is BaseModel.SD3


@pytest.mark.parametrize(
    "layer", ["double_blocks_0_img_mod_linear", "single_transformer_blocks_0_attn_to_qkv_mlp_proj"]
)
def test_other_models_with_blocks_named_as_fluxs_are_not_taken_for_it(layer):
    assert BaseModel.of_file({f"unet:{layer}": (9216, 3072), "unet:single_blocks_0_linear1": ()}, {}) is (
        BaseModel.UNKNOWN
    )


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
