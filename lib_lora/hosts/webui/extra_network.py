"""``<lora:…>`` and ``<lyco:…>`` as the WebUI calls them: `activate` before each pass of each batch."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules import extra_networks

from lib_lora.hosts.guard import attempt, sentence
from lib_lora.hosts.webui.messages import tell
from lib_lora.hosts.webui.settings import option, read_settings
from lib_lora.hosts.webui.takeover import TAG

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib_lora.hosts.webui.active import ActiveLoras
    from lib_lora.hosts.webui.takeover import TakeOver

NO_NETWORK = "None"
REQUEST = "prefuse_request"
"""Where a generation keeps what it asked for: a refiner is loaded without another call of `activate`."""


class PrefuseNetwork(extra_networks.ExtraNetwork):
    """Ours while the setting is on, else a door to the built-in extension's."""

    def __init__(self, loras: Callable[[], ActiveLoras], takeover: TakeOver) -> None:
        super().__init__(TAG)
        self._loras = loras
        self._takeover = takeover

    def activate(self, p: Any, params_list: list[Any]) -> None:
        """Make exactly these LoRAs active; every call is a complete request, an empty list one for none.

        Never raises for a fault of ours: the WebUI would take all LoRAs of the prompt out.

        Args:
            p: The generation; an empty one when a model was loaded.
            params_list: The tags' arguments, split by the WebUI.
        """
        if not read_settings().enabled:
            self._hand_over(p, params_list)
            return
        _, error = attempt("applying LoRAs", lambda: self._activate(p, params_list))
        if error is not None:
            vars(p).pop(REQUEST, None)
            attempt("giving the base weights back", lambda: self._loras().leave())
            tell(p, f"the LoRAs of this picture are not applied: {sentence(error)}")

    def deactivate(self, p: Any) -> None:
        """The end of a generation. What is applied stays: the next `activate` compares and changes what differs."""
        if self._takeover.in_charge:
            attempt("looking for changed strengths", lambda: self._tell_of_changes(p))
        elif self._takeover.fallback is not None:
            self._takeover.fallback.deactivate(p)

    def _tell_of_changes(self, p: Any) -> None:
        if changed := self._takeover.changed_by_others():
            tell(
                p,
                f"another extension changed the strengths of {', '.join(changed)} while the picture was made; that has "
                "no effect with Prefuse: write them in the tags, or switch Prefuse off in the settings",
            )

    def _activate(self, p: Any, params_list: list[Any]) -> None:
        self._takeover.take()
        params = [*params_list, *_network_of_settings(p, params_list)]
        self._loras().request(p, [(one.positional, one.named) for one in params], hires=_is_for_hires(p, params_list))

    def _hand_over(self, p: Any, params_list: list[Any]) -> None:
        if self._takeover.in_charge:
            self._loras().leave()
            self._takeover.give_back()
        vars(p).pop(REQUEST, None)
        if self._takeover.fallback is not None:
            self._takeover.fallback.activate(p, params_list)


def _is_for_hires(p: Any, params_list: list[Any]) -> bool:
    """Whether these are the tags of the hires pass; with little memory its prompts are encoded before the first."""
    later = (getattr(p, "hr_extra_network_data", None) or {}).values()
    theirs = {id(one) for tags in later for one in tags}
    return bool(getattr(p, "is_hr_pass", False)) or any(id(one) in theirs for one in params_list)


def _network_of_settings(p: Any, params_list: list[Any]) -> list[Any]:
    """The LoRA of "Add network to prompt", unless the prompt names it; the infotext gets its tag."""
    name = option("sd_lora", NO_NETWORK)
    if name == NO_NETWORK or not p.all_prompts or any(one.items and one.items[0] == name for one in params_list):
        return []
    strength = option("extra_networks_default_multiplier", 1.0)
    tag = f"<{TAG}:{name}:{strength}>"
    p.all_prompts = [prompt if tag in prompt else prompt + tag for prompt in p.all_prompts]
    return [extra_networks.ExtraNetworkParams(items=[name, str(strength)])]
