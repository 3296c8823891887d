"""Options and a model → a network: which layers are trained and with what ranks, as kohya's create_network decides.

Source: networks/lora.py and networks/dylora.py of sd-scripts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lib_lora.errors import JobError, TrainError
from lib_lora.train.adapters import Dropouts, DyloraLayer, LoraLayer
from lib_lora.train.block_lr import OUTSIDE
from lib_lora.train.network import TrainNetwork
from lib_lora.train.network_file import WeightsFile
from lib_lora.train.network_layers import TrainedModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from lib_lora.train.block_lr import BlockLayout
    from lib_lora.train.network_layers import Target
    from lib_lora.train.network_options import NetworkOptions

TEXT_ENCODERS = ("te1", "te2")


class Chosen(NamedTuple):
    """A layer that is trained.

    Attributes:
        target: The layer.
        rank: Above 0.
        alpha: 0 stands for the rank.
    """

    target: Target
    rank: int
    alpha: float


def create_network(unet: nn.Module, text_encoders: Sequence[nn.Module], options: NetworkOptions) -> TrainNetwork:
    """Layers for a model, float32 on the CPU and not attached yet, with the weights of `options.network_weights`.

    Args:
        unet: diffusers' UNet.
        text_encoders: transformers' CLIP; SDXL's two in their order.
        options: Which layers, and how.

    Raises:
        JobError: If the options do not fit the model, or leave nothing to train.
        FileError, NamingError, AdapterError, NonFiniteError: If the file to go on from can not be read.
        TrainError: If that file does not fit the model or the options.
    """
    trained = () if options.network_train_unet_only else TEXT_ENCODERS
    trained = trained if options.network_train_text_encoder_only else (*trained, "unet")
    model = TrainedModel(unet, text_encoders, trained)
    file = WeightsFile(options.network_weights, model) if options.network_weights else None
    if file and options.dim_from_weights:
        chosen = [Chosen(target, adapter.rank, adapter.scale * adapter.rank) for target, adapter in file.layers]
        _check_dylora(chosen, options)
    else:
        chosen = list(_of_options(model, options))
    if not chosen:
        raise JobError("the options leave no layer to train: ranks or learning rates are 0 everywhere")
    layers = {one.target.name: _layer(one, options) for one in chosen}
    notes = [*_notes(options, model.layout), *(file.load(layers) if file else ())]
    return TrainNetwork(model, layers, {one.target.name: one.target.module for one in chosen}, options, notes)


class _Ranks(NamedTuple):
    """Ranks and alphas of the UNet's blocks, 25 or 23 of each; rank 0 leaves a block alone."""

    dims: Sequence[int]
    alphas: Sequence[float]
    conv_dims: Sequence[int]
    conv_alphas: Sequence[float]


def _of_options(model: TrainedModel, options: NetworkOptions) -> Iterator[Chosen]:
    ranks = _block_ranks(options, model.layout)
    wide = options.conv_dim is not None or (options.has_block_options and bool(options.conv_block_dims))
    for target in model.targets(wide=wide):
        rank, alpha = _rank(target, options, ranks)
        if rank:
            yield Chosen(target, rank, alpha)


def _rank(target: Target, options: NetworkOptions, ranks: _Ranks) -> tuple[int, float]:
    """Rank and alpha; rank 0 for a layer that is left alone."""
    if target.block == OUTSIDE:
        return options.network_dim, options.network_alpha
    if target.block >= len(ranks.dims):
        raise JobError(f"{target.name} is in block {target.block + 1}, and Stable Diffusion has {len(ranks.dims)}")
    dims, alphas = (ranks.conv_dims, ranks.conv_alphas) if target.is_wide else (ranks.dims, ranks.alphas)
    return dims[target.block], alphas[target.block]


def _block_ranks(options: NetworkOptions, layout: BlockLayout) -> _Ranks:
    """Those of all blocks; blocks whose learning rate is 0 have rank 0."""
    own, conv = options.has_block_options, bool(options.conv_block_dims)
    conv_alpha = 1.0 if options.conv_alpha is None else options.conv_alpha
    conv_alpha = options.network_alpha if options.is_dylora else conv_alpha
    ranks = _Ranks(
        _each("block_dims", options.block_dims if own else (), options.network_dim, layout),
        _each("block_alphas", options.block_alphas if own else (), options.network_alpha, layout),
        _each("conv_block_dims", options.conv_block_dims if own else (), options.conv_dim or 0, layout),
        _each("conv_block_alphas", options.conv_block_alphas if own and conv else (), conv_alpha, layout),
    )
    weights = options.lr_weights(layout)
    if weights is None:
        return ranks
    return ranks._replace(
        dims=_learning(ranks.dims, weights.blocks), conv_dims=_learning(ranks.conv_dims, weights.blocks)
    )


def _learning(dims: Sequence[int], weights: Sequence[float]) -> list[int]:
    return [dim if weight else 0 for dim, weight in zip(dims, weights, strict=True)]


def _each(name: str, given: Sequence[float], default: float, layout: BlockLayout) -> Sequence[Any]:
    """A number for each block."""
    if given and len(given) != layout.count:
        raise JobError(f"{name} holds {len(given)} numbers, this model has {layout.count} blocks; write one for each")
    return given or [default] * layout.count


def _layer(chosen: Chosen, options: NetworkOptions) -> LoraLayer:
    target, rank, alpha = chosen
    kind = DyloraLayer if options.is_dylora else LoraLayer
    dropouts = Dropouts(options.network_dropout, options.rank_dropout, options.module_dropout)
    return kind(target.module, rank, alpha, dropouts, component=target.component, block=target.block)


def _notes(options: NetworkOptions, layout: BlockLayout) -> Iterator[str]:
    """What was given and has no effect, as in kohya's scripts, which do not say so."""
    weights = options.lr_weights(layout)
    yield from weights.notes if weights else ()
    if not options.has_block_options:
        names = ("block_alphas", "conv_block_dims", "conv_block_alphas")
        for name in filter(partial(getattr, options), names):
            yield f"{name} has no effect without block_dims or a learning rate weight of blocks"
    elif options.conv_block_alphas and not options.conv_block_dims:
        yield "conv_block_alphas has no effect without conv_block_dims"
    if options.is_dylora and options.conv_alpha not in (None, options.network_alpha):
        yield f"conv_alpha has no effect on DyLoRA, whose layers all have network_alpha {options.network_alpha:g}"
    if options.unit > 1 and not options.is_dylora:
        yield "unit has no effect on a network that is no DyLoRA"


def _check_dylora(chosen: Sequence[Chosen], options: NetworkOptions) -> None:
    ranks = sorted({one.rank for one in chosen})
    if options.is_dylora and (len(ranks) > 1 or ranks[0] % options.unit):
        raise TrainError(
            f"{options.network_weights} has the ranks {', '.join(map(str, ranks))}; DyLoRA needs one, "
            f"a multiple of unit {options.unit}"
        )
