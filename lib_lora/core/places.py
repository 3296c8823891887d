"""Names of a component's weights → which layers they are, whatever library's names they have."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.clip_names import CLIP_BLOCKS, OPEN_CLIP, OPEN_CLIP_BLOCKS, OPEN_CLIP_OUTSIDE, OPEN_CLIP_QKV
from lib_lora.core.ldm_names import diffusers_to_ldm, ldm_to_diffusers, translate
from lib_lora.core.mmdit_names import (
    FLUX,
    SD3,
    fused_names,
    is_swapped,
    original_to_diffusers,
    split_rows,
    swapped_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lib_lora.core.mmdit_names import MmditNames, Rows

    Shapes = Mapping[str, Sequence[int]]


class Spelling(NamedTuple):
    """A name of a layer in files and models.

    Attributes:
        path: Dotted path in the component.
        rows: If the name means a weight of which the layer is a part, or one in another order: the rows of it that
            the layer is. Empty if the two are the same.
    """

    path: str
    rows: tuple[Rows, ...] = ()


class Place(NamedTuple):
    """One layer.

    Attributes:
        source: The name it was read from.
        path: Canonical dotted path in the component.
        spellings: All names it has in files and models.
        ldm: Dotted path in the original library's spelling, or ``""`` if it has none.
        rows: Its rows in a fused weight, or None for the whole weight.
    """

    source: str
    path: str
    spellings: tuple[Spelling, ...]
    ldm: str = ""
    rows: Rows | None = None


def places_of(component: str, shapes: Shapes) -> Iterator[Place]:
    """The layers that weights of these names are, in the order of `shapes`.

    Names in front of the UNet, the transformer or the text encoder, such as ``model.diffusion_model.``, are cut off,
    and names beside it left out. A structure that is not known is taken as it is named.

    Args:
        component: ``unet``, ``te1``, ``te2``, ``te3``, ``transformer``.
        shapes: Dotted path of a layer, without ``.weight`` → shape of its weight.
    """
    for anchor, read in _STRUCTURES["te" if component.startswith("te") else "unet"]:
        prefix = _prefix(shapes, anchor)
        if prefix is not None:
            return read(prefix, {name: shape for name, shape in shapes.items() if name.startswith(prefix)})
    return (Place(name, name, _whole(name)) for name in shapes)


def _prefix(names: Iterable[str], anchor: str) -> str | None:
    """What stands before `anchor`; the shortest if it occurs several times, as in a CLIP with an image tower."""
    found = (name[:start] for name in names if (start := f".{name}".find(f".{anchor}")) >= 0)
    return min(found, key=len, default=None)


def _whole(*paths: str) -> tuple[Spelling, ...]:
    return tuple(Spelling(path) for path in paths)


def _diffusers_unet(prefix: str, shapes: Shapes) -> Iterator[Place]:
    paths = [name[len(prefix) :] for name in shapes]
    table = diffusers_to_ldm(paths)
    for name, path in zip(shapes, paths, strict=True):
        ldm = translate(path, table) or ""
        yield Place(name, path, _whole(path, ldm) if ldm else _whole(path), ldm)


def _ldm_unet(prefix: str, shapes: Shapes) -> Iterator[Place]:
    paths = [name[len(prefix) :] for name in shapes]
    table = ldm_to_diffusers(paths)
    for name, ldm in zip(shapes, paths, strict=True):
        path = translate(ldm, table) or ldm
        yield Place(name, path, _whole(path, ldm), ldm)


def _clip(prefix: str, shapes: Shapes) -> Iterator[Place]:
    """CLIPTextModel of transformers 4, and CLIPTextModelWithProjection."""
    for name in shapes:
        path = name[len(prefix) :]
        if path.startswith(("text_model.", "text_projection")):
            yield Place(name, path, _whole(path))


def _bare_clip(prefix: str, shapes: Shapes) -> Iterator[Place]:
    """CLIPTextModel of transformers 5, whose names lack ``text_model.``."""
    for name in shapes:
        path = f"text_model.{name[len(prefix) :]}"
        yield Place(name, path, _whole(path))


def _open_clip(prefix: str, shapes: Shapes) -> Iterator[Place]:
    for name, shape in shapes.items():
        own = name[len(prefix) :]
        for path, rows in _open_clip_paths(own, shape):
            spellings = _whole(path) if rows is not None else _whole(path, own)
            yield Place(name, f"text_model.{path}", spellings, rows=rows)


def _open_clip_paths(own: str, shape: Sequence[int]) -> Iterator[tuple[str, Rows | None]]:
    yield from ((path, None) for theirs, path in OPEN_CLIP_OUTSIDE if theirs == own)
    if not own.startswith(OPEN_CLIP_BLOCKS):
        return
    number, _, inner = own.removeprefix(OPEN_CLIP_BLOCKS).partition(".")
    layer = f"{CLIP_BLOCKS}{number}"
    if inner == OPEN_CLIP_QKV:
        for letter, rows in zip("qkv", split_rows(shape, 3), strict=False):
            yield f"{layer}.self_attn.{letter}_proj", rows
    yield from ((f"{layer}.{ours}", None) for theirs, ours in OPEN_CLIP if theirs == inner)


def _t5(prefix: str, shapes: Shapes) -> Iterator[Place]:
    """The third text encoder of SD3, the second of Flux."""
    for name in shapes:
        path = name[len(prefix) :]
        yield Place(name, path, _whole(path))


def _original_mmdit(family: MmditNames, prefix: str, shapes: Shapes) -> Iterator[Place]:
    """SD3 and Flux as their authors built them: q, k and v are one layer."""
    table = original_to_diffusers(family, [name[len(prefix) :] for name in shapes])
    for name, shape in shapes.items():
        path = name[len(prefix) :]
        yield from _original_places(name, path, shape, table.get(path, ()))


def _original_places(name: str, own: str, shape: Sequence[int], theirs: Sequence[str]) -> Iterator[Place]:
    """The layers of diffusers in one of the original's, or itself where they are not known."""
    parts = split_rows(shape, len(theirs)) if theirs else []
    if is_swapped(own, shape):
        other = (Spelling(path, swapped_rows(shape[0])) for path in theirs)
        yield Place(name, own, (*_whole(own), *other), own)
    elif len(parts) > 1:
        for index, (path, rows) in enumerate(zip(theirs, parts, strict=True)):
            fused = (Spelling(spelled, (rows,)) for spelled in fused_names(own, index))
            yield Place(name, path, (Spelling(path), *fused), own, rows)
    else:
        path = theirs[0] if parts else own
        yield Place(name, path, _whole(path, own), own)


