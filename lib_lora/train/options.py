"""All options of a training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lib_lora.errors import JobError
from lib_lora.train.data.options import PLACES, DataOptions
from lib_lora.train.kohya_options import understood
from lib_lora.train.network_options import NetworkOptions
from lib_lora.train.option_values import described, fill, plain
from lib_lora.train.settings import (
    LossOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
    OutputOptions,
    RunOptions,
    check_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAY_CHANGE = (
    *("max_train_steps", "max_train_epochs", "gradient_checkpointing", "device", "max_data_loader_n_workers"),
    *("vae_batch_size", "tokenizer", "pretrained_model_name_or_path"),
    *PLACES,
)
"""What a training may be resumed with in another way, beside all of `OutputOptions`.

Model and pictures are told by what they are, not by where they lie.
"""


@dataclass(frozen=True)
class TrainOptions:
    """All options of a training, by what they are about; `notes` are sentences on what was given and changes nothing.

    Raises:
        JobError: If a number is too small, or two contradict each other.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    run: RunOptions = field(default_factory=RunOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for group in (self.model, self.optimizer, self.loss, self.noise, self.run, self.output):
            check_numbers(group)
        if self.output.samples and self.output.sample_prompts is None:
            raise JobError("pictures are drawn from sample_prompts, a text file; give one")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainOptions:
        """Options from key → value, as a TOML file or a command line gives them.

        Raises:
            JobError: If there is no such option, a value can not be, or one of kohya's can not be had.
        """
        values, notes = understood(values)
        return cls(**fill(cls.kinds(), values), notes=notes)

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """Group → its dataclass."""
        return {one.name: one.default_factory for one in fields(cls) if callable(one.default_factory)}

    @classmethod
    def table(cls) -> list[tuple[str, Any, str]]:
        """(key, default, what it is) of every option."""
        return described(cls.kinds().values())

    def values(self) -> dict[str, Any]:
        """Key → value of every option."""
        return {key: value for group in self.kinds() for key, value in vars(getattr(self, group)).items()}

    def course(self) -> dict[str, Any]:
        """Key → value of all that decides how the training goes, plain as JSON."""
        free = {*_MAY_CHANGE, *vars(self.output)}
        return {key: plain(value) for key, value in self.values().items() if key not in free}
