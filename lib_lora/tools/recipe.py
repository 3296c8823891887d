"""What a merged checkpoint says of itself: its source's metadata, and a recipe to make it again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lib_lora import __version__
from lib_lora.catalog import LoraCatalog
from lib_lora.core.models import BaseModel
from lib_lora.tools.metadata import model_spec, usual_prediction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lib_lora.resolve import ResolvedLora

RECIPE_KEY = "prefuse.recipe"
_STALE = ("modelspec.hash_sha256",)
"""Said of the source's tensors, not of the result's; ``sshs_*`` too."""
_PREDICTION = "modelspec.prediction_type"


def make_recipe(
    model: Path,
    hashes: Mapping[str, str] | None,
    loras: Sequence[ResolvedLora],
    precision: str,
    save_precision: str | None,
) -> dict[str, Any]:
    """What the result is made of, as plain data.

    Args:
        model: The checkpoint or diffusers folder.
        hashes: Its files → SHA-256, or None if they are not known.
        loras: What is merged.
        precision: Of the calculation.
        save_precision: Of the result's weights, or None for the source's own.
    """
    catalog = LoraCatalog(())
    files = [
        {
            "file": lora.entry.path.name,
            "sha256": catalog.data_hash(lora.entry),
            "te": lora.request.te,
            "unet": lora.request.unet,
            "tag": lora.request.raw,
        }
        | ({"weights": lora.weights.text} if lora.weights.text else {})
        for lora in loras
    ]
    return {
        "prefuse": __version__,
        "model": {"file": model.name} | ({"sha256": dict(hashes)} if hashes else {}),
        "loras": files,
        "precision": precision,
        "save_precision": save_precision or "as in the model",
    }


def merged_metadata(
    source: Mapping[str, str], recipe: Mapping[str, Any], family: BaseModel, title: str
) -> dict[str, str]:
    """Metadata of a merged file: all that the source's says, but for hashes of other tensors.

    What a UNet predicts can not be told from a file's names, so it is written only if the source says it; of SD2 the
    architecture and the resolution depend on it.
    """
    kept = {key: text for key, text in source.items() if not key.startswith("sshs_") and key not in _STALE}
    is_said = _PREDICTION in source
    origins = [source.get("modelspec.title") or recipe["model"]["file"], *(lora["file"] for lora in recipe["loras"])]
    spec = model_spec(
        BaseModel.UNKNOWN if family is BaseModel.SD2 and not is_said else family,
        title=title,
        is_lora=False,
        prediction=usual_prediction(family, source),
        merged_from=origins,
    )
    if not is_said:
        spec.pop(_PREDICTION, None)
    new = {"modelspec.title", "modelspec.date", "modelspec.implementation_version", "modelspec.merged_from"}
    own = {key: text for key, text in spec.items() if key in new}
    whole = {**recipe, "model": recipe["model"] | _earlier(source)}
    return {"format": "pt"} | spec | kept | own | {RECIPE_KEY: json.dumps(whole, ensure_ascii=False)}


def _earlier(source: Mapping[str, str]) -> dict[str, Any]:
    """How the source was made, if it was merged itself."""
    try:
        return {"recipe": json.loads(source[RECIPE_KEY])}
    except (KeyError, ValueError, RecursionError):
        return {}
