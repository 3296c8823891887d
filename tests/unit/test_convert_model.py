"""A model as one file and as a folder of diffusers: every tensor bit for bit, as diffusers itself would load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ldm_files import write_checkpoint
from safetensors.torch import load_file
from tiny_pipelines import make_tiny, vocabulary, write_folder

from lib_lora.core.saving import save_tensors
from lib_lora.core.single_file import CONFIGS, FAMILIES
from lib_lora.tools.convert_checkpoint import to_diffusers, to_single

GOLDEN = Path(__file__).parents[1] / "golden" / "sd1"
TOKENIZER = {"vocab.json": json.dumps(vocabulary()).encode(), "merges.txt": b"#version: 0.2\n"}
NAMES = ("sd1", "sd2", "sdxl")
every_family = pytest.mark.parametrize("family", NAMES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny models of all families, in half precision as most files are."""
    made = {}
    for family in NAMES:
        model = make_tiny(family, tmp_path_factory.mktemp(family) / "config")
        for part in model.parts.values():
            part.half()
        made[family] = model
    return made


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory) -> dict[str, Path]:
    """The same as single files, written by the tests' own converter."""
    folder = tmp_path_factory.mktemp("single")
    return {
        family: write_checkpoint(
            folder / f"{family}.safetensors", {name: tensor.half() for name, tensor in model.tensors.items()}
        )
        for family, model in tiny.items()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
        assert torch.equal(tensor, second[name]), name
    return True


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what transformers 5 leaves away."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def weights(module) -> dict[str, torch.Tensor]:
    return plain({name: tensor.detach() for name, tensor in module.named_parameters()})


def tokenizer(pad_token: str) -> dict[str, bytes]:
    return TOKENIZER | {"tokenizer_config.json": json.dumps({"pad_token": pad_token}).encode()}


@every_family
def test_diffusers_loads_the_folder_with_the_weights_that_were_in_the_file(tiny, single, tmp_path, family):
    from diffusers import DiffusionPipeline

    out = tmp_path / "folder"
    made = to_diffusers(single[family], out, config=tiny[family].config, tokenizer=tokenizer)
    pipe = DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float16, local_files_only=True)
    for part, module in tiny[family].parts.items():
        assert same(weights(module), weights(getattr(pipe, part))), part
    assert made.left_out == {}
    assert made.tensors == sum(len(weights(module)) for module in tiny[family].parts.values())


@every_family
def test_diffusers_own_reading_of_the_file_agrees(tiny, single, tmp_path, family):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    out = tmp_path / "folder"
    to_diffusers(single[family], out, config=tiny[family].config)
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        options = {"config": str(tiny[family].config), "subfolder": part, "torch_dtype": torch.float16}
        theirs = kind.from_single_file(str(single[family]), local_files_only=True, **options)
        assert same(weights(theirs), load_file(out / part / "diffusion_pytorch_model.safetensors"))


@every_family
def test_a_file_comes_back_bit_for_bit(tiny, single, tmp_path, family):
    to_diffusers(single[family], tmp_path / "folder", config=tiny[family].config, tokenizer=tokenizer)
    made = to_single(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(single[family]), load_file(tmp_path / "back.safetensors"))
    assert (made.left_out, made.layout, made.notes) == ({}, "single", ())
    assert made.base_model in [one.title for one in FAMILIES if one.config == family]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_what_diffusers_saved_comes_back_bit_for_bit(tiny, tmp_path, family):
    folder = write_folder(tiny[family], tmp_path / "theirs")
    to_single(folder, tmp_path / "one.safetensors")
    assert same({n: t.half() for n, t in tiny[family].tensors.items()}, load_file(tmp_path / "one.safetensors"))
    to_diffusers(tmp_path / "one.safetensors", tmp_path / "ours", config=folder)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        saved, made = (load_file(place / f"{part}.safetensors") for place in (folder, tmp_path / "ours"))
        assert same(
            *({name.removeprefix("text_model."): tensor for name, tensor in one.items()} for one in (saved, made))
        )


