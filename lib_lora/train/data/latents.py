"""Pictures encoded once, before the training."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch

from lib_lora.core.saving import no_progress
from lib_lora.errors import FileError, JobError
from lib_lora.train.data.batch import stacked
from lib_lora.train.data.pictures import middle, pixels
from lib_lora.train.data.prefetch import prefetched
from lib_lora.train.data.tensor_cache import TensorCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.train.data.buckets import Size
    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.data.pictures import Picture

    Encode = Callable[[Tensor], Tensor]
    """(N, 3, H, W) float32 from -1 to 1 on the CPU → (N, C, h, w)."""

_NAME = "latents"


class Side(NamedTuple):
    """A picture as it is, or mirrored."""

    picture: Picture
    flipped: bool


class CachedLatents:
    """What the autoencoder made of each picture."""

    def __init__(self, cache: TensorCache, fingerprint: str) -> None:
        self._cache, self._fingerprint = cache, fingerprint

    def __call__(self, picture: Picture, flipped: bool, /) -> Tensor:
        """(C, h, w).

        Raises:
            FileError: If it is not there any more.
        """
        latents = self.find(Side(picture, flipped))
        if latents is None:
            raise FileError(f"the latents of {picture.name} are not there any more; start again to make them anew")
        return latents

    def find(self, side: Side) -> Tensor | None:
        """(C, h, w), or None if it was not encoded yet."""
        return (self._cache.get(self._key(side)) or {}).get(_NAME)

    def add(self, side: Side, latents: Tensor) -> None:
        """Keep (C, h, w).

        Raises:
            JobError: If not all are finite.
            OutputError: If it can not be written.
        """
        if not torch.isfinite(latents).all():
            raise JobError(f"the autoencoder makes NaN or infinity of {side.picture.name}; let it compute in float32")
        self._cache.put(self._key(side), {_NAME: latents})

    def _key(self, side: Side) -> str:
        """All that decides the latents."""
        picture, flipped = side
        content = f"{picture.identity.size} {picture.identity.mtime_ns} {picture.size}"
        fit = f"{picture.fit.resized} {picture.fit.bucket} {'flipped' if flipped else 'as it is'}"
        return f"latents of {picture.name!a}: {content} → {fit}, {self._fingerprint}"


def cache_latents(
    dataset: Dataset, encode: Encode, fingerprint: str, progress: Progress = no_progress
) -> CachedLatents:
    """Encode all pictures that were not encoded before.

    Args:
        dataset: The pictures; its options say whether files are made.
        encode: The autoencoder; should make the same of the same pixels.
        fingerprint: What tells the autoencoder from others, as `weights_fingerprint`.
        progress: Told the pictures that are there, mirrored ones counted apart.

    Raises:
        JobError: If latents are not finite.
        FileError: If a picture can not be read any more.
        OutputError: If a file can not be written.

    What `encode` and `progress` raise passes through; files that were made stay.
    """
    options = dataset.options
    cache = TensorCache(options.cache_folder if options.cache_latents_to_disk else None)
    cached = CachedLatents(cache, fingerprint)
    sides = [Side(one, flipped) for one in dataset.pictures for flipped in (False, True)[: 1 + one.options.flip_aug]]
    missing = [side for side in sides if cached.find(side) is None]
    done = len(sides) - len(missing)
    progress(done, len(sides))
    groups = _groups(missing, options.vae_batch_size)
    for group, content in prefetched(_loaded, groups, options.max_data_loader_n_workers):
        for side, latents in zip(group, encode(content), strict=True):
            cached.add(side, latents)
        done += len(group)
        progress(done, len(sides))
    return cached


def _groups(sides: list[Side], most: int) -> Iterator[list[Side]]:
    """Some of one size."""
    buckets: defaultdict[Size, list[Side]] = defaultdict(list)
    for side in sides:
        buckets[side.picture.fit.bucket].append(side)
    for same in buckets.values():
        yield from (same[i : i + most] for i in range(0, len(same), most))


def _loaded(group: list[Side]) -> tuple[list[Side], Tensor]:
    return group, stacked([pixels(picture, middle(picture, flipped=flipped)) for picture, flipped in group])
