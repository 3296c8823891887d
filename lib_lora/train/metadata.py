"""The metadata of a trained LoRA: what kohya's trainer writes, under its keys.

Source: train_network.py of sd-scripts; the ModelSpec standard, https://github.com/Stability-AI/ModelSpec. All values
are Python's texts of them, None is ``None``, and what has parts is JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lib_lora import __version__
from lib_lora.core.files import CHUNK_BYTES
from lib_lora.tools.dylora import SCALE
from lib_lora.tools.metadata import LEGACY_LETTERS, LEGACY_WINDOW, base_model_facts, model_spec, network_facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from pathlib import Path

    from lib_lora.tools.metadata import Prediction
    from lib_lora.train.data.folders import Folder
    from lib_lora.train.data.report import DataReport
    from lib_lora.train.network import TrainNetwork

_OPTIONS = (
    *("output_name", "learning_rate", "text_encoder_lr", "unet_lr", "lr_scheduler", "lr_warmup_steps"),
    *("gradient_checkpointing", "gradient_accumulation_steps", "max_grad_norm", "mixed_precision", "seed"),
    *("network_dim", "network_alpha", "scale_weight_norms", "clip_skip", "max_token_length"),
    *("zero_terminal_snr", "min_snr_gamma", "prior_loss_weight", "training_comment"),
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "keep_tokens"),
    *("flip_aug", "random_crop", "shuffle_caption", "enable_bucket", "bucket_no_upscale"),
    *("min_bucket_reso", "max_bucket_reso", "multires_noise_iterations", "multires_noise_discount"),
    *("adaptive_noise_scale", "noise_offset_random_strength", "ip_noise_gamma", "ip_noise_gamma_random_strength"),
    *("loss_type", "huber_schedule", "huber_scale", "huber_c"),
)
"""Options that are written under their names, with ``ss_`` before them; what there is no option of is None."""
_NONE_IF_ZERO = ("network_dropout", "noise_offset")
"""The same of options that kohya leaves out in another way."""
_NEVER = ("full_fp16", "lowram", "color_aug", "fp8_base", "fp8_base_unet")
_NONE = (
    *("face_crop_aug_range", "resize_interpolation", "validation_seed", "max_validation_steps"),
    *("validate_every_n_epochs", "validate_every_n_steps"),
)
_UNUSED: Mapping[str, Any] = {
    **dict.fromkeys(_NEVER, False),
    **dict.fromkeys(_NONE),
    "num_validation_images": 0,
    "validation_split": 0.0,
}
"""What kohya's trainer writes of options that are not used, and that there are not here."""
_MINIMUM = tuple(
    f"ss_{name}"
    for name in ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
)
_SPEC = (
    *("author", "description", "license", "tags", "usage_hint", "trigger_phrase", "merged_from", "preprocessor"),
    "is_negative_embedding",
)


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What is known when a training begins.

    Attributes:
        options: Name → value of all options, under kohya's names (`TrainOptions`).
        data: The training set.
        tags: Folder → tag → how often (`tag_frequency`).
        model_name: File or folder of the base model, without the folders before it.
        model_hashes: See `model_hashes`; empty for a folder.
        prediction: What the UNet predicts.
        optimizer: Its class and settings: ``torch.optim.adamw.AdamW(weight_decay=0.1)``.
        batches_per_epoch: In all processes.
        total_batch_size: Pictures of one step of the optimizer.
        epochs: Planned.
        steps: Planned.
        session_id: A random number of this training.
        started_at: In seconds since 1970.
    """

    options: Mapping[str, Any]
    data: DataReport
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, "Mapping[str, int]"])
    model_name: str
    model_hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    prediction: Prediction
    optimizer: str
    batches_per_epoch: int
    total_batch_size: int
    epochs: int
    steps: int
    session_id: int
    started_at: float


@dataclass(frozen=True)
class Reached:
    """How far a training is when a file is saved.

    Attributes:
        step: Steps done.
        epoch: The epoch it is in, from 1.
        time: In seconds since 1970.
    """

    step: int
    epoch: int
    time: float


def training_metadata(
    network: TrainNetwork, facts: TrainingFacts, reached: Reached, *, minimum: bool = False, now: datetime | None = None
) -> dict[str, str]:
    """Texts for the header of the file, but for the hashes of its tensors, which `save_network` adds.

    Args:
        network: What is trained.
        facts: What is known of the training.
        reached: How far it is.
        minimum: kohya's ``--no_metadata``: what a file must say to be used, and nothing of the pictures.
        now: Local time to be written; None for the clock's.
    """
    told = _course(facts, reached) | {name: facts.options.get(name) for name in _OPTIONS}
    told |= {name: facts.options.get(name) or None for name in _NONE_IF_ZERO}
    told |= _data(facts) | dict(_UNUSED) | {"debiased_estimation": facts.options.get("debiased_estimation_loss")}
    texts = {f"ss_{name}": str(value) for name, value in told.items()}
    texts |= _network(network) | base_model_facts(network.family, facts.prediction)
    texts |= {"ss_sd_model_name": facts.model_name, **facts.model_hashes}
    if minimum:
        texts = {key: text for key, text in texts.items() if key in _MINIMUM}
    return texts | _spec(network, facts, now) | (SCALE if network.options.is_dylora else {})


def tag_frequency(folders: Iterable[Folder], separator: str = ",") -> dict[str, dict[str, int]]:
    """Folder → tag in small letters → in how many captions, as kohya counts."""
    return {
        folder.name: dict(
            Counter(
                tag.strip().lower() for entry in folder.entries for tag in entry.caption.split(separator) if tag.strip()
            )
        )
        for folder in folders
    }


def model_hashes(path: Path) -> dict[str, str]:
    """``ss_sd_model_hash`` and ``ss_new_sd_model_hash`` of a checkpoint file; nothing of a folder.

    Raises:
        OSError: If the file can not be read.
    """
    if not path.is_file():
        return {}
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
        first, last = LEGACY_WINDOW
        file.seek(first)
        window = hashlib.sha256(file.read(last - first))
    return {"ss_sd_model_hash": window.hexdigest()[:LEGACY_LETTERS], "ss_new_sd_model_hash": whole.hexdigest()}


def _course(facts: TrainingFacts, reached: Reached) -> dict[str, Any]:
    """Of the training as a whole."""
    return {
        "session_id": facts.session_id,
        "training_started_at": facts.started_at,
        "training_finished_at": reached.time,
        "steps": reached.step,
        "epoch": reached.epoch,
        "max_train_steps": facts.steps,
        "num_epochs": facts.epochs,
        "num_batches_per_epoch": facts.batches_per_epoch,
        "total_batch_size": facts.total_batch_size,
        "batch_size_per_device": facts.options.get("train_batch_size"),
        "optimizer": facts.optimizer,
        "sd_scripts_commit_hash": f"prefuse/{__version__}",
    }


def _data(facts: TrainingFacts) -> dict[str, Any]:
    """Of the pictures."""
    data, options = facts.data, facts.options
    folders: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for folder in data.folders:
        within = folders[folder.is_reg]
        within[_unused(folder.name, within)] = {"n_repeats": folder.repeats, "img_count": folder.pictures}
    buckets = {
        index: {"resolution": [bucket.size.width, bucket.size.height], "count": bucket.count}
        for index, bucket in enumerate(data.buckets)
    }
    return {
        "num_train_images": data.train_images,
        "num_reg_images": data.reg_images,
        "resolution": _size(options),
        "cache_latents": any(options.get(name) for name in ("cache_latents", "cache_latents_to_disk")),
        "dataset_dirs": json.dumps(folders[False]),
        "reg_dataset_dirs": json.dumps(folders[True]),
        "bucket_info": json.dumps({"buckets": buckets, "mean_img_ar_error": data.ratio_error}),
        "tag_frequency": json.dumps(facts.tags),
    }


def _network(network: TrainNetwork) -> dict[str, str]:
    """Of the layers: what the options say, or if they were taken from a file, what they have."""
    options = network.options
    arguments = options.given_arguments()
    texts = {"ss_network_module": f"networks.{'dylora' if options.is_dylora else 'lora'}"}
    if options.dim_from_weights:
        return network_facts(network.state_dict(), json.dumps(arguments)) | texts
    return texts | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def _spec(network: TrainNetwork, facts: TrainingFacts, now: datetime | None) -> dict[str, str]:
    options = facts.options
    title = str(options.get("metadata_title") or options.get("output_name") or "LoRA")
    spec = model_spec(network.family, title=title, is_lora=True, prediction=facts.prediction, now=now)
    width, height = _size(options)
    own = {f"modelspec.{name}": str(text) for name in _SPEC if (text := options.get(f"metadata_{name}"))}
    return spec | {"modelspec.resolution": f"{width}x{height}"} | own


def _size(options: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height in pixels."""
    resolution = options["resolution"]
    return resolution[0], resolution[-1]


def _unused(name: str, names: Iterable[str]) -> str:
    """`name`, or with a number behind it that makes it another than `names`."""
    numbered = name
    number = 2
    while numbered in names:
        numbered, number = f"{name} ({number})", number + 1
    return numbered
