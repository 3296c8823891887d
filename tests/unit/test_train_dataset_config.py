"""kohya's dataset_config: several folders and lists, each with options of its own."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from lib_lora.errors import JobError, PrefuseError
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.data.latents import Side, cache_latents
from lib_lora.train.data.loader import Loader
from lib_lora.train.data.options import DataOptions
from lib_lora.train.data.sources import OF_DATASETS, OF_ONE_FOLDER, OF_PICTURES

if TYPE_CHECKING:
    from pathlib import Path

    from lib_lora.train.data.dataset import Dataset

KOHYAS = """
color_aug face_crop_aug_range flip_aug num_repeats random_crop shuffle_caption keep_tokens keep_tokens_separator
secondary_separator caption_separator enable_wildcard token_warmup_min token_warmup_step caption_prefix caption_suffix
custom_attributes resize_interpolation caption_dropout_every_n_epochs caption_dropout_rate caption_tag_dropout_rate
caption_extension class_tokens cache_info image_dir is_reg alpha_mask metadata_file conditioning_data_dir batch_size
bucket_no_upscale bucket_reso_steps enable_bucket max_bucket_reso min_bucket_reso validation_seed validation_split
resolution network_multiplier
"""
"""Of the schemas of config_util.py."""


def fill(folder: Path, count: int, size: tuple[int, int] = (64, 64), caption: str = "") -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng([count, index])
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{index}.png")
        if caption:
            (folder / f"{index}.txt").write_text(caption)
    return folder


def config(tmp_path: Path, text: str) -> Path:
    """A file; NAME in it is a folder of that name."""
    file = tmp_path / "sets.toml"
    for name in ("cats", "dogs", "old"):
        text = text.replace(f"@{name}", f'"{(tmp_path / name).as_posix()}"')
    file.write_text(text)
    return file


def opened(tmp_path: Path, text: str, **options) -> Dataset:
    form = {"bucket_reso_steps": 8, "resolution": (64,)} | options
    return open_dataset(DataOptions(dataset_config=config(tmp_path, text), **form))


@pytest.fixture
def folders(tmp_path) -> Path:
    fill(tmp_path / "cats", 3, caption="cat, red, big")
    fill(tmp_path / "dogs", 4, (48, 96), caption="dog, brown")
    fill(tmp_path / "old", 5)
    return tmp_path


TWO = """
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
flip_aug = true

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = @cats
  num_repeats = 10
  flip_aug = false

  [[datasets.subsets]]
  image_dir = @old
  class_tokens = "an animal"
  is_reg = true

[[datasets]]
resolution = [32, 48]
batch_size = 3
network_multiplier = 0.5
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = @dogs
"""


def test_all_names_of_kohyas_are_known():
    assert set(KOHYAS.split()) <= {*OF_PICTURES, *OF_DATASETS, *OF_ONE_FOLDER}


def test_a_subset_has_its_own_options_then_its_datasets_then_the_general_then_those_of_the_training(folders):
    dataset = opened(folders, TWO, caption_suffix="photo", keep_tokens=7, train_batch_size=9)
    cat, old, dog = (
        next(one for one in dataset.pictures if one.path.parent.name == n) for n in ("cats", "old", "dogs")
    )
    assert [one.options.flip_aug for one in (cat, old, dog)] == [False, True, True]
    assert [one.options.keep_tokens for one in (cat, old, dog)] == [1, 1, 2]
    assert [one.options.train_batch_size for one in (cat, old, dog)] == [2, 2, 3]
    assert [one.options.size for one in (cat, old, dog)] == [(64, 64), (64, 64), (32, 48)]
    assert [one.options.caption_suffix for one in (cat, old, dog)] == ["photo"] * 3
    assert [one.network_multiplier for one in (cat, old, dog)] == [1, 1, 0.5]
    assert [one.repeats for one in (cat, dog)] == [10, 1]
    assert (old.caption, old.is_reg) == ("an animal", True)


def test_regularisation_pictures_are_as_many_as_others_of_their_dataset(folders):
    dataset = opened(folders, TWO)
    counts = Counter[str]()
    for one in dataset.pictures:
        counts[one.path.parent.name] += one.repeats
    assert counts == {"cats": 30, "old": 30, "dogs": 4}
    assert (dataset.report.train_images, dataset.report.reg_images) == (34, 5)


def test_every_dataset_has_batches_of_its_size_and_its_number_of_pictures(folders):
    dataset = opened(folders, TWO)
    loader = Loader(dataset)
    batches = [loader.batch(step) for step in range(loader.order.batches_per_epoch)]
    assert len(batches) == 30 + 2
    places = [place for batch in batches for place in batch.places]
    assert len(set(places)) == len(places)
    for batch in batches:
        assert batch.pixels is not None
        dogs = "dogs" in batch.names[0]
        assert all(("dogs" in name) == dogs for name in batch.names)
        assert len(batch) == 2 if not dogs else len(batch) in (1, 3)
        assert batch.network_multipliers is not None
        assert batch.network_multipliers.tolist() == [0.5 if dogs else 1.0] * len(batch)
    assert {batch.pixels.shape[2:] for batch in batches if "dogs" in batch.names[0]} == {(48, 24)}


def test_the_same_folder_may_be_trained_at_several_resolutions(folders):
    """As of the GUI's own example."""
    text = "".join(
        f"[[datasets]]\nresolution = [{side}, {side}]\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = @cats\n"
        for side in (64, 48, 32)
    )
    dataset = opened(folders, text)
    assert Counter(one.fit.bucket for one in dataset.pictures) == {(64, 64): 3, (48, 48): 3, (32, 32): 3}


