"""From a step to its batch: pictures are read ahead, in threads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from lib_lora.train.data.batch import Batch, stacked
from lib_lora.train.data.captions import drawn_caption
from lib_lora.train.data.order import ALONE
from lib_lora.train.data.pictures import drawn_view, pixels
from lib_lora.train.data.prefetch import prefetched

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import Tensor

    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.data.order import Row, Shard
    from lib_lora.train.data.pictures import Picture, View


class Texts(Protocol):
    """A tokenizer, or a cache of encoded captions."""

    def __call__(self, captions: Sequence[str], /) -> Mapping[str, Tensor]:
        """Tensors by name, one row for each caption."""
        ...


class Latents(Protocol):
    """A cache of encoded pictures."""

    def __call__(self, picture: Picture, flipped: bool, /) -> Tensor:
        """(C, h, w) of a picture that is cropped in the middle."""
        ...


class Loader:
    """The batches of one process.

    Attributes:
        order: Which pictures are in which batch.
    """

    def __init__(
        self, dataset: Dataset, texts: Texts | None = None, latents: Latents | None = None, shard: Shard = ALONE
    ) -> None:
        """For the pictures of `dataset`.

        `texts` is called in the thread that asks for batches, None if captions are enough; `latents` in any thread,
        None to get pixels.
        """
        self.order = dataset.order(shard.processes)
        self._dataset, self._texts, self._latents, self._shard = dataset, texts, latents, shard
        self._multiplied = dataset.is_multiplied

    def batch(self, step: int) -> Batch:
        """The batch of any step, from 0 over all epochs: the same whatever was loaded before.

        Raises:
            FileError: If a picture can not be read any more.
        """
        return self._with_texts(self._load(step))

    def batches(self, first: int, end: int) -> Generator[Batch]:
        """The batches of the steps from `first` to `end` - 1; to be closed if it is left before its end.

        Raises:
            FileError: If a picture can not be read any more.
        """
        for batch in prefetched(self._load, range(first, end), self._dataset.options.max_data_loader_n_workers):
            yield self._with_texts(batch)

    def _load(self, step: int) -> Batch:
        examples = [self._example(row) for row in self.order.rows(step, self._shard)]
        batch = _joined(step, examples)
        return replace(batch, network_multipliers=_multipliers(examples)) if self._multiplied else batch

    def _with_texts(self, batch: Batch) -> Batch:
        return batch if self._texts is None else replace(batch, texts=self._texts(batch.captions))

    def _example(self, row: Row) -> _Example:
        picture = self._dataset.pictures[row.picture]
        view, caption = drawn_view(picture, row), drawn_caption(picture.caption, row, picture.options)
        weight = row.share * (picture.options.prior_loss_weight if picture.is_reg else 1.0)
        if self._latents is None:
            return _Example(row, picture, view, caption, weight, pixels=pixels(picture, view))
        return _Example(row, picture, view, caption, weight, latents=self._latents(picture, view.flipped))


class _Example(NamedTuple):
    """One row of a batch."""

    row: Row
    picture: Picture
    view: View
    caption: str
    weight: float
    pixels: Tensor | None = None
    latents: Tensor | None = None


def _joined(step: int, examples: Sequence[_Example]) -> Batch:
    return Batch(
        step=step,
        epoch=examples[0].row.epoch,
        names=tuple(one.picture.name for one in examples),
        captions=tuple(one.caption for one in examples),
        places=tuple(one.row.place for one in examples),
        weights=torch.tensor([one.weight for one in examples]),
        time_ids=torch.tensor([_time_ids(one.picture, one.view) for one in examples]),
        pixels=_stacked([one.pixels for one in examples]),
        latents=_stacked([one.latents for one in examples]),
    )


def _multipliers(examples: Sequence[_Example]) -> Tensor:
    return torch.tensor([one.picture.network_multiplier for one in examples])


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return stacked(present) if present else None


def _time_ids(picture: Picture, view: View) -> tuple[int, ...]:
    width, height = picture.fit.bucket
    return picture.size.height, picture.size.width, view.top, view.left, height, width
