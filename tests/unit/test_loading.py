"""Models from single files, without a network."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_pipelines import CLIP_PREFIXES, make_tiny, write_tokenizer

from lib_lora.core.single_file import CONFIGS, FAMILIES, recognise
from lib_lora.core.text_towers import tower_tensors
from lib_lora.errors import ModelError, PrefuseError
from lib_lora.hosts.standalone.checkpoints import load_single_file, probe_v_prediction
from lib_lora.hosts.standalone.libraries import transformers_class
from lib_lora.hosts.standalone.loading import load_pipeline

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

GOLDEN = Path(__file__).parents[1] / "golden/sd1"
FLOAT_TOLERANCE = 1e-5
SAME_WEIGHTS_TOLERANCE = 1e-6
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


def test_the_models_hash_is_the_webuis(tiny, tokenizer):
    model, file = tiny["sd1"]
    loaded = load_pipeline(file, "cpu", tokenizer=tokenizer, config=model.config)
    assert loaded.short_hash == hashlib.sha256(file.read_bytes()).hexdigest()[:10]
