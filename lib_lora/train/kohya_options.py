"""kohya's options that are none here: what stands for them, what they change, and which can not be had.

Source: the parsers of train_network.py and sdxl_train_network.py of sd-scripts, and what kohya's GUI writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

OFF = (None, "", False, 0, "false", "False", "0", "none", "None", [], ())
"""What leaves an option out."""

OFF_AT_ZERO = (
    *("min_snr_gamma", "v_pred_like_loss", "ip_noise_gamma", "multires_noise_iterations", "adaptive_noise_scale"),
    *("save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio", "save_last_n_epochs", "save_last_n_steps"),
    *("sample_every_n_epochs", "sample_every_n_steps", "max_train_epochs", "max_timestep", "clip_skip"),
    *("scale_weight_norms", "vae_batch_size", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio"),
)
"""Options that are as if not given if they are 0."""

RENAMED = {"caption_extention": "caption_extension"}

STAND_FOR: Mapping[str, tuple[str, Any]] = {
    "use_8bit_adam": ("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": ("optimizer_type", "Lion"),
    "save_state": ("save_state_on_train_end", True),
}
"""Switch → the option and its value that it stands for."""

SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "k_euler": "Euler",
    "euler_a": "Euler a",
    "k_euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "k_dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "k_dpm_2_a": "DPM2 a",
    "dpmsolver": "DPM++ 2M",
    "dpmsolver++": "DPM++ 2M",
    "dpmsingle": "DPM++ SDE",
    "lms": "Euler",
    "k_lms": "Euler",
}
"""kohya's names of samplers → the WebUI's; those that are not here → the nearest."""

DEFAULTS: Mapping[str, Any] = {
    "dynamo_backend": "inductor",
    "initial_epoch": 1,
    "log_with": "tensorboard",
    "resize_interpolation": "lanczos",
    "save_model_as": "safetensors",
    "token_warmup_min": 1,
    "zero_stage": 2,
}
"""What kohya's option is when it is not given, or what is done here in any case, where that is not one of `OFF`."""