def test_kohyas_checkpoint_comes_back_without_what_diffusers_has_no_place_for(tmp_path):
    source, settings = GOLDEN / "base.safetensors", json.loads((GOLDEN / "config.json").read_text())
    config = tmp_path / "config"
    shutil.copytree(CONFIGS / "sd1", config)
    for part, name in (("unet", "unet_diffusers"), ("vae", "vae"), ("text_encoder", "clip_text")):
        text = json.dumps(settings[name] | {"architectures": ["CLIPTextModel"]})
        (config / part / "config.json").write_text(text)
    made = to_diffusers(source, tmp_path / "folder", config=config)
    constant = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert made.left_out == {"alphas_cumprod": 1, constant: 1}
    assert any("no tokenizer" in note for note in made.notes)
    to_single(tmp_path / "folder", tmp_path / "back.safetensors")
    kept = {name: tensor for name, tensor in load_file(source).items() if name not in ("alphas_cumprod", constant)}
    assert same(kept, load_file(tmp_path / "back.safetensors"))


def test_what_sd2_files_hold_beyond_the_model_is_left_out_and_told(tiny, tmp_path):
    prefix = "cond_stage_model.model."
    extra = {f"{prefix}transformer.resblocks.2.ln_1.weight": torch.ones(8), f"{prefix}logit_scale": torch.ones(())}
    extra |= {f"{prefix}text_projection": torch.ones(8, 8), "model_ema.diffusion_modelout2bias": torch.ones(4)}
    extra |= {"first_stage_model.loss.logvar": torch.ones(()), "model.diffusion_model.banana": torch.ones(())}
    tensors = {name: tensor.half() for name, tensor in tiny["sd2"].tensors.items()}
    write_checkpoint(tmp_path / "more.safetensors", tensors | extra)
    made = to_diffusers(tmp_path / "more.safetensors", tmp_path / "folder", config=tiny["sd2"].config)
    assert sum(made.left_out.values()) == len(extra)
    assert f"{prefix}transformer.resblocks.2" in made.left_out
    to_single(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(tensors, load_file(tmp_path / "back.safetensors"))


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A tiny SD1 as diffusers saves it."""
    return write_folder(tiny["sd1"], tmp_path / "model")


def expected(tiny) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in tiny["sd1"].tensors.items()}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_are_read_as_diffusers_saves_them(tiny, folder, tmp_path, variant):
    shutil.rmtree(folder / "unet")
    tiny["sd1"].parts["unet"].save_pretrained(folder / "unet", max_shard_size="60KB", variant=variant)
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    to_single(folder, tmp_path / "one.safetensors")
    assert same(expected(tiny), load_file(tmp_path / "one.safetensors"))


def test_of_two_variants_the_one_that_was_asked_for_is_taken(tiny, folder, tmp_path):
    for part in ("unet", "vae"):
        module = tiny["sd1"].parts[part]
        zeros = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
        save_tensors(folder / part / "diffusion_pytorch_model.fp16.safetensors", zeros)
    shutil.copy(folder / "text_encoder/model.safetensors", folder / "text_encoder/model.fp16.safetensors")
    to_single(folder, tmp_path / "plain.safetensors")
    to_single(folder, tmp_path / "fp16.safetensors", variant="fp16")
    assert same(expected(tiny), load_file(tmp_path / "plain.safetensors"))
    assert not load_file(tmp_path / "fp16.safetensors")["model.diffusion_model.out.2.weight"].any()


def test_a_vae_with_the_names_of_old_versions_is_read(tiny, folder, tmp_path):
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        new = next((new for new in old if f".{new}." in name), "")
        tensors[name.replace(f".{new}.", f".{old[new]}.") if new else name] = tensor
    assert sum("proj_attn" in name for name in tensors) == 4
    save_tensors(file, tensors, overwrite=True)
    to_single(folder, tmp_path / "one.safetensors")
    assert same(expected(tiny), load_file(tmp_path / "one.safetensors"))
