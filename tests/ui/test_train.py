"""The sub-tab of trainings, in a browser: choose, preview, train, watch, stop with save, go on, try what was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageDraw

from lib_lora.core.files import read_lora_file
from lib_lora.hosts.standalone.libraries import missing_to_train

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

STATUS, LINE, PANEL = (f"#prefuse-train-{place}" for place in ("status", "line", "panel"))
STEPS = 400
"""More than can be done before the test stops them."""


def says(place: str, pattern: str) -> str:
    return f"/{pattern}/.test(document.querySelector('{place}').innerText)"


@pytest.fixture
def train(server: PageServer, page: PageDriver) -> Iterator[PageDriver]:
    """The page at its trainings, with a folder of drawn circles."""
    folder = server.models.parent / "train" / "circles" / "5_shapes"
    folder.mkdir(parents=True, exist_ok=True)
    for index, colour in enumerate(("red", "green", "blue", "yellow")):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((10, 10, 54, 54), fill=colour)
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} circle", encoding="utf-8")
    (folder / "broken.png").write_bytes(b"no picture")
    page.sub_tab("Train")
    page.choose("train.pictures", "circles")
    page.type("train.resolution", "64")
    page.type("train.max_train_steps", str(STEPS))
    page.type("train.name", "circles")
    yield page
    (server.loras / "circles.safetensors").unlink(missing_ok=True)


def test_a_preview_counts_pictures_steps_and_what_is_skipped(train: PageDriver, server: PageServer) -> None:
    before = sorted(server.loras.iterdir())
    assert train.job("train.preview", STATUS).startswith("Done in")
    train.wait(says(PANEL, "nothing was trained"))
    told = train.text(PANEL)
    assert "64x64 (20)" in told
    assert f"{STEPS}, which are 20 epochs" in told
    assert "5_shapes/broken.png" in told
    assert sorted(server.loras.iterdir()) == before


def test_a_name_that_is_none_is_refused(train: PageDriver) -> None:
    train.type("train.name", "../up")
    train.click("train.preview")
    train.wait(says(STATUS, "not a plain file name"))


@pytest.mark.skipif(bool(missing_to_train()), reason=f"a training needs {', '.join(missing_to_train())}")
def test_a_training_is_watched_left_stopped_and_gone_on_with(train: PageDriver, server: PageServer) -> None:
    train.click("train.start")
    train.wait(says(LINE, f"Step \\d+ of {STEPS}.*steps.s"), 120)
    train.wait("!!document.querySelector('#prefuse-train-plot svg')")
    train.click("train.pause")
    train.wait(says(LINE, "Paused"))
    train.open()
    train.sub_tab("Train")
    train.wait(says(LINE, "Paused"))
    train.click("train.pause")
    train.click("train.stop")
    assert train.job_end(STATUS).startswith("Done in")
    assert train.wait(f"document.querySelector('{PANEL} .prefuse-copy')?.dataset.text") == "<lora:circles:1>"
    train.click("train.try")
    train.wait("document.querySelector('#prefuse-generate-prompt textarea')?.value === '<lora:circles:1>'")
    train.sub_tab("Train")
    first = read_lora_file(server.loras / "circles.safetensors").metadata
    train.choose("train.earlier", "circles")
    train.wait("document.querySelector('#prefuse-train-pictures input').value === 'circles'")
    train.type("train.max_train_steps", str(int(first["ss_steps"]) + 2))
    assert train.job("train.resume", STATUS).startswith("Done in")
    last = read_lora_file(server.loras / "circles.safetensors").metadata
    assert int(last["ss_steps"]) == int(first["ss_steps"]) + 2
    train.sub_tab("Block weights")
    train.choose("blocks.lora", "circles")
