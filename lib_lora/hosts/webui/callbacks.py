"""The extension as the WebUI sees it: one object with a method for each of its callbacks."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib_lora.hosts.webui.guard import attempt
from lib_lora.hosts.webui.settings import add_settings, read_settings
from lib_lora.hosts.webui.xyz import add_axes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lib_lora.hosts.webui.active import ActiveLoras
    from lib_lora.hosts.webui.takeover import TakeOver


class Extension:
    """Made anew with each load of the WebUI's scripts; what is fused is recorded on the models, not here."""

    def __init__(self) -> None:
        self._loras: ActiveLoras | None = None
        self._takeover: TakeOver | None = None

    def ui_settings(self) -> None:
        """The settings page is being made."""
        _guarded("adding the settings", add_settings)

    def before_ui(self) -> None:
        """The page is being made."""
        _guarded("adding axes to the X/Y/Z plot", lambda: add_axes(self._names))

    def app_started(self, _demo: Any, app: Any) -> None:
        """The server is up, and the built-in extension has registered its network: the moment to take over."""
        _guarded("taking over <lora:…>", lambda: self._start(app))

    def model_loaded(self, sd_model: Any) -> None:
        """A model was made, weights were loaded into one, or its VAE changed."""
        _guarded("meeting the model", lambda: self._meet(sd_model))

    def script_unloaded(self) -> None:
        """The scripts are loaded anew next, perhaps without us."""
        _guarded("giving everything back", self._stop)

    def _start(self, app: Any) -> None:
        # Torch is there, but forty modules of ours are not, and the page waits for nothing that they do.
        from lib_lora.hosts.webui.active import ActiveLoras
        from lib_lora.hosts.webui.api import Api, add_routes
        from lib_lora.hosts.webui.conds import extend_cond_key
        from lib_lora.hosts.webui.extra_network import PrefuseNetwork
        from lib_lora.hosts.webui.model import Sessions
        from lib_lora.hosts.webui.takeover import TakeOver

        if self._takeover is None:
            self._takeover = TakeOver()
            self._loras = ActiveLoras(Sessions(), self._takeover)
            extend_cond_key(self._loras.cond_state)
            self._takeover.register(PrefuseNetwork(self._loras, self._takeover))
            add_routes(app, Api(self._loras, self._takeover))

    def _meet(self, sd_model: Any) -> None:
        if self._loras is None or self._takeover is None:
            return
        self._loras.model_loaded(sd_model)
        if read_settings().enabled:
            self._takeover.take()

    def _stop(self) -> None:
        from lib_lora.hosts.webui.conds import restore_cond_key

        restore_cond_key()
        if self._loras is not None and self._takeover is not None:
            self._loras.leave()
            self._takeover.give_back(patch=False)
        self._loras = self._takeover = None

    def _names(self) -> Sequence[str]:
        """Names that tags of the X/Y/Z plot can have."""
        from lib_lora.catalog import LoraCatalog
        from lib_lora.hosts.webui.model import lora_folders

        catalog = LoraCatalog(lora_folders()) if self._loras is None else self._loras.sessions.catalog
        return sorted(entry.tag_name for entry in catalog.entries() if entry.tag_name)


def _guarded(what: str, action: Callable[[], None]) -> None:
    """Our fault must not stop the WebUI's other callbacks, and is told in the log."""
    attempt(what, action)
