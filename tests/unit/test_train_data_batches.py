"""From pictures to batches: pixels, crops, mirrors, sizes for SDXL; the same after a resume and in any process."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from lib_lora.errors import FileError
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.data.loader import Loader
from lib_lora.train.data.options import DataOptions
from lib_lora.train.data.order import ALONE, Shard
from lib_lora.train.data.prefetch import prefetched

if TYPE_CHECKING:
    from lib_lora.train.data.batch import Batch

PIXEL_ERROR = 1e-6
LEVEL = 2 / 255
"""One of 8 bits, of pixels from -1 to 1."""


def pattern(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def saved(path: Path, image: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def loader(folder: Path, texts=None, latents=None, shard: Shard = ALONE, **options) -> Loader:
    form = {"resolution": (64,), "bucket_reso_steps": 8} | options
    return Loader(open_dataset(DataOptions(train_data_dir=folder, **form)), texts, latents, shard)


def as_image(pixels: torch.Tensor) -> np.ndarray:
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture
def mixed(tmp_path):
    """Eleven pictures of three sizes, some with captions."""
    for number in range(11):
        width, height = ((64, 64), (80, 48), (48, 80))[number % 3]
        path = saved(tmp_path / f"2_cat/{number:02}.png", pattern(width, height, number))
        path.with_suffix(".txt").write_text(f"cat {number}, a, b, c")
    return tmp_path


CHANCES = {
    "flip_aug": True,
    "random_crop": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.2,
    "caption_tag_dropout_rate": 0.2,
    "seed": 5,
}


def same(first: Batch, second: Batch) -> bool:
    kept = first.names, first.captions, first.places, first.step, first.epoch
    return kept == (second.names, second.captions, second.places, second.step, second.epoch) and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("weights", "time_ids", "pixels")
    )


def test_pixels_are_those_of_the_file(tmp_path):
    saved(tmp_path / "a.png", pattern(64, 48))
    batch = loader(tmp_path).batch(0)
    assert batch.pixels.shape == (1, 3, 48, 64)
    assert batch.pixels.dtype == torch.float32
    expected = torch.from_numpy(pattern(64, 48)).permute(2, 0, 1).double() / 255 * 2 - 1
    assert (batch.pixels[0] - expected).abs().max() <= PIXEL_ERROR
    assert batch.time_ids.tolist() == [[48, 64, 0, 0, 48, 64]]


def test_a_large_picture_is_shrunk_and_cropped_in_the_middle(tmp_path):
    colours = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    saved(tmp_path / "a.png", colours)
    batch = loader(tmp_path, bucket_reso_steps=16).batch(0)
    assert batch.time_ids.tolist() == [[200, 300, 0, 4, 48, 64]]
    shrunk = np.asarray(colours.resize((72, 48), Image.Resampling.LANCZOS))
    assert (as_image(batch.pixels[0]) == shrunk[:, 4:68]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation):
    upright = Image.linear_gradient("L").resize((80, 48)).convert("RGB")
    upright.paste("red", (0, 0, 30, 20))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes an orientation
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved(tmp_path / "a.png", stored, exif=exif)
    assert (as_image(loader(tmp_path).batch(0).pixels[0]) == np.asarray(upright)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    grey = np.full((64, 64), 128, np.uint8)
    grey[:32] = 255
    if mode == "I;16":
        image, suffix = Image.fromarray(grey.astype(np.uint16) * 257), "png"
    else:
        inner = "RGB" if mode == "CMYK" else "L"
        image, suffix = Image.fromarray(grey).convert(inner).convert(mode), "jpg" if mode == "CMYK" else "png"
    saved(tmp_path / f"a.{suffix}", image, **({"quality": 100} if mode == "CMYK" else {}))
    pixels = loader(tmp_path).batch(0).pixels[0]
    assert (pixels[:, :31] - 1).abs().max() <= 2 * LEVEL
    if mode != "1":
        assert (pixels[:, 33:] - 1 / 255).abs().max() <= 2 * LEVEL


def test_what_is_transparent_is_white_and_animations_stand_still(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    saved(tmp_path / "1_x/a.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    saved(tmp_path / "1_x/b.png", Image.new("RGBA", (64, 64), (255, 0, 0, 0)))
    batch = loader(tmp_path, train_batch_size=2).batch(0)
    seen = dict(zip(batch.names, map(as_image, batch.pixels), strict=True))
    assert (seen["1_x/b.png"] == 255).all()
    assert (seen["1_x/a.webp"] == [255, 0, 0]).all()


def test_a_mirrored_picture_is_the_mirror_of_the_same_crop(tmp_path):
    saved(tmp_path / "a.png", pattern(69, 64))
    seen = [loader(tmp_path, flip_aug=True, resolution=(80,)).batch(step) for step in range(30)]
    lefts = {batch.time_ids[0, 3].item(): as_image(batch.pixels[0]) for batch in seen}
    assert set(lefts) == {2, 3}  # 5 pixels too many: 2 on the left, 3 if it is mirrored
    assert (lefts[2] == pattern(69, 64)[:, 2:66]).all()
    assert (lefts[3] == lefts[2][:, ::-1]).all()
    assert 5 < sum(batch.time_ids[0, 3].item() == 3 for batch in seen) < 25


def test_random_crops_lie_where_sdxl_is_told(tmp_path):
    saved(tmp_path / "a.png", pattern(71, 70))
    places = set()
    for step in range(40):
        batch = loader(tmp_path, random_crop=True, resolution=(80,)).batch(step)
        _, _, top, left, height, width = batch.time_ids[0].tolist()
        assert (as_image(batch.pixels[0]) == pattern(71, 70)[top : top + height, left : left + width]).all()
        places.add((top, left))
    assert len(places) > 15


def test_a_resume_at_any_step_gives_the_same_batches(mixed):
    options = {"train_batch_size": 3, **CHANCES}
    whole = list(loader(mixed, **options).batches(0, 40))
    assert [batch.step for batch in whole] == list(range(40))
    assert len({batch.epoch for batch in whole}) > 3
    for first in (1, 7, 23, 39):
        resumed = list(loader(mixed, **options, max_data_loader_n_workers=0).batches(first, 40))
        assert all(map(same, resumed, whole[first:]))
        assert len(resumed) == 40 - first


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (4, 1), (3, 2)])
def test_processes_see_together_what_one_would(mixed, processes, batch_size):
    alone = loader(mixed, train_batch_size=processes * batch_size, **CHANCES)
    shards = [Shard(rank, processes) for rank in range(processes)]
    together = [loader(mixed, shard=shard, train_batch_size=batch_size, **CHANCES) for shard in shards]
    for step in range(2 * alone.order.batches_per_epoch):
        one, parts = alone.batch(step), [each.batch(step) for each in together]
        pixels = torch.cat([part.pixels[part.weights > 0] for part in parts])
        assert torch.equal(pixels, one.pixels)
        assert sum((part.captions[: int((part.weights > 0).sum())] for part in parts), ()) == one.captions
        mean = torch.stack([(part.weights * part.pixels.mean((1, 2, 3))).mean() for part in parts]).mean()
        assert (mean - one.pixels.mean((1, 2, 3)).mean()).abs() <= PIXEL_ERROR


def test_prior_loss_weight_is_that_of_regularisation_pictures(tmp_path):
    saved(tmp_path / "train/a.png", pattern(64, 64))
    saved(tmp_path / "reg/b.png", pattern(64, 64))
    one = loader(tmp_path / "train", reg_data_dir=tmp_path / "reg", prior_loss_weight=0.25, train_batch_size=2)
    batch = one.batch(0)
    weights = dict(zip(batch.names, batch.weights.tolist(), strict=True))
    assert weights == {"train/a.png": 1.0, "reg/reg/b.png": 0.25}


def test_texts_are_made_where_batches_are_asked_for(mixed):
    threads = set()

    def tokens(captions):
        threads.add(threading.current_thread())
        return {"ids": torch.tensor([[len(caption)] for caption in captions])}

    for batch in loader(mixed, tokens, train_batch_size=4).batches(0, 8):
        assert batch.texts["ids"].flatten().tolist() == [len(caption) for caption in batch.captions]
        assert len(batch.to("cpu").texts["ids"]) == len(batch)
    assert threads == {threading.current_thread()}


def test_a_picture_that_changes_during_the_training_is_a_sentence(mixed):
    one = loader(mixed, train_batch_size=1, max_data_loader_n_workers=2)
    for path in (mixed / "2_cat").glob("*.png"):
        saved(path, pattern(30, 30))
    with pytest.raises(FileError, match=r"\.png changed during the training: it was \d+x\d+ and is 30x30"):
        next(one.batches(0, 5))
    for path in (mixed / "2_cat").glob("*.png"):
        path.unlink()
    with pytest.raises(FileError, match=r"\.png can not be read any more: .*No such file"):
        one.batch(0)


def test_things_are_made_ahead_and_in_order():
    made = []
    found = prefetched(lambda number: (made.append(number), number)[1], iter(range(1000)), 2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    found.close()
    assert len(made) < 12
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefuse-data")]


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="this system does not tell the threads of a process")
def test_threads_that_read_pictures_start_no_others(tmp_path):
    for number in range(8):
        saved(tmp_path / f"{number}.png", np.zeros((512, 600, 3), np.uint8))
    usual = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        one = loader(tmp_path, resolution=(512,), train_batch_size=2, flip_aug=True, max_data_loader_n_workers=3)
        before = len(list(TASKS.iterdir()))
        with closing(one.batches(0, 16)) as batches:
            for _ in range(8):
                next(batches)
            assert len(list(TASKS.iterdir())) - before <= 3
    finally:
        torch.set_num_threads(usual)


def test_all_threads_work_at_once():
    met = threading.Barrier(3, timeout=10)
    assert list(prefetched(lambda number: (met.wait(), number)[1], range(6), 3)) == list(range(6))


@pytest.mark.parametrize("workers", [0, 3])
def test_a_fault_comes_where_its_result_would_have_come(workers):
    def make(number: int) -> int:
        if number == 4:
            raise ValueError("four")
        return number

    found = prefetched(make, range(9), workers)
    assert [next(found) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="four"):
        next(found)
