"""Each form of the workshop against its tool called directly: the same answers make the same file, bit for bit."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.models import BaseModel
from lib_lora.core.saving import no_progress
from lib_lora.errors import JobError, ModelError, OutputError, PrefuseError, UnknownLoraError, UnsafePathError
from lib_lora.hosts.standalone.host import StandaloneHost
from lib_lora.hosts.standalone.vocabulary import tokenizer_files
from lib_lora.tools.combine import combine
from lib_lora.tools.convert import convert_lora
from lib_lora.tools.convert_checkpoint import to_diffusers, to_single
from lib_lora.tools.dylora import split_dylora
from lib_lora.tools.extract import extract
from lib_lora.tools.given import prompted_loras
from lib_lora.tools.merge import merge_loras
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize
from lib_lora.ui.workshop_forms import NONE
from lib_lora.ui.workshop_jobs import FORMS
from tests.tool_jobs import write_sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lib_lora.tools.outcome import Outcome
    from lib_lora.ui.workshop_forms import Form

BY_KEY = {form.key: form for form in FORMS}
NAME = "made"
DATE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
MERGED, COMBINED = "a cat <lora:tiny:0.6:-0.3>", "<lora:a:0.5> and <lora:b:0.75:lbw=MIDD>"


class Folders:
    """A host with some LoRAs and models, and a place for what is made without it."""

    def __init__(self, folder: Path) -> None:
        self.loras, self.models, self.direct = (folder / name for name in ("loras", "models", "direct"))
        for made in (self.loras, self.models, self.direct):
            made.mkdir()
        (folder / "written").mkdir()
        source = write_sources(folder / "written")
        for file in source.glob("*.safetensors"):
            shutil.move(file, (self.models if file.stem in ("model", "tuned") else self.loras) / file.name)
        shutil.move(source / "model", self.models / "folder")
        self.host = StandaloneHost(lora_folders=[self.loras], model_folder=self.models, picture_folder=folder / "out")

    def prompted(self, prompt: str) -> Any:
        return prompted_loras(prompt, LoraCatalog([self.loras]))

    def answered(self, form: Form, answers: dict[str, Any]) -> dict[str, Any]:
        """What stands in all fields: the answers, else what stands there at first."""
        return {one.name: one.value for one in form.fields} | answers

    def start(self, key: str, answers: dict[str, Any], name: str = NAME, **options: Any) -> Outcome:
        form = BY_KEY[key]
        given = {"replace": False, "preview": False, "progress": no_progress} | options
        return form.start(self.host, self.answered(form, answers), name, **given)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def folders(shared: Folders) -> Iterator[Folders]:
    yield shared
    for folder in (shared.loras, shared.models, shared.direct):
        for made in folder.glob(f"{NAME}*"):
            shutil.rmtree(made) if made.is_dir() else made.unlink()


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Folders, Path], Outcome]]] = {
    "merge": (
        "merge",
        {"model": "model", "loras": MERGED, "save_precision": "fp16", "hashed": True},
        lambda on, out: merge_loras(
            on.models / "model.safetensors", on.prompted(MERGED), out, save_precision="fp16", hashed=True
        ),
    ),
    "merge into a folder": (
        "merge",
        {"model": "folder", "loras": MERGED, "precision": "fp16"},
        lambda on, out: merge_loras(on.models / "folder", on.prompted(MERGED), out.with_suffix(""), precision="fp16"),
    ),
    "combine exactly": ("combine", {"loras": COMBINED}, lambda on, out: combine(on.prompted(COMBINED), out)),
    "combine by svd": (
        "combine",
        {"loras": COMBINED, "method": "svd", "rank": 3, "conv_rank": 2, "dtype": "bf16"},
        lambda on, out: combine(on.prompted(COMBINED), out, method="svd", rule=RankRule(3, 2), dtype=torch.bfloat16),
    ),
    "combine dynamically": (
        "combine",
        {"loras": COMBINED, "method": "svd", "rank": 6, "dynamic": "sv_fro", "parameter": 0.8},
        lambda on, out: combine(on.prompted(COMBINED), out, method="svd", rule=RankRule(6, None, "sv_fro", 0.8)),
    ),
    "extract": (
        "extract",
        {"base": "model", "tuned": "tuned", "rank": 2, "conv_rank": 3, "dtype": "fp16"},
        lambda on, out: extract(
            on.models / "model.safetensors",
            on.models / "tuned.safetensors",
            out,
            rank=2,
            conv_rank=3,
            dtype=torch.float16,
        ),
    ),
    "extract as kohya does": (
        "extract",
        {"base": "folder", "tuned": "tuned", "rank": 2, "clamp": 0.99, "min_diff": 100},
        lambda on, out: extract(
            on.models / "folder", on.models / "tuned.safetensors", out, rank=2, clamp=0.99, min_diff=100.0
        ),
    ),
    "resize": (
        "resize",
        {"lora": "a", "rank": 2},
        lambda on, out: resize(on.loras / "a.safetensors", out, RankRule(2)),
    ),
    "resize dynamically like kohya": (
        "resize",
        {"lora": "a", "rank": 4, "dynamic": "sv_ratio", "parameter": 2, "kohya": True, "dtype": "float"},
        lambda on, out: resize(
            on.loras / "a.safetensors", out, RankRule(4, None, "sv_ratio", 2.0, True), dtype=torch.float32
        ),
    ),
    "split": (
        "split",
        {"lora": "half", "unit": 2},
        lambda on, out: split_dylora(on.loras / "half.safetensors", out, 2),
    ),
    "convert to PEFT's layout": (
        "convert_lora",
        {"lora": "a", "to": "peft", "family": "SD1"},
        lambda on, out: convert_lora(on.loras / "a.safetensors", "peft", out, family=BaseModel.SD1),
    ),
    "convert to kohya's layout": (
        "convert_lora",
        {"lora": "peft", "family": "SD1"},
        lambda on, out: convert_lora(on.loras / "peft.safetensors", "kohya", out, family=BaseModel.SD1),
    ),
    "convert to one file": (
        "convert_model",
        {"model": "folder"},
        lambda on, out: to_single(on.models / "folder", out),
    ),
    "convert to a folder": (
        "convert_model",
        {"model": "model", "to": "diffusers", "config": "folder", "prediction": "v"},
        lambda on, out: to_diffusers(
            on.models / "model.safetensors",
            out.with_suffix(""),
            config=on.models / "folder",
            tokenizer=lambda pad: tokenizer_files(None, pad),
            prediction="v",
        ),
    ),
}


def contents(paths: tuple[Path, ...]) -> dict[str, bytes]:
    """Every file of a result, by its name there, without the second in which it was made."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return {
        str(file.relative_to(paths[0].parent)): DATE.sub(b"", file.read_bytes()) for file in files if file.is_file()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_form_makes_the_file_that_its_tool_makes(folders: Folders, case: str) -> None:
    key, answers, direct = CASES[case]
    made = folders.start(key, answers)
    wanted = direct(folders, folders.direct / f"{NAME}.safetensors")
    assert {path.parent for path in made.paths} == {BY_KEY[key].folder(folders.host)}
    assert contents(made.paths) == contents(wanted.paths)
    assert contents(made.paths)


