"""What a training set has, as data and as lines to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_lora.tools.images import Skipped
    from lib_lora.train.data.buckets import Size

SHOWN = 5
"""Files and sizes that are named; of the others there is the number."""


@dataclass(frozen=True)
class FolderReport:
    """One folder, or a list.

    Attributes:
        name: Its name.
        pictures: How many can be used.
        repeats: How often each is used in an epoch, as its name says.
        is_reg: Whether they are regularisation pictures.
        class_name: What pictures without a caption show.
        without_caption: How many pictures have no caption of their own.
        alone: How many captions have no picture.
    """

    name: str
    pictures: int
    repeats: int
    is_reg: bool
    class_name: str
    without_caption: int
    alone: int

    def __str__(self) -> str:
        """One line."""
        kind = "regularisation pictures" if self.is_reg else "pictures"
        caption = f'the caption "{self.class_name}"' if self.class_name else "no caption"
        parts = [f"{self.name}: {self.pictures} {kind}, each {self.repeats} times in an epoch"]
        parts += [f"{self.without_caption} of them with {caption}"] if self.without_caption else []
        parts += [f"{self.alone} captions without a picture"] if self.alone else []
        return ", ".join(parts)


@dataclass(frozen=True)
class BucketReport:
    """Pictures of one size.

    Attributes:
        size: In pixels.
        count: Pictures in an epoch, repeated ones counted as often.
    """

    size: Size
    count: int


@dataclass(frozen=True)
class DataReport:
    """A training set.

    Attributes:
        folders: Where the pictures come from.
        buckets: Their sizes, ascending.
        ratio_error: Mean difference between width / height of a picture and of its bucket.
        train_images: Pictures of an epoch, repeated ones counted as often, without regularisation pictures.
        reg_images: The same for regularisation pictures, as their folders' names say.
        skipped: What can not be used, and why.
        notes: Other things to know.
    """

    folders: tuple[FolderReport, ...]
    buckets: tuple[BucketReport, ...]
    ratio_error: float
    train_images: int
    reg_images: int
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Lines for a console or a page."""
        most = sorted(self.buckets, key=lambda bucket: -bucket.count)
        sizes = ", ".join(f"{bucket.size} ({bucket.count})" for bucket in most[:SHOWN])
        sizes += f" and {len(most) - SHOWN} more" if len(most) > SHOWN else ""
        lines = [*map(str, self.folders), f"{self.train_images} pictures in an epoch; sizes: {sizes}"]
        lines += [f"skipped {file.name}: {file.reason}" for file in self.skipped[:SHOWN]]
        more = len(self.skipped) - SHOWN
        lines += [f"… and {more} more are skipped"] if more > 0 else []
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"skipped": [file._asdict() for file in self.skipped]}