def test_pictures_are_mirrored_and_encoded_only_where_their_subset_says_so(folders):
    dataset = opened(folders, TWO, cache_latents=True)
    encoded = []
    cached = cache_latents(dataset, lambda pixels: encoded.extend(pixels) or pixels.mean((2, 3))[:, :, None, None], "x")
    assert len(encoded) == 3 + 2 * (5 + 4)
    for one in dataset.pictures:
        assert (cached.find(Side(one, flipped=True)) is not None) == one.options.flip_aug


def test_a_list_is_a_subset_too(folders):
    facts = {"0": {"caption": "one cat", "tags": "red"}, "1": {"tags": "blue"}}
    (folders / "meta.json").write_text(json.dumps(facts))
    text = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = @cats\nmetadata_file = "{folders / "meta.json"}"\n'
    dataset = opened(folders, text + "num_repeats = 3\n")
    assert [one.caption for one in dataset.pictures] == ["one cat, red", "blue"]
    assert {one.repeats for one in dataset.pictures} == {3}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"sets.toml has no datasets; write \[\[datasets\]\]"),
        ("[[datasets]]\nresolution = 64\n", r"dataset 1 has no subsets; write \[\[datasets.subsets\]\]"),
        ("[[datasets]]\n[[datasets.subsets]]\n", "dataset 1, subset 1: it names no pictures; give image_dir"),
        ("[generals]\n", "sets.toml: there is no option generals; did you mean general"),
        ("[general]\nresolutoin = 5\n", r"\[general\]: there is no option resolutoin; did you mean resolution"),
        ("[general]\nimage_dir = 'a'\n", r"\[general\]: there is no option image_dir"),
        (TWO.replace("is_reg = true", "resolution = 5"), "dataset 1, subset 2: there is no option resolution; "),
        (
            TWO.replace("num_repeats = 10", "num_repeats = 0"),
            "dataset 1, subset 1: num_repeats must be 1 or more, not 0",
        ),
        (TWO.replace("batch_size = 3", "batch_size = 'x'"), "dataset 2, subset 1: batch_size must be a whole number"),
        (TWO.replace("network_multiplier = 0.5", "network_multiplier = 1e9"), "network_multiplier 1e.09 is beyond"),
        (TWO.replace("flip_aug = false", "color_aug = true"), "subset 1: color_aug can not be had here: "),
        (TWO.replace("flip_aug = false", "random_crop = true"), "subset 1: latents can not be cached when random_crop"),
        (TWO.replace("@dogs", "'nowhere'"), "nowhere"),
        ("datasets = 5\n", "sets.toml has no datasets"),
        ("datasets = [5]\n", "dataset 1 is no table of options"),
    ],
)
def test_what_can_not_be_is_told_with_its_place(folders, text, sentence):
    with pytest.raises(PrefuseError, match=sentence):
        opened(folders, text or "\n", cache_latents=True)


def test_a_folder_without_pictures_is_told(folders):
    (folders / "empty").mkdir()
    with pytest.raises(JobError, match=r"dataset 2, subset 1: .*empty has no pictures"):
        opened(folders, TWO.replace("@dogs", f"'{folders / 'empty'}'"))


def test_what_a_subset_says_otherwise_is_known_of_its_pictures(folders):
    dataset = opened(folders, TWO)
    dog = next(one for one in dataset.pictures if "dogs" in one.name)
    assert dataset.own_options(dog) == {
        "caption_extension": ".txt",
        "shuffle_caption": True,
        "keep_tokens": 2,
        "flip_aug": True,
        "resolution": (32, 48),
        "train_batch_size": 3,
    }
    whole = open_dataset(DataOptions(train_data_dir=folders))
    assert whole.own_options(whole.pictures[0]) == {}


def test_folders_beside_it_are_not_read_as_with_kohya(folders):
    dataset = opened(folders, TWO, train_data_dir=folders, reg_data_dir=folders / "old")
    assert dataset.report.notes[0] == "dataset_config is read in place of train_data_dir and reg_data_dir"
    assert Counter(one.path.parent.name for one in dataset.pictures) == {"cats": 3, "old": 5, "dogs": 4}
    with pytest.raises(JobError, match="num_class_images is for reg_data_dir, which is not read"):
        opened(folders, TWO, reg_data_dir=folders / "old", num_class_images=3, class_prompt="a cat")
