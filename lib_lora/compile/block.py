"""One block of a model: eager until what was compiled for a call has shown that it computes the same."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.compile.attempt import Failure, attempt
from lib_lora.compile.forms import call_form
from lib_lora.compile.judge import disagreement, is_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from lib_lora.compile.forms import CallForm

MOST_FORMS = 64
"""A number that is new in every call would be compiled for without end."""


class Block:
    """Stands where a module's forward was.

    A call of a form that was not met before is answered eagerly, and the form is asked for. When that was built, the
    next such call is answered eagerly once more and compared; from then on the compiled one answers.

    Attributes:
        name: In its model.
        module: The block.
        eager: Its forward as it was.
        built: Form → compiled, not yet compared.
        trusted: Form → compiled, compared.
        reason: Why it stays eager, a clause, or ``""``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        ask: Callable[[Block, CallForm], None],
        fail: Callable[[Block, Failure], None],
    ) -> None:
        """Take the forward's place.

        Args:
            name: In its model.
            module: The block.
            ask: Called with forms that are to be built; puts them into `built`.
            fail: Called when it was found that something does not work.
        """
        self.name = name
        self.module = module
        self.eager: Callable[..., Any] = module.forward
        self.built: dict[CallForm, Callable[..., Any]] = {}
        self.trusted: dict[CallForm, Callable[..., Any]] = {}
        self.reason = ""
        self._asked = set["CallForm"]()
        self._ask, self._fail = ask, fail
        self._others = vars(module).get("forward")
        self._inside = [vars(part) for part in module.modules() if part is not module]
        self._replaced = [inside.get("forward") for inside in self._inside]

        @functools.wraps(self.eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.call(args, kwargs)

        self._forward = forward
        module.forward = forward

    @property
    def is_altered(self) -> bool:
        """Whether other code hooked or replaced forwards inside since: a graph that was compiled does not see that."""
        return any(
            inside["_forward_hooks"] or inside["_forward_pre_hooks"] or inside.get("forward") is not before
            for inside, before in zip(self._inside, self._replaced, strict=True)
        )

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``forward(*args, **kwargs)``."""
        if self.reason or torch.is_grad_enabled() or self.is_altered:
            return self.eager(*args, **kwargs)
        form = call_form(self.module, args, kwargs)
        if form is not None and (compiled := self.trusted.get(form)):
            return self._run(compiled, args, kwargs)
        expected = self.eager(*args, **kwargs)
        if form is not None and form in self.built:
            self._compare(form, expected, args, kwargs)
        elif form is not None and form not in self._asked and len(self._asked) < MOST_FORMS:
            self._asked.add(form)
            self._ask(self, form)
        return expected

    def release(self) -> None:
        """Give the forward back; where somebody else put another over it, that one reaches the eager one."""
        self.reason = "released"
        self.built.clear()
        self.trusted.clear()
        if vars(self.module).get("forward") is not self._forward:
            return
        if self._others is None:
            del self.module.forward
        else:
            self.module.forward = self._others

    def _run(self, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = attempt(lambda: compiled(*args, **kwargs))
        if isinstance(result, Failure):
            self._fail(self, result)
            return self.eager(*args, **kwargs)
        return result

    def _compare(self, form: CallForm, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compiled = self.built[form]
        got = attempt(lambda: compiled(*args, **kwargs))
        if isinstance(got, Failure):
            self._fail(self, got)
        elif not is_finite(expected):
            return  # no reference; the next call may be one
        elif problem := disagreement(expected, got):
            self._fail(self, Failure(f"it computes something else: {problem}"))
        else:
            self.trusted[form] = self.built.pop(form)
