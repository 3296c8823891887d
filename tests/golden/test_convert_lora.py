"""LoRA files in the other layout: bit for bit the same way back, and to diffusers and PEFT the same LoRA."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lib_lora.core.files import read_lora_file
from lib_lora.core.keymap import KeyMap
from lib_lora.core.lora_names import kohya_name
from lib_lora.core.models import BaseModel
from lib_lora.core.network import load_network
from lib_lora.core.saving import save_tensors
from lib_lora.tools.convert import convert_lora
from tests.fullsize import FAMILIES, kohya_shapes
from tests.toys import c3lier, lora_tensors, sd1_unet, sdxl_unet, text_encoder

GOLDEN = Path(__file__).parent / "sd1"
KOHYA_FILES = ["lora_A", "lora_B", "lora_D_c3lier", "lora_E_c3lier"]
BASE_MODELS = {"sd1": BaseModel.SD1, "sd2": BaseModel.SD2, "sdxl": BaseModel.SDXL}
DELTA_ERROR = 1e-6
"""Relative, float32: two ways to round alpha / rank · up @ down."""
DEEP = re.compile(r"transformer_blocks\.[2-9]|encoder\.layers\.[1-9]")
"""Layers that are like those before them: PEFT needs a second for each hundred whose alpha differs."""
COMPONENTS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning")


def there_and_back(source: Path, folder: Path, **options) -> Path:
    convert_lora(source, "peft", folder / "peft.safetensors", **options)
    convert_lora(folder / "peft.safetensors", "kohya", folder / "back.safetensors", **options)
    return folder / "back.safetensors"


@pytest.mark.parametrize("name", KOHYA_FILES)
def test_kohyas_own_file_comes_back_byte_for_byte(name, tmp_path):
    source = GOLDEN / f"{name}.safetensors"
    back = there_and_back(source, tmp_path)
    assert back.read_bytes() == source.read_bytes()


def same(first: Path, second: Path) -> bool:
    """The same keys, dtypes, shapes and bits."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape), key
        assert (
            tensor.contiguous().flatten().view(torch.uint8).equal(other[key].contiguous().flatten().view(torch.uint8))
        )
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_comes_back_under_its_name(family, tmp_path):
    tensors = {}
    for number, (name, (out, *inner)) in enumerate(kohya_shapes(family).items()):
        tensors[f"{name}.lora_up.weight"] = torch.full((1, 1), float(number)).expand(min(out, 4), 1)
        tensors[f"{name}.lora_down.weight"] = torch.full((1, 2, *inner[1:]), float(number))
        tensors[f"{name}.alpha"] = torch.tensor(number / 7)
    save_tensors(tmp_path / "all.safetensors", tensors)
    assert same(
        tmp_path / "all.safetensors", there_and_back(tmp_path / "all.safetensors", tmp_path, family=BASE_MODELS[family])
    )


def unusual_alphas() -> dict[str, torch.Tensor]:
    """Each layer's alpha is stored in a way of its own, or not at all."""
    layers = [
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_{part}" for part in ("to_q", "to_k", "to_v")
    ]
    layers += [f"lora_te_text_model_encoder_layers_{number}_mlp_fc1" for number in range(4)]
    alphas = (torch.tensor(4), torch.tensor([3.0]), None, torch.tensor(0.375, dtype=torch.float64))
    alphas += (torch.tensor(2.5), torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(0.0))
    tensors = {}
    for number, (layer, alpha) in enumerate(zip(layers, alphas, strict=True)):
        tensors[f"{layer}.lora_down.weight"] = torch.randn(2 + number, 768).half()
        tensors[f"{layer}.lora_up.weight"] = torch.randn(8, 2 + number).half()
        if alpha is not None:
            tensors[f"{layer}.alpha"] = alpha
    return tensors


def test_alphas_come_back_in_the_dtype_and_shape_they_had_and_missing_ones_stay_missing(tmp_path):
    source = tmp_path / "odd.safetensors"
    save_tensors(source, unusual_alphas(), {"ss_base_model_version": "sd_v1"})
    back = there_and_back(source, tmp_path)
    assert same(source, back)
    scales = {name: adapter.factors().scale for name, adapter in load_network(source).adapters.items()}
    peft = load_network(tmp_path / "peft.safetensors").adapters
    assert {name: adapter.factors().scale for name, adapter in peft.items()} == scales
    assert len(set(scales.values())) > 4


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, nn.Module]]:
    torch.manual_seed(0)
    sd1 = {"unet": sd1_unet(), "text_encoder": text_encoder()}
    return {
        "sd1": sd1,
        "sdxl": {"unet": sdxl_unet(), "text_encoder": text_encoder(8), "text_encoder_2": text_encoder(8)},
    }


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipeline(request, models) -> Any:
    """A pipeline of diffusers without what LoRAs do not change."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "scheduler", "feature_extractor"))
    if request.param == "sdxl":
        return StableDiffusionXLPipeline(**parts, tokenizer_2=None, **models["sdxl"], add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False, **models["sd1"])


@pytest.fixture(scope="module")
def kohya_file(pipeline, tmp_path_factory) -> Path:
    """A C3Lier whose ranks and alphas differ from layer to layer, under kohya's own names."""
    path = tmp_path_factory.mktemp("kohya") / "varied.safetensors"
    return write_kohya(path, pipeline, ranks=(2, 3, 4), alphas=(1.0, 2.0, 3.0, 4.5, 5.0))


