"""What a LoRA's metadata tells of its training set, under kohya's names.

Source: train_network.py of kohya's sd-scripts; both what it writes for folders, and ``ss_datasets``.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.data.report import FolderReport


def data_facts(dataset: Dataset, processes: int = 1) -> dict[str, str]:
    """Texts for the header."""
    options, report = dataset.options, dataset.report
    facts: dict[str, Any] = {
        "ss_num_train_images": report.train_images,
        "ss_num_reg_images": report.reg_images,
        "ss_num_batches_per_epoch": dataset.order(processes).batches_per_epoch,
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": options.train_batch_size * processes,
        "ss_resolution": options.size,
        "ss_enable_bucket": options.enable_bucket,
        "ss_bucket_no_upscale": options.bucket_no_upscale,
        "ss_min_bucket_reso": options.min_bucket_reso if options.enable_bucket else None,
        "ss_max_bucket_reso": options.max_bucket_reso if options.enable_bucket else None,
        "ss_color_aug": False,
        "ss_flip_aug": options.flip_aug,
        "ss_random_crop": options.random_crop,
        "ss_shuffle_caption": options.shuffle_caption,
        "ss_keep_tokens": options.keep_tokens,
        "ss_caption_dropout_rate": options.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": options.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": options.caption_tag_dropout_rate,
        "ss_prior_loss_weight": options.prior_loss_weight,
        "ss_max_token_length": options.max_token_length,
        "ss_cache_latents": options.caches_latents,
        "ss_seed": options.seed,
    }
    parts = {
        "ss_dataset_dirs": _folders(dataset, is_reg=False),
        "ss_reg_dataset_dirs": _folders(dataset, is_reg=True),
        "ss_tag_frequency": _tags(dataset),
        "ss_bucket_info": _buckets(dataset),
        "ss_datasets": [_whole(dataset)],
    }
    return {key: str(value) for key, value in facts.items()} | {key: json.dumps(part) for key, part in parts.items()}


def _folders(dataset: Dataset, *, is_reg: bool) -> dict[str, Any]:
    told = (folder for folder in dataset.report.folders if folder.is_reg == is_reg)
    return {folder.name: {"n_repeats": folder.repeats, "img_count": folder.pictures} for folder in told}


def _tags(dataset: Dataset) -> dict[str, Any]:
    """Folder → tag in small letters → in how many captions it is."""
    return {
        folder.name: Counter(tag for entry in folder.entries for tag in _split(entry.tags))
        for folder in dataset.folders
    }


def _split(tags: str) -> list[str]:
    return [tag for tag in (part.strip().lower() for part in tags.split(",")) if tag]


def _buckets(dataset: Dataset) -> dict[str, Any] | None:
    if not dataset.options.enable_bucket:
        return None
    buckets = {
        str(index): {"resolution": list(bucket.size), "count": bucket.count}
        for index, bucket in enumerate(dataset.report.buckets)
    }
    errors = [abs(_ratio(one.fit.bucket) - _ratio(one.size)) for one in dataset.pictures]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)}


def _ratio(size: tuple[int, int]) -> float:
    return size[0] / size[1]


def _whole(dataset: Dataset) -> dict[str, Any]:
    options, report = dataset.options, dataset.report
    return {
        "is_dreambooth": options.in_json is None,
        "batch_size_per_device": options.train_batch_size,
        "num_train_images": report.train_images,
        "num_reg_images": report.reg_images,
        "resolution": list(options.size),
        "enable_bucket": options.enable_bucket,
        "min_bucket_reso": options.min_bucket_reso,
        "max_bucket_reso": options.max_bucket_reso,
        "tag_frequency": _tags(dataset),
        "bucket_info": _buckets(dataset),
        "subsets": [_subset(dataset, folder) for folder in report.folders],
    }


def _subset(dataset: Dataset, folder: FolderReport) -> dict[str, Any]:
    options = dataset.options
    place = "image_dir" if options.in_json is None or folder.is_reg else "metadata_file"
    return {
        "img_count": folder.pictures,
        "num_repeats": folder.repeats,
        "color_aug": False,
        "flip_aug": options.flip_aug,
        "random_crop": options.random_crop,
        "shuffle_caption": options.shuffle_caption,
        "keep_tokens": options.keep_tokens,
        "keep_tokens_separator": options.keep_tokens_separator,
        "caption_prefix": options.caption_prefix or None,
        "caption_suffix": options.caption_suffix or None,
        place: folder.name,
        "class_tokens": folder.class_name or None,
        "is_reg": folder.is_reg,
    }
