"""Which pictures and captions a training set has: folders in kohya's layout, lists, and what is wrong with them."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from lib_lora.errors import FileError, JobError
from lib_lora.train.data.class_pictures import missing_class_pictures
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.data.options import DataOptions

if TYPE_CHECKING:
    from pathlib import Path

    from lib_lora.train.data.dataset import Dataset


def put(path: Path, caption: str | None = None, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def opened(folder: Path | None, **options) -> Dataset:
    form = {"resolution": (64,), "bucket_reso_steps": 32} | options
    return open_dataset(DataOptions(train_data_dir=folder, **form))


def captions(dataset: Dataset) -> dict[str, str]:
    return {picture.name: picture.caption for picture in dataset.pictures}


def test_names_of_folders_say_repeats_and_class(tmp_path):
    put(tmp_path / "3_black cat/a.png", "a cat sleeps\nsecond line")
    put(tmp_path / "3_black cat/b.JPG")
    put(tmp_path / "10/c.webp")
    dataset = opened(tmp_path)
    assert captions(dataset) == {"10/c.webp": "", "3_black cat/a.png": "a cat sleeps", "3_black cat/b.JPG": "black cat"}
    assert {picture.name: picture.repeats for picture in dataset.pictures} == {
        "10/c.webp": 10,
        "3_black cat/a.png": 3,
        "3_black cat/b.JPG": 3,
    }
    assert dataset.report.train_images == 16
    assert '3_black cat: 2 pictures, each 3 times in an epoch, 1 of them with the caption "black cat"' in str(
        dataset.report
    )


def test_a_folder_of_pictures_is_used_once(tmp_path):
    put(tmp_path / "a.png", "red")
    put(tmp_path / "more/b.png", "blue")
    dataset = opened(tmp_path)
    assert captions(dataset) == {"more/b.png": "blue", f"{tmp_path.name}/a.png": "red"}
    assert [picture.repeats for picture in dataset.pictures] == [1, 1]


def test_folders_without_number_are_left_out_where_others_have_one(tmp_path):
    put(tmp_path / "2_cat/a.png")
    put(tmp_path / "samples/b.png")
    put(tmp_path / "0_dog/c.png")
    put(tmp_path / "d.png")
    put(tmp_path / ".hidden/e.png")
    dataset = opened(tmp_path)
    assert list(captions(dataset)) == ["2_cat/a.png"]
    assert len(dataset.report.notes) == 3
    assert "samples are left out: it has no number of repeats" in str(dataset.report)
    assert "0_dog is left out: its name asks for 0 repeats" in str(dataset.report)


def test_captions_are_txt_and_then_caption_or_what_is_asked_for(tmp_path):
    for name in "ab":
        put(tmp_path / f"1_x/{name}.png").with_suffix(".caption").write_text(f"{name} caption")
    (tmp_path / "1_x/a.txt").write_bytes("\N{BYTE ORDER MARK}a text\r\n".encode())
    assert list(captions(opened(tmp_path)).values()) == ["a text", "b caption"]
    assert list(captions(opened(tmp_path, caption_extension=".caption")).values()) == ["a caption", "b caption"]
    assert list(captions(opened(tmp_path, caption_extension="txt")).values()) == ["a text", "x"]


def test_the_most_frequent_sizes_are_told(tmp_path):
    for number in range(8):
        put(tmp_path / f"{number + 1}_x/a.png", size=(64, 64 + 8 * number))
    report = opened(tmp_path, resolution=(512,), bucket_reso_steps=8).report
    sizes = "64x120 (8), 64x112 (7), 64x104 (6), 64x96 (5), 64x88 (4) and 3 more"
    assert f"36 pictures in an epoch; sizes: {sizes}" in str(report)
    assert len(report.to_dict()["buckets"]) == 8


def test_an_empty_caption_is_one(tmp_path):
    put(tmp_path / "1_cat/a.png", "")
    dataset = opened(tmp_path)
    assert captions(dataset) == {"1_cat/a.png": ""}
    assert dataset.report.folders[0].without_caption == 0


def test_captions_without_pictures_are_counted(tmp_path):
    put(tmp_path / "1_cat/a.png", "x")
    (tmp_path / "1_cat/b.txt").write_text("alone")
    (tmp_path / "1_cat/c.caption").write_text("alone")
    assert opened(tmp_path).report.folders[0].alone == 2
    assert "2 captions without a picture" in str(opened(tmp_path).report)


def test_pictures_that_can_not_be_used_are_named_and_counted(tmp_path):
    put(tmp_path / "1_cat/good.png")
    (tmp_path / "1_cat/text.png").write_text("no picture")
    whole = put(tmp_path / "1_cat/cut.png", size=(500, 500)).read_bytes()
    (tmp_path / "1_cat/cut.png").write_bytes(whole[: len(whole) // 2])
    put(tmp_path / "1_cat/small.png", size=(20, 200))
    put(tmp_path / "1_cat/latin.png").with_suffix(".txt").write_bytes("chat \xe9".encode("latin-1"))
    (tmp_path / "1_cat/empty.jpg").write_bytes(b"")
    (tmp_path / "1_cat/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "1_cat/pipe.png")
    (tmp_path / "1_cat/folder.png").mkdir()
    dataset = opened(tmp_path)
    assert list(captions(dataset)) == ["1_cat/good.png"]
    reasons = {name.removeprefix("1_cat/"): reason for name, reason in dataset.report.skipped}
    assert set(reasons) == {"text.png", "cut.png", "small.png", "latin.png", "empty.jpg", "gone.png", "pipe.png"}
    assert reasons["text.png"] == reasons["empty.jpg"] == "it is no picture"
    assert "smaller than 32x32, the smallest bucket" in reasons["small.png"]
    assert reasons["latin.png"] == "its caption latin.txt is no text in UTF-8"
    assert "No such file" in reasons["gone.png"]
    assert "is a device or pipe" in reasons["pipe.png"]
    assert "skipped 1_cat/cut.png: " in str(dataset.report)
    assert "… and 2 more are skipped" in str(dataset.report)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda _: None, "has no pictures"),
        (lambda f: (f / "a.txt").write_text("x"), "has 1 captions, but no pictures"),
        (lambda f: put(f / "0_cat/a.png"), "ask for 0 repeats"),
        (
            lambda f: (f / "a.png").write_text("x"),
            "none of the 1 pictures can be trained on: .*/a.png: it is no picture",
        ),
    ],
)
def test_a_set_without_pictures_is_a_sentence(tmp_path, make, sentence):
    make(tmp_path)
    with pytest.raises(JobError, match=sentence):
        opened(tmp_path)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(FileError, match="nowhere can not be read: No such file"):
        opened(tmp_path / "nowhere")
    with pytest.raises(JobError, match="give train_data_dir"):
        opened(None)


def test_hostile_names_are_names(tmp_path):
    names = ["<b>&.png", "a'b\"c.png", "$(x);.png", "line\nbreak.png", "ünï ☃.png", "[ab]*.png", "-rf.png"]
    for name in names:
        put(tmp_path / "1_..cat/" / name, "x")
    latin = os.fsdecode(b"1_..cat/\xe9.png")
    put(tmp_path / "plain.png").rename(tmp_path / latin)
    dataset = opened(tmp_path)
    assert set(captions(dataset)) == {f"1_..cat/{name}" for name in names} | {latin}
    str(dataset.report).encode()


def test_regularisation_pictures_are_as_many_as_others(tmp_path):
    for name in "abc":
        put(tmp_path / f"train/5_cat/{name}.png")
    for name in "xy":
        put(tmp_path / f"train/reg/2_animal/{name}.png")
    dataset = opened(tmp_path / "train", reg_data_dir=tmp_path / "train/reg", prior_loss_weight=0.5)
    counts = Counter(dataset.pictures[index].name for bucket in dataset.buckets().values() for index in bucket)
    assert counts == {
        "5_cat/a.png": 5,
        "5_cat/b.png": 5,
        "5_cat/c.png": 5,
        "reg/2_animal/x.png": 8,
        "reg/2_animal/y.png": 7,
    }
    assert (dataset.report.train_images, dataset.report.reg_images) == (15, 4)


@pytest.mark.parametrize(("train", "reg", "repeats"), [(3, 9, 1), (7, 2, 3), (1, 1, 1), (10, 3, 1), (4, 3, 5)])
def test_regularisation_pictures_are_repeated_as_kohya_does(tmp_path, train, reg, repeats):
    for i in range(train):
        put(tmp_path / f"train/{repeats}_cat/{i:02}.png", size=(32, 32))
    for i in range(reg):
        put(tmp_path / f"reg/{repeats}_animal/{i:02}.png", size=(32, 32))
    wanted, count, theirs = train * repeats, 0, dict[int, int]()
    while count < wanted:  # DreamBoothDataset of sd-scripts
        for i in range(reg):
            added = 1 if i in theirs else repeats
            theirs[i] = theirs.get(i, 0) + added
            count += added
            if count >= wanted:
                break
    dataset = opened(tmp_path / "train", reg_data_dir=tmp_path / "reg")
    assert [picture.repeats for picture in dataset.pictures if picture.is_reg] == list(theirs.values())


def listed(path: Path, *entries: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in entries), encoding="utf-8")
    return path


def test_a_list_of_hugging_faces_kind(tmp_path):
    put(tmp_path / "a.png", "not this one")
    put(tmp_path / "sub/a.png")
    path = listed(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": "a cat"},
        "",
        {"file_name": "sub/a.png", "caption": "a dog", "tags": ["brown", "big"]},
        {"image_path": str(tmp_path / "sub/a.png")},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "../a.png", "text": "x"},
    )
    dataset = opened(None, in_json=path, dataset_repeats=4)
    assert [(one.name, one.caption, one.repeats) for one in dataset.pictures] == [
        ("a.png", "a cat", 4),
        ("sub/a.png", "a dog, brown, big", 4),
        ("sub/a.png", "", 4),
    ]
    assert dict(dataset.report.skipped) == {
        "gone.png": "there is no such file",
        "../a.png": "it leads out of the folder of the pictures",
    }


def test_kohyas_list_with_captions_and_tags(tmp_path):
    put(tmp_path / "pictures/a.png")
    put(tmp_path / "pictures/b.png")
    facts = {"a": {"caption": "a cat", "tags": "1cat, sofa"}, "b.png": {"tags": "1dog", "train_resolution": [64, 64]}}
    path = listed(tmp_path / "meta_cap.json", facts)
    dataset = opened(tmp_path / "pictures", in_json=path)
    assert captions(dataset) == {"a.png": "a cat, 1cat, sofa", "b.png": "1dog"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "m.jsonl, line 2 is no JSON"),
        ("[1]", "m.jsonl, line 2 is no object of JSON"),
        ('{"text": "x"}', "m.jsonl, line 2, names no picture; it needs file_name"),
        ("[" * 100_000, "m.jsonl, line 2 is no JSON"),
    ],
)
def test_a_damaged_list_is_a_sentence(tmp_path, line, sentence):
    put(tmp_path / "a.png")
    path = listed(tmp_path / "m.jsonl", {"file_name": "a.png"}, line)
    with pytest.raises(JobError, match=sentence):
        opened(None, in_json=path)


def test_a_list_that_can_not_be_read_or_is_empty_is_a_sentence(tmp_path):
    with pytest.raises(FileError, match=r"no\.jsonl can not be read"):
        opened(None, in_json=tmp_path / "no.jsonl")
    with pytest.raises(JobError, match="names no pictures"):
        opened(None, in_json=listed(tmp_path / "e.json", {}))


def test_missing_class_pictures_are_drawn_beside_those_that_are_there(tmp_path):
    put(tmp_path / "train/1_x/a.png")
    put(tmp_path / "reg/2_cat/class_00001.png")
    put(tmp_path / "reg/2_cat/own.png")
    options = {"reg_data_dir": tmp_path / "reg", "num_class_images": 5, "class_prompt": "a <b>cat</b>", "seed": 100}
    missing = missing_class_pictures(DataOptions(**options))
    assert [one.path.name for one in missing] == ["class_00000.png", "class_00002.png", "class_00003.png"]
    assert [one.seed for one in missing] == [100, 102, 103]
    for one in missing:
        one.save(Image.new("RGB", (64, 64)))
    assert missing_class_pictures(DataOptions(**options)) == []
    dataset = opened(tmp_path / "train", reg_data_dir=tmp_path / "reg")
    assert dataset.report.folders[1].pictures == 5
    assert "reg/2_cat/class_00000.png" in captions(dataset)
    assert captions(dataset)["reg/2_cat/class_00000.png"] == "a <b>cat</b>"


def test_all_class_pictures_are_missing_where_there_is_no_folder(tmp_path):
    options = {"reg_data_dir": tmp_path / "reg", "num_class_images": 2, "class_prompt": "a cat"}
    missing = missing_class_pictures(DataOptions(**options, caption_extension=".caption"))
    assert [one.path.parent for one in missing] == [tmp_path / "reg"] * 2
    missing[0].save(Image.new("RGB", (64, 64)))
    assert (tmp_path / "reg/class_00000.caption").read_text() == "a cat"
    assert len(missing_class_pictures(DataOptions(**options))) == 1
    assert missing_class_pictures(DataOptions(reg_data_dir=tmp_path / "none")) == []


def test_all_lines_of_a_caption_are_read_where_one_is_chosen(tmp_path):
    put(tmp_path / "1_cat/a.png").with_suffix(".txt").write_text("first\n\n second \n")
    assert list(captions(opened(tmp_path)).values()) == ["first"]
    assert list(captions(opened(tmp_path, enable_wildcard=True)).values()) == ["first\nsecond"]
    (tmp_path / "list.jsonl").write_text('{"file_name": "1_cat/a.png", "text": "one\\n\\ntwo", "tags": ["x", "y"]}')
    named = {"in_json": tmp_path / "list.jsonl"}
    assert list(captions(opened(tmp_path, **named)).values()) == ["one, x, y"]
    assert list(captions(opened(tmp_path, enable_wildcard=True, **named)).values()) == ["one, x, y\ntwo, x, y"]


def test_a_picture_that_fits_no_bucket_is_told_its_size_and_what_helps(tmp_path):
    put(tmp_path / "1_cat/narrow.png", size=(500, 60))
    put(tmp_path / "1_cat/good.png", size=(64, 64))
    skipped = opened(tmp_path, resolution=(64,), bucket_reso_steps=64).report.skipped
    assert [file.reason for file in skipped] == ["it has 500x60 pixels and is smaller than 64x64, the smallest bucket"]
    put(tmp_path / "1_cat/narrow.png", size=(500, 400))
    skipped = opened(tmp_path, resolution=(64,), bucket_reso_steps=64).report.skipped
    assert skipped[0].reason.startswith(
        "it has 500x400 pixels, which do not fit 64x64 without a side smaller than 64x64"
    )
    assert skipped[0].reason.endswith("raise resolution, or lower bucket_reso_steps")
