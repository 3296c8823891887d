"""Every family and precision is trained: SDXL with its sizes and pooled text, SD2 with v, bf16, DyLoRA, one file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from tiny_pipelines import make_tiny, write_tokenizer
from train_runs import SIDE, load_tiny, options_for, run, same, tensors_of
from transformers import CLIPTokenizer

from lib_lora.__main__ import main
from lib_lora.errors import JobError, TrainError
from lib_lora.hosts.standalone import training
from lib_lora.hosts.standalone.demo import MODEL_DIR
from lib_lora.hosts.standalone.loading import load_pipeline
from lib_lora.train.model import TrainModel
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.newest

# Part of the length of a gradient.
ROUNDING = {"bf16": 0.05, "fp16": 0.01}


def tiny(family: str, folder: Path) -> TrainModel:
    """Of SD2 the one that predicts v."""
    parts = make_tiny(family, folder / "configs").parts
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"), model_max_length=77)
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False)
    if family == "sdxl":
        own = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "scheduler": scheduler, "add_watermarker": False}
        pipe = StableDiffusionXLPipeline(**parts, **own)
    else:
        own = {"tokenizer": tokenizer, "scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, **own, requires_safety_checker=False)
    return TrainModel(pipe, "tiny", folder, dict(scheduler.config))


def weights(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of every version of transformers."""
    return {name.removeprefix("text_model."): weight for name, weight in part.named_parameters()}


def sdxl(folder: Path) -> TrainModel:
    return tiny("sdxl", folder)


