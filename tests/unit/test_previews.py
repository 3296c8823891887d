"""A preview tells what the job will do, refuses what it would refuse, and writes nothing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from typing import TYPE_CHECKING, NamedTuple

import pytest
from tool_jobs import JOBS, NO_OVERWRITING, write_sources

from lib_lora.core import saving
from lib_lora.core.files import read_header
from lib_lora.core.header import CHECKPOINT_LIMITS
from lib_lora.errors import PrefuseError
from lib_lora.tools.metadata import UNKNOWN
from lib_lora.tools.outcome import LoraOutcome

if TYPE_CHECKING:
    from pathlib import Path

    from lib_lora.tools.outcome import Outcome

KNOWN_LATER = ("modelspec.date", "sshs_model_hash", "sshs_legacy_hash")
DATA_DEPENDENT = ("ss_network_dim", "ss_network_alpha", "ss_network_args", "peft_lora_adapter_metadata")
WITHOUT_HEADER = ("convert to a folder", "merge into a folder", "resize images")
every_job = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def refusal(job, sources, folder, **options) -> str:
    with pytest.raises(PrefuseError) as caught:
        job(sources, folder, **options)
    return str(caught.value)


def bytes_in(path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


class Both(NamedTuple):
    """A preview, and the same job done."""

    name: str
    folder: Path
    preview: Outcome
    done: Outcome


@pytest.fixture(scope="module", params=JOBS)
def both(request, sources, tmp_path_factory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    preview = JOBS[request.param](sources, folder, preview=True)
    assert list(folder.iterdir()) == []
    return Both(request.param, folder, preview, JOBS[request.param](sources, folder))


def test_a_preview_says_that_nothing_was_written(both):
    preview, done = both.preview, both.done
    assert (preview.written, done.written) == (False, True)
    assert "nothing was written" in str(preview)
    assert "nothing was written" not in str(done)
    for outcome in (preview, done):
        told = json.loads(json.dumps(outcome.to_dict()))
        assert (told["path"], told["size"], told["written"]) == (str(done.path), outcome.size, outcome.written)


def test_a_preview_knows_places_sizes_and_room(both):
    preview, done = both.preview, both.done
    assert preview.paths == done.paths
    assert all(path.exists() for path in done.paths)
    assert done.size == sum(map(bytes_in, done.paths))
    assert (preview.size >= done.size) if preview.at_most else (preview.size == done.size)
    assert any(note.startswith("at most") for note in preview.notes) == preview.at_most
    assert not done.at_most
    assert 0 < preview.size == preview.disk.needed == done.disk.needed < preview.disk.free


def test_a_preview_knows_the_metadata(both):
    preview, done = both.preview, both.done
    assert preview.metadata.keys() == done.metadata.keys()
    later = {*KNOWN_LATER, *(DATA_DEPENDENT if preview.at_most else ()), "prefuse.recipe"}
    assert without(preview.metadata, later) == without(done.metadata, later)
    recipes = [json.loads(one.metadata.get("prefuse.recipe", "{}")) for one in (preview, done)]
    assert recipes[0].get("loras") == recipes[1].get("loras")
    assert all(UNKNOWN not in done.metadata.get(key, "") for key in (*KNOWN_LATER, "prefuse.recipe"))
    if both.name not in WITHOUT_HEADER:
        assert read_header(done.path, CHECKPOINT_LIMITS).metadata == done.metadata


def without(metadata, keys) -> dict[str, str]:
    return {key: text for key, text in metadata.items() if key not in keys}


def test_a_preview_knows_what_is_in_the_result(both):
    for name in ("layers", "base_model", "ranks", "tensors", "left_out", "set", "removed", "pictures", "skipped"):
        if not isinstance(both.done, LoraOutcome):
            assert getattr(both.preview, name, None) == getattr(both.done, name, None)


def test_a_preview_knows_layers_and_ranks(both):
    preview, done = both.preview, both.done
    if not isinstance(done, LoraOutcome):
        return
    planned = {layer.name: layer for layer in preview.layers}
    assert (preview.base_model, preview.dtype) == (done.base_model, done.dtype)
    assert preview.at_most or (len(planned), preview.notes) == (len(done.layers), done.notes)
    for layer in done.layers:
        plan = planned[layer.name]
        assert plan.rank_before == layer.rank_before
        assert (plan.rank >= layer.rank) if preview.at_most else (plan.rank == layer.rank)


def test_an_older_file_is_refused_in_the_same_words(both, sources):
    job, before = JOBS[both.name], sorted(both.folder.rglob("*"))
    assert refusal(job, sources, both.folder, preview=True) == refusal(job, sources, both.folder)
    assert sorted(both.folder.rglob("*")) == before


def test_an_older_file_may_be_replaced(both, sources):
    if both.name in NO_OVERWRITING:
        return
    older = [path.read_bytes() for path in both.done.paths if path.is_file()]
    assert JOBS[both.name](sources, both.folder, preview=True, overwrite=True).size == both.preview.size
    assert [path.read_bytes() for path in both.done.paths if path.is_file()] == older


@every_job
def test_a_folder_that_is_not_there_is_refused_in_the_same_words(job, sources, tmp_path, request):
    if request.node.callspec.id == "resize images":
        (tmp_path / "no").touch()  # a folder that is missing would be made
    place = tmp_path / "no" / "such"
    assert refusal(job, sources, place, preview=True) == refusal(job, sources, place)
    assert not place.exists()


@pytest.mark.parametrize("job", [job for name, job in JOBS.items() if name != "resize images"])
def test_a_full_disk_is_refused_in_the_same_words(job, sources, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage(100, 90, 10))
    said = refusal(job, sources, tmp_path, preview=True)
    assert said == refusal(job, sources, tmp_path)
    assert "the disk has 0.0 MB" in said
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("job", [job for name, job in JOBS.items() if name != "resize images" and "merge" not in name])
def test_damaged_sources_are_refused_in_the_same_words(job, sources, tmp_path):
    damaged = shutil.copytree(sources, tmp_path / "damaged")
    for path in (*damaged.glob("*.safetensors"), *damaged.glob("model/unet/*.safetensors")):
        cut(path)
    (tmp_path / "out").mkdir()
    said = refusal(job, damaged, tmp_path / "out", preview=True)
    assert said == refusal(job, damaged, tmp_path / "out")
    assert "is incomplete" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_a_method_that_is_none_for_a_layer_is_refused_before_the_work(sources, tmp_path):
    job, told = JOBS["combine other types"], []
    options = {"files": "a mixed", "progress": lambda *numbers: told.append(numbers)}
    said = refusal(job, sources, tmp_path, **options)
    assert said == refusal(job, sources, tmp_path, preview=True, **options)
    assert "has no thin factors there (LoKr); use svd" in said
    assert all(done == 0 for done, _ in told)
