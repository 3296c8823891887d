"""Regularisation pictures that are missing, and are drawn by the base model itself.

Source: DreamBooth (https://arxiv.org/abs/2208.12242), prior preservation.
"""

from __future__ import annotations

from io import BytesIO
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.saving import save_bytes
from lib_lora.train.data.folders import count_pictures, make_folder, read_folders

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from lib_lora.train.data.options import DataOptions


class ClassPicture(NamedTuple):
    """A picture to be drawn.

    Attributes:
        path: Its file, a .png.
        caption: The file of its caption.
        prompt: What it shows.
        seed: Of its noise; each picture of a folder has its own.
    """

    path: Path
    caption: Path
    prompt: str
    seed: int

    def save(self, image: Image.Image) -> None:
        """Write the picture and its caption.

        Raises:
            OutputError: If that is not possible.
        """
        data = BytesIO()
        image.save(data, "PNG")
        make_folder(self.path.parent)
        save_bytes(self.caption, self.prompt.encode(), overwrite=True)
        save_bytes(self.path, data.getvalue())


def missing_class_pictures(options: DataOptions) -> list[ClassPicture]:
    """What must be drawn before `open_dataset`, beside what is there, to have `num_class_images`.

    Raises:
        FileError: If the folder of regularisation pictures can not be read.
        JobError: If the names of its folders ask for 0 repeats.
    """
    base = options.reg_data_dir
    if base is None or not options.num_class_images:
        return []
    folders = read_folders(base, options, is_reg=True)[0] if count_pictures(base) else []
    present = [entry.path for folder in folders for entry in folder.entries]
    place = present[0].parent if present else base
    names = ((number, f"class_{number:05d}") for number in count())
    free = ((number, name) for number, name in names if not (place / f"{name}.png").exists())
    extension = options.caption_extensions[0]
    return [
        ClassPicture(place / f"{name}.png", place / f"{name}{extension}", options.class_prompt, options.seed + number)
        for number, name in islice(free, max(0, options.num_class_images - len(present)))
    ]
