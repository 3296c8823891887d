"""Models from folders and single files, without a network."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_pipelines import CLIP_PREFIXES, make_tiny, write_folder, write_tokenizer

import lib_lora.hosts.standalone.vocabulary as vocabulary_module
from lib_lora.core.single_file import CONFIGS, FAMILIES, recognise
from lib_lora.core.text_towers import tower_tensors
from lib_lora.errors import ModelError, PrefuseError
from lib_lora.hosts.standalone.checkpoints import load_single_file, probe_v_prediction
from lib_lora.hosts.standalone.libraries import transformers_class
from lib_lora.hosts.standalone.loading import load_pipeline
from lib_lora.hosts.standalone.vocabulary import (
    MERGES,
    byte_symbols,
    clip_tokenizer,
    find_vocabulary,
    read_merges,
    vocabulary,
)

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

GOLDEN = Path(__file__).parents[1] / "golden/sd1"
FLOAT_TOLERANCE = 1e-5
SAME_WEIGHTS_TOLERANCE = 1e-6
# Ids that OpenAI's tokenizer gives; 49406 and 49407 are start and end of text.
CAT_IDS = [49406, 320, 1125, 539, 320, 2368, 49407]
# Numbers of parameters of the published models.
PARAMETERS = {
    ("sd1", "unet"): 859_520_964,
    ("sd2", "unet"): 865_910_724,
    ("sdxl", "unet"): 2_567_463_684,
    ("sd1", "vae"): 83_653_863,
    ("sd2", "vae"): 83_653_863,
    ("sdxl", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Family → model and its file, made once."""
    made = {}
    for family in CLIP_PREFIXES:
        folder = tmp_path_factory.mktemp(family)
        model = make_tiny(family, folder / "config")
        made[family] = model, model.write(folder / f"{family}.safetensors")
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("family", CLIP_PREFIXES)
def test_a_single_file_becomes_the_pipeline_it_was_written_from(tiny, tokenizer, family):
    model, file = tiny[family]
    loaded = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config)
    for name, part in model.parts.items():
        found = getattr(loaded.pipe, name)
        assert [key for key, _ in found.named_parameters()] == [key for key, _ in part.named_parameters()]
        for (key, ours), theirs in zip(found.named_parameters(), part.parameters(), strict=True):
            assert torch.equal(ours, theirs), key
    assert loaded.name == family
    assert loaded.files == (file,)


@pytest.mark.parametrize("family", CLIP_PREFIXES)
def test_a_loaded_model_makes_pictures(tiny, tokenizer, family):
    model, file = tiny[family]
    pipe = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config).pipe
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe("abc cab", num_inference_steps=1, width=32, height=32, output_type="np").images[0]
    assert pixels.shape == (32, 32, 3)


def test_kohyas_forward_is_reproduced_from_the_checkpoint_file(tokenizer, tmp_path):
    config = json.loads((GOLDEN / "config.json").read_text())
    for part, key in (("unet", "unet_diffusers"), ("vae", "vae"), ("text_encoder", "clip_text")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config[key]))
    shutil.copytree(CONFIGS / "sd1/scheduler", tmp_path / "scheduler")
    pipe, _ = load_single_file(GOLDEN / "base.safetensors", torch.float32, tokenizer=tokenizer, config=tmp_path)
    expected = load_file(GOLDEN / "forward.safetensors")
    with torch.no_grad():
        noise = pipe.unet(expected["x"], expected["timesteps"], expected["context"]).sample
        text = pipe.text_encoder(expected["input_ids"]).last_hidden_state
    torch.testing.assert_close(noise, expected["unet_base"], atol=FLOAT_TOLERANCE, rtol=0)
    torch.testing.assert_close(text, expected["te_last_base"], atol=FLOAT_TOLERANCE, rtol=0)


def test_weights_are_copies_that_can_be_written_to(tiny, tokenizer):
    model, file = tiny["sd1"]
    before = file.read_bytes()
    pipe = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config).pipe
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        for parameter in part.parameters():
            parameter.data.fill_(1)
    assert file.read_bytes() == before


def test_half_precision_files_load_in_the_dtype_that_is_asked_for(tiny, tokenizer, tmp_path):
    model, _ = tiny["sd1"]
    halves = {name: tensor.half() for name, tensor in model.tensors.items()}
    file = type(model)("sd1", model.parts, model.config, halves).write(tmp_path / "half.safetensors")
    for asked, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        pipe = load_pipeline(file, "cpu", asked, tokenizer=tokenizer, config=model.config).pipe
        assert {parameter.dtype for part in (pipe.unet, pipe.text_encoder) for parameter in part.parameters()} == {
            dtype
        }


