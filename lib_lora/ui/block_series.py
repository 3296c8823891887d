"""Pictures of each block of a LoRA, alone or left out, as a form asks for them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lib_lora.errors import JobError
from lib_lora.hosts.host import SEEDS, GenerateRequest
from lib_lora.prompt.values import read_strength
from lib_lora.tools.analyse_pictures import analyse_pictures
from lib_lora.tools.block_lists import tag_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from PIL.Image import Image

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import Host
    from lib_lora.tools.analyse import BlockAnalysis
    from lib_lora.tools.analyse_pictures import Mode, PictureAnalysis


@dataclass(frozen=True)
class Series:
    """One picture for each block.

    Attributes:
        tag: Of the LoRA.
        tag_name: The name in it.
        length: Of the list of block weights.
        blocks: Of which pictures are made.
        mode: Whether each block is alone, or left out.
        request: What is drawn, without a prompt.
    """

    tag: str
    tag_name: str
    length: int
    blocks: tuple[str, ...]
    mode: Mode
    request: GenerateRequest

    @classmethod
    def of(
        cls,
        tag_name: str,
        found: BlockAnalysis,
        chosen: Collection[str],
        mode: str,
        strength: float,
        seed: float | None,
        steps: int,
        width: int,
        height: int,
    ) -> Series:
        """What the form asks for.

        Raises:
            JobError: If the blocks of its family have no names, or it changes none of those that are chosen.
            RequestError: If a number is out of its range.
            TagError: If a tag can not hold the name or the strength.
        """
        if found.length is None:
            raise JobError(f"the blocks of {found.base_model} have no names, so that a tag could weigh them")
        blocks = tuple(block for block in found.present if block in chosen or not chosen)
        if not blocks:
            raise JobError(f"{tag_name} changes none of these blocks: {', '.join(chosen)}")
        request = GenerateRequest(
            prompt="",
            steps=int(steps),
            width=int(width) or None,
            height=int(height) or None,
            seed=secrets.randbelow(SEEDS) if seed is None or seed < 0 else int(seed),
        )
        request.check()
        tag = tag_of(tag_name, read_strength("the strength", strength), "")
        way: Mode = "without" if mode == "without" else "only"
        return cls(tag, tag_name, found.length, blocks, way, request)

    def draw(self, host: Host, prompt: str, made: list[tuple[str, Image]], progress: Progress) -> PictureAnalysis:
        """Draw all pictures.

        Args:
            host: Draws.
            prompt: Without the LoRA.
            made: Gets the block and the picture of each as soon as it is there.
            progress: Told the steps done; what it raises ends the drawing.

        Raises:
            JobError: If the LoRA is refused.
            PrefuseError: If a picture can not be drawn.
        """
        drawing = _Drawing(self, host, made, progress)
        options: dict[str, Any] = {"length": self.length, "present": self.blocks, "mode": self.mode}
        found = analyse_pictures(drawing.draw, f"{self.tag} {prompt}", progress=drawing.begin, **options)
        return replace(found, changes=tuple(change for change in found.changes if change.drawn))


class _Drawing:
    """What is drawn now, of how many pictures."""

    def __init__(self, series: Series, host: Host, made: list[tuple[str, Image]], progress: Progress) -> None:
        self._series = series
        self._host = host
        self._made = made
        self._progress = progress
        self._done, self._total, self._block = 0, 1, ""

    def begin(self, done: int, total: int, block: str) -> None:
        self._done, self._total, self._block = done, total, block

    def draw(self, prompt: str) -> Image:
        picture = self._host.generate(replace(self._series.request, prompt=prompt), self._step, save=False)[0]
        if reasons := [one.reason for one in picture.report.refused if one.name == self._series.tag_name]:
            raise JobError(reasons[0])
        self._made.append((self._block, picture.image))
        return picture.image

    def _step(self, step: int, steps: int) -> None:
        self._progress(self._done * steps + step, self._total * steps)
