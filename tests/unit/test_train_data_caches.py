"""Pictures and captions encoded once: in memory or in files, which may be damaged, stale or gone."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from lib_lora.errors import FileError, JobError, OutputError
from lib_lora.tools.pictures import open_picture
from lib_lora.train.data import measuring
from lib_lora.train.data.batch import stacked
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.data.latents import cache_latents
from lib_lora.train.data.loader import Loader
from lib_lora.train.data.options import CACHE_FOLDER, DataOptions
from lib_lora.train.data.tensor_cache import TensorCache, weights_fingerprint
from lib_lora.train.data.texts import cache_texts

if TYPE_CHECKING:
    from pathlib import Path

    from lib_lora.train.data.dataset import Dataset


class Encoder:
    """An autoencoder: means of 8 by 8 pixels, and how many pictures it has seen."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, 8)

    @property
    def pictures(self) -> int:
        return sum(self.sizes)


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        size = (48, 64, 3) if number % 2 else (64, 48, 3)
        image = np.random.default_rng(number).integers(0, 256, size).astype(np.uint8)
        (tmp_path / "2_cat").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"2_cat/{number}.png")
        (tmp_path / f"2_cat/{number}.txt").write_text(f"cat {number % 3}")
    return tmp_path


def opened(folder: Path, **options) -> Dataset:
    form = {"resolution": (64,), "bucket_reso_steps": 16} | options
    return open_dataset(DataOptions(train_data_dir=folder, **form))


def files(folder: Path) -> list[Path]:
    return sorted((folder / CACHE_FOLDER).rglob("*.safetensors"))


@pytest.mark.parametrize("form", ["cache_latents", "cache_latents_to_disk"])
def test_cached_latents_are_those_of_the_pixels(folder, form):
    options = {"train_batch_size": 2, "flip_aug": True}
    encoder = Encoder()
    dataset = opened(folder, vae_batch_size=2, **options, **{form: True})
    cached = Loader(dataset, latents=cache_latents(dataset, encoder, "v"))
    fresh = Loader(opened(folder, **options))
    assert encoder.sizes == [2, 2, 2, 2, 2]  # of one size each
    for step in range(12):
        ours, theirs = cached.batch(step), fresh.batch(step)
        assert ours.pixels is None
        assert torch.equal(ours.latents, Encoder()(theirs.pixels))
        assert torch.equal(ours.time_ids, theirs.time_ids)
    assert bool(files(folder)) == (form == "cache_latents_to_disk")


def encoded_again(folder: Path, fingerprint: str = "v", **options) -> int:
    """How many pictures a training encodes that begins now."""
    encoder, told = Encoder(), []
    dataset = opened(folder, cache_latents_to_disk=True, **options)
    cache_latents(dataset, encoder, fingerprint, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    return encoder.pictures


def test_files_are_used_again_by_the_next_training(folder, tmp_path):
    assert encoded_again(folder) == 5
    assert encoded_again(folder) == 0
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.move(folder, moved)
    assert encoded_again(moved) == 0


def test_the_same_bucket_of_a_picture_scaled_otherwise_is_encoded_again(tmp_path):
    (tmp_path / "1_x").mkdir()
    Image.new("RGB", (68, 132), "red").save(tmp_path / "1_x/a.png")
    form = {"resolution": (96,), "bucket_reso_steps": 32, "min_bucket_reso": 32, "max_bucket_reso": 256}
    fits = [opened(tmp_path, **form, bucket_no_upscale=no_upscale).pictures[0].fit for no_upscale in (True, False)]
    assert fits[0].bucket == fits[1].bucket == (64, 128)
    assert [encoded_again(tmp_path, **form, bucket_no_upscale=no_upscale) for no_upscale in (True, False)] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "another autoencoder"},
        {"resolution": (32,)},
        {"bucket_reso_steps": 8, "resolution": (40,)},
    ],
)
def test_what_decides_the_latents_is_known(folder, change):
    assert encoded_again(folder) == 5
    assert encoded_again(folder, **change) == 5


def test_mirrored_pictures_are_encoded_when_they_are_needed(folder):
    assert encoded_again(folder) == 5
    assert encoded_again(folder, flip_aug=True) == 5


def test_a_picture_that_was_edited_is_encoded_again(folder):
    assert encoded_again(folder) == 5
    path = folder / "2_cat/5.bmp"
    Image.new("RGB", (64, 48), "blue").save(path)
    size = path.stat().st_size
    assert encoded_again(folder) == 1
    Image.new("RGB", (64, 48), "red").save(path)
    os.utime(path, ns=(1, 10**18))
    assert path.stat().st_size == size
    assert encoded_again(folder) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    shutil.copyfile(next(other for other in path.parent.parent.rglob("*.safetensors") if other != path), path)


def web_page(path: Path) -> None:
    path.write_text("<html>")


@pytest.mark.parametrize("damage", [cut, flip, swap, web_page, os.unlink])
def test_damaged_files_are_made_again(folder, damage):
    assert encoded_again(folder) == 5
    damage(files(folder)[2])
    assert encoded_again(folder) == 1
    assert encoded_again(folder) == 0


def test_an_interrupted_encoding_goes_on_where_it_was(folder):
    class StopError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        cache_latents(opened(folder, cache_latents_to_disk=True), Encoder(), "v", stop)
    assert encoded_again(folder) == 2


