"""The WebUI's UNets that run compiled: with what, how far that is, and why one is not."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from modules import cache, devices, sd_hijack, sd_models, shared

from lib_lora.compile.choose import OFF, prepare_by_name
from lib_lora.compile.eager import EagerHandle
from lib_lora.compile.protocol import CompileStatus
from lib_lora.hosts.webui.settings import option, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lib_lora.compile.protocol import Handle
    from lib_lora.core.layers import LayerRef

FOLDER = "prefuse"
"""In the WebUI's cache."""
MOVED = "The model is not compiled: --medvram and --lowvram move its parts right before their forwards."
FP8 = "The model is not compiled: its weights are kept in fp8 and turned into another dtype in each forward."
WAITING = "The model is compiled when the next picture is drawn."


@dataclass(frozen=True)
class _Entry:
    """A model's handle and what it was made for.

    Attributes:
        handle: The handle.
        backend: The setting.
        code: What of the WebUI's settings decides how the model computes.
        loads: Gets an item with each load of weights into the UNet.
        listener: Ends that.
    """

    handle: Handle
    backend: str
    code: tuple[Any, ...]
    loads: list[object]
    listener: RemovableHandle


class CompiledUnets:
    """A handle for each model that is in memory, while the setting is on. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()

    def use(self, sd_model: Any, backend: str) -> None:
        """The next steps are of this model: begin to compile it, unless that was done.

        Args:
            sd_model: The WebUI's model.
            backend: One of `BACKENDS`, or ``off``.
        """
        with self._lock:
            self.forget_others(sd_model)
            entry, code = self._entry(sd_model), _code_of(sd_model)
            if entry is not None and (entry.backend, entry.code) != (backend, code):
                self.release(sd_model)
                entry = None
            if entry is None and backend != OFF:
                self._entries[sd_model] = _new_entry(sd_model, backend, code)
            self.watch(sd_model)

    def watch(self, sd_model: Any) -> None:
        """Compute eagerly while something else changes what the model's parts do; to be called before each step."""
        if entry := self._entry(sd_model):
            entry.handle.pause(_obstacle(sd_model))

    def status(self, sd_model: Any) -> CompileStatus:
        """How a model runs.

        Args:
            sd_model: The WebUI's model, or None.
        """
        if entry := self._entry(sd_model):
            return entry.handle.status
        settings = read_settings()
        return CompileStatus(reason=WAITING if settings.enabled and settings.compiler != OFF else "")

    def listener(self, sd_model: Any) -> Callable[[Sequence[LayerRef]], None]:
        """What a session of this model tells which weights it wrote."""
        model = ref(sd_model)  # a session must not keep the model that it is kept for

        def weights_changed(layers: Sequence[LayerRef]) -> None:
            if entry := self._entry(model()):
                entry.handle.weights_changed(layers)

        return weights_changed

    def forget_others(self, sd_model: Any) -> None:
        """Release models that were thrown away, or got other weights, this one too."""
        with self._lock:
            loaded = [id(model) for model in (sd_model, *sd_models.model_data.loaded_sd_models)]
            for model, entry in list(self._entries.items()):
                if id(model) not in loaded or entry.loads:
                    self.release(model)

    def release(self, sd_model: Any) -> None:
        """The model as it was."""
        with self._lock:
            entry = self._entries.pop(sd_model, None)
            if entry is not None:
                entry.listener.remove()
                entry.handle.release()

    def release_all(self) -> None:
        """All models as they were."""
        for sd_model in list(self._entries):
            self.release(sd_model)

    def _entry(self, sd_model: Any) -> _Entry | None:
        return None if sd_model is None else self._entries.get(sd_model)


def _new_entry(sd_model: Any, backend: str, code: tuple[Any, ...]) -> _Entry:
    unet = sd_model.model.diffusion_model
    reason = _refusal(sd_model)
    handle = EagerHandle(reason) if reason else prepare_by_name(unet, backend, Path(cache.cache_dir) / FOLDER)
    loads: list[object] = []
    listener = unet.register_load_state_dict_post_hook(lambda _, keys: loads.append(keys))
    return _Entry(handle, backend, code, loads, listener)


def _code_of(sd_model: Any) -> tuple[Any, ...]:
    """What is compiled with the model: the way its attention is computed, and whether it is compiled at all."""
    hijack = sd_hijack.model_hijack
    return _refusal(sd_model), hijack.optimization_method, option("upcast_attn", False)


def _refusal(sd_model: Any) -> str:
    if getattr(sd_model, "lowvram", False):
        return MOVED
    return FP8 if devices.fp8 else ""


def _obstacle(sd_model: Any) -> str:
    """What else acts on the model's layers, and would not be seen by code that was compiled before: a clause."""
    if getattr(sd_model, "applied_token_merged_ratio", 0):
        return "tokens are merged"
    if shared.loaded_hypernetworks:
        return "a hypernetwork is active"
    return "pictures are tiled" if sd_hijack.model_hijack.circular_enabled else ""
