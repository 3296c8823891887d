"""What the page shows of a file, and the changes of its metadata that it collects; without a browser."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
import torch
from toys import sd1_unet

from lib_lora.catalog import LoraCatalog
from lib_lora.core.files import data_sha256, read_header
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_tensors
from lib_lora.errors import JobError, OutputError, UnsafePathError
from lib_lora.tools.inspect import GivenModel, inspect_file
from lib_lora.ui.inspection import MOST_ROWS, inspection_panel
from lib_lora.ui.metadata_editor import Edited, changes_panel
from lib_lora.ui.texts import Texts, languages
from tests.hostile import HOSTILE_TEXTS

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "lora_unet_down_blocks_0_attentions_0_proj_in"
HARMLESS = "harmless"


class Elements(HTMLParser):
    """Which elements and attributes a page would have, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.update([tag, *(f"{tag} {name}" for name, _ in attrs)])

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


class Host:
    """Folders of a program around the page."""

    def __init__(self, folder: Path) -> None:
        self.catalog = LoraCatalog([folder / "loras"])
        self.model_folder = folder / "models"


def lora(folder: Path, metadata: dict[str, str], value: float = 0.5) -> Path:
    tensors = {f"{LAYER}.lora_up.weight": torch.full((8, 2), value), f"{LAYER}.lora_down.weight": torch.ones(2, 8)}
    path = folder / "file.safetensors"
    save_tensors(path, tensors | {f"{LAYER}.alpha": torch.tensor(1.0)}, metadata, overwrite=True)
    return path


def checkpoint(folder: Path) -> Path:
    names = ("input_blocks.0.0", "input_blocks.1.1.proj_in", "output_blocks.0.0.in_layers.2")
    path = folder / "model.safetensors"
    save_tensors(path, {f"model.diffusion_model.{name}.weight": torch.ones(4, 4, 1, 1) for name in names})
    return path


def panel(path: Path, language: str = "en") -> Elements:
    return Elements(inspection_panel(Texts(language), inspect_file(path)))


def edited(path: Path, *, is_copy: bool = False) -> Edited:
    return Edited(path, inspect_file(path), is_copy)


def save(given: Edited, folder: Path, name: str = "", *, replace: bool = False) -> Path:
    return given.save(Host(folder), name, replace=replace, progress=lambda done, total: None).path


def everywhere(text: str) -> dict[str, str]:
    """A text as value, as key, as tag, as folder."""
    return {
        "ss_output_name": text,
        "ss_training_comment": text,
        "modelspec.author": text,
        "ss_tag_frequency": json.dumps({text: {text: 3}}),
        "ss_dataset_dirs": json.dumps({text: {"n_repeats": 1, "img_count": 2}}),
        f"key {text}": text,
    }


def test_there_are_forty_hostile_texts() -> None:
    assert len(set(HOSTILE_TEXTS)) >= 40


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_hostile_metadata_makes_no_element_and_no_attribute(tmp_path: Path, text: str) -> None:
    expected = panel(lora(tmp_path, everywhere(HARMLESS))).found
    assert expected["svg"] == 2
    found = panel(lora(tmp_path, everywhere(text))).found
    # a plot draws a letter that its font lacks, and a text of spaces, with fewer elements
    assert not {name for name in found if name not in expected}
    assert {name: found[name] for name in ("table", "tr", "td", "details", "svg", "button", "script", "img")} == {
        name: expected[name] for name in ("table", "tr", "td", "details", "svg", "button", "script", "img")
    }


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_hostile_changes_make_no_element(tmp_path: Path, text: str) -> None:
    given = edited(lora(tmp_path, {"a": "b"}))
    shown, expected = (
        Elements(changes_panel(Texts(), given.change(f"key {one}", one).change("a", one))).found
        for one in (text, HARMLESS)
    )
    assert shown == expected


def test_facts_hashes_and_training_are_told(tmp_path: Path) -> None:
    path = lora(tmp_path, {"ss_learning_rate": "0.0003", "ss_tag_frequency": json.dumps({"10_x": {"blue eyes": 7}})})
    shown = panel(path)
    with path.open("rb") as file:
        content = file.read()
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[start:]).hexdigest()
    for told in (digest, digest[:12], "LoRA", "0.0003", "blue eyes", "float32"):
        assert told in shown.text
    assert shown.found["button data-text"] == 2


def test_nan_is_told_with_the_tensor(tmp_path: Path) -> None:
    assert f"1: {LAYER}.lora_up.weight" in panel(lora(tmp_path, {}, value=float("nan"))).text


