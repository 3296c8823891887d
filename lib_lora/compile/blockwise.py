"""A model whose blocks are compiled one by one in the background, while pictures are made eagerly."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lib_lora.compile.attempt import Failure, attempt
from lib_lora.compile.background import Background, is_running
from lib_lora.compile.block import RELEASED, Block
from lib_lora.compile.parts import blocks_of
from lib_lora.compile.protocol import CompileStatus
from lib_lora.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from lib_lora.compile.forms import CallForm
    from lib_lora.compile.variants import Variant
    from lib_lora.core.layers import LayerRef

logger = logging.getLogger(__name__)


class Compiler(Protocol):
    """What a backend does for one block."""

    def build(self, block: Variant, form: CallForm) -> Callable[..., Any]:
        """Compile a block for calls of a form, and make one; in the background's thread.

        What comes out raises `NoGraphError` for a call that it was not compiled for.
        """
        ...

    def renew(self) -> bool:
        """Leave behind what an earlier program may have left damaged; False if there is nothing like that."""
        ...

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """Bring new weights into what was built."""
        ...


class BlockwiseHandle:
    """The blocks of one model, and how far they are."""

    def __init__(self, model: nn.Module, name: str, compiler: Compiler) -> None:
        """Take the place of the blocks' forwards.

        Args:
            model: Diffusers' or LDM's.
            name: Of the backend.
            compiler: What it does for one block.

        Raises:
            CompileError: If the model has no blocks that we know.
        """
        blocks = blocks_of(model)
        if not blocks:
            raise CompileError(
                f"{type(model).__name__} has no blocks that could be compiled one by one; it runs eagerly."
            )
        self._name, self._compiler = name, compiler
        self._background = Background()
        self._asked = self._done = self._recompiles = self._switches = 0
        self._switch_ms = 0.0
        self._reason = self._pause = ""
        self._blocks = [Block(path, block, self._ask, self._fail) for path, block in blocks.items()]

    @property
    def status(self) -> CompileStatus:
        """How far it is."""
        return CompileStatus(
            backend=self._name,
            blocks=len(self._blocks),
            compiled=tuple(block.name for block in self._blocks if block.variant.trusted),
            asked=self._asked,
            done=self._done,
            recompiles=self._recompiles,
            switches=self._switches,
            switch_ms=self._switch_ms,
            reason=self._reason or self._failed() or self._paused() or self._altered(),
        )

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """Bring new weights to the compiled blocks; if that fails, the model computes eagerly from now on."""
        start = time.perf_counter()
        failure = attempt(partial(self._compiler.weights_changed, layers))
        if isinstance(failure, Failure):
            self._give_up(f"The weights of {len(layers)} layers could not be brought into it: {failure.reason}")
        self._switches += 1
        self._switch_ms = (time.perf_counter() - start) * 1e3

    def pause(self, clause: str) -> None:
        """Compute eagerly as long as something changes what the model's parts do; ``""`` ends that."""
        self._pause = clause
        for block in self._blocks:
            block.is_paused = bool(clause)
            block.stand_again()

    def wait(self, seconds: float | None = None) -> bool:
        """Until nothing is left to compile."""
        return self._background.wait(seconds)

    def release(self) -> None:
        """Give the forwards back; what is being compiled at this moment is dropped when it is done."""
        self._background.stop()
        for block in self._blocks:
            block.release()

    def _ask(self, block: Block, variant: Variant, form: CallForm) -> None:
        self._asked += 1
        self._background.add(partial(self._build, block, variant, form))

    def _build(self, block: Block, variant: Variant, form: CallForm) -> None:
        """Build what was asked for, unless the block is not that way any more, before or after."""
        built = attempt(lambda: self._compiler.build(variant, form)) if _is_still(block, variant) else None
        if built is None or not _is_still(block, variant) or not is_running():
            variant.asked.discard(form)
        elif isinstance(built, Failure):
            self._fail(block, variant, built)
        else:
            variant.built[form] = built
        self._done += 1

    def _fail(self, block: Block, variant: Variant, failure: Failure) -> None:
        """A block computes eagerly as long as it is like that; all of them, if the first fails or others would too."""
        if block.reason:
            return  # it was released meanwhile
        if failure.is_stale:
            self._recompiles += 1
            return
        if not failure.is_general and self._compiler.renew():
            logger.warning("%s is compiled again, in an empty folder, for %s", block.name, failure.reason)
            block.start_over()
            return
        logger.warning("%s: %s runs eagerly, for %s", self._name, block.name, failure.reason)
        works = any(other.variant.built or other.variant.trusted for other in self._blocks if other is not block)
        if failure.is_general or not works:
            self._give_up(f"{failure.reason} (at {block.name})")
        variant.reason = failure.reason

    def _give_up(self, clause: str) -> None:
        self._done += self._background.stop()
        self._reason = f"All of it runs eagerly. {clause.rstrip('.')}."
        for block in self._blocks:
            block.release()

    def _failed(self) -> str:
        failed = ((block.name, block.reason or block.variant.reason) for block in self._blocks)
        return next(
            (f"{name} runs eagerly, for {reason}." for name, reason in failed if reason not in ("", RELEASED)), ""
        )

    def _paused(self) -> str:
        return f"It runs eagerly while {self._pause}." if self._pause else ""

    def _altered(self) -> str:
        altered = [block.name for block in self._blocks if block.is_altered]
        if not altered:
            return ""
        more = f" and {len(altered) - 1} more" if altered[1:] else ""
        return f"{altered[0]}{more} run eagerly while something is hooked into their layers."


def _is_still(block: Block, variant: Variant) -> bool:
    return not block.is_idle and not variant.reason and variant.is_current
