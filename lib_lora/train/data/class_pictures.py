"""Regularisation pictures that are missing, and are drawn by the base model itself.

Source: DreamBooth (https://arxiv.org/abs/2208.12242), prior preservation.
"""

from __future__ import annotations

from io import BytesIO
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.opening import reason_of, shown
from lib_lora.core.saving import save_bytes
from lib_lora.errors import OutputError
from lib_lora.train.data.folders import count_pictures

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from lib_lora.train.data.options import DataOptions

FOLDER = "1_class"


class ClassPicture(NamedTuple):
    """A picture to be drawn.

    Attributes:
        path: Its file, a .png.
        prompt: What it shows.
        seed: Of its noise; each picture of a folder has its own.
    """

    path: Path
    prompt: str
    seed: int

    def save(self, image: Image.Image) -> None:
        """Write the picture and its caption.

        Raises:
            OutputError: If that is not possible.
        """
        data = BytesIO()
        image.save(data, "PNG")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the folder {shown(self.path.parent)} can not be made: {reason_of(error)}") from error
        save_bytes(self.path.with_suffix(".txt"), self.prompt.encode(), overwrite=True)
        save_bytes(self.path, data.getvalue())


def missing_class_pictures(options: DataOptions) -> list[ClassPicture]:
    """What must be drawn before `open_dataset`, so that there are as many as `num_class_images`.

    Raises:
        FileError: If the folder of regularisation pictures can not be read.
    """
    if options.reg_data_dir is None or not options.num_class_images:
        return []
    missing = max(0, options.num_class_images - count_pictures(options.reg_data_dir))
    folder = options.reg_data_dir / FOLDER
    names = ((number, folder / f"class_{number:05d}.png") for number in count())
    free = ((number, path) for number, path in names if not path.exists())
    return [ClassPicture(path, options.class_prompt, options.seed + number) for number, path in islice(free, missing)]