@pytest.mark.parametrize("language", languages())
def test_the_loaded_model_is_told_with_what_it_lacks(tmp_path: Path, language: str) -> None:
    layers = (LAYER, LAYER.replace("attentions_0", "attentions_9"))
    tensors = {f"{layer}.lora_up.weight": torch.ones(8, 2, 1, 1) for layer in layers}
    tensors |= {f"{layer}.lora_down.weight": torch.ones(2, 8, 1, 1) for layer in layers}
    save_tensors(tmp_path / "lora.safetensors", tensors)
    found = inspect_file(tmp_path / "lora.safetensors", GivenModel(KeyMap.from_modules({"unet": sd1_unet()})))
    assert found.fit is not None
    text = Elements(inspection_panel(Texts(language), found)).text
    assert found.fit.problem is None
    assert "down_blocks_0_attentions_9_proj_in" in text
    assert Texts(language)("inspect.matched", matched=1, total=2, model=found.fit.model) in text


@pytest.mark.parametrize("language", languages())
def test_every_kind_of_file_is_told_in_every_language(tmp_path: Path, language: str) -> None:
    save_tensors(tmp_path / "else.safetensors", {"weights": torch.ones(2)})
    for path in (lora(tmp_path, everywhere("x")), checkpoint(tmp_path), tmp_path / "else.safetensors"):
        assert path.name in panel(path, language).text


def test_thousands_of_keys_do_not_fill_the_page(tmp_path: Path) -> None:
    shown = panel(lora(tmp_path, {f"key {number}": "x" for number in range(5000)}))
    assert shown.found["tr"] < MOST_ROWS + 50
    assert "and 4800 more" in shown.text


def test_long_texts_are_cut_in_the_table_and_whole_in_the_editor(tmp_path: Path) -> None:
    path = lora(tmp_path, {"long": "y" * 100_000})
    assert "100,000" in panel(path).text
    assert len(panel(path).text) < 5000
    assert edited(path).text("long") == "y" * 100_000


def test_what_is_set_back_is_no_change(tmp_path: Path) -> None:
    given = edited(lora(tmp_path, {"a": "1", "b": "2"}))
    changed = given.change("a", "new").change("b", None).change("c", "3")
    assert changed.changes == {"a": "new", "b": None, "c": "3"}
    assert changed.change("a", "1").change("b", "2").change("c", None) == given
    assert changed.undone() == given


def test_a_new_file_has_the_changes_and_the_same_tensors(tmp_path: Path) -> None:
    source = lora(tmp_path, {"a": "1", "b": "2"})
    before = source.read_bytes()
    new = save(edited(source).change("a", "new").change("b", None).change("c", "3"), tmp_path, "other")
    assert new == tmp_path / "loras" / "other.safetensors"
    assert read_header(new).metadata == {"a": "new", "c": "3"}
    assert data_sha256(new) == data_sha256(source)
    assert source.read_bytes() == before


def test_the_file_itself_is_replaced_only_if_that_is_ticked(tmp_path: Path) -> None:
    source = lora(tmp_path, {"a": "1"})
    changed = edited(source).change("a", "2")
    with pytest.raises(JobError, match="give the new file a name, or tick"):
        save(changed, tmp_path)
    with pytest.raises(JobError, match="one of both"):
        save(changed, tmp_path, "other", replace=True)
    digest = data_sha256(source)
    assert save(changed, tmp_path, replace=True) == source
    assert read_header(source).metadata == {"a": "2"}
    assert data_sha256(source) == digest


def test_a_dropped_file_is_never_replaced(tmp_path: Path) -> None:
    source = lora(tmp_path, {})
    with pytest.raises(JobError, match="a copy of yours"):
        save(edited(source, is_copy=True).change("a", "2"), tmp_path, replace=True)
    assert read_header(save(edited(source, is_copy=True).change("a", "2"), tmp_path, "kept")).metadata == {"a": "2"}


def test_a_checkpoint_goes_to_the_models(tmp_path: Path) -> None:
    new = save(edited(checkpoint(tmp_path)).change("modelspec.title", "mine"), tmp_path, "mine")
    assert new == tmp_path / "models" / "mine.safetensors"


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "CON", "x\x00", "~/x/y"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePathError):
        save(edited(lora(tmp_path, {})).change("a", "2"), tmp_path, name)
    assert not list((tmp_path / "loras").iterdir())


def test_an_older_file_of_that_name_stays(tmp_path: Path) -> None:
    changed = edited(lora(tmp_path, {})).change("a", "2")
    first = save(changed, tmp_path, "taken").read_bytes()
    with pytest.raises(OutputError, match="taken"):
        save(changed.change("a", "3"), tmp_path, "taken")
    assert (tmp_path / "loras" / "taken.safetensors").read_bytes() == first