def _diffusers_mmdit(family: MmditNames, prefix: str, shapes: Shapes) -> Iterator[Place]:
    paths = {name[len(prefix) :]: shape for name, shape in shapes.items()}
    table = dict(_original_spellings(family, paths))
    for name, path in zip(shapes, paths, strict=True):
        originals = table.get(path, ())
        yield Place(name, path, (Spelling(path), *originals), originals[0].path if originals else "")


def _original_spellings(family: MmditNames, shapes: Shapes) -> Iterator[tuple[str, tuple[Spelling, ...]]]:
    """Path in diffusers → the original's layer and which of its rows; of layers that the model has completely."""
    for original, theirs in original_to_diffusers(family, shapes).items():
        if not all(path in shapes for path in theirs):
            continue
        heights = [shapes[path][0] for path in theirs]
        for index, (path, height, stop) in enumerate(zip(theirs, heights, accumulate(heights), strict=True)):
            rows = ((stop - height, stop),) if len(theirs) > 1 else ()
            rows = swapped_rows(height) if is_swapped(original, shapes[path]) else rows
            yield path, tuple(Spelling(spelled, rows) for spelled in fused_names(original, index))


_STRUCTURES = {
    "unet": (
        ("output_blocks.0.", _ldm_unet),
        ("up_blocks.0.", _diffusers_unet),
        ("controlnet_cond_embedding.", _diffusers_unet),
        ("double_blocks.0.img_attn.qkv", partial(_original_mmdit, FLUX)),
        ("joint_blocks.0.x_block.", partial(_original_mmdit, SD3)),
        ("single_transformer_blocks.0.attn.to_q", partial(_diffusers_mmdit, FLUX)),
        ("transformer_blocks.0.attn.add_q_proj", partial(_diffusers_mmdit, SD3)),
    ),
    "te": (
        ("text_model.encoder.layers.0.", _clip),
        ("encoder.layers.0.", _bare_clip),
        ("transformer.resblocks.0.", _open_clip),
        ("encoder.block.0.", _t5),
    ),
}
"""Component → a name that occurs in every model of a structure, and what reads it; the first found counts."""
