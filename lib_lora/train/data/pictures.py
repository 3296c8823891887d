"""How a picture becomes pixels of its bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from lib_lora.core.opening import shown
from lib_lora.errors import FileError
from lib_lora.tools.pictures import UNREADABLE, open_picture, why_unreadable
from lib_lora.train.data.buckets import Size
from lib_lora.train.data.order import stream

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.opening import FileIdentity
    from lib_lora.train.data.buckets import Fit
    from lib_lora.train.data.options import DataOptions
    from lib_lora.train.data.order import Row


@dataclass(frozen=True)
class Picture:
    """A picture of the training.

    Attributes:
        name: Folder and file, and whether it is a regularisation picture: what tells it from all others.
        path: Its file.
        identity: Which content was measured.
        size: Upright.
        fit: The size it is trained at.
        caption: What it shows, as it was found.
        options: How it is used.
        repeats: How often it is used in an epoch.
        is_reg: Whether it is a regularisation picture.
        network_multiplier: Strength of the network while it is learned.
    """

    name: str
    path: Path
    identity: FileIdentity
    size: Size
    fit: Fit
    caption: str
    options: DataOptions
    repeats: int
    is_reg: bool
    network_multiplier: float = 1.0


class View(NamedTuple):
    """What is seen of a picture at a place of the training.

    Attributes:
        left: Pixels left of the crop, in the scaled and mirrored picture.
        top: Pixels above it.
        flipped: Whether it is mirrored.
    """

    left: int
    top: int
    flipped: bool


def drawn_view(picture: Picture, row: Row) -> View:
    """What is seen at a place of the training: mirrored or not, cropped in the middle or anywhere."""
    options = picture.options
    chance = stream(options.seed, "view", row.place)
    flipped = options.flip_aug and chance.random() < 0.5
    if not options.random_crop:
        return middle(picture, flipped=flipped)
    (width, height), (wide, high) = picture.fit
    return View(chance.randint(0, wide - width), chance.randint(0, high - height), flipped)


def middle(picture: Picture, *, flipped: bool = False) -> View:
    """The picture cropped in the middle."""
    (width, height), (wide, high) = picture.fit
    left = (wide - width) // 2
    return View(wide - width - left if flipped else left, (high - height) // 2, flipped)


def pixels(picture: Picture, view: View) -> Tensor:
    """(3, H, W) float32, from -1 to 1.

    Raises:
        FileError: If the picture changed since it was measured, or can not be read any more.
    """
    try:
        image = open_picture(picture.path)
    except UNREADABLE as error:
        raise FileError(f"{shown(picture.path)} can not be read any more: {why_unreadable(error)}") from error
    if image.size != picture.size:
        now = Size(*image.size)
        raise FileError(f"{shown(picture.path)} changed during the training: it was {picture.size} and is {now}")
    if picture.fit.resized != picture.size:
        image = image.resize(picture.fit.resized, Image.Resampling.LANCZOS)
    if view.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = picture.fit.bucket
    image = image.crop((view.left, view.top, view.left + width, view.top + height))
    # numpy computes in this thread; torch would start threads of its own in each that reads pictures
    channels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1), np.float32)
    channels /= np.float32(127.5)
    channels -= np.float32(1)
    return torch.from_numpy(channels)