@pytest.mark.parametrize("case", CASES)
def test_a_preview_writes_nothing_and_tells_the_size_and_the_place(folders: Folders, case: str) -> None:
    key, answers, _ = CASES[case]
    planned = folders.start(key, answers, preview=True)
    assert not any(path.exists() for path in planned.paths)
    made = folders.start(key, answers)
    assert planned.paths == made.paths
    assert planned.size == made.size or (planned.at_most and planned.size > made.size)
    assert set(planned.metadata) == set(made.metadata)


@pytest.mark.parametrize("key", BY_KEY)
def test_an_empty_form_is_refused_with_a_sentence(folders: Folders, key: str) -> None:
    with pytest.raises(PrefuseError, match=r"chosen|names no LoRA"):
        folders.start(key, {})


WRONG: dict[str, tuple[str, dict[str, Any], type[PrefuseError]]] = {
    "a number that was deleted": ("resize", {"lora": "a", "rank": None}, JobError),
    "a number that is none": ("resize", {"lora": "a", "rank": float("nan")}, JobError),
    "an option that there is not": ("resize", {"lora": "a", "dynamic": "../up"}, JobError),
    "a LoRA that there is not": ("resize", {"lora": "../a"}, UnknownLoraError),
    "a model that there is not": ("merge", {"model": "/etc/passwd", "loras": MERGED}, ModelError),
    "a prompt without tags": ("merge", {"model": "model", "loras": "a cat"}, JobError),
    "a configuration that there is not": (
        "convert_model",
        {"model": "model", "to": "diffusers", "config": "?"},
        ModelError,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_refused(folders: Folders, wrong: str) -> None:
    key, answers, error = WRONG[wrong]
    with pytest.raises(error):
        folders.start(key, answers)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "CON", "a\nb", " ", "x" * 300])