def write_kohya(path: Path, pipeline, ranks: tuple[int, ...], alphas: tuple[float, ...]) -> Path:
    family = BaseModel.SDXL if hasattr(pipeline, "text_encoder_2") else BaseModel.SD1
    keymap = KeyMap.from_modules({COMPONENTS[name]: part for name, part in modules(pipeline).items()})
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(layer for layer in c3lier(keymap) if not DEEP.search(layer.key)):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        made = lora_tensors([layer], rank=rank, alpha=alpha, seed=number)
        tensors |= {f"{kohya_name(layer.key, family)}.{key.split('.', 1)[1]}": value for key, value in made.items()}
    version = "sdxl_base_v1-0" if family is BaseModel.SDXL else "sd_v1"
    save_tensors(path, tensors, {"ss_base_model_version": version})
    return path


def modules(pipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipeline, name) for name in COMPONENTS if getattr(pipeline, name, None) is not None}


def loaded_deltas(pipeline, path: Path) -> dict[str, torch.Tensor]:
    """`LayerRef.key` → ΔW that PEFT makes after diffusers has loaded a file."""
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="ink")
    try:
        return {
            f"{COMPONENTS[part]}.{name.removeprefix('text_model.')}": layer.get_delta_weight("ink").detach()
            for part, module in modules(pipeline).items()
            for name, layer in module.named_modules()
            if hasattr(layer, "get_delta_weight") and "ink" in getattr(layer, "lora_A", {})
        }
    finally:
        pipeline.unload_lora_weights()


def our_deltas(path: Path) -> dict[str, torch.Tensor]:
    adapters = load_network(path).adapters
    return {name: adapter.delta_weight(torch.zeros(adapter.shape)) for name, adapter in adapters.items()}


def by_flat_name(deltas: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".", ":", 1).replace(".", "_"): delta for key, delta in deltas.items()}


def test_diffusers_loads_the_converted_file_as_the_same_lora(pipeline, kohya_file, tmp_path):
    convert_lora(kohya_file, "peft", tmp_path / "peft.safetensors")
    theirs = by_flat_name(loaded_deltas(pipeline, tmp_path / "peft.safetensors"))
    ours = our_deltas(tmp_path / "peft.safetensors")
    assert theirs.keys() == ours.keys()
    for name, delta in ours.items():
        assert (theirs[name] - delta).norm() <= DELTA_ERROR * delta.norm(), name


def test_diffusers_own_reading_of_kohyas_file_agrees_with_the_converted_one(pipeline, tmp_path):
    """With one rank and alpha: where alphas differ, diffusers loses those of attention and text encoders."""
    kohya = write_kohya(tmp_path / "kohya.safetensors", pipeline, ranks=(4,), alphas=(1.5,))
    convert_lora(kohya, "peft", tmp_path / "peft.safetensors")
    converted, own = loaded_deltas(pipeline, tmp_path / "peft.safetensors"), loaded_deltas(pipeline, kohya)
    assert own.keys() == converted.keys()
    for name, delta in own.items():
        assert torch.equal(converted[name], delta), name


def test_the_converted_file_is_to_us_the_same_lora_bit_for_bit(kohya_file, tmp_path):
    back = there_and_back(kohya_file, tmp_path)
    assert same(kohya_file, back)
    first, second = load_network(kohya_file), load_network(tmp_path / "peft.safetensors")
    assert first.base_model is second.base_model
    sums = [
        sorted(a.delta_weight(torch.zeros(a.shape)).sum().item() for a in n.adapters.values()) for n in (first, second)
    ]
    assert sums[0] == sums[1]


SETTINGS = {
    "one rank": {"r": 4, "lora_alpha": 3},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 5, "q_proj": 7}},
}
TARGETS = {"unet": ["to_q", "to_v", "conv1", "proj_in"], "text_encoder": ["q_proj", "fc1"]}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_what_diffusers_saved_is_the_same_lora_in_kohyas_layout(models, tmp_path, settings):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    layers, texts, deltas = {}, {}, {}
    for part, module in copy.deepcopy(models["sd1"]).items():
        config = LoraConfig(target_modules=TARGETS[part], init_lora_weights=False, **settings)
        module.add_adapter(config, adapter_name="ink")
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="ink")
        texts[f"{part}_lora_adapter_metadata"] = config.to_dict()
        for name, layer in module.named_modules():
            if hasattr(layer, "get_delta_weight"):
                key = f"{COMPONENTS[part]}.{name.removeprefix('text_model.')}"
                deltas[key] = layer.get_delta_weight("ink").detach()
    layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(layers["text_encoder_lora_layers"])
    StableDiffusionPipeline.save_lora_weights(tmp_path, weight_name="peft.safetensors", **layers, **texts)
    convert_lora(tmp_path / "peft.safetensors", "kohya", tmp_path / "kohya.safetensors", family=BaseModel.SD1)
    ours, theirs = our_deltas(tmp_path / "kohya.safetensors"), by_flat_name(deltas)
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        assert (theirs[name] - delta).norm() <= DELTA_ERROR * delta.norm(), name
    assert read_lora_file(tmp_path / "kohya.safetensors").metadata["ss_v2"] == "False"
