"""What a LoRA's metadata tells of its training, whatever else is written there.

Source: kohya's ``ss_*`` (sd-scripts, train_network.py) and the ModelSpec standard, https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MOST_LETTERS = 500
"""Of one fact."""
MOST_COUNT = 10**9
"""A larger number of pictures is none."""

_FACTS = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "trigger": ("modelspec.trigger_phrase",),
    "usage": ("modelspec.usage_hint",),
    "description": ("modelspec.description",),
    "license": ("modelspec.license",),
    "base_model": ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
    "base_model_version": ("ss_base_model_version",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "clip_skip": ("ss_clip_skip",),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "pictures": ("ss_num_train_images",),
    "batch_size": ("ss_total_batch_size", "ss_batch_size_per_device"),
    "learning_rate": ("ss_learning_rate",),
    "unet_lr": ("ss_unet_lr",),
    "text_encoder_lr": ("ss_text_encoder_lr",),
    "scheduler": ("ss_lr_scheduler",),
    "optimizer": ("ss_optimizer",),
    "network": ("ss_network_module",),
    "rank": ("ss_network_dim",),
    "alpha": ("ss_network_alpha",),
    "network_args": ("ss_network_args",),
    "noise_offset": ("ss_noise_offset",),
    "min_snr_gamma": ("ss_min_snr_gamma",),
    "precision": ("ss_mixed_precision",),
    "seed": ("ss_seed",),
    "comment": ("ss_training_comment",),
}
"""Fact → the keys that tell it; the first that says something counts."""
_TIME = "ss_training_finished_at"
_NOTHING = frozenset({"", "None", "null", "{}", "[]"})


@dataclass(frozen=True)
class TrainingFolder:
    """Pictures of one folder.

    Attributes:
        name: Of the folder.
        pictures: How many, or None.
        repeats: How often each was used in an epoch, or None.
    """

    name: str
    pictures: int | None
    repeats: int | None


@dataclass(frozen=True)
class Training:
    """What is told of a training; empty where nothing is.

    Attributes:
        facts: Such as ``resolution`` → what the trainer wrote, long texts cut.
        folders: Where the pictures came from.
        tags: Tag → in how many captions, over all folders, the most first.
    """

    facts: Mapping[str, str]
    folders: tuple[TrainingFolder, ...]
    tags: Mapping[str, int]


def read_training(metadata: Mapping[str, str]) -> Training:
    """Read what can be read.

    Args:
        metadata: The header's texts, of any content.
    """
    facts = {name: text for name, keys in _FACTS.items() if (text := _first(metadata, keys))}
    if finished := _time(metadata.get(_TIME, "")):
        facts["finished"] = finished
    datasets = [_object(dataset) for dataset in _items(_json(metadata, "ss_datasets"))]
    folders = _folders(_object(_json(metadata, "ss_dataset_dirs"))) or tuple(_subsets(datasets))
    tags = _tags(_json(metadata, "ss_tag_frequency"))
    for dataset in [] if tags else datasets:
        tags.update(_tags(dataset.get("tag_frequency")))
    return Training(facts, folders, dict(tags.most_common()))


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str:
    """A text that says something, or nothing."""
    texts = (metadata.get(key, "").strip() for key in keys)
    text = next((text for text in texts if text not in _NOTHING), "")
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"


def _time(seconds: str) -> str:
    """A day, from seconds since 1970."""
    try:
        return datetime.fromtimestamp(float(seconds), timezone.utc).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return ""


def _folders(folders: Mapping[str, Any]) -> tuple[TrainingFolder, ...]:
    """Of ``ss_dataset_dirs``."""
    told = ((name, _object(value)) for name, value in folders.items())
    return tuple(TrainingFolder(name, _count(of.get("img_count")), _count(of.get("n_repeats"))) for name, of in told)


def _subsets(datasets: list[dict[str, Any]]) -> Iterator[TrainingFolder]:
    """Of ``ss_datasets``."""
    for dataset in datasets:
        for subset in map(_object, _items(dataset.get("subsets"))):
            name = subset.get("image_dir") or subset.get("metadata_file")
            if isinstance(name, str):
                yield TrainingFolder(name, _count(subset.get("img_count")), _count(subset.get("num_repeats")))


def _tags(frequencies: Any) -> Counter[str]:
    """Counts of all folders together."""
    counts: Counter[str] = Counter()
    for tags in _object(frequencies).values():
        for tag, value in _object(tags).items():
            if (count := _count(value)) and tag.strip():
                counts[tag.strip()] += count
    return counts


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_COUNT else None


def _json(metadata: Mapping[str, str], key: str) -> Any:
    """What a text says as JSON; None where it is none."""
    try:
        return json.loads(metadata.get(key) or "null")
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
