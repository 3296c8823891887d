"""A configuration of kohya's scripts, or of the GUI over them, is taken as it is; what can not be had is a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_lora.errors import JobError
from lib_lora.train.encoders import Encoders
from lib_lora.train.kohya_options import NAMES, NO_EFFECT, REFUSED
from lib_lora.train.option_values import read_toml
from lib_lora.train.options import TrainOptions

_SWITCHES = """
alpha_mask async_upload bucket_no_upscale cache_info cache_latents cache_latents_to_disk cache_text_encoder_outputs
cache_text_encoder_outputs_to_disk color_aug console_log_simple cpu_offload_checkpointing ddp_gradient_as_bucket_view
ddp_static_graph debiased_estimation_loss debug_dataset deepspeed dim_from_weights disable_mmap_load_safetensors
enable_bucket enable_wildcard flip_aug fp16_master_weights_and_gradients fp8_base fp8_base_unet full_bf16 full_fp16
fused_backward_pass gradient_checkpointing highvram ip_noise_gamma_random_strength log_config lowram masked_loss
mem_eff_attn network_train_text_encoder_only network_train_unet_only no_half_vae no_metadata
noise_offset_random_strength output_config persistent_data_loader_workers random_crop resume_from_huggingface
sample_at_first save_state save_state_on_train_end save_state_to_huggingface scale_v_pred_loss_like_noise_pred sdpa
shuffle_caption skip_cache_check skip_until_initial_step torch_compile use_8bit_adam use_lion_optimizer v2
v_parameterization weighted_captions xformers zero3_init_flag zero3_save_16bit_model zero_terminal_snr
"""
"""Of train_network.py and sdxl_train_network.py; off if not given."""

_NOTHING = """
adaptive_noise_scale base_weights base_weights_multiplier caption_extention caption_prefix caption_suffix clip_skip
conditioning_data_dir config_file console_log_file console_log_level dataset_class dataset_config ddp_timeout
face_crop_aug_range huggingface_path_in_repo huggingface_repo_id huggingface_repo_type huggingface_repo_visibility
huggingface_token in_json initial_epoch initial_step ip_noise_gamma log_prefix log_tracker_config log_tracker_name
log_with logging_dir lr_scheduler_args lr_scheduler_min_lr_ratio lr_scheduler_timescale max_timestep max_token_length
max_train_epochs max_validation_steps metadata_author metadata_description metadata_is_negative_embedding
metadata_license metadata_merged_from metadata_preprocessor metadata_tags metadata_thumbnail metadata_title
metadata_trigger_phrase metadata_usage_hint min_snr_gamma min_timestep multires_noise_iterations network_args
network_dim network_dropout network_module network_weights noise_offset offload_optimizer_device
offload_optimizer_nvme_path offload_param_device offload_param_nvme_path optimizer_args output_dir output_name
pretrained_model_name_or_path reg_data_dir resize_interpolation resolution resume sample_every_n_epochs
sample_every_n_steps sample_prompts save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state
save_last_n_steps save_last_n_steps_state save_n_epoch_ratio save_precision scale_weight_norms secondary_separator seed
text_encoder_lr tokenizer_cache_dir train_data_dir training_comment unet_lr v_pred_like_loss vae
validate_every_n_epochs validate_every_n_steps validation_seed wandb_api_key wandb_run_name
"""
"""Nothing if not given."""

DEFAULTS = {
    "base_weights_multiplier": [],
    "bucket_reso_steps": 64,
    "caption_dropout_every_n_epochs": 0,
    "caption_dropout_rate": 0.0,
    "caption_extension": ".caption",
    "caption_separator": ",",
    "caption_tag_dropout_rate": 0.0,
    "dataset_repeats": 1,
    "dynamo_backend": "inductor",
    "gradient_accumulation_steps": 1,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "keep_tokens": 0,
    "keep_tokens_separator": "",
    "learning_rate": 2e-6,
    "loss_type": "l2",
    "lr_decay_steps": 0,
    "lr_scheduler": "constant",
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1,
    "lr_scheduler_type": "",
    "lr_warmup_steps": 0,
    "max_bucket_reso": 1024,
    "max_data_loader_n_workers": 8,
    "max_grad_norm": 1.0,
    "max_train_steps": 1600,
    "min_bucket_reso": 256,
    "mixed_precision": "no",
    "multires_noise_discount": 0.3,
    "network_alpha": 1,
    "optimizer_type": "",
    "prior_loss_weight": 1.0,
    "sample_sampler": "ddim",
    "save_model_as": "safetensors",
    "token_warmup_min": 1,
    "token_warmup_step": 0,
    "train_batch_size": 1,
    "vae_batch_size": 1,
    "validation_split": 0.0,
    "zero_stage": 2,
}

ALL = {**dict.fromkeys(_SWITCHES.split(), False), **dict.fromkeys(_NOTHING.split()), **DEFAULTS}

GUI = """
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_dropout_every_n_epochs = 0
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 10
gradient_accumulation_steps = 1
gradient_checkpointing = true
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
keep_tokens = 0
learning_rate = 0.0001
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 160
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = 1600
min_bucket_reso = 256
mixed_precision = "bf16"
network_alpha = 16
network_args = [ "conv_dim=8", "conv_alpha=4", "rank_dropout=0", "module_dropout=0",]
network_dim = 32
network_module = "networks.lora"
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "/somewhere/out"
output_name = "last"
persistent_data_loader_workers = 1
pretrained_model_name_or_path = "/somewhere/model.safetensors"
prior_loss_weight = 1
resolution = "512,512"
sample_prompts = "/somewhere/out/sample/prompt.txt"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_last_n_steps_state = 2
save_model_as = "safetensors"
save_precision = "fp16"
text_encoder_lr = [ 5e-5, 5e-5,]
train_batch_size = 2
train_data_dir = "/somewhere/img"
unet_lr = 0.0001
wandb_run_name = "last"
xformers = true
"""
"""As kohya's GUI writes it with its own defaults for a LoRA, its numbers and lists included."""


