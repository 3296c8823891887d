"""From the WebUI's model to LoraSessions. What is fused is recorded on the model; sessions go when it goes."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from modules import cache, paths_internal, sd_models

from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap
from lib_lora.errors import ModelError
from lib_lora.hosts.guard import attempt, logger
from lib_lora.hosts.webui.loaded import checkpoint_file, lora_folders
from lib_lora.presets import WEIGHTS_FILE, PresetFiles
from lib_lora.prompt.block_names import LISTS, ORDER
from lib_lora.session import LoraSession

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lib_lora.core.base_store import StoreKind
    from lib_lora.core.layers import LayerRef
    from lib_lora.hosts.webui.settings import Settings

    Listener = Callable[[Sequence[LayerRef]], None]

INDEX = "prefuse-loras.json"


@dataclass(frozen=True)
class _Entry:
    """A session and what it was made for.

    Attributes:
        session: The session.
        checkpoint: File that the weights came from.
        store: The setting it was made with.
        loads: Gets an item with each load of weights into the UNet.
        handle: Ends that.
    """

    session: LoraSession
    checkpoint: str
    store: StoreKind
    loads: list[object]
    handle: RemovableHandle


class Sessions:
    """One session for each model that is in memory and ever had a LoRA.

    Attributes:
        catalog: The LoRA folders of the built-in extension.
        presets: Files with presets of block weights.
    """

    def __init__(self, listener: Callable[[Any], Listener]) -> None:
        """No session is made yet.

        Args:
            listener: Gives for a model what is told of the weights that are written there.
        """
        self.catalog = LoraCatalog(lora_folders(), Path(cache.cache_dir) / INDEX)
        self.presets = PresetFiles(_preset_folders())
        self._listener = listener
        self._entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()

    def known(self, sd_model: Any) -> LoraSession | None:
        """The session of a model, if it has one that fits its weights."""
        entry = self._entries.get(sd_model)
        if entry is None:
            return None
        if entry.checkpoint != checkpoint_file(sd_model):
            self.forget(sd_model)
            return None
        return entry.session

    def get(self, sd_model: Any, settings: Settings) -> LoraSession:
        """The session of a model, made if there is none yet.

        Raises:
            ModelError: If there is no model, or no part of it has layers that LoRAs can act on.
        """
        if sd_model is None:
            raise ModelError("no model is loaded; choose a checkpoint that can be loaded")
        session = self.known(sd_model)
        if session is not None and self._entries[sd_model].store != settings.store:
            self.release(sd_model)
            session = None
        if session is None:
            checkpoint = checkpoint_file(sd_model)
            session = self._new_session(sd_model, settings.store, checkpoint)
            loads: list[object] = []
            # The same checkpoint can be loaded anew, as when fp8 is switched on; no callback tells it from another VAE.
            unet = sd_model.model.diffusion_model
            handle = unet.register_load_state_dict_post_hook(lambda _, keys: loads.append(keys))
            self._entries[sd_model] = _Entry(session, checkpoint, settings.store, loads, handle)
        return session

    def blocks(self) -> list[str]:
        """Names of the loaded model's blocks in their order; of SD1's if none is loaded yet."""
        sd_model = sd_models.model_data.sd_model
        if sd_model is None:
            return [*LISTS[26]]
        session = self.known(sd_model)
        keymap = KeyMap.from_modules(components(sd_model)) if session is None else session.keymap
        blocks = {layer.block for layer in keymap}
        return [block for block in ORDER if block in blocks]

    def weights_loaded(self, sd_model: Any) -> None:
        """A model was loaded, or its VAE: if its own weights were, they are the base now."""
        entry = self._entries.get(sd_model)
        if entry is not None and entry.loads:
            self.forget(sd_model)

    def forget(self, sd_model: Any) -> None:
        """Its weights were loaded anew, or thrown away: nothing is fused there any more."""
        entry = self._entries.pop(sd_model, None)
        if entry is not None:
            entry.handle.remove()
            entry.session.abandon()

    def rest(self, sd_model: Any) -> None:
        """Give every model but this one its base weights and free what was kept for it."""
        for other in [model for model in list(self._entries) if model is not sd_model]:
            self.release(other)

    def release(self, sd_model: Any) -> None:
        """Base weights back, memory free, session gone."""
        entry = self._entries.pop(sd_model, None)
        if entry is None:
            return
        entry.handle.remove()
        gone = any(layer.weight().is_meta for layer in entry.session.keymap)
        _, error = attempt("giving the base weights back", entry.session.abandon if gone else entry.session.unload)
        if error is not None:
            logger.warning("%s", error)

    def release_all(self) -> None:
        """Every model its base weights."""
        self.rest(None)

    def _new_session(self, sd_model: Any, store: StoreKind, checkpoint: str) -> LoraSession:
        usable = Path(checkpoint) if checkpoint.lower().endswith(".safetensors") else None
        usable = usable if usable is not None and usable.is_file() else None
        if store == "checkpoint" and usable is None:
            logger.warning("Prefuse: base weights can only be read from a .safetensors checkpoint; they are copied")
            store = "auto"
        return LoraSession(
            components(sd_model),
            self.catalog,
            store=store,
            checkpoint=usable,
            presets=self.presets,
            on_weights_changed=self._listener(sd_model),
        )


def components(sd_model: Any) -> dict[str, nn.Module]:
    """``unet``, ``te1``, ``te2``, ``te3`` → module; SD1, SD2, SDXL and its refiner, SD3."""
    found: dict[str, nn.Module] = {"unet": sd_model.model.diffusion_model}
    conditioner = getattr(sd_model, "conditioner", None)
    if conditioner is not None:
        for embedder in conditioner.embedders:
            if (wrapped := getattr(embedder, "wrapped", None)) is not None:
                # CLIP has a `transformer`, open_clip a `model`; the refiner has the second alone.
                found["te1" if hasattr(wrapped, "transformer") else "te2"] = wrapped
        return found
    encoder = sd_model.cond_stage_model
    parts = {"te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"}
    sd3 = {key: getattr(encoder, name, None) for key, name in parts.items()}
    if any(part is not None for part in sd3.values()):
        return found | {key: part for key, part in sd3.items() if part is not None}
    return found | {"te1": getattr(encoder, "wrapped", encoder)}


def _preset_folders() -> list[Path]:
    """Beside the WebUI's settings, with the LoRAs, and in LoRA Block Weight, where that is installed."""
    theirs = sorted(Path(paths_internal.extensions_dir).glob(f"*/scripts/{WEIGHTS_FILE}"))
    return [*map(Path, (paths_internal.data_path, *lora_folders())), *(file.parent for file in theirs)]
