"""Names of blocks in the order in which lists weigh them. Source: https://github.com/hako-mikan/sd-webui-lora-block-weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BASE = "BASE"
"""Every layer of every text encoder; a list for Flux has one number for each of its two."""
CLIP, T5 = "CLIP", "T5"
ENCODERS = frozenset({BASE, CLIP, T5})

_IN = tuple(f"IN{number:02d}" for number in range(12))
_MID = ("M00",)
_OUT = tuple(f"OUT{number:02d}" for number in range(12))
_DOUBLE = tuple(f"D{number:02d}" for number in range(19))
_SINGLE = tuple(f"S{number:02d}" for number in range(38))

LISTS: Mapping[int, Sequence[str]] = {
    12: (BASE, *_IN[4:6], *_IN[7:9], *_MID, *_OUT[:6]),
    17: (BASE, *_IN[1:3], *_IN[4:6], *_IN[7:9], *_MID, *_OUT[3:]),
    20: (BASE, *_IN[:9], *_MID, *_OUT[:9]),
    26: (BASE, *_IN, *_MID, *_OUT),
    61: (CLIP, T5, "IN", *_DOUBLE, *_SINGLE, "OUT"),
}
"""Length of a list → the block of each number: SDXL's attention, SD1's and SD2's, all of SDXL, of SD1 and SD2, Flux."""
THIRDS: Mapping[str, Sequence[str]] = {"in": _IN, "mid": _MID, "out": _OUT}
ORDER = (*LISTS[26], *LISTS[61])
"""All names; those of one model stand in its own order."""
