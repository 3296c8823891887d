"""Pictures of a training set at given areas: sizes, colours, captions, and what is no picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from lib_lora.__main__ import main
from lib_lora.errors import FileError, JobError, OutputError
from lib_lora.tools.images import resize_images
from lib_lora.tools.pictures import ImageForm, Resolution

ROUNDING = 1  # of 255
JPEG_ERROR = 3

OPENCV_AREA = {  # cv2.resize(pattern(10, 7), size, interpolation=cv2.INTER_AREA) of OpenCV 5.0.0
    "5x4": [[65, 136, 153, 114, 131], [175, 133, 108, 120, 132], [122, 129, 173, 126, 78]],
    "10x6": [
        [12, 55, 97, 140, 164, 188, 77, 53, 96],
        [81, 137, 172, 177, 141, 106, 111, 146, 202],
        [150, 198, 136, 104, 119, 134, 102, 128, 100],
        [204, 134, 130, 156, 97, 126, 107, 147, 133],
        [97, 129, 172, 112, 166, 154, 127, 57, 118],
        [100, 167, 92, 178, 180, 160, 104, 120, 27],
    ],
}


def pattern(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return ((x * 37 + y * 59 + x * y * 11) % 256).astype(np.uint8)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(pattern(width, height)).convert(mode)


@pytest.fixture
def folders(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    return source, tmp_path / "new"


def form(text: str = "64x64", **options) -> ImageForm:
    return ImageForm(Resolution.parse(text), **options)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((200, 100), (90, 45)),
        ((100, 200), (45, 90)),
        ((768, 768), (64, 64)),
        ((64, 64), (64, 64)),
        ((4096, 1), (4096, 1)),
        ((50, 60), (50, 60)),
        ((128, 32), (128, 32)),
        ((8000, 1), (5724, 1)),
    ],
)
def test_a_picture_keeps_its_sides_ratio_and_is_never_enlarged(size, expected):
    assert Resolution(64, 64).size_of(*size) == expected


@pytest.mark.parametrize("size", [(3000, 2000), (1999, 1501), (513, 512), (1, 400_000)])
def test_the_size_is_the_largest_of_the_area(size):
    width, height = Resolution(512, 512).size_of(*size)
    assert width * height <= 512 * 512 or min(width, height) == 1
    scale = math.sqrt(512 * 512 / (size[0] * size[1]))
    assert width == max(1, math.floor(size[0] * scale + 1e-9))
    assert height == max(1, math.floor(size[1] * scale + 1e-9))


@pytest.mark.parametrize("area", OPENCV_AREA)
def test_area_is_opencvs_area(folders, area):
    source, new = folders
    picture(10, 7).save(source / "a.png")
    resize_images(source, new, form(area, png=True))
    theirs = np.array(OPENCV_AREA[area])[:, :, None]
    assert np.abs(pixels(new / f"a+{area}.png") - theirs).max() <= ROUNDING


def test_every_size_is_made_of_the_original(folders):
    source, new = folders
    picture(200, 100).save(source / "a.png")
    resize_images(source, new, form("64x64,32x32", png=True))
    resize_images(source, new.parent / "alone", form("32x32", png=True))
    assert (pixels(new / "a+32x32.png") == pixels(new.parent / "alone/a+32x32.png")).all()


def test_small_pictures_are_written_pixel_by_pixel(folders):
    source, new = folders
    picture(20, 30).save(source / "a.png")
    resize_images(source, new, form(png=True))
    assert (pixels(new / "a+64x64.png") == pattern(20, 30)[:, :, None]).all()


@pytest.mark.parametrize(("divisible_by", "size"), [(1, (90, 45)), (8, (88, 40)), (45, (90, 45))])
def test_sides_are_cropped_in_the_middle(folders, divisible_by, size):
    source, new = folders
    picture(90, 45).save(source / "a.png")
    resize_images(source, new, form("100x100", divisible_by=divisible_by, png=True))
    left, top = (90 - size[0]) // 2, (45 - size[1]) // 2
    cut = pattern(90, 45)[top : top + size[1], left : left + size[0], None]
    assert (pixels(new / "a+100x100.png") == cut).all()


@pytest.mark.parametrize("interpolation", ["area", "cubic", "lanczos4"])
def test_a_smooth_picture_stays_what_it_is(folders, interpolation):
    source, new = folders
    gradient = np.tile(np.linspace(0, 255, 256).astype(np.uint8), (128, 1))
    Image.fromarray(gradient).save(source / "a.png")
    resize_images(source, new, form("64x32", interpolation=interpolation, png=True))
    assert pixels(new / "a+64x32.png").shape == (32, 64, 3)
    expected = np.linspace(1.5, 253.5, 64)
    assert np.abs(pixels(new / "a+64x32.png")[:, 2:-2, 0] - expected[2:-2]).max() <= 2 * ROUNDING


def test_jpeg_is_written_at_its_best_quality(folders):
    source, new = folders
    picture(60, 40).save(source / "a.png")
    resize_images(source, new, form())
    assert names(new) == ["a+64x64.jpg"]
    assert np.abs(pixels(new / "a+64x64.jpg") - pattern(60, 40)[:, :, None]).max() <= JPEG_ERROR


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_the_camera_says(folders, orientation):
    source, new = folders
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.T, 2),
        8: np.rot90,
    }[orientation]
    picture(20, 30).save(source / "a.png", exif=exif)
    resize_images(source, new, form(png=True))
    assert (pixels(new / "a+64x64.png")[:, :, 0] == turned(pattern(20, 30))).all()


def test_what_is_transparent_becomes_white(folders):
    source, new = folders
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (10, 20, 30, 255)
    Image.fromarray(clear).save(source / "alpha.png")
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([5, 6, 7, 200, 100, 50])
    palette.save(source / "palette.png", transparency=0)
    resize_images(source, new, form(png=True))
    assert pixels(new / "alpha+64x64.png")[[0, 3], 0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert pixels(new / "palette+64x64.png")[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_other_modes_become_rgb(folders):
    source, new = folders
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(source / "deep.png")
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(source / "bits.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(source / "print.jpg")
    resize_images(source, new, form(png=True))
    assert pixels(new / "deep+64x64.png")[0, :, 0].tolist() == [0, 100, 255]
    assert pixels(new / "bits+64x64.png")[0, :, 0].tolist() == [0, 255]
    assert pixels(new / "print+64x64.png")[4, 4].tolist() == pytest.approx([255, 0, 0], abs=JPEG_ERROR)


def test_broken_pictures_are_told_and_the_others_written(folders):
    source, new = folders
    picture(40, 40).save(source / "good.webp", lossless=True)
    (source / "page.JPG").write_text("<html>not found</html>")
    picture(200, 200).save(source / "cut.png")
    (source / "cut.png").write_bytes((source / "cut.png").read_bytes()[:300])
    (source / "empty.bmp").touch()
    done = resize_images(source, new, form())
    assert names(new) == ["good+64x64.jpg"]
    assert (done.pictures, done.made) == (4, 1)
    reasons = {file.name: file.reason for file in done.skipped}
    assert reasons.keys() == {"page.JPG", "cut.png", "empty.bmp"}
    assert reasons["page.JPG"] == "it is no picture"
    assert all(file.name in str(done) for file in done.skipped)


def test_a_picture_that_is_too_small_for_the_step_is_told(folders):
    source, new = folders
    picture(100, 10).save(source / "a.png")
    done = resize_images(source, new, form(divisible_by=16))
    assert done.skipped[0].reason == "at 64x64 it has 100x10 pixels, too few for sides divisible by 16"


def test_captions_go_with_every_picture_if_asked(folders):
    source, new = folders
    picture(40, 40).save(source / "a.png")
    for name in ("a.txt", "a.caption", "notes.txt"):
        (source / name).write_text(name)
    done = resize_images(source, new, form("64x64,32x32"), associated=True)
    pictures, captions = (
        ["a+32x32.jpg", "a+64x64.jpg"],
        ["a+32x32.caption", "a+32x32.txt", "a+64x64.caption", "a+64x64.txt"],
    )
    assert names(new) == sorted([*pictures, *captions, "notes.txt"])
    assert (new / "a+32x32.txt").read_text() == "a.txt"
    assert (done.made, done.copied) == (2, 5)


def test_other_files_are_copied_as_they_are(folders):
    source, new = folders
    picture(40, 40).save(source / "a.png")
    (source / "a.txt").write_text("caption")
    (source / "inner").mkdir()
    resize_images(source, new, form())
    assert names(new) == ["a+64x64.jpg", "a.txt"]


def test_existing_files_are_kept_unless_asked_otherwise(folders):
    source, new = folders
    picture(40, 40).save(source / "a.png")
    resize_images(source, new, form())
    (new / "a+64x64.jpg").write_text("mine")
    with pytest.raises(OutputError, match=r"1 of these files already, such as a\+64x64\.jpg"):
        resize_images(source, new, form())
    assert (new / "a+64x64.jpg").read_text() == "mine"
    resize_images(source, new, form(), overwrite=True)
    assert pixels(new / "a+64x64.jpg").shape == (40, 40, 3)


def test_two_pictures_of_one_name_are_refused_before_anything_is_written(folders):
    source, new = folders
    picture(40, 40).save(source / "a.png")
    picture(40, 40).save(source / "a.jpg")
    with pytest.raises(JobError, match=r"both become a\+64x64\.jpg"):
        resize_images(source, new, form())
    assert not new.exists()


def test_folders_that_can_not_be_used_are_told(folders, tmp_path):
    source, new = folders
    with pytest.raises(JobError, match="no pictures"):
        resize_images(source, new, form())
    with pytest.raises(FileError, match="can not be read"):
        resize_images(tmp_path / "nowhere", new, form())
    picture(4, 4).save(source / "a.png")
    with pytest.raises(JobError, match="the folder of the pictures itself"):
        resize_images(source, source, form())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can not be made"):
        resize_images(source, tmp_path / "file", form())


@pytest.mark.parametrize("text", ["", "512", "512x", "0x512", "512x512,", "axb", "512X512", "-1x5", "123456x1", "٣x٣"])
def test_what_is_no_resolution_is_refused(text):
    with pytest.raises(JobError, match="no resolution"):
        Resolution.parse(text)


def test_sides_divisible_by_nothing_are_refused():
    with pytest.raises(JobError, match="divisible by 0"):
        form(divisible_by=0)


def test_a_cancelled_job_leaves_whole_pictures_only(folders):
    source, new = folders
    for number in range(20):
        picture(100, 100).save(source / f"{number}.png")

    def progress(done, total):
        if done >= 3 * 100 * 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resize_images(source, new, form(png=True), progress=progress)
    assert 3 <= len(names(new)) <= 20
    for name in names(new):
        assert pixels(new / name).shape == (64, 64, 3)


def test_the_command_resizes_and_tells(folders, capsys):
    source, new = folders
    picture(100, 50).save(source / "a.png")
    (source / "b.png").touch()
    options = ["--max-resolution", "40x40,20x20", "--divisible-by", "4", "--interpolation", "cubic", "--save-as-png"]
    assert main(["resize-images", str(source), str(new), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["made"], [file["name"] for file in told["skipped"]]) == (2, ["b.png"])
    assert pixels(new / "a+40x40.png").shape == (28, 56, 3)
    assert main(["resize-images", str(source), str(new), *options]) == 1
    assert "--force" in capsys.readouterr().err
