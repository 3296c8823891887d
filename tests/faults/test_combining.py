"""LoRAs that can not be one: a sentence, and the folder as it was."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from lib_lora.errors import (
    AdapterError,
    BaseModelMismatchError,
    JobError,
    NamingError,
    NonFiniteError,
    OutputError,
    ShapeMismatchError,
)
from lib_lora.tools.combine import combine
from lib_lora.tools.given import given_files
from tests.combine_files import DENSE, LDM_LINEAR, LINEAR, NEEDS_BASE, SD1, asked, deltas, exact_sum, lora, mixed, two
from tests.family_files import write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("family", DENSE)
def test_what_has_no_thin_factors_is_told_to_use_svd(tmp_path, family):
    with pytest.raises(AdapterError, match="a has no thin factors there"):
        combine(asked(mixed(tmp_path, family, LINEAR)), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("family", NEEDS_BASE)
def test_what_depends_on_the_model_is_told_to_be_merged(tmp_path, family):
    with pytest.raises(AdapterError, match="depends on the model's weights; merge it into a checkpoint and extract"):
        combine(asked(mixed(tmp_path, family, LINEAR)), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def bad_pairs(folder: Path) -> dict[str, tuple[list[str], type[Exception], str]]:
    """Case → files, error, and words of its sentence."""
    good = write(folder / "good.safetensors", lora(4, 1.0), SD1)
    files = {
        "xl": (lora(4), {"ss_base_model_version": "sdxl_base_v1-0"}),
        "nan": (lora(4, size=math.nan), SD1),
        "wide": ({LINEAR: {"lora_up.weight": torch.ones(24, 2), "lora_down.weight": torch.ones(2, 20)}}, SD1),
        "huge": (lora(4, 1.0, size=1e9), SD1),
        "bias": ({LINEAR: {"diff_b": torch.ones(24)}}, SD1),
        "ten": (lora(10, 1.0), SD1),
        "negative": (lora(4, -1.0), SD1),
        "strange": ({"lora_unet_somewhere_else": lora(4)[LINEAR]}, SD1),
        "twice": ({name: lora(4)[LINEAR] for name in (LINEAR, LDM_LINEAR)}, SD1),
        "empty": ({LINEAR: {"lora_up.weight": torch.ones(24, 0), "lora_down.weight": torch.ones(0, 16)}}, SD1),
    }
    at = {name: write(folder / f"{name}.safetensors", layers, said) for name, (layers, said) in files.items()}
    return {
        "another family": ([good, at["xl"]], BaseModelMismatchError, "good is for SD 1.x and xl for SDXL"),
        "NaN": ([good, at["nan"]], NonFiniteError, "nan: .*NaN"),
        "another shape": ([good, at["wide"]], ShapeMismatchError, "different shapes: good .24, 16., wide .24, 20."),
        "too large": ([at["huge"]], NonFiniteError, "beyond float16"),
        "a bias": ([good, at["bias"]], AdapterError, "bias or a norm"),
        "an unknown layer": ([good, at["strange"]], NamingError, "no layer named unet:somewhere_else"),
        "one layer twice": ([at["twice"]], NamingError, "are the same layer"),
        "rank 0 alone": ([at["empty"]], JobError, "nothing is left"),
        "strength 0": ([f"{good}:0"], JobError, "nothing is left"),
        "dyn 0": ([f"{good}:1:1:0"], JobError, "nothing is left"),
        "add of other ranks": ([good, at["ten"]], AdapterError, "equal ranks, these are 4, 10"),
        "add of other signs": ([good, at["negative"]], AdapterError, "alphas of one sign"),
    }


CASES = ("another family", "NaN", "another shape", "too large", "a bias", "an unknown layer", "one layer twice")
EMPTY = ("rank 0 alone", "strength 0", "dyn 0")


@pytest.mark.parametrize("case", [*CASES, *EMPTY, "add of other ranks", "add of other signs"])
def test_what_can_not_be_combined_is_refused_with_a_sentence_and_nothing_is_written(tmp_path, case):
    texts, error, words = bad_pairs(tmp_path)[case]
    before = sorted(tmp_path.iterdir())
    method = "add" if case.startswith("add") else "concat"
    with pytest.raises(error, match=words):
        given = given_files(map(str, texts))
        combine(given, tmp_path / "out.safetensors", method=method, dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    loras = asked(two(tmp_path))
    before = sorted(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr("lib_lora.tools.combine.stacked", None)
    with pytest.raises(OutputError, match="make room"):
        combine(loras, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_add_is_for_lora_alone(tmp_path):
    with pytest.raises(AdapterError, match="add is for LoRA, a has LoHa there"):
        combine(asked(mixed(tmp_path, "LoHa", LINEAR)), tmp_path / "out.safetensors", method="add")


def test_files_that_are_there_stay_unless_forced(tmp_path):
    loras = asked(two(tmp_path))
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"older")
    with pytest.raises(OutputError):
        combine(loras, out)
    assert out.read_bytes() == b"older"
    combine(loras, out, overwrite=True)
    link = tmp_path / "link.safetensors"
    link.symlink_to(out)
    with pytest.raises(OutputError):
        combine(loras, link, overwrite=True)


def test_a_cancelled_job_leaves_nothing(tmp_path):
    loras = asked(two(tmp_path))
    before = sorted(tmp_path.iterdir())

    def cancel(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combine(loras, tmp_path / "out.safetensors", progress=cancel)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_can_take_its_own_place(tmp_path):
    loras = two(tmp_path)
    total, _ = exact_sum(loras)
    combine(asked(loras), loras[0][0], overwrite=True)
    assert all((delta - total[name]).norm() < 1e-6 for name, delta in deltas(loras[0][0]).items())
