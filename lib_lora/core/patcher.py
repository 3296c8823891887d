"""The only writer of live weights: applies a plan, takes it back, and never believes what it has not seen."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from lib_lora.core import numerics
from lib_lora.core.fingerprint import Change, compare, samples
from lib_lora.core.gpu.grouped import Sum
from lib_lora.core.gpu.switch import GroupedSwitch
from lib_lora.core.held import HeldSums
from lib_lora.core.layers import LayerRef, is_fp8
from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.core.patch_state import DIRTY, STATE_ATTRIBUTE, ApplyReport, PatchState
from lib_lora.core.webui_rounding import fuse_layer_a1111
from lib_lora.core.workspace import Workspace
from lib_lora.errors import ForeignWriteError, FuseMemoryError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from lib_lora.core.base_store import BaseStore
    from lib_lora.core.gpu.switch import SwitchKind
    from lib_lora.core.patch_state import AppliedKey, Rounding
    from lib_lora.core.plan import Compat, FusePlan, LayerPatch


class ModelPatcher:
    """Writes plans into a model's own parameters, in place, always from the base weights."""

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        store: BaseStore,
        fp8_rounding: Rounding = "nearest",
        switch: SwitchKind = "auto",
    ) -> None:
        """Take charge of a model.

        Args:
            components: ``unet``, ``te1``, … → module. If LoRAs are fused there already (by a patcher that is gone),
                their state is taken over and `store` is not used.
            store: Where base weights shall be kept.
            fp8_rounding: How sums are rounded to weights in fp8: to the nearest, or at random by nearness, from a seed
                that is the same for the same request.
            switch: How many layers are written at a time.
        """
        self._fp8_rounding: Rounding = fp8_rounding
        self._components = dict(components)
        known = (getattr(module, STATE_ATTRIBUTE, None) for module in self._components.values())
        self._state = next((state for state in known if isinstance(state, PatchState)), PatchState(store))
        self._workspace = Workspace()
        self._switch = GroupedSwitch(switch)
        self._held = HeldSums()

    @property
    def applied_key(self) -> str:
        """Key of the plan that is in the weights, ``""`` for the base."""
        return self._state.plan_key

    @property
    def generation(self) -> int:
        """Grows with every change of a weight."""
        return self._state.generation

    @property
    def store(self) -> BaseStore:
        """Where the base weights are."""
        return self._state.store

    @property
    def held_bytes(self) -> int:
        """Memory of the sums that are kept for a plan that sets some terms apart."""
        return self._held.nbytes

    def drop_held(self) -> None:
        """Free these sums; a plan that needs one makes it again."""
        self._held.clear()

    def base(self, layer: LayerRef) -> Tensor:
        """The untouched weight of a layer, fused or not; not to be written to."""
        live = layer.live()
        return self._base(layer, live) if layer.key in self._state.layers else live

    def apply(self, plan: FusePlan) -> ApplyReport:
        """Make the weights what the plan says; layers that are so already are not touched.

        Raises:
            NonFiniteError: A weight would overflow; nothing was written.
            ForeignWriteError: Something else wrote to fused weights; nothing was written.
            FuseMemoryError: Not enough memory; the base weights are back.

        Any other exception, a KeyboardInterrupt too, leaves with the base weights back.
        """
        start = time.perf_counter()
        self._held.keep(plan)
        if not plan.patches and not self._state.applied:
            return ApplyReport()  # the weights are the base, whoever wrote them
        for module in self._components.values():
            object.__setattr__(module, STATE_ATTRIBUTE, self._state)
        with torch.no_grad():
            notes = self._reconcile()
            applied = self._state.applied
            writes = [patch for key, patch in plan.patches.items() if applied.get(key) != self._key(patch, plan.compat)]
            leaving = [self._state.layers[key] for key in applied if key not in plan.patches]
            try:
                self._capture(patch.layer for patch in writes)
                self._held.add(writes, self._sum_up)
                self._refuse_overflow(writes, plan.compat)
                self._write(writes, leaving, plan.compat)
            except OUT_OF_MEMORY as error:
                self._back_to_base()
                raise FuseMemoryError(
                    f"not enough memory to fuse {len(writes)} layers: {error}; the base weights are back, "
                    "free memory or keep the base weights elsewhere (store='pinned' or 'checkpoint')"
                ) from error
            except NonFiniteError:
                raise
            except BaseException:
                self._back_to_base()
                raise
        self._state.plan_key = plan.key
        milliseconds = (time.perf_counter() - start) * 1e3
        notes += _coarse_note(plan)
        return ApplyReport(tuple(patch.layer for patch in writes), tuple(leaving), milliseconds, notes)

    def restore(self) -> ApplyReport:
        """Base weights back, bit for bit.

        Raises:
            ForeignWriteError: Something else wrote to fused weights; nothing was written.
        """
        start = time.perf_counter()
        with torch.no_grad():
            self._held.clear()
            notes = self._reconcile()
            leaving = [self._state.layers[key] for key in self._state.applied]
            self._restore(leaving)
        return ApplyReport((), tuple(leaving), (time.perf_counter() - start) * 1e3, notes)

    def release(self) -> ApplyReport:
        """Restore, free the store, and leave no trace on the model."""
        report = self.restore()
        for key in list(self._state.layers):
            self._forget(key)
        self._workspace = Workspace()
        self._switch.clear()
        for module in self._components.values():
            if getattr(module, STATE_ATTRIBUTE, None) is self._state:
                object.__delattr__(module, STATE_ATTRIBUTE)
        return report

    def _capture(self, layers: Iterable[LayerRef]) -> None:
        state, taken = self._state, list[LayerRef]()
        for layer in layers:
            if layer.key not in state.layers:
                state.store.capture(layer, layer.live())
                state.layers[layer.key] = layer
                taken.append(layer)
        self._mark(taken)

    def _sum_up(self, held: LayerPatch, out: Tensor) -> None:
        """Write the sum of LoRAs that stay; where it is in the weight as yet, that is copied."""
        if self._state.applied.get(held.layer.key) == self._key(held, "exact"):
            out.copy_(held.layer.live())
        else:
            self._fuse(held, out, "exact")

    def _write(self, writes: Sequence[LayerPatch], leaving: Sequence[LayerRef], compat: Compat) -> None:
        self._restore(leaving)
        state = self._state
        state.generation += bool(writes)
        done = self._write_together(writes) if compat == "exact" and not self._switch.is_off else set[str]()
        for patch in writes:
            if patch.layer.key not in done:
                self._soil(patch.layer.key)
                self._fuse(patch, patch.layer.live(), compat)
            state.applied[patch.layer.key] = self._key(patch, compat)
        self._mark(patch.layer for patch in writes)

    def _write_together(self, writes: Sequence[LayerPatch]) -> set[str]:
        """Write what can be written at once; returns the layers' keys, or none if memory was short for it."""
        store, sums = self._state.store, dict[str, Sum]()
        for patch in writes:
            live = patch.layer.live()
            if patch.is_low_rank and self._switch.takes(live):
                self._soil(patch.layer.key)
                sums[patch.layer.key] = Sum(live, store.source(patch.layer, live), patch)
        try:
            self._switch.write([*sums.values()], near=store.is_near)
        except OUT_OF_MEMORY:
            self._switch.clear()
            return set()
        return set(sums)

    def _fuse(self, patch: LayerPatch, out: Tensor, compat: Compat) -> None:
        """One layer; on a device without memory for it, through the host's."""
        try:
            self._kernel(patch, out, compat)
        except OUT_OF_MEMORY:
            self._workspace = Workspace()
            if out.device.type == "cuda":
                torch.cuda.empty_cache()
            host = torch.empty_like(out, device="cpu")
            self._kernel(patch, host, compat)
            out.copy_(host)

    def _base(self, layer: LayerRef, like: Tensor) -> Tensor:
        """What is added to: the untouched weight, or the wider master of one in fp8; on the device of `like`."""
        master = layer.master()
        return self._state.store.get(layer, like) if master is None else master.to(like.device)

    def _kernel(self, patch: LayerPatch, out: Tensor, compat: Compat) -> None:
        if patch.held is not None:
            self._held.fuse(patch, out, self._workspace)
        elif compat == "a1111":
            fuse_layer_a1111(self._base(patch.layer, out), patch.terms, out, patch.layer)
        else:
            seed = patch.seed if self._rounding(patch.layer) == "stochastic" else None
            numerics.fuse_layer(self._base(patch.layer, out), patch.terms, out, self._workspace, seed)

    def _rounding(self, layer: LayerRef) -> Rounding:
        stochastic = self._fp8_rounding == "stochastic" and is_fp8(layer.weight().dtype)
        return "stochastic" if stochastic else "nearest"

    def _key(self, patch: LayerPatch, compat: Compat) -> AppliedKey:
        return compat, self._rounding(patch.layer), patch.key

    def _back_to_base(self) -> None:
        self._held.clear()
        self._restore(list(self._state.layers.values()))

    def _restore(self, layers: Sequence[LayerRef]) -> None:
        state = self._state
        state.generation += bool(layers)
        state.plan_key = ""
        for layer in layers:
            self._soil(layer.key)
        state.store.restore_all(layers, [layer.live() for layer in layers])
        for layer in layers:
            del state.applied[layer.key]
        self._mark(layers)

    def _mark(self, layers: Iterable[LayerRef]) -> None:
        layers = list(layers)
        with suppress(*OUT_OF_MEMORY):  # a restore must end; what has no sample is not compared
            taken = samples([layer.live() for layer in layers])
            self._state.samples.update(zip((layer.key for layer in layers), taken, strict=True))

    def _soil(self, key: str) -> None:
        """A layer is written next: until that is done, and sampled, nothing is known of it."""
        self._state.applied[key] = DIRTY
        self._state.samples.pop(key, None)

    def _refuse_overflow(self, writes: Sequence[LayerPatch], compat: Compat) -> None:
        """Prove that every weight stays finite; where the bounds do not prove it, compute and look."""
        state = self._state
        state.peaks.read((patch.layer for patch in writes), state.store)
        for patch in writes:
            dtype = patch.layer.weight().dtype
            if numerics.fits(patch.largest(state.peaks[patch.layer.key]), dtype):
                continue
            trial = torch.empty_like(patch.layer.live())
            self._fuse(patch, trial, compat)
            if not torch.isfinite(trial.float()).all():
                raise NonFiniteError(
                    f"{patch.heaviest().name}: layer {patch.layer.key} would overflow {dtype} "
                    f"(largest number {torch.finfo(dtype).max:g}); lower its strength",
                    network=patch.heaviest().uid,
                )

    def _reconcile(self) -> tuple[str, ...]:
        """Compare the weights with what we left, and forget what was replaced.

        New weights in base layers, or in all fused layers of a component at once (a checkpoint was loaded into the
        model), are a new base. Anything else is another program writing into our fused weights, which is refused.
        A model converted to another dtype keeps its base; what is fused there is written again.
        """
        state = self._state
        known = state.samples.keys()
        layers = [layer for key, layer in state.layers.items() if key in known and state.applied.get(key) != DIRTY]
        changes = {Change.CONVERTED: list[LayerRef](), Change.REPLACED: list[LayerRef]()}
        for layer, now in zip(layers, samples([layer.live() for layer in layers]), strict=True):
            if (change := compare(state.samples[layer.key], now)) in changes:
                changes[change].append(layer)
        replaced = changes[Change.REPLACED]
        for component in {layer.component for layer in replaced}:
            self._judge(component, [layer for layer in replaced if layer.component == component])
        for layer in replaced:
            self._forget(layer.key)
        for layer in changes[Change.CONVERTED]:
            state.peaks.pop(layer.key, None)
            self._held.forget(layer.key)
            if layer.key in state.applied:
                state.applied[layer.key] = DIRTY
        return (f"{len(replaced)} layers hold new base weights",) if replaced else ()

    def _judge(self, component: str, changed: Sequence[LayerRef]) -> None:
        fused = {key for key, layer in self._state.layers.items() if layer.component == component}
        fused &= self._state.applied.keys()
        hit = [layer.key for layer in changed if layer.key in fused]
        if hit and len(hit) < len(fused):
            raise ForeignWriteError(
                f"another program changed {len(hit)} of {len(fused)} fused layers of {component} "
                f"(first: {hit[0]}); load the checkpoint again, then the LoRAs"
            )

    def _forget(self, key: str) -> None:
        state = self._state
        self._held.forget(key)
        state.store.forget(key)
        state.layers.pop(key, None)
        state.applied.pop(key, None)
        state.samples.pop(key, None)
        state.peaks.pop(key, None)
        state.plan_key = ""


def _coarse_note(plan: FusePlan) -> tuple[str, ...]:
    """What is lost where fp8 numbers are all there is."""
    layers = [patch.layer for patch in plan.patches.values() if is_fp8(patch.layer.weight().dtype)]
    coarse = sum(layer.master() is None for layer in layers)
    if not coarse:
        return ()
    return (
        f"{coarse} layers are kept in fp8 without a wider copy, so the LoRAs are added to numbers that are coarse "
        "already; let the host keep the fp16 weights for better pictures",
    )
