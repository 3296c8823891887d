"""Every job of the workshop can be cancelled at any time, and leaves nothing of itself."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from PIL import Image
from tool_jobs import FORM, JOBS, write_sources

CANCELS = 10
every_job = pytest.mark.parametrize("name", JOBS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


class CancelledError(Exception):
    """What a page raises."""


@every_job
def test_progress_grows_from_nothing_to_all(sources, tmp_path, name):
    told: list[tuple[int, int]] = []
    JOBS[name](sources, tmp_path, progress=lambda *numbers: told.append(numbers))
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 0
    assert all(before[0] <= after[0] <= after[1] for before, after in pairwise(told))
    assert sum(done == total for done, total in told) < len(told) / 2


@every_job
def test_a_job_that_is_cancelled_leaves_nothing(sources, tmp_path, name):
    calls: list[int] = []
    (tmp_path / "whole").mkdir()
    JOBS[name](sources, tmp_path / "whole", progress=lambda done, _: calls.append(done))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").touch()
    times = sorted(random.Random(0).sample(range(len(calls)), min(CANCELS, len(calls))))
    for last in times:
        left = iter(range(last))

        def cancel(done, total, left=left):
            if next(left, None) is None:
                raise CancelledError

        with pytest.raises(CancelledError):
            JOBS[name](sources, out, progress=cancel, **({"overwrite": True} if name == "resize images" else {}))
        kept = sorted(path for path in out.rglob("*") if path.is_file())
        if name == "resize images":  # what is written of many is whole, and stays
            assert all(is_whole(path) for path in kept)
        else:
            assert sorted(out.iterdir()) == kept == [out / "precious.txt"]


def is_whole(path) -> bool:
    if path.suffix == ".txt":
        return True
    with Image.open(path) as picture:
        picture.load()
        return picture.size in {FORM.resolutions[0].size_of(40, 30), FORM.resolutions[1].size_of(40, 30)}
