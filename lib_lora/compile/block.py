"""One block of a model: eager until what was compiled for a call has shown that it computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lib_lora.compile.attempt import Failure, attempt
from lib_lora.compile.forms import call_form, copied
from lib_lora.compile.judge import disagreement, is_finite
from lib_lora.compile.place import Place, own_method
from lib_lora.compile.variants import Variant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from lib_lora.compile.forms import CallForm

RELEASED = "released"
METHODS = ("forward", "_forward")
"""What other code replaces in a module to change what it does; LDM's blocks have the second within the first."""
MOST_FORMS = 64
"""A number that is new in every call would be compiled for without end."""
MOST_VAIN = 8
"""Attributes that are new in every call too, and what torch specialises on without our knowing."""


class Block:
    """Stands where a module's forward was.

    A call of a form that was not met before is answered eagerly, and the form is asked for. When that was built, the
    next such call is answered eagerly once more and compared; from then on the compiled one answers, as long as the
    block stays as it is. What was built for the way it was before is kept, for what is switched on is often switched
    off again.

    Attributes:
        name: In its model.
        module: The block.
        variant: The block as it is, or was in the last call, with what was compiled for it.
        reason: Why it stays eager whatever it will be, a clause, or ``""``.
        is_paused: Whether it computes eagerly for a while.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        ask: Callable[[Block, Variant, CallForm], None],
        fail: Callable[[Block, Variant, Failure], None],
    ) -> None:
        """Take the forward's place.

        Args:
            name: In its model.
            module: The block.
            ask: Called with forms that are to be built; puts them into `Variant.built`.
            fail: Called when it was found that something does not work.
        """
        self.name = name
        self.module = module
        self.reason = ""
        self.is_paused = False
        self._vain = 0
        self._ask, self._fail = ask, fail
        inside = [part for part in module.modules() if part is not module]
        self._hooks = [vars(part)[kind] for part in inside for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._methods = _Methods(inside)
        self._place = Place(module, self.call)
        self.start_over()

    @property
    def eager(self) -> Callable[..., Any]:
        """Its forward as it was."""
        return self._place.eager

    @property
    def is_altered(self) -> bool:
        """Whether other code hooked or replaced forwards since: a graph that was compiled does not see that."""
        return self._place.is_covered or any(self._hooks) or self._methods.are_replaced

    @property
    def is_idle(self) -> bool:
        """Whether nothing may be compiled of it now."""
        return bool(self.reason) or self.is_paused or self.is_altered

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``forward(*args, **kwargs)``."""
        form = None if torch.is_grad_enabled() or self.is_idle else call_form(self.module, args, kwargs)
        if form is None or not self._is_known() or self.variant.reason:
            return self.eager(*args, **kwargs)
        if compiled := self.variant.trusted.get(form):
            return self._run(form, compiled, args, kwargs)
        if form in self.variant.built:
            return self._compare(form, args, kwargs)
        expected = self.eager(*args, **kwargs)
        if form not in self.variant.asked and len(self.variant.asked) < MOST_FORMS:
            self.variant.asked.add(form)
            self._ask(self, self.variant, form)
        return expected

    def start_over(self) -> None:
        """Forget all that was compiled."""
        self.variant = self._before = Variant(self.name, self.module, self.eager)

    def stand_again(self) -> None:
        """Take the forward's place once more, if other code put back what it had met there before."""
        if not self.reason and self._place.take_again():
            self.start_over()

    def release(self) -> None:
        """Give the forward back; where somebody else put another over it, that one reaches the eager one."""
        self.reason = RELEASED
        self.start_over()
        self._place.leave()

    def _is_known(self) -> bool:
        """Find the variant that the block is now; False if that is another one all the time."""
        if self.variant.is_current:
            return True
        self._count_vain(not self.variant.trusted, "its attributes are others in each call")
        now = self._before if self._before.is_current else Variant(self.name, self.module, self.eager)
        self.variant, self._before = now, self.variant
        return not self.reason

    def _run(self, form: CallForm, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = attempt(lambda: compiled(*args, **kwargs))
        if isinstance(result, Failure):
            self._take_back(form, result)
            return self.eager(*args, **kwargs)
        return result

    def _compare(self, form: CallForm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        compiled, (again, named_again) = self.variant.built[form], copied((args, kwargs))
        expected = self.eager(*args, **kwargs)  # which may write into its arguments
        got = attempt(lambda: compiled(*again, **named_again))
        if isinstance(got, Failure):
            self._take_back(form, got)
        elif not is_finite(expected):
            return expected  # no reference; the next call may be one
        elif problem := disagreement(expected, got):
            self._fail(self, self.variant, Failure(f"it computes something else: {problem}"))
        else:
            self.variant.trusted[form] = self.variant.built.pop(form)
        return expected

    def _take_back(self, form: CallForm, failure: Failure) -> None:
        """What was compiled does not serve this call: it is asked for again, if there was just no graph for it."""
        for place in (self.variant.built, self.variant.trusted):
            place.pop(form, None)
        if failure.is_stale:
            self.variant.asked.discard(form)
            self._count_vain(True, "no graph of it served a second call")
        self._fail(self, self.variant, failure)

    def _count_vain(self, is_vain: bool, clause: str) -> None:
        self._vain = self._vain + 1 if is_vain else 0
        if self._vain > MOST_VAIN:
            self._fail(self, self.variant, Failure(clause))
            self.reason = self.reason or clause


class _Methods:
    """How modules compute: by methods of their classes, or by what was put over these."""

    def __init__(self, modules: list[nn.Module]) -> None:
        places = [(module, name) for module in modules for name in METHODS if hasattr(module, name)]
        self._places = [(vars(module), name) for module, name in places]
        self._were = self._now()
        self._plain = [
            own_method(*place) if was is None else was for place, was in zip(places, self._were, strict=True)
        ]

    @property
    def are_replaced(self) -> bool:
        """Whether any is another since; its class's own may be put over itself."""
        now = self._now()
        return now != self._were and any(
            one is not was and one != plain for one, was, plain in zip(now, self._were, self._plain, strict=True)
        )

    def _now(self) -> list[Any]:
        return [attributes.get(name) for attributes, name in self._places]
