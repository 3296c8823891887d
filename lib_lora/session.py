"""LoraSession: a request for LoRAs in, the model's weights changed, a report out. One lock around all of it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lib_lora.applying import Applier
from lib_lora.catalog import LoraCatalog
from lib_lora.core.base_store import choose_store
from lib_lora.core.blocks import OUTSIDE
from lib_lora.core.checkpoint import layer_tensors
from lib_lora.core.keymap import KeyMap
from lib_lora.core.memory import return_memory
from lib_lora.core.norms import delta_norm, shares
from lib_lora.core.patch_state import STATE_ATTRIBUTE
from lib_lora.core.patcher import ModelPatcher
from lib_lora.errors import ForeignWriteError, ModelError, UnknownLoraError
from lib_lora.moving import Course, plan_course
from lib_lora.pipelines import pipeline_components
from lib_lora.presets import PresetFiles
from lib_lora.prompt.tags import parse_request
from lib_lora.report import SessionReport
from lib_lora.resolve import IDLE_BYTES, Resolver, notes_of
from lib_lora.tuning import Slider

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from torch import nn

    from lib_lora.core.base_store import StoreKind
    from lib_lora.core.gpu.switch import SwitchKind
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.models import BaseModel
    from lib_lora.core.patch_state import ApplyReport, Rounding
    from lib_lora.core.plan import Compat, FusePlan
    from lib_lora.prompt.tags import ParsedPrompt, Request
    from lib_lora.report import AppliedLora, RefusedLora
    from lib_lora.resolve import ResolvedLora

Mode = Literal["prefuse", "hook"]


class LoraSession:
    """LoRAs on one model.

    ``set`` makes exactly the LoRAs of a request active, ``clear`` gives the base weights back bit for bit, ``unload``
    frees all memory. Safe to use from several threads; hold `lease` while pictures are made.

    Attributes:
        catalog: Where LoRA names are looked up.
        keymap: The model's layers.
        cache_bytes: Networks that are not in the last request stay in memory up to this size.
        may_hook: Whether a LoRA that moves may be hooked in prefuse mode, where that is cheaper. Off, for graphs that
            were compiled before do not see hooks.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        catalog: LoraCatalog,
        *,
        mode: Mode = "prefuse",
        compat: Compat = "exact",
        store: StoreKind = "auto",
        checkpoint: Path | Sequence[Path] | None = None,
        fp8_rounding: Rounding = "nearest",
        switch: SwitchKind = "auto",
        presets: PresetFiles | None = None,
        on_weights_changed: Callable[[Sequence[LayerRef]], None] | None = None,
        control_follows: bool = False,
    ) -> None:
        """Prepare a model; no weight is touched and nothing is copied yet.

        Args:
            components: ``unet``, ``te1``, ``controlnet``, … → module; diffusers, transformers, LDM or open_clip.
            catalog: The LoRA folders.
            mode: ``prefuse`` into the weights, or ``hook`` the forwards.
            compat: ``exact``, or ``a1111`` for the WebUI's rounding.
            store: Where base weights are kept while LoRAs are fused.
            checkpoint: The .safetensors file(s) the model was loaded from, which can serve as the store.
            fp8_rounding: How sums are rounded to weights in fp8: ``nearest``, or ``stochastic`` (seeded).
            switch: How many layers are written at a time.
            presets: Where presets of block weights are read; by default from files in the LoRA folders.
            on_weights_changed: Called after weights were written, with their layers.
            control_follows: Whether LoRAs of the UNet act on the ControlNets' copies of its layers too.

        Raises:
            ModelError: If no component has layers that LoRAs can act on.
        """
        self.catalog = catalog
        self.cache_bytes = IDLE_BYTES
        self.keymap = KeyMap.from_modules(components, control_follows=control_follows)
        if not len(self.keymap):
            raise ModelError(f"no layers for LoRAs in {', '.join(components) or 'an empty model'}")
        files = [checkpoint] if isinstance(checkpoint, Path) else list(checkpoint or ())
        mapped = layer_tensors(self.keymap.parameters, files) if files and store in ("auto", "checkpoint") else None
        weights = [layer.live() for layer in self.keymap.parameters]
        self._patcher = ModelPatcher(components, choose_store(store, weights, mapped), fp8_rounding, switch)
        self._applier = Applier(self._patcher, on_weights_changed)
        self._components = dict(components)
        self._mode: Mode = mode
        self._compat: Compat = compat
        self._resolver = Resolver(catalog, self.keymap, presets or PresetFiles(catalog.folders))
        self._loras: list[ResolvedLora] = []
        self._lock = threading.RLock()
        self._report = SessionReport(mode=mode)
        self.may_hook = False

    @classmethod
    def for_pipeline(
        cls, pipe: Any, lora_dir: str | Path | Sequence[str | Path] = "loras", **options: Any
    ) -> LoraSession:
        """A session on a diffusers pipeline (Stable Diffusion 1, 2, XL).

        Args:
            pipe: Any object with `unet` (or `transformer`) and `text_encoder` modules.
            lora_dir: One or more folders with LoRA files.
            options: As the constructor's: mode, compat, store, checkpoint, fp8_rounding, ….

        Raises:
            ModelError: If the pipeline has no such modules.
        """
        folders = [lora_dir] if isinstance(lora_dir, (str, Path)) else lora_dir
        catalog = LoraCatalog([Path(folder) for folder in folders])
        return cls(pipeline_components(pipe), catalog, **options)

    @property
    def base_model(self) -> BaseModel:
        """The family of the model."""
        return self.keymap.base_model

    @property
    def report(self) -> SessionReport:
        """What the last change did."""
        return self._report

    @property
    def active(self) -> tuple[AppliedLora, ...]:
        """The LoRAs that are in the model now."""
        return self._report.applied

    def block_shares(self, name: str) -> dict[str, float]:
        """Where an active LoRA acts: block → part of its whole change (Σ‖ΔW‖² at strength 1), sorted by block.

        Args:
            name: As its request wrote it.

        Raises:
            UnknownLoraError: If no such LoRA is active.
        """
        with self._lock, torch.no_grad():
            lora = self._active(name)
            return shares(
                (layer.block or OUTSIDE, delta_norm(adapter, self._patcher.base(layer)))
                for layer, adapter in lora.match.layers
            )

    def _active(self, name: str) -> ResolvedLora:
        for lora in self._loras:
            if lora.request.name == name:
                return lora
        raise UnknownLoraError(f"{name!r} is not active; set it first")

    @property
    def applied_key(self) -> str:
        """Names everything that decides the weights now; equal keys mean equal pictures."""
        return self._applier.key

    @property
    def mode(self) -> Mode:
        """``prefuse`` or ``hook``; setting it takes effect at the next `set`."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        with self._lock:
            self._mode = mode

    @property
    def compat(self) -> Compat:
        """``exact`` or ``a1111``; setting it takes effect at the next `set`."""
        return self._compat

    @compat.setter
    def compat(self, compat: Compat) -> None:
        with self._lock:
            self._compat = compat

    @contextmanager
    def lease(self, request: Request | None = None) -> Generator[SessionReport]:
        """Hold the model: no other thread changes its LoRAs until the block ends.

        Args:
            request: LoRAs to set first, or None to keep what is active.
        """
        with self._lock:
            yield self._report if request is None else self.set(request)

    def set(self, request: Request) -> SessionReport:
        """Make exactly these LoRAs active. A bad one is refused whole and told in the report, the others apply.

        Args:
            request: A prompt with tags, the same after it was parsed, or (name, strength) and (name, te, unet) tuples.

        Raises:
            ApplyError: If writing the weights failed; the base weights are back, or, if something else wrote to fused
                weights (ForeignWriteError), nothing was changed.
        """
        with self._lock:
            return self._set(parse_request(request))

    def preview(self, request: Request) -> SessionReport:
        """What `set` would apply and refuse; files are read, the model stays as it is."""
        with self._lock:
            return self._resolver.preview(parse_request(request), self._mode)

    def advance(self, step: int, steps: int) -> None:
        """Bring strengths that are scheduled to a step of the pass that `set` began; nothing is done if none moves.

        To be called before each step: ``start=5`` takes effect in the step that is called 5. Prompts are encoded
        before step 0, so text encoders stay as they are.

        Args:
            step: Counted from 0.
            steps: How many the pass has.

        Raises:
            ApplyError: As by `set`.
        """
        with self._lock:
            loras = [lora.at(step, steps) for lora in self._loras]
            if all(now is before for now, before in zip(loras, self._loras, strict=True)):
                return
            start, refused = time.perf_counter(), list(self._report.refused)
            if self._applier.course.steps != steps:
                self._applier.follow(
                    plan_course(self._loras, step, steps, fused=self._is_exact, may_hook=self.may_hook)
                )
            _, done = self._apply(loras, refused)
            self._loras = loras
            moved = self._report.moved((time.perf_counter() - start) * 1e3, refused, notes_of((), done))
            self._report = self._applier.tell_of_move(moved, step)

    @property
    def _is_exact(self) -> bool:
        return self._mode == "prefuse" and self._compat == "exact"

    @contextmanager
    def tuning(self, name: str) -> Generator[Callable[[float], None]]:
        """Change the strength of one active LoRA again and again, at the cost of its own rank: for a slider.

        Inside the block the weights are a preview: the other LoRAs' sum is rounded before this one is added. When the
        block ends the last strength is set as `set` would. Where a preview can not be had (hook mode, algorithms that
        depend on the weights, quantised layers) a turn costs what a `set` does.

        Args:
            name: A LoRA of the last `set`, as its request wrote it.

        Yields:
            A function that takes the new strength.

        Raises:
            UnknownLoraError: If no such LoRA is active.
            TagError: By the function, if a strength is not finite or beyond the limits of a tag.
        """
        with self._lock:
            slider = Slider(name, self._report.text, self._loras)
            if self._is_exact:
                self._applier.ways = slider.ways

            def turn(strength: float) -> None:
                self._apply(slider.move(strength), [])

            try:
                yield turn
            finally:
                self._set(slider.parsed)

    def clear(self) -> SessionReport:
        """Base weights back, bit for bit."""
        return self.set(())

    def unload(self) -> SessionReport:
        """Base weights back, and every byte freed that was taken since the start."""
        with self._lock:
            report = self.clear()
            self._patcher.release()
            self._resolver.clear()
            return_memory()
            return report

    def abandon(self) -> None:
        """Forget what was fused and write nothing, for the host loaded other weights. This session is over then."""
        with self._lock:
            self._applier.hooks.clear()
            self._resolver.clear()
            self._loras = []
            for module in self._components.values():
                if hasattr(module, STATE_ATTRIBUTE):
                    object.__delattr__(module, STATE_ATTRIBUTE)

    def _set(self, parsed: ParsedPrompt) -> SessionReport:
        start = time.perf_counter()
        self._applier.follow(Course(0))
        loras, refused = self._resolver.resolve(parsed)
        plan, done = self._apply(loras, refused)
        self._resolver.trim(loras, self.cache_bytes)
        self._loras = loras
        written = sum(len(report.written) for report in done)
        self._report = SessionReport(
            text=parsed.text,
            applied=tuple(lora.applied() for lora in loras),
            refused=tuple(refused),
            notes=notes_of(loras, done),
            milliseconds=(time.perf_counter() - start) * 1e3,
            layers_written=written,
            layers_restored=sum(len(report.restored) for report in done),
            layers_kept=len(plan.patches) - written,
            store=self._patcher.store.label,
            store_bytes=self._patcher.store.nbytes,
            mode=self._mode,
        )
        return self._report

    def _apply(self, loras: list[ResolvedLora], refused: list[RefusedLora]) -> tuple[FusePlan, list[ApplyReport]]:
        plan = partial(self._resolver.plan, compat=self._compat)
        try:
            return self._applier.apply(loras, refused, plan, hook=self._mode == "hook")
        except ForeignWriteError:
            raise  # nothing was written: what was active still is
        except BaseException:
            self._back_to_base()
            raise

    def _back_to_base(self) -> None:
        try:
            self._applier.restore()
        finally:
            if not self._patcher.applied_key:  # else nothing could be done, and what was active still is
                self._loras = []
                self._report = SessionReport(mode=self._mode)
        self._applier.tell(self.keymap.parameters)
