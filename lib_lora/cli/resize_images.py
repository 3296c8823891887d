"""``resize-images``: pictures of a training set at given areas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, result_options, tell

if TYPE_CHECKING:
    import argparse

RESOLUTIONS = "512x512,384x384,256x256,128x128"


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder of pictures")
    add("folder", type=Path, metavar="DST", help="folder to be filled")
    add("--max-resolution", default=RESOLUTIONS, metavar="WxH,…", help=f"areas (default {RESOLUTIONS})")
    add("--divisible-by", type=int, default=1, metavar="N", help="crop both sides to multiples of N (default 1)")
    add("--interpolation", choices=("area", "cubic", "lanczos4"), default="area", help="default area")
    add("--save-as-png", action="store_true", help="write .png, not .jpg")
    add("--copy-associated-files", action="store_true", help="copy captions once for each picture that is written")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Shrink the pictures of a training set to given areas, none is enlarged."""
    from lib_lora.tools.images import resize_images
    from lib_lora.tools.pictures import ImageForm, Resolution

    given = arguments
    resolutions = Resolution.parse(given.max_resolution)
    form = ImageForm(resolutions, given.divisible_by, given.interpolation, given.save_as_png)
    options = {"associated": given.copy_associated_files, "overwrite": given.force, "preview": given.dry_run}
    with bar("resize") as progress:
        done = resize_images(given.source, given.folder, form, **options, progress=progress)
    tell(done.to_dict(), str(done), as_json=given.json)
