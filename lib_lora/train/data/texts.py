"""Captions encoded once, before the training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lib_lora.core.saving import no_progress
from lib_lora.errors import FileError, JobError
from lib_lora.train.data.tensor_cache import TensorCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.data.loader import Texts

AT_ONCE = 8
"""Captions encoded at once."""


class CachedTexts:
    """What the text encoders made of each caption."""

    def __init__(self, cache: TensorCache, fingerprint: str) -> None:
        self._cache, self._fingerprint = cache, fingerprint

    def __call__(self, captions: Sequence[str], /) -> Mapping[str, Tensor]:
        """As the encoder: tensors by name, one row for each caption.

        Raises:
            FileError: If one is not there any more.
        """
        found = [self._row(caption) for caption in captions]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}

    def find(self, caption: str) -> Mapping[str, Tensor] | None:
        """Its row of each tensor, or None if it was not encoded yet."""
        return self._cache.get(self._key(caption))

    def add(self, caption: str, row: Mapping[str, Tensor]) -> None:
        """Keep its row of each tensor.

        Raises:
            JobError: If not all are finite.
            OutputError: If it can not be written.
        """
        if not all(torch.isfinite(tensor).all() for tensor in row.values()):
            raise JobError(f"the text encoder makes NaN or infinity of the caption {caption[:80]!r}")
        self._cache.put(self._key(caption), row)

    def _row(self, caption: str) -> Mapping[str, Tensor]:
        row = self.find(caption)
        if row is None:
            raise FileError(f"the caption {caption[:80]!r} is not encoded any more; start again to encode it anew")
        return row

    def _key(self, caption: str) -> str:
        return f"text {caption!a}, {self._fingerprint}"


def cache_texts(dataset: Dataset, encode: Texts, fingerprint: str, progress: Progress = no_progress) -> CachedTexts:
    """Encode all captions that were not encoded before, and the empty one if captions are dropped.

    Args:
        dataset: The pictures with their captions; its options say whether files are made.
        encode: The tokenizers and text encoders; tensors by name, one row for each caption.
        fingerprint: What tells them from others, with what else decides their answer, such as the length of captions.
        progress: Told the captions that are there.

    Raises:
        JobError: If an answer is not finite.
        OutputError: If a file can not be written.

    What `encode` and `progress` raise passes through; files that were made stay.
    """
    options = dataset.options
    folder = options.cache_folder if options.cache_text_encoder_outputs_to_disk else None
    cached = CachedTexts(TensorCache(folder), fingerprint)
    captions = dataset.captions()
    missing = [caption for caption in captions if cached.find(caption) is None]
    progress(len(captions) - len(missing), len(captions))
    for first in range(0, len(missing), AT_ONCE):
        group = missing[first : first + AT_ONCE]
        answer = encode(group)
        for index, caption in enumerate(group):
            cached.add(caption, {name: tensor[index] for name, tensor in answer.items()})
        progress(len(captions) - len(missing) + first + len(group), len(captions))
    return cached
