"""The sub-tab of jobs on files, in a browser: choose, preview, start, watch, cancel, use what was made."""

from __future__ import annotations

import json
import shutil
import signal
import time
from typing import TYPE_CHECKING

import pytest
import torch

from lib_lora.core.saving import save_tensors
from tests.family_files import family_tensors
from tests.ui.driver import PageDriver
from tests.ui.serving import PageServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.browser import Browser

MERGE = "#prefuse-workshop-merge"
INNER_TABS = '#prefuse-workshop [role="tablist"] button, #prefuse-workshop > .tab-nav > button'
BLOCK = "mid_block.attentions.0.transformer_blocks"
SIDE = 1280
LAYERS = tuple(f"{BLOCK}.{block}.attn1.to_{part}" for block in range(5) for part in ("q", "k", "v", "out.0"))
COUNT = 60
LONG = " ".join(f"<lora:dense{number}:0.1>" for number in range(COUNT))
"""A merge that takes more than 3 seconds anywhere: each LoRA is 20 whole matrices more."""
CANCEL_SECONDS = 5.0
"""One layer of `LONG`, and what a busy machine adds."""


def fill(server: PageServer) -> None:
    """A model of a few wide layers, and LoRAs whose updates are whole matrices."""
    (server.models / "wide" / "unet").mkdir(parents=True)
    (server.models / "wide" / "model_index.json").write_text("{}")
    weights = {f"{layer}.weight": torch.full((SIDE, SIDE), 0.5, dtype=torch.float16) for layer in LAYERS}
    save_tensors(server.models / "wide" / "unet" / "diffusion_pytorch_model.safetensors", weights)
    for number in range(COUNT):
        tensors = {
            f"lora_unet_{layer.replace('.', '_')}.{suffix}": tensor
            for layer in LAYERS
            for suffix, tensor in family_tensors("LoHa", (SIDE, SIDE), number).items()
        }
        save_tensors(server.loras / f"dense{number}.safetensors", tensors)


@pytest.fixture(scope="module")
def wide(server: PageServer) -> PageServer:
    fill(server)
    return server


@pytest.fixture
def workshop(wide: PageServer, page: PageDriver) -> Iterator[PageDriver]:
    """The page at its workshop; what a test has made is removed."""
    before = {*wide.models.iterdir(), *wide.loras.iterdir()}
    page.sub_tab("Workshop")
    yield page
    for made in {*wide.models.iterdir(), *wide.loras.iterdir()} - before:
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def open_form(page: PageDriver, title: str) -> None:
    found = f"[...document.querySelectorAll('{INNER_TABS}')].find((one) => one.textContent.trim() === '{title}')"
    page.wait(f"!!{found}?.offsetParent")
    page.run(f"{found}.click()")


def ask_merge(page: PageDriver, tags: str, name: str) -> None:
    page.choose("workshop.merge.model", "wide")
    page.type("workshop.merge.loras", tags)
    page.wait(f"{suggested('workshop.merge.name')}?.startsWith('wide-')")
    page.type("workshop.merge.name", name)


def value(key: str) -> str:
    place = f"#prefuse-{key.replace('.', '-').replace('_', '-')}"
    return f"document.querySelector('{place} textarea, {place} input')?.value"


def suggested(key: str) -> str:
    """The name that is shown in grey as long as none is written."""
    return value(key).removesuffix("value") + "placeholder"


def started(page: PageDriver) -> None:
    page.click("workshop.merge.start")
    page.wait(f"document.querySelector('{MERGE} progress')?.value > 0")


def facts(page: PageDriver, form: str) -> dict[str, str]:
    """The rows of the table of facts."""
    page.wait(f"!!document.querySelector('{form} .prefuse-outcome')")
    rows = page.run(
        f"""[...document.querySelector('{form} .prefuse-outcome table').rows]
        .map((row) => [...row.cells].map((cell) => cell.textContent))"""
    )
    return dict(rows)