def test_latents_that_vanish_during_the_training_are_a_sentence(folder):
    dataset = opened(folder, cache_latents_to_disk=True)
    loader = Loader(dataset, latents=cache_latents(dataset, Encoder(), "v"))
    shutil.rmtree(folder / CACHE_FOLDER)
    with pytest.raises(FileError, match=r"the latents of 2_cat/\d.png are not there any more; start again"):
        loader.batch(0)


def test_nan_is_not_trained_on(folder):
    with pytest.raises(JobError, match=r"NaN or infinity of 2_cat/\d.png; let it compute in float32"):
        cache_latents(opened(folder, cache_latents=True), lambda pixels: pixels * float("nan"), "v")


def test_a_cache_that_can_not_be_written_is_a_sentence(folder):
    (folder / "blocked").write_text("a file")
    with pytest.raises(OutputError, match="can not be made"):
        opened(folder, cache_latents_to_disk=True, cache_dir=folder / "blocked")
    dataset = opened(folder, cache_latents_to_disk=True, cache_dir=folder / "free")
    shutil.rmtree(folder / "free")
    (folder / "free").write_text("a file")
    with pytest.raises(OutputError, match="can not be made"):
        cache_latents(dataset, Encoder(), "v")


def test_pictures_are_read_whole_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr(measuring, "open_picture", lambda path: (read.append(path.name), open_picture(path))[1])

    def names() -> list[str]:
        read.clear()
        assert len(opened(folder, cache_latents_to_disk=True).pictures) == 5
        return sorted(read)

    everything = [f"{number}.png" for number in range(5)]
    assert names() == everything
    assert names() == []
    Image.new("RGB", (64, 64)).save(folder / "2_cat/3.png")
    assert names() == ["3.png"]
    for damage in (b"", b"[1]", b'{"a": 1}', b"[" * 99_999):
        (folder / CACHE_FOLDER / measuring.INDEX).write_bytes(damage)
        assert names() == everything


def test_nothing_is_written_where_nothing_is_to_be_kept(folder):
    opened(folder, cache_latents=True, cache_text_encoder_outputs=True)
    assert not (folder / CACHE_FOLDER).exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half(folder, monkeypatch):
    dataset = opened(folder, cache_latents_to_disk=True)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(OutputError, match="the disk is full"):
            cache_latents(dataset, Encoder(), "v")
    assert files(folder) == []
    assert encoded_again(folder) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_stacked_as_torch_stacks_them(dtype):
    rows = [torch.randn(2, 3, 4).to(dtype).transpose(0, 1) for _ in range(3)]
    assert torch.equal(stacked(rows), torch.stack(rows))


def answer(captions: list[str] | tuple[str, ...]) -> dict[str, torch.Tensor]:
    rows = torch.tensor([[float(len(caption)), float(ord(caption[-1:] or " "))] for caption in captions])
    return {"states": rows[:, None].expand(-1, 77, -1), "pooled": rows}


@pytest.mark.parametrize("form", ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
def test_cached_texts_are_the_encoders_answer(folder, form):
    asked: list[str] = []

    def encode(captions):
        asked.extend(captions)
        return answer(captions)

    dataset = opened(folder, train_batch_size=2, caption_dropout_rate=0.4, caption_prefix="a", **{form: True})
    loader = Loader(dataset, cache_texts(dataset, encode, "t"))
    assert sorted(asked) == ["", "a cat 0", "a cat 1", "a cat 2"]  # each once
    for batch in loader.batches(0, 15):
        for name, expected in answer(batch.captions).items():
            assert torch.equal(batch.texts[name], expected)
    cache_texts(dataset, encode, "t")
    assert len(asked) == (4 if form.endswith("disk") else 8)
    cache_texts(dataset, encode, "other")
    assert len(asked) == (8 if form.endswith("disk") else 12)


def test_texts_that_vanish_or_are_not_finite_are_a_sentence(folder):
    dataset = opened(folder, cache_text_encoder_outputs_to_disk=True)
    texts = cache_texts(dataset, answer, "t")
    shutil.rmtree(folder / CACHE_FOLDER)
    with pytest.raises(FileError, match="'cat 0' is not encoded any more"):
        texts(["cat 0"])
    with pytest.raises(JobError, match="NaN or infinity of the caption 'cat"):
        cache_texts(dataset, lambda captions: {"states": torch.full((len(captions), 2), torch.inf)}, "t")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_kept_is_what_comes_back(tmp_path, dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype).transpose(0, 2)
    for cache in (TensorCache(None), TensorCache(tmp_path)):
        cache.put("a key/with ../ and \0", {"b": tensor, "a": tensor[0]})
        found = cache.get("a key/with ../ and \0")
        assert found["b"].dtype == dtype
        assert torch.equal(found["b"], tensor)
        assert torch.equal(found["a"], tensor[0])
        assert cache.get("another") is None
    assert all(path.parent.parent == tmp_path for path in tmp_path.rglob("*.safetensors"))


def test_a_fingerprint_tells_weights_dtypes_and_shapes_apart():
    weights = [torch.arange(100.0), torch.ones(3, 3)]
    other = [[torch.arange(100.0) + 1, weights[1]], [weights[0].half(), weights[1]], [weights[0], torch.ones(9)]]
    prints = {weights_fingerprint(one) for one in (weights, *other)}
    assert len(prints) == 4
    assert weights_fingerprint([weight.clone() for weight in weights]) in prints
