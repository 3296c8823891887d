"""Names of a component's weights → which layers they are, whatever library's names they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.ldm_names import diffusers_to_ldm, ldm_to_diffusers, translate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_OPEN_CLIP = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_OPEN_CLIP_OUTSIDE = (("ln_final", "final_layer_norm"), ("token_embedding", "embeddings.token_embedding"))
_OPEN_CLIP_QKV = "attn.in_proj"


class Place(NamedTuple):
    """One layer.

    Attributes:
        source: The name it was read from.
        path: Canonical dotted path in the component.
        spellings: All dotted paths it has in files and models.
        ldm: Dotted path in LDM's spelling, or ``""`` if it has none.
        third: Which third of the rows of a fused qkv weight, or None for the whole weight.
    """

    source: str
    path: str
    spellings: tuple[str, ...]
    ldm: str = ""
    third: int | None = None


def places_of(component: str, names: Sequence[str]) -> Iterator[Place]:
    """The layers that weights of these names are, in the order of `names`.

    Names in front of the UNet or the text encoder, such as ``model.diffusion_model.``, are cut off, and names beside
    it left out. A structure that is not known is taken as it is named.

    Args:
        component: ``unet``, ``te1``, ``te2``, ``transformer``.
        names: Dotted paths of layers, without ``.weight``.
    """
    for anchor, read in _STRUCTURES.get("te" if component.startswith("te") else component, ()):
        prefix = _prefix(names, anchor)
        if prefix is not None:
            return read(prefix, [name for name in names if name.startswith(prefix)])
    return (Place(name, name, (name,)) for name in names)


def _prefix(names: Sequence[str], anchor: str) -> str | None:
    """What stands before `anchor`; the shortest if it occurs several times, as in a CLIP with an image tower."""
    found = (name[:start] for name in names if (start := f".{name}".find(f".{anchor}")) >= 0)
    return min(found, key=len, default=None)


def _diffusers_unet(prefix: str, names: Sequence[str]) -> Iterator[Place]:
    paths = [name[len(prefix) :] for name in names]
    table = diffusers_to_ldm(paths)
    for name, path in zip(names, paths, strict=True):
        ldm = translate(path, table) or ""
        yield Place(name, path, (path, ldm) if ldm else (path,), ldm)


def _ldm_unet(prefix: str, names: Sequence[str]) -> Iterator[Place]:
    paths = [name[len(prefix) :] for name in names]
    table = ldm_to_diffusers(paths)
    for name, ldm in zip(names, paths, strict=True):
        path = translate(ldm, table) or ldm
        yield Place(name, path, (path, ldm), ldm)


def _clip(prefix: str, names: Sequence[str]) -> Iterator[Place]:
    """CLIPTextModel of transformers 4, and CLIPTextModelWithProjection."""
    for name in names:
        path = name[len(prefix) :]
        if path.startswith(("text_model.", "text_projection")):
            yield Place(name, path, (path,))


def _bare_clip(prefix: str, names: Sequence[str]) -> Iterator[Place]:
    """CLIPTextModel of transformers 5, whose names lack ``text_model.``."""
    for name in names:
        path = f"text_model.{name[len(prefix) :]}"
        yield Place(name, path, (path,))


def _open_clip(prefix: str, names: Sequence[str]) -> Iterator[Place]:
    for name in names:
        own = name[len(prefix) :]
        for path, third in _open_clip_paths(own):
            spellings = (path,) if third is not None else (path, own)
            yield Place(name, f"text_model.{path}", spellings, third=third)


def _open_clip_paths(own: str) -> Iterator[tuple[str, int | None]]:
    yield from ((path, None) for theirs, path in _OPEN_CLIP_OUTSIDE if theirs == own)
    if not own.startswith("transformer.resblocks."):
        return
    number, _, inner = own.removeprefix("transformer.resblocks.").partition(".")
    layer = f"encoder.layers.{number}"
    if inner == _OPEN_CLIP_QKV:
        yield from ((f"{layer}.self_attn.{letter}_proj", third) for third, letter in enumerate("qkv"))
    yield from ((f"{layer}.{ours}", None) for theirs, ours in _OPEN_CLIP if theirs == inner)


_STRUCTURES = {
    "unet": (("output_blocks.0.", _ldm_unet), ("up_blocks.0.", _diffusers_unet)),
    "te": (
        ("text_model.encoder.layers.0.", _clip),
        ("encoder.layers.0.", _bare_clip),
        ("transformer.resblocks.0.", _open_clip),
    ),
}
"""Component → a name that occurs in every model of a structure, and what reads it; the first found counts."""
