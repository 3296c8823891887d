"""The extension as the WebUI sees it: one object with a method for each of its callbacks."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from lib_lora.errors import RequestError
from lib_lora.hosts.guard import attempt
from lib_lora.hosts.webui.settings import add_settings, page_language, read_settings
from lib_lora.hosts.webui.xyz import Known, add_axes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lib_lora.hosts.host import Host
    from lib_lora.hosts.webui.active import ActiveLoras
    from lib_lora.hosts.webui.takeover import TakeOver
    from lib_lora.prompt.block_weights import Presets


RELOAD_SECONDS = 120
"""For the WebUI to load the extension anew, before somebody who needs it is refused."""


class Newest:
    """The extension that the WebUI loaded last: jobs of a page go on while that is loaded anew."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._extension: Extension | None = None

    def came(self, extension: Extension | None) -> None:
        """It can be used; or none can, until the next came."""
        with self._changed:
            self._extension = extension
            self._changed.notify_all()

    def loras(self) -> ActiveLoras:
        """What does its work.

        Raises:
            RequestError: If the WebUI has unloaded it and loads none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._extension is not None, RELOAD_SECONDS)
            if self._extension is None:
                raise RequestError("The WebUI has unloaded the extension.")
            return self._extension.loras()


NEWEST = Newest()


class Extension:
    """Made anew with each load of the WebUI's scripts; what is fused is recorded on the models, not here."""

    def __init__(self) -> None:
        self._takeover: TakeOver | None = None
        self._active: ActiveLoras | None = None
        self._lock = threading.Lock()
        # Not in `on_ui_settings`: with --nowebui there is no page, and the API's options are made before the server is.
        _guarded("adding the settings", lambda: add_settings(self._compile_status, self._compile_anew))

    def before_ui(self) -> None:
        """The page is being made."""
        _guarded("adding axes to the X/Y/Z plot", lambda: add_axes(Known(self._names, self._presets, self._blocks)))

    def tabs(self, build: Callable[[Host, str], Any]) -> list[tuple[Any, str, str]]:
        """Our page among the WebUI's; none if it can not be made.

        Args:
            build: Makes it, of its host and its language.
        """
        blocks, _ = attempt("making the page", lambda: build(self._host(), page_language()))
        return [] if blocks is None else [(blocks, "Prefuse", "prefuse")]

    def app_started(self, demo: Any, app: Any) -> None:
        """The server is up, and the built-in extension has registered its network: the moment to take over."""
        _guarded("taking over <lora:…>", lambda: self._start(demo, app))

    def model_loaded(self, sd_model: Any) -> None:
        """A model was made, weights were loaded into one, or its VAE changed."""
        _guarded("meeting the model", lambda: self._meet(sd_model))

    def denoising(self, params: Any) -> None:
        """The model is about to be called for a step."""
        if self._active is not None:
            denoiser = params.denoiser
            self._active.advance(getattr(denoiser, "p", None), *_step_of(params, denoiser))

    def script_unloaded(self) -> None:
        """The scripts are loaded anew next, perhaps without us."""
        _guarded("giving everything back", self._stop)

    def _start(self, demo: Any, app: Any) -> None:
        from lib_lora.hosts.webui.api import Api, add_routes
        from lib_lora.hosts.webui.builtin import spell_writable_names
        from lib_lora.hosts.webui.conds import extend_cond_key
        from lib_lora.hosts.webui.extra_network import PrefuseNetwork
        from lib_lora.hosts.webui.pages import close_what_has_ended
        from lib_lora.hosts.webui.takeover import TakeOver

        if self._takeover is None:
            self._takeover = TakeOver()
            NEWEST.came(self)
            extend_cond_key(lambda p: () if self._active is None else self._active.cond_state(p))
            self._takeover.register(PrefuseNetwork(self.loras, self._takeover))
            add_routes(app, Api(self.loras, self._takeover))
            spell_writable_names(self._tag_name)
            if demo is not None:
                close_what_has_ended()

    def _host(self) -> Host:
        from lib_lora.hosts.webui.tab import WebuiHost

        return WebuiHost(NEWEST.loras)

    def loras(self) -> ActiveLoras:
        """What does the work; made when it is first needed, for it brings forty modules of ours."""
        from lib_lora.hosts.webui.active import ActiveLoras
        from lib_lora.hosts.webui.compiled import CompiledUnets
        from lib_lora.hosts.webui.model import Sessions

        with self._lock:
            if self._takeover is None:
                raise RuntimeError("the WebUI has unloaded the extension")
            if self._active is None:
                compiled = CompiledUnets()
                self._active = ActiveLoras(Sessions(compiled.listener), compiled, self._takeover)
            return self._active

    def _meet(self, sd_model: Any) -> None:
        if self._active is not None:
            self._active.model_loaded(sd_model)
        if self._takeover is not None and read_settings().enabled:
            self._takeover.take()

    def _stop(self) -> None:
        from lib_lora.hosts.webui.builtin import restore_names
        from lib_lora.hosts.webui.conds import restore_cond_key
        from lib_lora.hosts.webui.pages import leave_open

        NEWEST.came(None)
        leave_open()
        restore_cond_key()
        restore_names()
        if self._active is not None:
            self._active.leave()
        if self._takeover is not None:
            self._takeover.give_back(patch=False)
        self._active = self._takeover = None

    def _compile_status(self) -> str:
        """For the settings page, which is made before there is anything to tell."""
        return "" if self._active is None else str(self._active.compile_status)

    def _compile_anew(self) -> None:
        """The setting was changed."""
        if self._active is not None:
            _guarded("compiling the model", self._active.compile_as_set)

    def _names(self) -> Sequence[str]:
        """Names that tags of the X/Y/Z plot can have."""
        entries = self.loras().sessions.catalog.entries() if self._takeover is not None else ()
        return sorted(entry.tag_name for entry in entries if entry.tag_name)

    def _presets(self) -> Presets:
        return self.loras().sessions.presets.read()

    def _blocks(self) -> Sequence[str]:
        return self.loras().sessions.blocks()

    def _tag_name(self, file: str) -> str:
        """How our tags spell a file; the built-in extension's may not understand it."""
        return self.loras().sessions.catalog.tag_name(file) if read_settings().enabled else ""


def _step_of(params: Any, denoiser: Any) -> tuple[int, int]:
    """Step, from 0, and number of steps of the pass.

    `params.sampling_step` is the one before, for it is set after each; samplers of second order call twice a step.
    """
    calls, steps = getattr(denoiser, "total_steps", None), getattr(denoiser, "steps", None)
    if not calls or not steps:
        return params.sampling_step, params.total_sampling_steps
    return denoiser.step * steps // calls, steps


def _guarded(what: str, action: Callable[[], None]) -> None:
    """Our fault must not stop the WebUI's other callbacks, and is told in the log."""
    attempt(what, action)