def test_a_prompt_is_baked_with_a_bar_and_the_model_can_be_chosen_at_once(page: PageDriver, wide: PageServer) -> None:
    page.type("generate.prompt", f"a cat {LONG}")
    page.click("generate.bake")
    page.wait(f"{value('workshop.merge.loras')} === {json.dumps(f'a cat {LONG}')}")
    page.choose("workshop.merge.model", "wide")
    page.wait(f"{suggested('workshop.merge.name')}?.startsWith('wide-')")
    page.type("workshop.merge.name", "baked")
    page.click("workshop.merge.preview")
    page.wait(f"!!document.querySelector('{MERGE} .prefuse-preview')")
    planned = facts(page, MERGE)
    assert not (wide.models / "baked").exists()
    started(page)
    page.wait(f"/^\\d+ %, .* so far, about .* left/.test(document.querySelector('{MERGE} .prefuse-job').innerText)")
    assert page.job_end(MERGE).startswith("Done in")
    page.wait(f"!!document.querySelector('{MERGE} .prefuse-written')")
    made = facts(page, MERGE)
    folder = wide.models / "baked"
    try:
        assert {**made, "Disk": ""} == {**planned, "Disk": ""}
        assert made["Where"] == str(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert made["Size"] == f"{size / 1e6:.2f} MB"
        assert page.wait("!!document.querySelector('#prefuse-workshop-merge-use')?.offsetParent")
        page.choose("workshop.merge.model", "baked")
        page.sub_tab("Generate")
        page.choose("generate.model", "demo")
    finally:
        shutil.rmtree(folder)


def test_a_merge_is_cancelled_at_once_and_leaves_nothing(workshop: PageDriver, wide: PageServer) -> None:
    before = sorted(wide.models.iterdir())
    ask_merge(workshop, LONG, "cancelled")
    started(workshop)
    begun = time.monotonic()
    workshop.click("workshop.merge.stop")
    assert workshop.job_end(MERGE).startswith("Cancelled after")
    assert time.monotonic() - begun < CANCEL_SECONDS
    assert sorted(wide.models.iterdir()) == before


def test_a_job_is_found_again_on_a_page_that_is_opened_anew_while_it_runs(
    workshop: PageDriver, wide: PageServer
) -> None:
    before = sorted(wide.models.iterdir())
    ask_merge(workshop, LONG, "found")
    started(workshop)
    workshop.open()
    workshop.sub_tab("Workshop")
    workshop.wait(f"document.querySelector('{MERGE} progress')?.value > 0")
    workshop.click("workshop.merge.stop")
    assert workshop.job_end(MERGE).startswith("Cancelled after")
    assert sorted(wide.models.iterdir()) == before
    workshop.open()
    workshop.sub_tab("Workshop")
    workshop.wait("!!document.querySelector('#prefuse-workshop-merge-start')?.offsetParent")
    assert not workshop.text(f"{MERGE} .prefuse-job"), "its end was told before"


def test_a_second_click_waits_and_says_so(workshop: PageDriver) -> None:
    ask_merge(workshop, LONG, "queued")
    started(workshop)
    workshop.click("workshop.merge.start")
    workshop.wait(f"/1 more of this form/.test(document.querySelector('{MERGE}').innerText)")
    workshop.click("workshop.merge.stop")
    workshop.job_end(MERGE)


def test_another_form_waits_for_its_turn_and_says_so(workshop: PageDriver) -> None:
    open_form(workshop, "Resize")
    workshop.choose("workshop.resize.lora", "dense1")
    open_form(workshop, "Merge")
    ask_merge(workshop, LONG, "first")
    started(workshop)
    open_form(workshop, "Resize")
    workshop.click("workshop.resize.start")
    workshop.wait("/Waiting for 1 other/.test(document.querySelector('#prefuse-workshop-resize').innerText)")
    assert "no layers with LoRA's factors" in workshop.job_end("#prefuse-workshop-resize"), "its turn has come"


def test_a_name_is_refused_and_the_form_stays_as_it_is(workshop: PageDriver, wide: PageServer) -> None:
    before = set(wide.models.iterdir())
    ask_merge(workshop, "<lora:dense1:0.5>", "../up")
    workshop.click("workshop.merge.start")
    assert "not a plain file name" in workshop.job_end(MERGE)
    assert workshop.value("workshop.merge.loras") == "<lora:dense1:0.5>"
    workshop.type("workshop.merge.name", "wide")
    workshop.click("workshop.merge.start")
    workshop.wait(f"/choose another name/.test(document.querySelector('{MERGE} .prefuse-job').innerText)")
    assert set(wide.models.iterdir()) == before


def test_a_new_lora_can_be_copied_as_a_tag_and_chosen_in_every_form(workshop: PageDriver, wide: PageServer) -> None:
    open_form(workshop, "Resize")
    workshop.choose("workshop.resize.lora", "stripes")
    workshop.wait(f"{suggested('workshop.resize.name')}?.startsWith('stripes-r')")
    workshop.type("workshop.resize.rank", "2")
    workshop.wait(f"{suggested('workshop.resize.name')} === 'stripes-r2'")
    workshop.click("workshop.resize.start")
    assert workshop.job_end("#prefuse-workshop-resize").startswith("Done in")
    assert workshop.wait("document.querySelector('.prefuse-copy')?.dataset.text") == "<lora:stripes-r2:1>"
    assert facts(workshop, "#prefuse-workshop-resize")["Ranks"].startswith("2 (")
    assert (wide.loras / "stripes-r2.safetensors").is_file()
    open_form(workshop, "Split")
    workshop.choose("workshop.split.lora", "stripes-r2")


def test_a_merged_model_is_used_by_a_click(workshop: PageDriver) -> None:
    workshop.choose("workshop.merge.model", "demo")
    workshop.type("workshop.merge.loras", "<lora:stripes:0.5>")
    workshop.wait(f"{suggested('workshop.merge.name')} === 'demo-stripes'")
    workshop.click("workshop.merge.start")
    workshop.wait("!!document.querySelector('#prefuse-workshop-merge-use')?.offsetParent")
    workshop.click("workshop.merge.use")
    workshop.wait(f"/made with demo-stripes now/.test(document.querySelector('{MERGE}').innerText)")
    workshop.sub_tab("Generate")
    workshop.wait(f"{value('generate.model')} === 'demo-stripes'")
    workshop.choose("generate.model", "demo")
    assert workshop.job_end("#prefuse-tab-generate").startswith("Done in")


def test_the_suggested_name_never_replaces_what_was_written(workshop: PageDriver) -> None:
    open_form(workshop, "Resize")
    workshop.type("workshop.resize.name", "mine")
    workshop.choose("workshop.resize.lora", "stripes")
    workshop.wait(f"{suggested('workshop.resize.name')} === 'stripes-r16'")
    assert workshop.value("workshop.resize.name") == "mine"


def test_tags_are_added_by_choosing_and_ranks_are_asked_for_where_they_count(workshop: PageDriver) -> None:
    open_form(workshop, "Combine")
    workshop.choose("workshop.combine.picked", "stripes")
    workshop.type("workshop.combine.strength", "-0.5")
    workshop.click("workshop.combine.add")
    workshop.wait(f"{value('workshop.combine.loras')} === '<lora:stripes:-0.5>'")
    workshop.wait(f"{suggested('workshop.combine.name')} === 'stripes-2'")
    rank = "document.querySelector('#prefuse-workshop-combine-rank')?.offsetParent"
    assert not workshop.run(f"!!{rank}")
    workshop.choose("workshop.combine.method", "svd")
    assert workshop.wait(f"!!{rank}")


def test_a_server_that_is_killed_in_a_job_leaves_no_file_of_its_name(browser: Browser, tmp_path: Path) -> None:
    server = PageServer(tmp_path)
    fill(server)
    server.start()
    try:
        page = PageDriver(browser, server.address).open()
        page.sub_tab("Workshop")
        ask_merge(page, LONG, "killed")
        started(page)
    finally:
        server.end(signal.SIGKILL)
    visible = {file.name for file in server.models.iterdir() if not file.name.startswith(".")}
    assert visible == {"wide"}