def test_text_encoder_names_of_2022_are_understood(tiny, tokenizer, tmp_path):
    model, _ = tiny["sd1"]
    old = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in model.tensors.items()}
    assert old.keys() != model.tensors.keys()
    file = type(model)("sd1", model.parts, model.config, old).write(tmp_path / "old.safetensors")
    pipe = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config).pipe
    for ours, theirs in zip(pipe.text_encoder.parameters(), model.parts["text_encoder"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_open_clip_layers_that_the_configuration_leaves_out_are_ignored(tiny):
    """SD2 reads the last but one of 24 layers; its file has all."""
    model, _ = tiny["sd2"]
    tower = FAMILIES[1].towers[0]
    extra = {
        name.replace("resblocks.1.", "resblocks.2."): tensor
        for name, tensor in model.tensors.items()
        if "resblocks.1." in name
    }
    named = tower_tensors(tower, model.tensors | extra | {f"{tower.prefix}logit_scale": torch.ones(())})
    known = {
        f"text_model.{name.removeprefix('text_model.')}" for name, _ in model.parts["text_encoder"].named_parameters()
    }
    assert {name for name in named if ".layers.2." not in name} == known


@pytest.mark.parametrize(("family", "part"), PARAMETERS)
def test_the_shipped_configurations_make_models_of_the_published_size(family, part):
    from accelerate import init_empty_weights

    folder = CONFIGS / family / part
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    with init_empty_weights():
        if part in kinds:
            model = kinds[part].from_config(kinds[part].load_config(folder))
        else:
            config = transformers_class("CLIPTextConfig").from_pretrained(folder)
            model = transformers_class(config.architectures[0])(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[family, part]


@pytest.mark.parametrize(
    ("metadata", "extra", "expected"),
    [
        ({}, (), "epsilon"),
        ({"modelspec.prediction_type": "v"}, (), "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, (), "epsilon"),
        ({}, ("v_pred",), "v_prediction"),
    ],
)
def test_what_the_unet_predicts_is_read_from_the_file(tiny, tokenizer, tmp_path, metadata, extra, expected):
    model, _ = tiny["sd2"]
    tensors = model.tensors | {name: torch.zeros(1) for name in extra}
    file = type(model)("sd2", model.parts, model.config, tensors).write(tmp_path / "m.safetensors", metadata)
    loaded = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config)
    assert loaded.pipe.scheduler.config.prediction_type == expected


def test_what_the_unet_predicts_can_be_said(tiny, tokenizer):
    model, file = tiny["sd2"]
    for asked, expected in (("v", "v_prediction"), ("epsilon", "epsilon")):
        loaded = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config, prediction=asked)
        assert loaded.pipe.scheduler.config.prediction_type == expected
        assert loaded.scheduler["prediction_type"] == expected


class Predictor(torch.nn.Module):
    """Gives back `factor` times the sample, as noise (1) or velocity (-2) predictors do where all is noise."""

    def __init__(self, factor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(factor)))
        self.config = type("Config", (), {"in_channels": 4, "cross_attention_dim": 8})

    def forward(self, sample, timestep, encoder_hidden_states):
        return type("Output", (), {"sample": sample * self.weight})


@pytest.mark.parametrize(("factor", "expected"), [(1, False), (0.5, False), (-2, True)])
def test_a_velocity_predictor_is_known_by_its_answer_to_pure_noise(factor, expected):
    assert probe_v_prediction(Predictor(factor)) is expected


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}