def test_every_option_of_kohyas_is_known_with_its_default():
    options = TrainOptions.of(ALL)
    assert options.notes == ()
    assert options.data.caption_extensions == (".caption",)
    assert options.output.sample_sampler == "DDIM"
    assert options.optimizer.optimizer_type == "AdamW"
    assert options.run.max_train_steps == 1600


@pytest.mark.parametrize("name", ALL)
def test_each_alone_is_known_too(name):
    if name != "sample_at_first":
        TrainOptions.of({name: ALL[name]})


def test_no_option_is_both_ours_and_one_that_is_only_understood():
    ours = {key for key, _, _ in TrainOptions.table()}
    assert not ours & NAMES
    assert not {name for names in NO_EFFECT.values() for name in names} & {
        name for names in REFUSED.values() for name in names
    }


def test_a_file_of_the_gui_is_taken_as_it_is(tmp_path):
    file = tmp_path / "config_lora.toml"
    file.write_text(GUI)
    options = TrainOptions.of(read_toml(file))
    assert options.network.conv_dim == 8
    assert options.optimizer.text_encoder_lr == 5e-5
    assert options.output.sample_sampler == "Euler a"
    assert options.notes == (
        "xformers changes nothing here: attention is torch's own (SDPA) in any case",
        "save_last_n_steps_state changes nothing here: save_last_n_states says how many states are kept",
    )


@pytest.mark.parametrize("name", [name for names in REFUSED.values() for name in names])
def test_what_can_not_be_had_is_refused_with_what_there_is_instead(name):
    with pytest.raises(JobError, match=rf"^{name} can not be had here: .*; leave {name} out$"):
        TrainOptions.of({name: 7})


@pytest.mark.parametrize("name", [name for names in NO_EFFECT.values() for name in names])
def test_what_changes_nothing_is_taken_and_told_if_somebody_may_count_on_it(name):
    notes = TrainOptions.of({name: True}).notes
    silent = name in NO_EFFECT[""]
    assert [f"{name} changes nothing here: " in note for note in notes] == [] if silent else [True]


def test_a_secret_is_in_no_note_and_no_record():
    options = TrainOptions.of({"wandb_api_key": "s3cret", "huggingface_token": "s3cret", "log_with": "wandb"})
    assert "s3cret" not in repr(options)


def test_switches_of_older_scripts_stand_for_what_they_meant():
    assert TrainOptions.of({"use_8bit_adam": True}).optimizer.optimizer_type == "AdamW8bit"
    assert TrainOptions.of({"use_8bit_adam": False}).optimizer.optimizer_type == "AdamW"
    assert TrainOptions.of({"caption_extention": ".cap"}).data.caption_extensions == (".cap",)
    assert TrainOptions.of({"save_state": "true"}).output.save_state_on_train_end


@pytest.mark.parametrize("name", ["min_snr_gamma", "save_every_n_epochs", "sample_every_n_steps", "max_train_epochs"])
@pytest.mark.parametrize("zero", [0, 0.0, "0"])
def test_zero_leaves_out_what_could_not_be_zero(name, zero):
    assert TrainOptions.of({name: zero}) == TrainOptions()


def test_of_rates_of_several_text_encoders_the_first_counts():
    options = TrainOptions.of({"text_encoder_lr": [1e-5, 2e-5]})
    assert options.optimizer.text_encoder_lr == 1e-5
    assert "first text_encoder_lr, 1e-05" in options.notes[0]
    assert TrainOptions.of({"text_encoder_lr": []}).optimizer.text_encoder_lr is None


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_for_sdxl_the_gui_writes_a_clip_skip_that_means_nothing(layer):
    encode_with(layer)
    with pytest.raises(JobError, match="clip_skip 3 is for SD1 and SD2; SDXL reads the last layer but one"):
        encode_with(3)


def encode_with(clip_skip: int | None) -> None:
    vae: Any = torch.nn.Linear(1, 1)
    vae.config, vae.dtype = SimpleNamespace(scaling_factor=1.0), torch.float32
    model: Any = SimpleNamespace(is_sdxl=True, vae=vae, text_encoders=())
    Encoders(model, TrainOptions.of({"clip_skip": clip_skip}), torch.device("cpu"), trains_text=False)
