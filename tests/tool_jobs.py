"""Every job of the workshop on tiny files, as one kind of function: sources, folder to be filled, options → outcome."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ldm_files import write_checkpoint
from PIL import Image
from tiny_pipelines import make_tiny, original_tensors, write_folder

from lib_lora.core.models import BaseModel
from lib_lora.tools.combine import combine
from lib_lora.tools.convert import convert_lora
from lib_lora.tools.convert_checkpoint import to_diffusers, to_single
from lib_lora.tools.dylora import split_dylora
from lib_lora.tools.extract import extract
from lib_lora.tools.given import given_files
from lib_lora.tools.images import resize_images
from lib_lora.tools.merge import merge_loras
from lib_lora.tools.metadata import edit_metadata
from lib_lora.tools.pictures import ImageForm, Resolution
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize
from tests.combine_files import CONV, LINEAR, SD1, SHAPES, TEXT, lora
from tests.family_files import family_tensors, write
from tests.merge_models import BASE, LORA, write_mixed_lora

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lib_lora.tools.outcome import Outcome

    Job = Callable[..., Outcome]

HASHES = {"sshs_model_hash": "old", "sshs_legacy_hash": "old"}
FORM = ImageForm(Resolution.parse("24x24,12x12"))


def write_sources(folder: Path) -> Path:
    """What the jobs are made of."""
    _write_loras(folder)
    _write_models(folder)
    _write_pictures(folder / "pictures")
    return folder


def _write_loras(folder: Path) -> None:
    write(folder / "a.safetensors", lora(4, 2.0, seed=1), SD1 | HASHES)
    write(folder / "b.safetensors", lora(4, 1.0, seed=2), SD1)
    write(folder / "half.safetensors", lora(6, 3.0, torch.float16, seed=3), {})
    families = {LINEAR: "LoHa", CONV: "LoKr both factored", TEXT: "LoKr whole"}
    mixed = {name: family_tensors(family, SHAPES[name], 0) for name, family in families.items()}
    write(folder / "mixed.safetensors", mixed, SD1)
    write(folder / "loha.safetensors", {LINEAR: family_tensors("LoHa", SHAPES[LINEAR], 0)}, SD1)
    convert_lora(folder / "a.safetensors", "peft", folder / "peft.safetensors")


def _write_models(folder: Path) -> None:
    tiny = make_tiny("sd1", folder / "config")
    write_checkpoint(folder / "model.safetensors", tiny.tensors, {"author": "me"})
    write_folder(tiny, folder / "model")
    write_mixed_lora(folder / "tiny.safetensors", {"unet": tiny.parts["unet"]}, every=9)
    tuned = copy.deepcopy(tiny.parts)
    with torch.no_grad():
        for name, weight in (*tuned["unet"].named_parameters(), *tuned["text_encoder"].named_parameters()):
            if weight.ndim > 1 and "attentions.0" not in name:  # some layers stay the same
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    write_checkpoint(folder / "tuned.safetensors", original_tensors("sd1", tuned))


def _write_pictures(folder: Path) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ("one.png", "two.jpg"):
        Image.fromarray(noise).save(folder / name)
    (folder / "one.txt").write_text("a caption")
    (folder / "page.png").write_text("<html>")


def _merge(sources: Path, out: Path, model: str = "", lora: str = "", target: str = "new.safetensors", **options):
    given = given_files([str(sources / lora) if lora else str(LORA)])
    return merge_loras(sources / model if model else BASE, given, out / target, **options)


def _combine(sources: Path, out: Path, files: str = "a b", rule: RankRule | None = None, **options: Any) -> Outcome:
    loras = given_files([f"{sources / name}.safetensors:0.{number + 5}" for number, name in enumerate(files.split())])
    return combine(loras, out / "new.safetensors", rule=rule, **options)


def _extract(sources: Path, out: Path, **options: Any) -> Outcome:
    return extract(sources / "model.safetensors", sources / "tuned.safetensors", out / "new.safetensors", **options)


def _resize(sources: Path, out: Path, rule: RankRule, lora: str = "a", **options: Any) -> Outcome:
    return resize(sources / f"{lora}.safetensors", out / "new.safetensors", rule, **options)


def _split(sources: Path, out: Path, **options: Any) -> Outcome:
    return split_dylora(sources / "half.safetensors", out / "new.safetensors", 2, **options)


def _convert(sources: Path, out: Path, lora: str, to: Any, **options: Any) -> Outcome:
    source = sources / f"{lora}.safetensors"
    return convert_lora(source, to, out / "new.safetensors", family=BaseModel.SD1, **options)


def _to_diffusers(sources: Path, out: Path, **options: Any) -> Outcome:
    return to_diffusers(sources / "model.safetensors", out / "new", config=sources / "config", **options)


def _to_single(sources: Path, out: Path, **options: Any) -> Outcome:
    return to_single(sources / "model", out / "new.safetensors", **options)


def _edit(sources: Path, out: Path, **options: Any) -> Outcome:
    changes = {"author": "you", "title": "ä"}
    return edit_metadata(
        sources / "a.safetensors", changes, ["sshs_model_hash"], out=out / "new.safetensors", **options
    )


def _images(sources: Path, out: Path, **options: Any) -> Outcome:
    return resize_images(sources / "pictures", out / "new", FORM, associated=True, **options)


SMALL = RankRule(2)
JOBS: dict[str, Job] = {
    "merge": _merge,
    "merge in fp16 with a hash": partial(_merge, save_precision="fp16", hashed=True),
    "merge into a folder": partial(_merge, model="model", lora="tiny.safetensors", target="new"),
    "combine": _combine,
    "combine other types": partial(_combine, files="a half loha"),
    "combine by svd": partial(_combine, method="svd", rule=SMALL),
    "combine whole matrices by svd": partial(_combine, files="a mixed", method="svd", rule=SMALL),
    "combine by svd dynamically": partial(
        _combine, method="svd", rule=RankRule(6, None, "sv_fro", 0.8), dtype=torch.float16
    ),
    "combine by add": partial(_combine, method="add"),
    "extract": partial(_extract, rank=2, conv_rank=3, dtype=torch.float16),
    "extract without convolutions": partial(_extract, rank=4),
    "extract beside a text encoder that hardly differs": partial(_extract, rank=2, min_diff=100.0),
    "resize": partial(_resize, rule=SMALL),
    "resize nothing": partial(_resize, rule=RankRule(8)),
    "resize into another type": partial(_resize, rule=RankRule(8, 2), dtype=torch.bfloat16),
    "resize dynamically": partial(_resize, rule=RankRule(4, None, "sv_ratio", 2.0)),
    "resize like kohya": partial(_resize, rule=RankRule(8, kohya=True)),
    "resize PEFT's layout": partial(_resize, rule=SMALL, lora="peft"),
    "split": _split,
    "convert to PEFT's layout": partial(_convert, lora="a", to="peft"),
    "convert to kohya's layout": partial(_convert, lora="peft", to="kohya"),
    "convert to a folder": _to_diffusers,
    "convert to a file": _to_single,
    "edit metadata": _edit,
    "resize images": _images,
}
NO_OVERWRITING = ("merge into a folder", "convert to a folder")
