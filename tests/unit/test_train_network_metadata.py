"""What a trained file says: the keys and the ways of writing of kohya's trainer."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime

import pytest

from lib_lora.core.files import read_lora_file
from lib_lora.core.models import BaseModel
from lib_lora.tools.dylora import SCALE
from lib_lora.tools.training import TrainingFolder, read_training
from lib_lora.train.create_network import create_network
from lib_lora.train.data.buckets import Size
from lib_lora.train.data.folders import Entry, Folder
from lib_lora.train.data.report import BucketReport, DataReport, FolderReport
from lib_lora.train.metadata import Reached, TrainingFacts, model_hashes, tag_frequency, training_metadata
from lib_lora.train.network_file import network_tensors, save_network
from lib_lora.train.options import TrainOptions
from tests.toys import sd1_unet, sdxl_unet, text_encoder

KOHYA = """
session_id training_started_at training_finished_at output_name learning_rate text_encoder_lr unet_lr num_train_images
num_validation_images num_reg_images num_batches_per_epoch num_epochs gradient_checkpointing max_train_steps steps epoch
gradient_accumulation_steps lr_warmup_steps lr_scheduler network_module network_dim network_alpha network_dropout
network_args mixed_precision full_fp16 v2 base_model_version clip_skip max_token_length cache_latents seed lowram
noise_offset multires_noise_iterations multires_noise_discount adaptive_noise_scale zero_terminal_snr training_comment
sd_scripts_commit_hash optimizer max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs
caption_tag_dropout_rate face_crop_aug_range prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma
debiased_estimation noise_offset_random_strength ip_noise_gamma_random_strength loss_type huber_schedule huber_scale
huber_c fp8_base fp8_base_unet validation_seed validation_split max_validation_steps validate_every_n_epochs
validate_every_n_steps resize_interpolation batch_size_per_device total_batch_size resolution color_aug flip_aug
random_crop shuffle_caption enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens dataset_dirs
reg_dataset_dirs tag_frequency bucket_info sd_model_hash new_sd_model_hash sd_model_name
"""
"""Of train_network.py with folders of pictures, a checkpoint file and network_args, each with ss_ before it."""
SPEC = "architecture date implementation implementation_version prediction_type resolution sai_model_spec title"
MINIMUM = "v2 base_model_version network_module network_dim network_alpha network_args"
HASHES = {"sshs_model_hash", "sshs_legacy_hash"}
ALL = 94
"""Keys of a whole file."""

NOW = datetime(2026, 1, 2, 3, 4, 5)
DATA = DataReport(
    folders=(
        FolderReport("10_cat", 20, 10, False, "cat", 0, 0),
        FolderReport("10_cat", 3, 10, False, "cat", 0, 0),
        FolderReport("1_reg", 300, 1, True, "cat", 300, 0),
    ),
    buckets=(BucketReport(Size(448, 576), 200), BucketReport(Size(512, 512), 30)),
    train_images=230,
    reg_images=300,
    ratio_error=0.02,
    skipped=(),
    notes=(),
)
VALUES = {
    "output_name": "cats",
    "learning_rate": 2e-4,
    "network_args": ["conv_dim=2", "conv_alpha=1"],
    "network_dropout": 0.1,
    "resolution": "512,640",
    "train_batch_size": 2,
    "cache_latents_to_disk": True,
    "min_snr_gamma": 5,
    "seed": 7,
}


def spaced(text: str, prefix: str) -> set[str]:
    return {f"{prefix}{name}" for name in text.split()}


def facts(**changes) -> TrainingFacts:
    known = {
        "options": TrainOptions.of(VALUES).values(),
        "data": DATA,
        "tags": {"10_cat": {"cat": 20}},
        "model_name": "v1-5.safetensors",
        "model_hashes": {"ss_sd_model_hash": "e3b0c442", "ss_new_sd_model_hash": "0" * 64},
        "prediction": "epsilon",
        "optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "batches_per_epoch": 265,
        "total_batch_size": 2,
        "epochs": 4,
        "steps": 1000,
        "session_id": 42,
        "started_at": 1767323045.5,
    }
    return TrainingFacts(**known | changes)


@pytest.fixture(scope="module")
def network():
    return create_network(sd1_unet(), [text_encoder(layers=1)], TrainOptions.of(VALUES).network)


def told(network, **options) -> dict[str, str]:
    return training_metadata(network, facts(), Reached(500, 2, 1767323999.5), now=NOW, **options)


def test_a_file_has_the_94_keys_of_kohyas(network, tmp_path):
    path = tmp_path / "cats.safetensors"
    save_network(path, network_tensors(network), told(network))
    keys = set(read_lora_file(path).metadata)
    assert keys == spaced(KOHYA, "ss_") | spaced(SPEC, "modelspec.") | HASHES
    assert len(keys) == ALL


def test_values_are_written_as_kohya_writes_them(network):
    metadata = told(network)
    expected = {
        "ss_learning_rate": "0.0002",
        "ss_unet_lr": "None",
        "ss_noise_offset": "None",
        "ss_network_dropout": "0.1",
        "ss_gradient_checkpointing": "False",
        "ss_cache_latents": "True",
        "ss_resolution": "(512, 640)",
        "ss_mixed_precision": "no",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "1.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1.0"}',
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_clip_skip": "None",
        "ss_min_snr_gamma": "5.0",
        "ss_batch_size_per_device": "2",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_steps": "500",
        "ss_max_train_steps": "1000",
        "ss_epoch": "2",
        "ss_training_finished_at": "1767323999.5",
        "modelspec.title": "cats",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.resolution": "512x640",
        "modelspec.date": "2026-01-02T03:04:05",
        "modelspec.prediction_type": "epsilon",
        "modelspec.sai_model_spec": "1.0.1",
    }
    assert {key: metadata[key] for key in expected} == expected


def test_losses_noise_and_words_of_the_user_are_told_under_kohyas_names(network):
    given = {
        "loss_type": "huber",
        "debiased_estimation_loss": True,
        "multires_noise_iterations": 6,
        "ip_noise_gamma": 0.1,
        "metadata_trigger_phrase": "a cat",
        "metadata_usage_hint": "at 0.8",
    }
    known = facts(options=TrainOptions.of(VALUES | given).values())
    metadata = training_metadata(network, known, Reached(500, 2, 1767323999.5), now=NOW)
    expected = {
        "ss_loss_type": "huber",
        "ss_huber_schedule": "snr",
        "ss_debiased_estimation": "True",
        "ss_multires_noise_iterations": "6",
        "ss_multires_noise_discount": "0.3",
        "ss_ip_noise_gamma": "0.1",
        "ss_adaptive_noise_scale": "None",
        "modelspec.trigger_phrase": "a cat",
        "modelspec.usage_hint": "at 0.8",
    }
    assert {key: metadata[key] for key in expected} == expected


def test_pictures_are_told_by_folder_and_bucket(network):
    metadata = told(network)
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "10_cat": {"n_repeats": 10, "img_count": 20},
        "10_cat (2)": {"n_repeats": 10, "img_count": 3},
    }
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_reg": {"n_repeats": 1, "img_count": 300}}
    assert json.loads(metadata["ss_bucket_info"]) == {
        "buckets": {"0": {"resolution": [448, 576], "count": 200}, "1": {"resolution": [512, 512], "count": 30}},
        "mean_img_ar_error": 0.02,
    }
    assert (metadata["ss_num_train_images"], metadata["ss_num_reg_images"]) == ("230", "300")


def test_what_the_trainer_writes_the_page_reads(network):
    training = read_training(told(network))
    assert training.folders == (TrainingFolder("10_cat", 20, 10), TrainingFolder("10_cat (2)", 3, 10))
    assert training.tags == {"cat": 20}
    assert (training.facts["title"], training.facts["steps"], training.facts["rank"]) == ("cats", "500", "4")
    assert training.facts["base_model"] == "v1-5.safetensors"
    assert BaseModel.of_file({}, told(network)) is BaseModel.SD1


def test_without_metadata_only_what_a_loader_needs_is_told(network):
    assert told(network, minimum=True).keys() == spaced(MINIMUM, "ss_") | spaced(SPEC, "modelspec.")


def test_other_families_and_dylora_are_named():
    options = TrainOptions.of({"network_module": "dylora", "unit": 2}).network
    encoders = [text_encoder(layers=1), text_encoder(layers=1)]
    metadata = told(create_network(sdxl_unet(), encoders, options))
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_network_module"] == "networks.dylora"
    assert metadata["ss_network_args"] == '{"unit": "2"}'
    assert SCALE.items() <= metadata.items()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_ranks_that_a_file_gave_are_told_and_not_the_options(network, tmp_path):
    path = tmp_path / "a.safetensors"
    save_network(path, network_tensors(network), {})
    options = TrainOptions.of({"network_weights": path, "dim_from_weights": True, "network_dim": 99}).network
    metadata = told(create_network(sd1_unet(), [text_encoder(layers=1)], options))
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "1.0")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1.0"}


def test_titles_and_authors_are_taken_over(network):
    options = dict(facts().options) | {"metadata_title": "My cats", "metadata_author": "me", "training_comment": "v2"}
    metadata = training_metadata(network, facts(options=options), Reached(1, 1, 0.0))
    assert (metadata["modelspec.title"], metadata["modelspec.author"]) == ("My cats", "me")
    assert metadata["ss_training_comment"] == "v2"


def test_tags_are_counted_by_folder_in_small_letters(tmp_path):
    entries = [Entry(tmp_path / "a.png", text, text) for text in ("Cat, sitting", "cat,, dog ", "", "cat")]
    assert tag_frequency([Folder("3_cat", tuple(entries))]) == {"3_cat": {"cat": 3, "sitting": 1, "dog": 1}}


def test_hashes_of_a_model_are_those_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 4608  # 1.125 MiB
    (tmp_path / "model.safetensors").write_bytes(data)
    assert model_hashes(tmp_path / "model.safetensors") == {
        "ss_sd_model_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(data).hexdigest(),
    }
    assert model_hashes(tmp_path) == {}
