"""Where pictures come from: a folder or a list, or kohya's dataset_config of several with options of their own.

Source: library/config_util.py of sd-scripts. What a subset does not say its dataset does, then [general], then the
options of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lib_lora.core.opening import shown
from lib_lora.errors import JobError
from lib_lora.tools.images import SUFFIXES
from lib_lora.train.data.folders import read_folder, read_folders
from lib_lora.train.data.lists import LARGEST_MULTIPLIER, read_list
from lib_lora.train.data.options import DataOptions
from lib_lora.train.kohya_options import understood
from lib_lora.train.option_values import check_names, converted, read_tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lib_lora.train.data.folders import Folder

OF_PICTURES = (
    *("num_repeats", "class_tokens", "caption_extension", "caption_separator", "secondary_separator"),
    *("shuffle_caption", "keep_tokens", "keep_tokens_separator", "enable_wildcard", "caption_prefix", "caption_suffix"),
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
    *("token_warmup_min", "token_warmup_step", "flip_aug", "random_crop"),
    *("color_aug", "face_crop_aug_range", "cache_info", "resize_interpolation", "custom_attributes"),
)
OF_DATASETS = (
    *("batch_size", "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
    *("bucket_no_upscale", "network_multiplier", "prior_loss_weight", "validation_seed", "validation_split"),
)
OF_ONE_FOLDER = ("image_dir", "metadata_file", "is_reg", "alpha_mask", "conditioning_data_dir")
_OURS = {
    "image_dir": "train_data_dir",
    "metadata_file": "in_json",
    "num_repeats": "dataset_repeats",
    "batch_size": "train_batch_size",
}
"""kohya's words in dataset_config → those of the options of a training."""
_NOT_INHERITED = {
    **dict.fromkeys(("train_data_dir", "reg_data_dir", "in_json", "dataset_config")),
    "dataset_repeats": 1,
    "num_class_images": 0,
}


class Source(NamedTuple):
    """Pictures of one place.

    Attributes:
        folder: What was found.
        options: How they are used.
        group: Number of their dataset; within one there are as many regularisation pictures as others.
    """

    folder: Folder
    options: DataOptions
    group: int = 0


@dataclass(frozen=True)
class SubsetOptions:
    """What only dataset_config says of a folder.

    Attributes:
        class_tokens: What pictures without a caption show.
        is_reg: Whether they are regularisation pictures.
        network_multiplier: Strength of the network while they are learned.
    """

    class_tokens: str = ""
    is_reg: bool = False
    network_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.network_multiplier) <= LARGEST_MULTIPLIER:
            raise JobError(f"network_multiplier {self.network_multiplier:g} is beyond {LARGEST_MULTIPLIER:g}")


def read_sources(options: DataOptions) -> tuple[list[Source], list[str]]:
    """All pictures, those for training first; and what should be known of them.

    Raises:
        FileError: If a folder or list can not be read.
        JobError: If there are no pictures, or dataset_config says what can not be.
    """
    if options.dataset_config is not None:
        return _read_config(options.dataset_config, options)
    if options.in_json is not None:
        folders, notes = [read_list(options.in_json, options)], list[str]()
    else:
        folders, notes = read_folders(options.picture_folder, options)
    if options.reg_data_dir is not None:
        reg, more = read_folders(options.reg_data_dir, options, is_reg=True)
        folders, notes = folders + reg, notes + more
    return [Source(folder, options) for folder in folders], notes


def _read_config(path: Path, options: DataOptions) -> tuple[list[Source], list[str]]:
    unread = [name for name in ("train_data_dir", "in_json", "reg_data_dir") if getattr(options, name) is not None]
    sources: list[Source] = []
    notes = dict.fromkeys([f"dataset_config is read in place of {' and '.join(unread)}"] if unread else ())
    for where, group, given in _subsets(path):
        try:
            source, more = _source(given, options, group)
        except JobError as error:
            raise JobError(f"{where}: {_in_their_words(str(error))}") from error
        sources.append(source)
        notes |= dict.fromkeys(more)
    return sources, list(notes)


def _subsets(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Where it stands, the number of its dataset, and what is said of each subset, by itself and by what it is in."""
    file = read_tables(path)
    name = shown(path)
    check_names(file, ("general", "datasets"), name)
    general = _table(file.get("general", {}), (*OF_PICTURES, *OF_DATASETS), f"{name}, [general]")
    for group, dataset in enumerate(_list(file, "datasets", name), 1):
        where = f"{name}, dataset {group}"
        own = _table(dataset, (*OF_PICTURES, *OF_DATASETS, "subsets"), where)
        for number, subset in enumerate(_list(own, "subsets", where), 1):
            place = f"{where}, subset {number}"
            given = {**general, **own, **_table(subset, (*OF_PICTURES, *OF_ONE_FOLDER), place)}
            given.pop("subsets")
            yield place, group, given


def _source(given: Mapping[str, Any], options: DataOptions, group: int) -> tuple[Source, tuple[str, ...]]:
    values, notes = understood(given)
    values = {_OURS.get(key, key): value for key, value in values.items()}
    data = DataOptions(**{**vars(options), **_NOT_INHERITED, **converted(DataOptions, values)})
    folder = _folder(data, own := SubsetOptions(**converted(SubsetOptions, values)))
    if own.network_multiplier != 1:
        strength = own.network_multiplier
        entries = (replace(one, network_multiplier=one.network_multiplier * strength) for one in folder.entries)
        folder = replace(folder, entries=tuple(entries))
    return Source(folder, data, group), notes


def _folder(data: DataOptions, own: SubsetOptions) -> Folder:
    if data.in_json is not None:
        return replace(read_list(data.in_json, data), is_reg=own.is_reg)
    if data.train_data_dir is None:
        raise JobError("it names no pictures; give image_dir, or metadata_file")
    folder = read_folder(data.train_data_dir, (data.dataset_repeats, own.class_tokens), data, is_reg=own.is_reg)
    if not folder.entries and not folder.skipped:
        raise JobError(f"{shown(data.train_data_dir)} has no pictures ({', '.join(SUFFIXES)})")
    return folder


def _table(found: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """A table of options that may stand there.

    Raises:
        JobError: If it is none, or has others.
    """
    if not isinstance(found, dict):
        raise JobError(f"{where} is no table of options")
    check_names(found, names, where)
    return dict(found)


def _list(table: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = table.get(key)
    if not isinstance(found, list) or not found:
        raise JobError(
            f"{where} has no {key}; write [[{'datasets.' if key == 'subsets' else ''}{key}]] and options below"
        )
    return list(found)


def _in_their_words(sentence: str) -> str:
    for theirs, ours in _OURS.items():
        sentence = sentence.replace(ours, theirs)
    return sentence
