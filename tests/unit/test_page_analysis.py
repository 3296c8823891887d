"""Pictures of each block as the page's form asks for them, and files of the page; without a browser."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from lib_lora.core.saving import save_tensors
from lib_lora.errors import JobError, RequestError, TagError
from lib_lora.hosts.host import SEEDS, Picture
from lib_lora.prompt.block_names import LISTS
from lib_lora.prompt.tags import parse_prompt
from lib_lora.report import RefusedLora, SessionReport
from lib_lora.tools.analyse import analyse_blocks
from lib_lora.ui.block_series import Series
from lib_lora.ui.exports import save_exports
from lib_lora.ui.jobs import Jobs, Slot
from lib_lora.ui.latest import Latest

if TYPE_CHECKING:
    from pathlib import Path

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import GenerateRequest
    from lib_lora.tools.analyse import BlockAnalysis

LAYERS = {
    "IN01": "lora_unet_down_blocks_0_attentions_0_proj_in",
    "OUT03": "lora_unet_up_blocks_1_attentions_0_proj_in",
    "OUT05": "lora_unet_up_blocks_1_attentions_2_proj_in",
}
GREY = {"IN01": 10, "OUT03": 20, "OUT05": 40}
STEPS = 4


class Host:
    """Draws pictures that are as bright as the blocks that a prompt weighs."""

    def __init__(self, refused: str = "") -> None:
        self.prompts: list[str] = []
        self._refused = refused

    def generate(self, request: GenerateRequest, progress: Progress, *, save: bool = True) -> list[Picture]:
        assert not save
        self.prompts.append(request.prompt)
        for step in range(request.steps):
            progress(step + 1, request.steps)
        return [Picture(Image.new("RGB", (16, 8), (brightness(request.prompt),) * 3), report=self._report())]

    def _report(self) -> SessionReport:
        return SessionReport(refused=(RefusedLora("mine", self._refused),) if self._refused else ())


def weights_of(prompt: str) -> dict[str, float]:
    """Block → weight that the prompt's tag asks for."""
    for one in parse_prompt(prompt).requests:
        if one.name == "mine" and one.blocks is not None:
            numbers = [float(number) * one.unet for number in one.blocks.weights.split(",")]
            return dict(zip(LISTS[len(numbers)], numbers, strict=True))
    return {}


def brightness(prompt: str) -> int:
    weights = weights_of(prompt)
    return round(sum(grey * weights.get(block, 0) for block, grey in GREY.items()))


@pytest.fixture
def analysis(tmp_path: Path) -> BlockAnalysis:
    tensors = {}
    for layer in LAYERS.values():
        tensors |= {f"{layer}.lora_up.weight": torch.ones(8, 2), f"{layer}.lora_down.weight": torch.ones(2, 8)}
    save_tensors(tmp_path / "mine.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    return analyse_blocks(tmp_path / "mine.safetensors")


def series(
    analysis: BlockAnalysis, *chosen: str, mode: str = "only", strength: float = 1.0, seed: float | None = 3
) -> Series:
    return Series.of("mine", analysis, chosen, mode, strength, seed, STEPS, 0, 0)


@pytest.mark.parametrize("mode", ["only", "without"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_each_block_changes_the_picture_by_its_own_part(analysis: BlockAnalysis, mode: str, strength: float) -> None:
    found = series(analysis, mode=mode, strength=strength).draw(Host(), "a cat", [], lambda done, total: None)
    assert {one.block: one.rms for one in found.changes} == {block: grey * strength for block, grey in GREY.items()}
    assert found.whole.rms == sum(GREY.values()) * strength


def test_only_the_chosen_blocks_are_drawn(analysis: BlockAnalysis) -> None:
    host = Host()
    found = series(analysis, "OUT03").draw(host, "a cat", [], lambda done, total: None)
    assert [one.block for one in found.changes] == ["OUT03"]
    assert "IN01" not in found.to_csv()
    ones = [{block for block, weight in weights_of(prompt).items() if weight} for prompt in host.prompts]
    assert ones == [set(), {*LISTS[17]}, {"OUT03"}]


def test_the_prompt_and_its_other_tags_are_kept(analysis: BlockAnalysis) -> None:
    host = Host()
    series(analysis, "IN01").draw(host, "a cat <lora:other:0.7> asleep", [], lambda done, total: None)
    assert all(prompt.strip().endswith("a cat <lora:other:0.7> asleep") for prompt in host.prompts)
    assert [[one.name for one in parse_prompt(prompt).requests] for prompt in host.prompts] == [
        ["other"],
        ["mine", "other"],
        ["mine", "other"],
    ]


def test_each_picture_is_handed_over_as_soon_as_it_is_there(analysis: BlockAnalysis) -> None:
    made: list[tuple[str, Image.Image]] = []
    seen: list[tuple[int, int, int]] = []
    series(analysis).draw(Host(), "", made, lambda done, total: seen.append((done, total, len(made))))
    assert [name for name, _ in made] == ["no LoRA", "whole", *GREY]
    assert seen == [(step + 1, 5 * STEPS, step // STEPS) for step in range(5 * STEPS)]


def test_a_refused_lora_ends_the_drawing_with_its_reason(analysis: BlockAnalysis) -> None:
    host = Host("mine does not fit this model")
    with pytest.raises(JobError, match="mine does not fit this model"):
        series(analysis).draw(host, "", [], lambda done, total: None)
    assert len(host.prompts) == 1


def test_what_can_not_be_drawn_is_refused_before_the_first_picture(analysis: BlockAnalysis) -> None:
    with pytest.raises(JobError, match="changes none of these blocks: M00"):
        series(analysis, "M00")
    with pytest.raises(TagError, match="the strength is 1000"):
        series(analysis, strength=1000)
    with pytest.raises(TagError, match="nan"):
        series(analysis, strength=float("nan"))
    with pytest.raises(RequestError, match="multiple of 8"):
        Series.of("mine", analysis, (), "only", 1, 1, STEPS, 100, 0)
    with pytest.raises(RequestError, match="The seed"):
        series(analysis, seed=float(SEEDS))


def test_a_random_seed_is_one_seed_for_all_pictures(analysis: BlockAnalysis) -> None:
    assert series(analysis, seed=-1).request.seed != series(analysis, seed=None).request.seed


@pytest.mark.parametrize("title", ["blocks-mine", "../../etc/x", "CON", "a:b*c", "初音", "", "x" * 500])
def test_exports_stay_in_their_folder_under_free_names(tmp_path: Path, title: str) -> None:
    folder = tmp_path / "outputs"
    first = save_exports(folder, title, {".csv": b"1", ".png": b"2"})
    first[0].unlink()
    second = save_exports(folder, title, {".csv": b"3", ".png": b"4"})
    assert {path.parent for path in (*first, *second)} == {folder}
    assert [path.suffix for path in first] == [".csv", ".png"]
    assert second[0].stem == second[1].stem != first[1].stem
    assert [path.read_bytes() for path in (first[1], *second)] == [b"2", b"3", b"4"]


def test_a_newer_choice_silences_the_one_before() -> None:
    latest = Latest(Slot(Jobs()))
    begun, go = threading.Event(), threading.Event()

    def first(progress: Progress) -> str:
        begun.set()
        go.wait(10)
        progress(1, 2)
        return "first"

    older = latest.run(first)
    assert next(older) is not None
    assert begun.wait(10)
    newer = latest.run(lambda _: "second")
    assert next(newer) is not None
    go.set()
    assert [state for state in older if state is not None] == []
    states = [state for state in newer if state is not None]
    assert states[-1].result == "second"