@pytest.mark.parametrize(("family", "title"), [("sd1", "SD 1.x"), ("sd2", "SD 2.x"), ("sdxl", "SDXL")])
def test_the_family_is_told_by_names(tiny, family, title):
    assert recognise(shapes_of(tiny[family][0]), "file").title == title


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("first_stage_model.", "holds no VAE"),
        ("cond_stage_model.", "holds no text encoder"),
        ("model.diffusion_model.", "is no SD1, SD2 or SDXL checkpoint"),
    ],
)
def test_a_checkpoint_without_a_part_is_refused_with_the_parts_name(tiny, gone, said):
    shapes = {name: shape for name, shape in shapes_of(tiny["sd1"][0]).items() if not name.startswith(gone)}
    with pytest.raises(ModelError, match=said):
        recognise(shapes, "file")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, "is a LoRA"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "is a LoRA"),
        ({"control_model.input_blocks.0.0.weight": (4, 4)}, "ControlNet"),
        ({"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (4, 4)}, "SD3"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)}, "Flux"),
        ({"conditioner.embedders.0.model.ln_final.weight": (4,)}, "refiner"),
        ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "model_index.json"),
        ({"anything": (1,)}, "no SD1, SD2 or SDXL checkpoint"),
        ({}, "no SD1, SD2 or SDXL checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(names, said):
    with pytest.raises(ModelError, match=said):
        recognise(names, "file")


@pytest.mark.parametrize(("channels", "said"), [(9, "inpainting"), (8, "8 channels")])
def test_a_unet_for_another_input_is_refused_with_the_number(tiny, channels, said):
    shapes = shapes_of(tiny["sd1"][0]) | {"model.diffusion_model.input_blocks.0.0.weight": (4, channels, 3, 3)}
    with pytest.raises(ModelError, match=said):
        recognise(shapes, "file")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_missing_tensor_is_refused_before_a_picture_is_made(tiny, tokenizer, tmp_path, name):
    model, _ = tiny["sd1"]
    tensors = {key: tensor for key, tensor in model.tensors.items() if key != name}
    file = type(model)("sd1", model.parts, model.config, tensors).write(tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"m\.safetensors"):
        load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config)


def test_a_model_of_another_size_is_refused_with_the_configuration(tiny, tokenizer):
    _, file = tiny["sd1"]
    with pytest.raises(ModelError, match="configuration"):
        load_pipeline(file, "cpu", tokenizer=tokenizer)


def test_a_ckpt_is_read_without_running_what_is_in_it(tiny, tokenizer, tmp_path):
    model, _ = tiny["sd1"]
    torch.save({"state_dict": model.tensors, "global_step": 3}, tmp_path / "m.ckpt")
    loaded = load_pipeline(tmp_path / "m.ckpt", "cpu", tokenizer=tokenizer, config=model.config)
    for ours, theirs in zip(loaded.pipe.unet.parameters(), model.parts["unet"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.files == ()
    assert "convert-pickle" in " ".join(loaded.notes)


def test_a_ckpt_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "m.ckpt").write_bytes(pickle.dumps({"state_dict": Attack()}))
    with pytest.raises(PrefuseError):
        load_pipeline(tmp_path / "m.ckpt", "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return write_folder(tiny["sd1"][0], tmp_path_factory.mktemp("saved") / "my-model")


def test_a_diffusers_folder_loads_with_its_name_and_its_files(tiny, folder):
    loaded = load_pipeline(folder, "cpu")
    for ours, theirs in zip(loaded.pipe.unet.parameters(), tiny["sd1"][0].parts["unet"].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=SAME_WEIGHTS_TOLERANCE, rtol=0)
    assert loaded.name == "my-model"
    assert [file.parent.name for file in loaded.files] == ["unet", "text_encoder"]
    assert loaded.size == 64


def test_the_models_hash_is_the_webuis(tiny, tokenizer):
    model, file = tiny["sd1"]
    loaded = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config)
    assert loaded.short_hash == hashlib.sha256(file.read_bytes()).hexdigest()[:10]


def test_a_folder_with_half_precision_files_only_is_found(folder, tmp_path):
    half = shutil.copytree(folder, tmp_path / "half")
    for file in half.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert all(".fp16." in file.name for file in load_pipeline(half, "cpu").files)


def test_a_folder_with_pickles_only_is_refused(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    for file in old.glob("unet/*.safetensors"):
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(ModelError, match="can not be loaded"):
        load_pipeline(old, "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"unet": ["my_code", "Unet"]}, "unet with code of its own"),
        ({"_class_name": ["StableDiffusionPipeline"]}, "can not be read"),
    ],
)
def test_a_folder_that_asks_for_other_code_is_refused(folder, tmp_path, change, said):
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ModelError, match=said):
        load_pipeline(other, "cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_index_is_refused(folder, tmp_path, text):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model_index.json").write_text(text)
    with pytest.raises(ModelError):
        load_pipeline(other, "cpu")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load_pipeline(tmp_path, "cpu")


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ModelError, match="There is no model"):
        load_pipeline(tmp_path / "nothing", "cpu")


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ModelError, match="device"):
        load_pipeline(folder, "cuda:99")


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ModelError, match="fp8"):
        load_pipeline(folder, "cpu", "fp8")


def test_the_installed_vocabulary_gives_openais_ids():
    tokenizer = clip_tokenizer(None, "<|endoftext|>")
    assert tokenizer("a photo of a cat")["input_ids"] == CAT_IDS
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77


def test_the_second_encoder_of_sdxl_pads_with_zero():
    padded = clip_tokenizer(None, "!")("a photo of a cat", padding="max_length")["input_ids"]
    assert padded == [*CAT_IDS, *[0] * (77 - len(CAT_IDS))]


def test_the_vocabulary_has_bytes_merges_and_two_marks():
    tokens = vocabulary(read_merges(find_vocabulary()))
    assert len(tokens) == 49408
    assert (tokens["!"], tokens["!</w>"], tokens["<|startoftext|>"], tokens["<|endoftext|>"]) == (0, 256, 49406, 49407)


def test_every_byte_has_a_symbol_of_its_own():
    assert len(set(byte_symbols())) == 256
    assert all(symbol.isprintable() and symbol != " " for symbol in byte_symbols())


def test_without_a_vocabulary_the_message_says_what_to_give(monkeypatch):
    monkeypatch.setattr(vocabulary_module, "PACKAGES", ("no_such_package",))
    with pytest.raises(ModelError, match="--tokenizer"):
        clip_tokenizer(None, "!")


@pytest.mark.parametrize("lines", [["#version", "a b"], ["#version", *["three symbols here"] * MERGES]])
def test_another_gzip_file_is_no_vocabulary(tmp_path, lines):
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(ModelError, match="not CLIP's vocabulary"):
        read_merges(path)


def test_a_file_that_is_no_gzip_is_no_vocabulary(tmp_path):
    path = tmp_path / "vocabulary.txt.gz"
    path.write_text("text")
    with pytest.raises(ModelError, match="can not be read"):
        read_merges(path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no CLIP tokenizer"):
        clip_tokenizer(tmp_path, "!")
