"""Names of the layers of SD3 and Flux in diffusers and in the original libraries, and which rows they share.

Sources: the libraries' own module trees, https://github.com/huggingface/diffusers (SD3Transformer2DModel,
FluxTransformer2DModel), https://github.com/Stability-AI/sd3-ref (mmdit.py) and
https://github.com/black-forest-labs/flux (model.py).
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Layers = tuple[tuple[str, ...], ...]

Rows = tuple[int, int]
"""First and last + 1 row of a weight."""


class _Blocks(NamedTuple):
    """A list of equal blocks: its name in the original and in diffusers, and the layers of one block."""

    original: str
    diffusers: str
    layers: Layers


class MmditNames(NamedTuple):
    """Names of one family: the original's layer first, behind it those of diffusers that its rows are, in order."""

    outside: Layers
    blocks: tuple[_Blocks, ...]


FLUX = MmditNames(
    outside=(
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("final_layer.linear", "proj_out"),
    ),
    blocks=(
        _Blocks(
            "double_blocks",
            "transformer_blocks",
            (
                ("img_mod.lin", "norm1.linear"),
                ("txt_mod.lin", "norm1_context.linear"),
                ("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                ("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                ("img_attn.proj", "attn.to_out.0"),
                ("txt_attn.proj", "attn.to_add_out"),
                ("img_mlp.0", "ff.net.0.proj"),
                ("img_mlp.2", "ff.net.2"),
                ("txt_mlp.0", "ff_context.net.0.proj"),
                ("txt_mlp.2", "ff_context.net.2"),
            ),
        ),
        _Blocks(
            "single_blocks",
            "single_transformer_blocks",
            (
                ("modulation.lin", "norm.linear"),
                ("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                ("linear2", "proj_out"),
            ),
        ),
    ),
)

SD3 = MmditNames(
    outside=(
        ("x_embedder.proj", "pos_embed.proj"),
        ("context_embedder", "context_embedder"),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("final_layer.linear", "proj_out"),
    ),
    blocks=(
        _Blocks(
            "joint_blocks",
            "transformer_blocks",
            (
                ("x_block.adaLN_modulation.1", "norm1.linear"),
                ("context_block.adaLN_modulation.1", "norm1_context.linear"),
                ("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                ("x_block.attn.ln_q", "attn.norm_q"),
                ("x_block.attn.ln_k", "attn.norm_k"),
                ("x_block.attn.proj", "attn.to_out.0"),
                ("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
                ("x_block.attn2.ln_q", "attn2.norm_q"),
                ("x_block.attn2.ln_k", "attn2.norm_k"),
                ("x_block.attn2.proj", "attn2.to_out.0"),
                ("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                ("context_block.attn.ln_q", "attn.norm_added_q"),
                ("context_block.attn.ln_k", "attn.norm_added_k"),
                ("context_block.attn.proj", "attn.to_add_out"),
                ("x_block.mlp.fc1", "ff.net.0.proj"),
                ("x_block.mlp.fc2", "ff.net.2"),
                ("context_block.mlp.fc1", "ff_context.net.0.proj"),
                ("context_block.mlp.fc2", "ff_context.net.2"),
            ),
        ),
    ),
)


def original_to_diffusers(family: MmditNames, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Original path → the paths in diffusers that its rows are, for a model whose layers are `paths` in either."""
    numbers = _numbers(paths)
    table = {original: tuple(theirs) for original, *theirs in family.outside}
    for blocks in family.blocks:
        for number in numbers.get(blocks.original, numbers.get(blocks.diffusers, {})):
            for original, *theirs in blocks.layers:
                names = tuple(f"{blocks.diffusers}.{number}.{path}" for path in theirs)
                table[f"{blocks.original}.{number}.{original}"] = names
    return table


def _numbers(paths: Iterable[str]) -> dict[str, dict[str, None]]:
    """List of blocks → numbers of its blocks, in the order of `paths`."""
    numbers: dict[str, dict[str, None]] = {}
    for path in paths:
        blocks, _, rest = path.partition(".")
        numbers.setdefault(blocks, {})[rest.partition(".")[0]] = None
    return numbers


def split_rows(shape: Sequence[int], count: int) -> list[Rows]:
    """Rows of each of the `count` layers that are fused in a weight: q, k, v, and the MLP where there are four.

    Args:
        shape: Of the fused weight, (out, in). In front of an MLP, q, k and v are as wide as their input.
        count: 1, 3 or 4.

    Returns:
        None, if the shape can not be divided so.
    """
    height = shape[0]
    heights = [shape[-1]] * 3 + [height - 3 * shape[-1]] if count == 4 else [height // count] * count
    if min(heights) <= 0 or sum(heights) != height:
        return []
    return list(pairwise(accumulate(heights, initial=0)))


def fused_names(original: str, index: int) -> tuple[str, ...]:
    """All names of a fused layer for its part number `index`, which lies in the same rows of each.

    x-flux trains q, k and v of Flux's ``linear1`` as a layer ``qkv``, without the MLP behind them.
    """
    block, _, layer = original.rpartition(".")
    return (original, f"{block}.qkv") if layer == "linear1" and index < 3 else (original,)


def is_swapped(original: str, shape: Sequence[int]) -> bool:
    """Whether a layer's rows are shift and scale in the original, and scale and shift in diffusers.

    They are at a model's end: the head's modulation, and that of the last text block of SD3. Elsewhere a modulation
    also has gates, and one order.
    """
    return original.endswith("adaLN_modulation.1") and len(shape) == 2 and shape[0] == 2 * shape[1]


def swapped_rows(height: int) -> tuple[Rows, Rows]:
    """The two halves of `height` rows, the second first."""
    return (height // 2, height), (0, height // 2)