def test_sdxl_is_trained_with_both_text_encoders_and_the_sizes_of_pictures(pictures, tmp_path):
    model, seen = sdxl(tmp_path), []
    model.unet.register_forward_pre_hook(lambda *call: seen.append(call[2]["added_cond_kwargs"]), with_kwargs=True)
    outcome = train(model, options_for(pictures, tmp_path / "out", gradient_checkpointing=True, max_train_steps=2))
    tensors = tensors_of(outcome)
    for start in ("lora_te1_text_model", "lora_te2_text_model", "lora_unet_input_blocks", "lora_unet_output_blocks"):
        ups = [tensor for name, tensor in tensors.items() if name.startswith(start) and "lora_up" in name]
        assert any(up.any() for up in ups), start
    assert seen[0]["time_ids"].tolist() == [[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2
    assert seen[0]["text_embeds"].shape == (2, 8)
    with safe_open(outcome.paths[0], "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_tuned_unet_is_a_folder_and_a_checkpoint_of_the_same_model(pictures, tmp_path, family):
    model = tiny(family, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    outcome = train(model, options_for(pictures, tmp_path / "out", full=True, max_train_steps=1))
    folder, file = outcome.paths
    whole = load_pipeline(folder, "cpu", "fp32")
    prediction = "v" if family == "sd2" else "epsilon"
    given = {"tokenizer": tmp_path / "tokenizer", "config": folder, "prediction": prediction}
    single = load_pipeline(file, "cpu", "fp32", **given)
    assert whole.scheduler["prediction_type"].startswith(prediction)
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    parts = {name: part for name in names if (part := getattr(model.pipe, name, None)) is not None}
    assert len(parts) == (4 if family == "sdxl" else 3)
    for name, part in parts.items():
        for loaded in (whole.pipe, single.pipe):
            assert same(weights(part), weights(getattr(loaded, name))), name
    assert not same(before, model.unet.state_dict())
    with safe_open(file, "pt") as made:
        assert made.metadata()["modelspec.prediction_type"] == prediction


def test_training_without_accelerate_is_one_sentence(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(JobError, match="pip install accelerate"):
        run(model, pictures, tmp_path)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"clip_skip": 3}, "clip_skip 3 is no layer of tiny, whose text encoder has 2"),
        ({"max_timestep": 2000}, "max_timestep 2000 is above the 1000 times of tiny"),
        ({"full": True, "learning_rate": 0}, "leave nothing to train: they are 0"),
    ],
)
def test_what_the_model_has_not_is_one_sentence(model, pictures, tmp_path, given, sentence):
    with pytest.raises(JobError, match=sentence):
        run(model, pictures, tmp_path, **given)


def test_a_model_that_paints_within_masks_is_refused(model, pictures, tmp_path):
    inpainting = load_tiny(model)
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(JobError, match="tiny paints within masks: it reads 9 channels"):
        train(inpainting, options_for(pictures, tmp_path))


def test_a_text_encoder_with_rate_0_is_left_alone_and_its_captions_may_be_cached(model, pictures, tmp_path):
    outcome = run(model, pictures, tmp_path, text_encoder_lr=0, cache_text_encoder_outputs=True, network_dropout=0.5)
    ups = {name: tensor.any().item() for name, tensor in tensors_of(outcome).items() if "lora_up" in name}
    assert not any(moved for name, moved in ups.items() if name.startswith("lora_te"))
    assert any(moved for name, moved in ups.items() if name.startswith("lora_unet"))


def test_options_of_a_network_are_told_where_none_is_trained(model, pictures, tmp_path):
    (note,) = run(model, pictures, tmp_path, full=True, network_dim=8, conv_dim=4, max_train_steps=1).notes
    assert note.endswith("without effect are network_dim, conv_dim")


def test_clip_skip_is_refused_for_sdxl(pictures, tmp_path):
    model = sdxl(tmp_path)
    model.text_encoders[0].config.num_hidden_layers = 12
    with pytest.raises(JobError, match="clip_skip 3 is for SD1 and SD2"):
        train(model, options_for(pictures, tmp_path / "out", clip_skip=3))


def test_captions_of_a_text_encoder_that_is_trained_are_not_cached(model, pictures, tmp_path):
    with pytest.raises(JobError, match="network_train_unet_only"):
        run(model, pictures, tmp_path, cache_text_encoder_outputs=True)


@pytest.mark.parametrize(
    "given",
    [
        {"v_parameterization": True, "min_snr_gamma": 5, "zero_terminal_snr": True},
        {"max_token_length": 225, "clip_skip": 2, "gradient_checkpointing": True},
        {"network_module": "dylora", "network_dim": 4, "unit": 2},
        {"conv_dim": 2, "network_train_unet_only": True, "down_lr_weight": "sine", "scale_weight_norms": 1.0},
        {"network_train_text_encoder_only": True, "optimizer_type": "AdaFactor"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "cache_latents": True},
        {"full": True, "mixed_precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=lambda given: "-".join(given),
)
def test_options_go_together(model, pictures, tmp_path, given):
    outcome = run(model, pictures, tmp_path, **given)
    tensors = tensors_of(outcome)
    assert outcome.step == 3
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert given.get("full") or any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_are_those_in_float32_but_for_rounding(pictures, tmp_path, precision):
    """Of the embedded model: in one with random weights what is left of the gradient is mostly rounding."""
    step = {"optimizer_type": "SGD", "learning_rate": 1.0, "max_grad_norm": 0, "max_train_steps": 1}

    def change(name: str) -> torch.Tensor:
        loaded = load_pipeline("demo", "cpu", "fp32")
        model = TrainModel(loaded.pipe, "demo", MODEL_DIR, loaded.scheduler)
        options = options_for(pictures, tmp_path / name, mixed_precision=name, train_batch_size=6, **step)
        made = tensors_of(train(model, options))
        return torch.cat([made[key].flatten() for key in made if "lora_up" in key])  # which began as zeros

    exact, rounded = change("no"), change(precision)
    assert exact.norm() > 0
    assert (rounded - exact).norm() < ROUNDING[precision] * exact.norm()


def test_a_checkpoint_file_is_trained_from_the_command_line(pictures, tmp_path, monkeypatch):
    tiny = make_tiny("sd1", tmp_path / "configs")
    file = tiny.write(tmp_path / "tiny.safetensors")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    load = training.load_pipeline
    monkeypatch.setattr(training, "load_pipeline", lambda *args, **named: load(*args, **named, config=tiny.config))
    values = {
        "pretrained_model_name_or_path": file,
        "tokenizer": tokenizer,
        "train_data_dir": pictures,
        "resolution": SIDE,
        "output_dir": tmp_path / "out",
        "max_train_steps": 1,
        "device": "cpu",
    }
    assert main(["train", *(f"--{key}={value}" for key, value in values.items())]) == 0
    with safe_open(tmp_path / "out" / "last.safetensors", "pt") as made:
        assert made.metadata()["ss_sd_model_name"] == "tiny.safetensors"
        assert len(made.metadata()["ss_new_sd_model_hash"]) == 64


def test_a_resumed_model_that_is_another_is_refused(model, pictures, tmp_path):
    run(model, pictures, tmp_path, save_state_every_n_steps=1)
    other = load_tiny(model)
    with torch.no_grad():
        next(other.unet.parameters()).mul_(2)
    with pytest.raises(TrainError, match="model was"):
        train(other, options_for(pictures, tmp_path, resume=tmp_path / "made-state"))
