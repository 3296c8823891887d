"""Every wrong type or value of an option is one sentence: which option, what was given, what is allowed."""

from __future__ import annotations

import math

import pytest

from lib_lora.errors import JobError
from lib_lora.train.options import TrainOptions

WRONG = (
    ("network_dim", "x", "a whole number"),
    ("network_dim", True, "a whole number"),
    ("network_dim", -4, "at least 0"),
    ("network_dim", [4], "a whole number"),
    ("network_dim", 1e30, "a whole number"),
    ("network_alpha", "inf", "a number"),
    ("network_dropout", 1, "from 0 to below 1"),
    ("network_module", "lycoris.kohya", "networks.lora, networks.dylora"),
    ("network_args", 5, "texts"),
    ("network_args", ["conv_dmi=4"], "did you mean conv_dim?"),
    ("learning_rate", "1e-4x", "a number"),
    ("learning_rate", math.nan, "a number"),
    ("learning_rate", -1, "at least 0"),
    ("learning_rate", [1e-4], "a number"),
    ("learning_rate", {}, "a number"),
    ("unet_lr", False, "a number"),
    ("text_encoder_lr", ["a"], "a number"),
    ("resolution", "512x512", "whole numbers with commas between them"),
    ("resolution", [512, 512, 512], "512,768"),
    ("resolution", 7, "smallest side is 8"),
    ("resolution", 32, "smallest bucket, 64x64"),
    ("resolution", 512.5, "whole numbers"),
    ("min_bucket_reso", 0, "1 or more"),
    ("bucket_reso_steps", 7, "multiple of 8"),
    ("train_batch_size", "two", "a whole number"),
    ("train_batch_size", 1.5, "a whole number"),
    ("train_batch_size", 0, "1 or more"),
    ("max_train_steps", 0, "at least 1"),
    ("max_train_epochs", -1, "at least 1"),
    ("mixed_precision", "fp8", "no, fp16, bf16"),
    ("save_precision", "fp32", "float, fp16, bf16"),
    ("gradient_checkpointing", "maybe", "true or false"),
    ("gradient_checkpointing", 2, "true or false"),
    ("seed", 1.5, "a whole number"),
    ("seed", 2**70, "a whole number"),
    ("caption_dropout_rate", 1.5, "0 to 1"),
    ("caption_tag_dropout_rate", -0.5, "0 to 1"),
    ("keep_tokens", -1, "not be negative"),
    ("caption_separator", 5, "a text"),
    ("max_token_length", 77, "75, 150, 225"),
    ("clip_skip", -1, "at least 1"),
    ("min_snr_gamma", -1, "at least 0"),
    ("noise_offset", "much", "a number"),
    ("multires_noise_discount", -1, "at least 0"),
    ("loss_type", "mse", "l2, l1, huber, smooth_l1"),
    ("huber_c", 0, "above 0"),
    ("huber_schedule", "linear", "snr, exponential, constant"),
    ("optimizer_type", 5, "a text"),
    ("optimizer_args", 5, "texts"),
    ("lr_warmup_steps", -1, "at least 0"),
    ("lr_scheduler_num_cycles", 0, "at least 1"),
    ("lr_scheduler_min_lr_ratio", 2, "at most 1"),
    ("lr_scheduler_power", "x", "a number"),
    ("max_grad_norm", -1, "at least 0"),
    ("gradient_accumulation_steps", 0, "at least 1"),
    ("ema_decay", 1.5, "at most 1"),
    ("output_name", 5, "a text"),
    ("output_dir", [1], "a path"),
    ("train_data_dir", ["a", "b"], "a path"),
    ("prior_loss_weight", -1, "0 or more"),
    ("max_data_loader_n_workers", -1, "not be negative"),
    ("token_warmup_step", 0.5, "a number of batches"),
    ("down_lr_weight", "sinus", "sine, cosine"),
    ("block_dims", "a,b", "whole numbers"),
    ("scale_weight_norms", -1, "above 0"),
    ("unit", 0, "at least 1"),
    ("device", "cuda:1", "auto, cpu"),
    ("v_parameterization", "maybe", "true or false"),
    ("save_n_epoch_ratio", -1, "at least 1"),
)


def words(value: object) -> set[str]:
    """What of a wrong value a sentence may show."""
    numbers = {f"{value:g}"} if isinstance(value, (int, float)) else set[str]()
    inner = {repr(value[0]), str(value[0]).partition("=")[0]} if isinstance(value, list) else set[str]()
    return {repr(value), str(value)} | numbers | inner


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_is_one_sentence_with_the_option_the_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(JobError) as told:
        TrainOptions.of({name: value})
    sentence = str(told.value)
    assert name in sentence
    assert allowed in sentence
    assert any(word in sentence for word in words(value))
    assert "\n" not in sentence


def test_there_are_many_of_them():
    assert len(WRONG) > 50
