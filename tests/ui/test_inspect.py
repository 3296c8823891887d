"""The sub-tab that shows what a file is, in a browser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lib_lora.core.files import data_sha256, read_header, read_lora_file
from lib_lora.core.saving import save_tensors
from tests.hostile import HOSTILE_TEXTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

FORM = "#prefuse-tab-inspect"
PANEL = "#prefuse-inspect-panel"
CHANGES = "#prefuse-inspect-changes"
EDIT = "#prefuse-inspect-edit"


@pytest.fixture(scope="module")
def trained(server: PageServer) -> Path:
    """A LoRA with metadata of a training."""
    tags = {f"tag {number}": 100 - number for number in range(40)}
    metadata = {
        "ss_output_name": "trained",
        "ss_base_model_version": "sd_v1",
        "ss_learning_rate": "0.0003",
        "ss_tag_frequency": json.dumps({"10_girl": tags}),
        "long": "x" * 20_000,
    }
    return add_lora(server, "trained", metadata)


def add_lora(server: PageServer, name: str, metadata: dict[str, str]) -> Path:
    path = server.loras / f"{name}.safetensors"
    save_tensors(path, read_lora_file(server.loras / "stripes.safetensors").tensors, metadata)
    return path


def open_lora(page: PageDriver, name: str) -> None:
    page.sub_tab("Inspect")
    page.choose("inspect.lora", name)
    assert page.job_end(FORM).startswith("Done in")
    page.wait(f"document.querySelector('{PANEL}').textContent.includes({json.dumps(name)})")
    page.wait(f"document.querySelector('{CHANGES}').textContent.includes('No changes yet')")


def change(page: PageDriver, key: str, text: str) -> None:
    page.type("inspect.key", key)
    page.type("inspect.text", text)
    page.click("inspect.set")
    page.wait(f"document.querySelector('{CHANGES}').textContent.includes({json.dumps(key)})")


def test_a_chosen_file_is_told_with_plots_and_hashes(page: PageDriver, trained: Path) -> None:
    open_lora(page, "trained")
    told = page.text(PANEL)
    for fact in ("SD 1.x", "float16", "0.0003", data_sha256(trained)):
        assert fact in told
    assert page.count(f"{PANEL} svg") == 2
    texts = page.texts(f"{PANEL} svg text")
    assert "tag 0" in texts
    assert "tag 29" in texts
    assert "tag 30" not in texts


def test_edited_metadata_makes_a_new_file_that_is_chosen_at_once(
    page: PageDriver, server: PageServer, trained: Path
) -> None:
    open_lora(page, "trained")
    page.choose("inspect.known", "long")
    page.wait("document.querySelector('#prefuse-inspect-text textarea').value.length === 20000")
    page.click("inspect.remove")
    page.wait(f"document.querySelector('{CHANGES}').textContent.includes('(removed)')")
    change(page, "a key", "a text")
    page.type("inspect.name", "edited")
    page.click("inspect.save")
    page.wait("document.querySelector('#prefuse-inspect-lora input').value === 'edited'")
    new = server.loras / "edited.safetensors"
    expected = read_header(trained).metadata | {"a key": "a text"}
    del expected["long"]
    assert read_header(new).metadata == expected
    assert data_sha256(new) == data_sha256(trained)
    assert "edited.safetensors" in page.text(PANEL)
    assert page.texts(f"{CHANGES} td") == []


def test_saving_without_a_name_is_refused_with_a_sentence(page: PageDriver, trained: Path) -> None:
    before = trained.read_bytes()
    open_lora(page, "trained")
    change(page, "a key", "a text")
    page.click("inspect.save")
    page.wait(f"document.querySelector('{EDIT} .prefuse-refused')?.textContent.includes('give the new file a name')")
    assert trained.read_bytes() == before


def test_forty_hostile_texts_make_no_element_and_run_nothing(page: PageDriver, server: PageServer) -> None:
    count = "document.querySelectorAll('#prefuse *').length"
    counts = []
    for name, texts in (("harmless", [f"text {n}" for n in range(len(HOSTILE_TEXTS))]), ("hostile", HOSTILE_TEXTS)):
        metadata = {f"{number:02} {text}": text for number, text in enumerate(texts)}
        add_lora(server, name, metadata | {"ss_training_comment": texts[0], "ss_output_name": texts[1]})
        page.open()
        open_lora(page, name)
        counts.append(page.run(count))
    assert counts[0] == counts[1]
    assert page.run("window.hacked") is None
    assert page.texts(f"{PANEL} details td:nth-child(2)")[1] == HOSTILE_TEXTS[1]


def test_a_dropped_file_is_inspected(page: PageDriver, server: PageServer) -> None:
    page.sub_tab("Inspect")
    page.upload("inspect.file", server.loras / "outline.safetensors")
    page.wait(f"document.querySelector('{PANEL}').textContent.includes('outline')", 60)
    assert data_sha256(server.loras / "outline.safetensors") in page.text(PANEL)


def test_a_broken_file_is_told_in_a_sentence(page: PageDriver) -> None:
    page.sub_tab("Inspect")
    page.choose("inspect.lora", "cut short")
    assert "cut short" in page.job_end(FORM)