NO_EFFECT: Mapping[str, tuple[str, ...]] = {
    "attention is torch's own (SDPA) in any case": ("xformers", "sdpa", "mem_eff_attn"),
    "the model stays where it is needed": ("lowram", "highvram", "cpu_offload_checkpointing", "blocks_to_swap"),
    "the layers are not compiled for a training": ("torch_compile",),
    "gradients of all layers are kept for a step": ("fused_backward_pass",),
    "what is trained is always float32": ("full_fp16", "full_bf16"),
    "the log is TensorBoard's": ("log_with",),
    "save_last_n_states says how many states are kept": ("save_last_n_epochs_state", "save_last_n_steps_state"),
    "sd-scripts do not know it when they train a network": ("stop_text_encoder_training",),
    "": (
        *("config_file", "v2", "tokenizer_cache_dir", "no_half_vae", "disable_mmap_load_safetensors"),
        *("dynamo_backend", "ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"),
        *("persistent_data_loader_workers", "cache_info", "skip_cache_check", "text_encoder_batch_size"),
        *("log_prefix", "log_tracker_name", "log_tracker_config", "log_config", "wandb_run_name", "wandb_api_key"),
        *("console_log_level", "console_log_file", "console_log_simple"),
        *("zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device"),
        *("offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model"),
        "fp16_master_weights_and_gradients",
        *("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token", "huggingface_repo_visibility"),
        "async_upload",
        *("validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
        *("use_safetensors", "custom_attributes", "base_weights_multiplier", "skip_until_initial_step"),
        *("epoch", "noise_offset_type"),
    ),
}
"""Why it changes nothing here → options. Nothing is said of those without a reason: they serve others that are
refused, or say what is found out here."""

_HUB = "nothing is sent anywhere; copy the files of output_dir yourself"
_GO_ON = "a training goes on where it was with resume, the folder of its states"
REFUSED: Mapping[str, tuple[str, ...]] = {
    "no masks are read; leave out pictures, or parts of them, that should not be learned": (
        *("masked_loss", "alpha_mask", "conditioning_data_dir"),
    ),
    "pictures are mirrored (flip_aug) and cropped (random_crop), and not changed otherwise": (
        *("color_aug", "face_crop_aug_range"),
    ),
    "pictures are scaled with lanczos": ("resize_interpolation",),
    "the base is kept in fp16 or bf16 (mixed_precision); with gradient_checkpointing it takes least": (
        *("fp8_base", "fp8_base_unet"),
    ),
    "several cards are used with accelerate launch; 8-bit optimizers take less memory": ("deepspeed",),
    "no part of the pictures is kept for a validation; sample_prompts shows how far the training is": (
        "validation_split",
    ),
    "files are written as .safetensors": ("save_model_as",),
    "captions are read as they stand, as most tools do": ("weighted_captions",),
    "the header of the file has no room for pictures": ("metadata_thumbnail",),
    "a file of its own is read from dataset_config, with [general] and [[datasets]]": ("datasets",),
    _HUB: ("huggingface_repo_id", "save_state_to_huggingface", "resume_from_huggingface"),
    _GO_ON: ("initial_step", "initial_epoch"),
    "`train --options` lists what there is, and a TOML file of yours is not changed": ("output_config",),
    "the pictures that would be used are told on the Train page, by Look at the pictures": ("debug_dataset",),
    "folders, lists and dataset_config are read; data sets in Python are not": ("dataset_class",),
    "the base is trained on as it is; `python -m lib_lora merge` makes one with LoRAs in it": ("base_weights",),
    "inpainting models are not trained here": ("train_inpainting",),
    "SD1, SD2 and SDXL are trained here; that is an option of other models": (
        *("ae", "clip_g", "clip_l", "t5xxl", "gemma2", "qwen3", "byt5", "text_encoder", "model_type"),
        *("weighting_scheme", "timestep_sampling", "discrete_flow_shift", "model_prediction_type", "guidance_scale"),
        *("single_blocks_to_swap", "double_blocks_to_swap", "split_mode", "apply_t5_attn_mask", "sigmoid_scale"),
    ),
}
"""Why it can not be had, with the nearest that is there → options."""

_WHY_NOTHING = {name: reason for reason, names in NO_EFFECT.items() for name in names}
_WHY_REFUSED = {name: reason for reason, names in REFUSED.items() for name in names}
NAMES = frozenset({*_WHY_NOTHING, *_WHY_REFUSED, *RENAMED, *STAND_FOR})
"""Names of kohya's that are no options here, and are understood."""


def understood(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options as they are here, and sentences on those that change nothing.

    What is empty is as if not given.

    Raises:
        JobError: If one of kohya's is on and can not be had.
    """
    values = {RENAMED.get(key, key): value for key, value in given.items() if not _is_left_out(key, value)}
    for key, reason in _WHY_REFUSED.items():
        if key in values and not _is_off(key, values[key]):
            raise JobError(f"{key} can not be had here: {reason}; leave {key} out")
    ignored = {key: value for key, value in values.items() if key in _WHY_NOTHING and not _is_off(key, value)}
    notes = tuple(_notes(ignored))
    meant = [STAND_FOR[key] for key, value in values.items() if key in STAND_FOR and not _is_off(key, value)]
    values = {key: value for key, value in values.items() if key not in NAMES} | dict(meant)
    if isinstance(sampler := values.get("sample_sampler"), str):
        values["sample_sampler"] = SAMPLERS.get(sampler.lower(), sampler)
    return values, (*notes, *_first_rate(values))


def _is_left_out(key: str, value: Any) -> bool:
    nothing = value is None or value == ""
    return nothing or (key in OFF_AT_ZERO and value is not False and value in (0, "0", "0.0"))


def _is_off(key: str, value: Any) -> bool:
    return value in OFF or str(value) == str(DEFAULTS.get(key))


def _notes(ignored: Mapping[str, Any]) -> Iterator[str]:
    for reason, names in NO_EFFECT.items():
        if reason and (found := [name for name in names if name in ignored]):
            yield f"{' and '.join(found)} change{'s' * (len(found) == 1)} nothing here: {reason}"


def _first_rate(values: dict[str, Any]) -> Iterator[str]:
    """Of kohya's rates of several text encoders the first counts, as in networks.lora; the others are told of."""
    rates = values.get("text_encoder_lr")
    if not isinstance(rates, (list, tuple)):
        return
    if not rates:
        del values["text_encoder_lr"]
        return
    values["text_encoder_lr"] = rates[0]
    if any(rate != rates[0] for rate in rates):
        yield f"all text encoders have the first text_encoder_lr, {rates[0]}, as with kohya's networks.lora"