def test_a_name_that_is_no_plain_name_is_refused(folders: Folders, name: str) -> None:
    with pytest.raises(UnsafePathError):
        folders.start("resize", {"lora": "a", "rank": 2}, name)


def test_without_a_name_the_result_has_the_suggested_one(folders: Folders) -> None:
    outcome = folders.start("resize", {"lora": "a", "rank": 2}, "", preview=True)
    assert outcome.path == folders.loras / "a-r2.safetensors"


def test_a_file_of_that_name_is_replaced_only_if_that_is_wanted(folders: Folders) -> None:
    first = folders.start("resize", {"lora": "a", "rank": 2}).path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        folders.start("resize", {"lora": "a", "rank": 1})
    assert (folders.loras / f"{NAME}.safetensors").read_bytes() == first
    assert folders.start("resize", {"lora": "a", "rank": 1}, replace=True).path.read_bytes() != first


def test_what_is_hidden_does_not_count(folders: Folders) -> None:
    hidden = {"rank": None, "conv_rank": None, "dynamic": "nonsense", "parameter": None}
    folders.start("combine", {"loras": COMBINED, "method": "concat"} | hidden)
    form = BY_KEY["combine"]
    shown = {one.name for one in form.fields if one.counts(folders.answered(form, {"method": "svd"}))}
    assert shown == {"loras", "method", "rank", "conv_rank", "dynamic", "dtype"}
    dynamic = folders.answered(form, {"method": "svd", "dynamic": "sv_fro"})
    assert all(one.counts(dynamic) for one in form.fields)


@pytest.mark.parametrize(
    ("key", "answers", "name"),
    [
        ("merge", {"model": "model", "loras": "<lora:a:1> <lora:sub/b:1>"}, "model-a-b"),
        ("merge", {"model": "model", "loras": "a cat"}, ""),
        ("merge", {"model": None, "loras": "<lora:a:1>"}, ""),
        ("combine", {"loras": "<lora:a:1><lora:b:1>"}, "a-b"),
        ("combine", {"loras": "<lora:a:1>"}, "a-2"),
        ("extract", {"tuned": "tuned", "rank": 8}, "tuned-r8"),
        ("resize", {"lora": "a", "rank": 2}, "a-r2"),
        ("split", {"lora": "half"}, "half-rank"),
        ("convert_lora", {"lora": "a", "to": "peft"}, "a-peft"),
        ("convert_model", {"model": "model", "to": "diffusers"}, "model-diffusers"),
        ("resize", {"lora": 'a"?', "rank": 2}, ""),
    ],
)
def test_a_name_is_suggested_that_is_plain_and_free(folders: Folders, key: str, answers: Any, name: str) -> None:
    form = BY_KEY[key]
    assert form.suggestion(folders.host, folders.answered(form, answers)) == name


def test_every_option_that_stands_there_at_first_can_be_chosen() -> None:
    for form in FORMS:
        for one in form.fields:
            assert one.kind != "options" or one.value in one.options, f"{form.key}: {one.name}"
            assert set(one.when) <= {other.name for other in form.fields}
    assert NONE not in BY_KEY["merge"].fields[2].options
