"""The pictures that ControlNets are given: read, brought to size, and told in the infotext."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from lib_lora.errors import RequestError
from lib_lora.hosts.host import Control
from lib_lora.tools.pictures import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lib_lora.hosts.standalone.controlnets import LoadedControlNet

_RESERVED = str.maketrans(",:", "__")
"""Signs that end a value in the infotext of a ControlNet."""


def read_controls(images: Sequence[Path], scales: Sequence[float], controlnets: int) -> tuple[Control, ...]:
    """What a user gives ControlNets.

    Args:
        images: A picture file for each.
        scales: Of each; one for all, or none for 1.
        controlnets: How many there are.

    Raises:
        RequestError: If the numbers differ, or a picture can not be read.
    """
    check_count(len(images), controlnets)
    if len(scales) not in (0, 1, len(images)):
        raise RequestError(f"{len(scales)} control scales are given for {len(images)} ControlNets; give one for each.")
    each = list(scales) * (len(images) if len(scales) == 1 else 1) or [1.0] * len(images)
    return tuple(Control(_read(path), scale, path.name) for path, scale in zip(images, each, strict=True))


def check_count(images: int, controlnets: int) -> None:
    """Each ControlNet needs one picture.

    Raises:
        RequestError: If it has not.
    """
    if images != controlnets:
        raise RequestError(f"ControlNets: {controlnets}, control images: {images}; each ControlNet needs one image.")


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise RequestError(f"{path} can not be read as a picture: {error}.") from error


def control_options(controls: Sequence[Control], width: int, height: int) -> dict[str, Any]:
    """What diffusers' pipelines with one or several ControlNets are told."""
    images = [ImageOps.fit(control.image, (width, height), Image.Resampling.LANCZOS) for control in controls]
    scales = [control.scale for control in controls]
    if len(controls) == 1:
        return {"image": images[0], "controlnet_conditioning_scale": scales[0]}
    return {"image": images, "controlnet_conditioning_scale": scales} if controls else {}


def control_notes(controls: Sequence[Control], width: int, height: int) -> list[str]:
    """A sentence about each picture that has not the size of what is drawn."""
    return [
        f"{control.name or 'the control image'} is {control.image.width}x{control.image.height}; "
        f"it was scaled to {width}x{height} and cropped to that shape"
        for control in controls
        if control.image.size != (width, height)
    ]


def control_parameters(controlnets: Sequence[LoadedControlNet], controls: Sequence[Control]) -> dict[str, str]:
    """Parameters of the infotext: those of the WebUI's ControlNet extension, and which pictures they were."""
    told: dict[str, str] = {}
    for number, (controlnet, control) in enumerate(zip(controlnets, controls, strict=True)):
        values = {
            "Module": "none",
            "Model": f"{controlnet.name.translate(_RESERVED)} [{controlnet.short_hash}]",
            "Weight": f"{control.scale:g}",
            "Resize Mode": "Crop and Resize",
            "Guidance Start": "0.0",
            "Guidance End": "1.0",
            "Pixel Perfect": "False",
            "Control Mode": "Balanced",
        }
        told[f"ControlNet {number}"] = ", ".join(f"{key}: {value}" for key, value in values.items())
        digest = hashlib.sha256(control.image.tobytes()).hexdigest()[:10]
        told[f"Control image {number}"] = f"{control.name} [{digest}]".strip()
    return told
