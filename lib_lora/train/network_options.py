"""Options of a network: which layers are trained, with what rank, and how fast. Names and defaults are kohya's.

Source: train_network.py, networks/lora.py and networks/dylora.py of sd-scripts. What kohya takes as ``network_args``
is accepted there and as an option of its own.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path  # noqa: TC003 -- the reader of options looks types up
from typing import TYPE_CHECKING, Any, get_type_hints

from lib_lora.errors import JobError
from lib_lora.train.block_lr import block_weights, read_weights
from lib_lora.train.option_values import convert

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lib_lora.train.block_lr import BlockLayout, LrWeights

MODULES = {"networks.lora": "lora", "networks.dylora": "dylora", "lora": "lora", "dylora": "dylora"}

NETWORK_ARGS = (
    *("conv_dim", "conv_alpha", "unit", "rank_dropout", "module_dropout"),
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
)
"""What kohya's scripts know as ``network_args``."""

_DROPOUTS = ("network_dropout", "rank_dropout", "module_dropout")
_BLOCK_LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_AT_LEAST = {"network_dim": 0, "conv_dim": 0, "unit": 1, "network_alpha": 0, "conv_alpha": 0}
_ABOVE_ZERO = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "scale_weight_norms")


@dataclass(frozen=True)
class NetworkOptions:
    """What is learned beside the model.

    Attributes:
        network_module: lora, or dylora for a file that can be cut to smaller ranks; with or without ``networks.``.
        network_dim: Rank of Linear layers and 1x1 convolutions; 0 leaves them alone.
        network_alpha: The effect is scaled by alpha / rank; 0 stands for the rank.
        network_dropout: Share of the values between the two factors that are left out in training.
        rank_dropout: Share of the ranks that are left out of a picture in training.
        module_dropout: Share of the layers that are left out in training.
        conv_dim: Rank of larger convolutions (C3Lier); 0 leaves these alone, but not the small layers beside them.
            Without it neither is trained (LierLa).
        conv_alpha: Alpha of larger convolutions; by default 1.
        unit: Ranks that DyLoRA trains together.
        block_dims: Rank of each of the UNet's blocks, 25 or SDXL's 23 numbers; 0 leaves a block alone.
        block_alphas: Alpha of each block.
        conv_block_dims: Rank of larger convolutions in each block.
        conv_block_alphas: Alpha of larger convolutions in each block.
        down_lr_weight: Factors of the learning rate of the 12 input blocks, SDXL's 9: numbers, or a curve, one of sine,
            cosine, linear, reverse_linear and zeros, also with +0.25; 0 leaves a block alone.
        mid_lr_weight: Factor of the middle block; three in SDXL.
        up_lr_weight: Factors of the output blocks.
        block_lr_zero_threshold: A factor that is not above it is 0.
        loraplus_lr_ratio: LoRA+: the up factors learn so many times faster.
        loraplus_unet_lr_ratio: In the UNet alone.
        loraplus_text_encoder_lr_ratio: In the text encoders alone.
        network_train_unet_only: Leave the text encoders alone.
        network_train_text_encoder_only: Leave the UNet alone.
        network_weights: A LoRA file to go on from.
        dim_from_weights: Take layers, ranks and alphas from that file.
        scale_weight_norms: No layer's change becomes longer than this (Frobenius norm).
        network_args: The above as kohya's scripts take it: conv_dim=4.
    """

    network_module: str = "lora"
    network_dim: int = 4
    network_alpha: float = 1.0
    network_dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    conv_dim: int | None = None
    conv_alpha: float | None = None
    unit: int = 1
    block_dims: Sequence[int] = ()
    block_alphas: Sequence[float] = ()
    conv_block_dims: Sequence[int] = ()
    conv_block_alphas: Sequence[float] = ()
    down_lr_weight: str | Sequence[float] | None = None
    mid_lr_weight: str | Sequence[float] | None = None
    up_lr_weight: str | Sequence[float] | None = None
    block_lr_zero_threshold: float = 0.0
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    network_train_unet_only: bool = False
    network_train_text_encoder_only: bool = False
    network_weights: Path | None = None
    dim_from_weights: bool = False
    scale_weight_norms: float | None = None
    network_args: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value in _read_arguments(self.network_args):
            object.__setattr__(self, name, value)
        if self.network_module not in MODULES:
            raise JobError(f"there is no network_module {self.network_module!r}; there are {', '.join(MODULES)}")
        self._check_numbers()
        self._check_together()
        self._lr_weights()
        if self.is_dylora:
            self._check_dylora()

    @property
    def is_dylora(self) -> bool:
        """Whether the file is to be cut to smaller ranks."""
        return MODULES[self.network_module] == "dylora"

    @property
    def has_block_options(self) -> bool:
        """Whether blocks differ."""
        return bool(self.block_dims) or any(weights is not None for weights in self._lr_weights())

    def lr_weights(self, layout: BlockLayout) -> LrWeights | None:
        """Factors of the learning rate of a model's blocks, or None if they do not differ."""
        down, mid, up = self._lr_weights()
        return block_weights(down, mid, up, layout, self.block_lr_zero_threshold)

    def given_arguments(self) -> dict[str, str]:
        """What is not as by default of `NETWORK_ARGS`, as kohya's scripts take it."""
        defaults = {field.name: field.default for field in fields(self)}
        given = {name: getattr(self, name) for name in NETWORK_ARGS}
        return {name: _text(value) for name, value in given.items() if value != defaults[name]}

    def _lr_weights(self) -> tuple[Any, ...]:
        """Those of down, mid and up, read."""
        given = {name: getattr(self, f"{name}_lr_weight") for name in ("down", "mid", "up")}
        return tuple(
            None if value is None or value == "" else read_weights(f"{name}_lr_weight", value)
            for name, value in given.items()
        )

    def _check_numbers(self) -> None:
        for name in _DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise JobError(f"{name} is {getattr(self, name):g}; write a share from 0 to below 1, such as 0.1")
        for name, least in _AT_LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise JobError(f"{name} must be at least {least}, not {value:g}")
        for name in _ABOVE_ZERO:
            if (value := getattr(self, name)) is not None and value <= 0:
                raise JobError(f"{name} must be above 0, not {value:g}")
        for name in _BLOCK_LISTS:
            if any(value < 0 for value in getattr(self, name)):
                raise JobError(f"{name} holds {min(getattr(self, name)):g}; ranks and alphas are not below 0")

    def _check_together(self) -> None:
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            raise JobError("network_train_unet_only and network_train_text_encoder_only leave nothing to train")
        if self.dim_from_weights and self.network_weights is None:
            raise JobError("dim_from_weights takes ranks from a file; say which with network_weights")

    def _check_dylora(self) -> None:
        one, dim = "DyLoRA has one rank for all layers", self.network_dim
        if given := next((name for name in _BLOCK_LISTS if getattr(self, name)), ""):
            raise JobError(f"{one}; leave {given} out")
        if self.dim_from_weights:
            return  # these ranks are not used
        if dim % self.unit:
            raise JobError(f"network_dim {dim} has no parts of unit {self.unit}; choose a divisor of it")
        if self.conv_dim not in (None, dim):
            raise JobError(f"{one}: conv_dim is {self.conv_dim} and network_dim {dim}")


def _read_arguments(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Name and value of each of kohya's ``network_args``."""
    hints = _hints()
    for argument in arguments:
        name, equals, text = (part.strip() for part in argument.partition("="))
        if name not in NETWORK_ARGS:
            close = get_close_matches(name, NETWORK_ARGS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(NETWORK_ARGS)}"
            raise JobError(f"network_args has no {name!r}; {hint}")
        if not equals:
            raise JobError(f"network_args holds {argument!r}; write {name}=VALUE")
        yield name, convert(name, text, hints[name])


def _hints() -> Mapping[str, Any]:
    return get_type_hints(NetworkOptions)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
