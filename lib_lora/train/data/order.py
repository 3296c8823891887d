"""Which pictures are in which batch: a function of seed and step alone.

An epoch's batches are as kohya's: the pictures of each bucket are shuffled and cut into batches, the last of which may
be smaller, and the batches of all buckets are shuffled. Several processes share each batch, so what N of them see with
a batch of B is what one sees with N·B.
"""

from __future__ import annotations

import hashlib
import math
import random
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Shard(NamedTuple):
    """One of several processes.

    Attributes:
        rank: Its number, from 0.
        processes: How many there are.
    """

    rank: int = 0
    processes: int = 1


ALONE = Shard()


class Bucket(NamedTuple):
    """Pictures that may be in one batch.

    Attributes:
        pictures: Their indices, each as often as it is used in an epoch.
        batch_size: Pictures of a step in all processes together.
    """

    pictures: Sequence[int]
    batch_size: int


class Row(NamedTuple):
    """A picture's place in the training.

    Attributes:
        picture: Its index.
        epoch: From 0.
        place: How many places were before, in all processes; what is left to chance here depends on it.
        step: How many batches were before, over all epochs.
        share: Weight of its loss, so that the mean over all processes' means is the mean over the batch; 0 for one that
            only fills up a process's part.
    """

    picture: int
    epoch: int
    step: int
    place: int
    share: float


class Order:
    """The batches of a training, by step.

    Attributes:
        batches_per_epoch: Steps of an epoch; it is the same for every epoch.
    """

    def __init__(self, buckets: Sequence[Bucket], seed: int) -> None:
        """For pictures by bucket."""
        self.batches_per_epoch = sum(math.ceil(len(bucket.pictures) / bucket.batch_size) for bucket in buckets)
        self._places = max(bucket.batch_size for bucket in buckets)  # of a step
        self._buckets, self._seed = buckets, seed
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def rows(self, step: int, shard: Shard = ALONE) -> list[Row]:
        """What one process gets: as many rows as every other, of one bucket.

        Args:
            step: From 0, over all epochs.
            shard: The process.
        """
        epoch, index = divmod(step, self.batches_per_epoch)
        batch = self._shuffled(epoch)[index]
        part = math.ceil(len(batch) / shard.processes)
        share = part * shard.processes / len(batch)
        first = shard.rank * part
        rows = [
            Row(picture, epoch, step, step * self._places + first + row, share)
            for row, picture in enumerate(batch[first : first + part])
        ]
        filler = Row(batch[0], epoch, step, step * self._places, 0.0)
        return rows + [filler] * (part - len(rows))

    def _shuffle(self, epoch: int) -> list[Sequence[int]]:
        chance = stream(self._seed, "order", epoch)
        batches: list[Sequence[int]] = []
        for bucket in self._buckets:
            shuffled, size = list(bucket.pictures), bucket.batch_size
            chance.shuffle(shuffled)
            batches += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        chance.shuffle(batches)
        return batches


def stream(seed: int, purpose: str, place: int) -> random.Random:
    """Chance for one purpose at one place: what is drawn elsewhere, or for something else, changes nothing here."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{place}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))  # noqa: S311 - pictures, no secrets
