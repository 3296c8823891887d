"""The place of a module's forward, and who stands there.

Other code keeps forwards that it meets, and puts them back when it likes: long after we gave a model back, and took it
again (ControlNet's "reference-only"). So what we put there knows nobody in particular; it asks at the module.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Forward = Callable[..., Any]

_places: WeakKeyDictionary[nn.Module, weakref.ref[Place]] = WeakKeyDictionary()
"""That which is taken now, of each module."""


class StandIn:
    """A forward that asks whoever has taken its place; where nobody has, it is the one that it replaced."""

    __slots__ = ("__wrapped__", "module", "replaced")

    def __init__(self, module: nn.Module, replaced: Forward | None) -> None:
        """For the forward `replaced` of a module, None for its class's."""
        self.module = module
        self.replaced = replaced
        self.__wrapped__ = own_method(module, "forward") if replaced is None else replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as the forward."""
        known = _places.get(self.module)
        place = known() if known else None
        if place is None or place.eager != self.__wrapped__:  # another forward, which may call this one
            return self.__wrapped__(*args, **kwargs)
        return place.answer(args, kwargs)


class Place:
    """A forward's place that was taken.

    Attributes:
        answer: What is asked in its place.
    """

    def __init__(self, module: nn.Module, answer: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """Take it; a stand-in that is there makes way.

        Args:
            module: Whose forward.
            answer: Gets the arguments of a call.
        """
        self.answer = answer
        self._module = module
        self._stand_in = module.forward = self._made()
        _places[module] = weakref.ref(self)

    @property
    def eager(self) -> Forward:
        """The forward as it was."""
        return self._stand_in.__wrapped__

    @property
    def is_covered(self) -> bool:
        """Whether other code put a forward of its own there."""
        now = vars(self._module).get("forward")
        return not (now is None or isinstance(now, StandIn) or now in (self.eager, own_method(self._module, "forward")))

    def take_again(self) -> bool:
        """Stand there once more, if other code put back what it had met there; whether `eager` is another now."""
        if vars(self._module).get("forward") is self._stand_in or self.is_covered:
            return False
        before, made = self._stand_in, self._made()
        is_other = made.__wrapped__ != before.__wrapped__
        self._stand_in = self._module.forward = made if is_other else before
        return is_other

    def leave(self) -> None:
        """The forward as it was; other code that keeps ours, or put its own over it, reaches the eager one."""
        known = _places.get(self._module)
        if known is None or known() is not self:
            return
        del _places[self._module]
        now = vars(self._module).get("forward")
        if isinstance(now, StandIn):
            del self._module.forward
            if now.replaced is not None:
                self._module.forward = now.replaced

    def _made(self) -> StandIn:
        now = vars(self._module).get("forward")
        return StandIn(self._module, now.replaced if isinstance(now, StandIn) else now)


def own_method(module: nn.Module, name: str) -> Any:
    """The method that a module has of its class, whatever was put over it; None if it has none."""
    method: Any = getattr(type(module), name, None)
    return None if method is None else method.__get__(module)
