"""Textual inversions that come inside of LoRA files: there while their LoRA is applied."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules import sd_hijack, shared
from modules.textual_inversion import textual_inversion

from lib_lora.core.files import FileIdentity
from lib_lora.core.network import load_network
from lib_lora.hosts.guard import logger
from lib_lora.hosts.webui.settings import option

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from lib_lora.report import AppliedLora

NESTED = "string_to_param."
"""Before the names of vectors in files of one of the formats of textual inversions."""


class LoraAsHash(str):
    """The LoRA's name where the WebUI looks for an embedding's hash; nothing if the setting is off."""

    __slots__ = ()

    def __str__(self) -> str:
        """The name, for the infotext."""
        return str.__str__(self) if option("lora_bundled_ti_to_infotext", True) else ""


class BundledEmbeddings:
    """Those that are registered with the WebUI at the moment."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._files: list[FileIdentity] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Embedding and file of each."""
        return tuple(f"{name}@{file}" for name, file in self._shown.items())

    def show(self, applied: Iterable[AppliedLora]) -> None:
        """Register the embeddings of these LoRAs with the model, and of no others."""
        wanted = [lora for lora in applied if lora.embeddings]
        if not wanted and not self._shown:
            return
        database = sd_hijack.model_hijack.embedding_db
        files = [FileIdentity.of(lora.path) for lora in wanted]
        # The WebUI forgets them when it looks through the embeddings' folder.
        if files == self._files and self._shown.keys() <= database.word_embeddings.keys():
            return
        for name in self._shown:
            database.register_embedding_by_name(None, shared.sd_model, name)
        self._shown, self._files = {}, []
        for lora in wanted:
            self._register(database, lora)
        self._files = files

    def _register(self, database: Any, lora: AppliedLora) -> None:
        for name, tensors in load_network(lora.path).embeddings.items():
            if name in database.word_embeddings:
                logger.warning("Prefuse: %s brings an embedding %r, of which there is a file too", lora.name, name)
                continue
            embedding = textual_inversion.create_embedding_from_data(
                _as_saved(tensors), name, filename=f"{lora.path}/{name}"
            )
            embedding.shorthash = LoraAsHash(lora.name)
            if database.expected_shape in (-1, embedding.shape):
                database.register_embedding(embedding, shared.sd_model)
                self._shown[name] = str(lora.path)
            else:
                database.skipped_embeddings[name] = embedding


def _as_saved(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The dictionary that a textual inversion's own file holds."""
    flat: dict[str, Any] = {key: tensor for key, tensor in tensors.items() if not key.startswith(NESTED)}
    nested = {key.removeprefix(NESTED): tensor for key, tensor in tensors.items() if key.startswith(NESTED)}
    return flat | {"string_to_param": nested} if nested else flat
