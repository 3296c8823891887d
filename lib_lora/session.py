"""LoraSession: a request for LoRAs in, the model's weights changed, a report out. One lock around all of it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lib_lora.catalog import LoraCatalog
from lib_lora.core.base_store import choose_store
from lib_lora.core.checkpoint import layer_tensors
from lib_lora.core.hooks import HookedLayers, is_hookable
from lib_lora.core.keymap import KeyMap
from lib_lora.core.files import FileIdentity
from lib_lora.core.network import Network, load_network
from lib_lora.core.patcher import ModelPatcher
from lib_lora.core.plan import FusePlan, Match, Scale, make_plan, match_network
from lib_lora.errors import ForeignWriteError, ModelError, NonFiniteError, PrefuseError
from lib_lora.prompt.tags import LoraRequest, ParsedPrompt, parse_numbers, parse_prompt
from lib_lora.report import AppliedLora, RefusedLora, SessionReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from lib_lora.catalog import CatalogEntry
    from lib_lora.core.base_store import StoreKind
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.models import BaseModel
    from lib_lora.core.patcher import ApplyReport
    from lib_lora.core.plan import Compat

    Request = str | Sequence[tuple[str, float] | tuple[str, float, float]]

Mode = Literal["prefuse", "hook"]

PIPELINE_COMPONENTS = (
    ("unet", "unet"),
    ("transformer", "transformer"),
    ("te1", "text_encoder"),
    ("te2", "text_encoder_2"),
)
NETWORK_CACHE_BYTES = 1 << 30
"""Networks that are not applied stay in memory up to this size."""


@dataclass(frozen=True)
class _Wanted:
    """A request that was found, read and laid over the model."""

    request: LoraRequest
    entry: CatalogEntry
    match: Match


class LoraSession:
    """LoRAs on one model.

    ``set`` makes exactly the LoRAs of a request active, ``clear`` gives the base weights back bit for bit, ``unload``
    frees all memory. Safe to use from several threads; hold `lease` while pictures are made.

    Attributes:
        catalog: Where LoRA names are looked up.
        keymap: The model's layers.
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
        on_weights_changed: Callable[[Sequence[LayerRef]], None] | None = None,
    ) -> None:
        """Prepare a model; no weight is touched and nothing is copied yet.

        Args:
            components: ``unet``, ``te1``, ``te2`` → module; diffusers, transformers, LDM or open_clip.
            catalog: The LoRA folders.
            mode: ``prefuse`` into the weights, or ``hook`` the forwards.
            compat: ``exact``, or ``a1111`` for the WebUI's rounding.
            store: Where base weights are kept while LoRAs are fused.
            checkpoint: The .safetensors file(s) the model was loaded from, which can serve as the store.
            on_weights_changed: Called after weights were written, with their layers.

        Raises:
            ModelError: If no component has layers that LoRAs can act on.
        """
        self.catalog = catalog
        self.keymap = KeyMap.from_modules(components)
        if not len(self.keymap):
            raise ModelError(f"no layers for LoRAs in {', '.join(components) or 'an empty model'}")
        files = [checkpoint] if isinstance(checkpoint, Path) else list(checkpoint or ())
        mapped = layer_tensors(self.keymap, files) if files and store in ("auto", "checkpoint") else None
        weights = [layer.live() for layer in self.keymap]
        self._patcher = ModelPatcher(components, choose_store(store, weights, mapped))
        self._hooks = HookedLayers()
        self._components = dict(components)
        self._mode: Mode = mode
        self._compat: Compat = compat
        self._on_weights_changed = on_weights_changed
        self._networks: OrderedDict[FileIdentity, Network] = OrderedDict()
        self._matches: dict[str, Match] = {}
        self._lock = threading.RLock()
        self._report = SessionReport(mode=mode)

    @classmethod
    def for_pipeline(
        cls,
        pipe: Any,
        lora_dir: str | Path | Sequence[str | Path] = "loras",
        **options: Any,
    ) -> LoraSession:
        """A session on a diffusers pipeline (Stable Diffusion 1, 2, XL).

        Args:
            pipe: Any object with `unet` (or `transformer`) and `text_encoder` modules.
            lora_dir: One or more folders with LoRA files.
            options: As the constructor's: mode, compat, store, checkpoint, on_weights_changed.

        Raises:
            ModelError: If the pipeline has no such modules.
        """
        named = ((component, getattr(pipe, attribute, None)) for component, attribute in PIPELINE_COMPONENTS)
        folders = [lora_dir] if isinstance(lora_dir, (str, Path)) else lora_dir
        catalog = LoraCatalog([Path(folder) for folder in folders])
        return cls({component: module for component, module in named if module is not None}, catalog, **options)

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

    @property
    def applied_key(self) -> str:
        """Names everything that decides the weights now; equal keys mean equal pictures."""
        return "|".join(filter(None, (self._patcher.applied_key, self._hooks.applied_key)))

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
    def lease(self, request: Request | None = None) -> Iterator[SessionReport]:
        """Hold the model: no other thread changes its LoRAs until the block ends.

        Args:
            request: LoRAs to set first, or None to keep what is active.
        """
        with self._lock:
            yield self._report if request is None else self.set(request)

    def set(self, request: Request) -> SessionReport:
        """Make exactly these LoRAs active. A bad one is refused whole and told in the report, the others apply.

        Args:
            request: A prompt with tags, or (name, strength) and (name, te, unet) tuples.

        Raises:
            ApplyError: If writing the weights failed; the base weights are back, or, if something else wrote to fused
                weights (ForeignWriteError), nothing was changed.
        """
        with self._lock:
            start = time.perf_counter()
            parsed = parse_prompt(request) if isinstance(request, str) else parse_numbers(request)
            refused = [RefusedLora(problem.raw, problem.message) for problem in parsed.problems]
            wanted = self._find(parsed.requests, refused)
            try:
                plan, done = self._apply(wanted, refused)
            except ForeignWriteError:
                raise  # nothing was written: what was active still is
            except BaseException:
                self._back_to_base()
                raise
            report = _describe(parsed, plan, wanted, refused, done, self._mode)
            store = self._patcher.store
            milliseconds = (time.perf_counter() - start) * 1e3
            self._report = replace(report, milliseconds=milliseconds, store=store.label, store_bytes=store.nbytes)
            self._trim_networks(wanted)
            return self._report

    def clear(self) -> SessionReport:
        """Base weights back, bit for bit."""
        return self.set(())

    def unload(self) -> SessionReport:
        """Base weights back, and every byte freed that was taken since the start."""
        with self._lock:
            report = self.clear()
            self._patcher.release()
            self._networks.clear()
            self._matches.clear()
            return report

    def _find(self, requests: Sequence[LoraRequest], refused: list[RefusedLora]) -> list[_Wanted]:
        wanted: list[_Wanted] = []
        for request in requests:
            try:
                entry = self.catalog.find(request.name)
                wanted.append(_Wanted(request, entry, self._match(entry, request.dyn)))
            except PrefuseError as error:
                refused.append(RefusedLora(request.name, str(error)))
        return wanted

    def _match(self, entry: CatalogEntry, dyn: int | None) -> Match:
        """The entry's network, read again if the file changed, laid over the model."""
        network = self._networks.get(FileIdentity.of(entry.path))
        if network is None:
            network = load_network(entry.path)
            self._networks[network.identity] = network
        self._networks.move_to_end(network.identity)
        if dyn is not None:
            network = network.with_rank(dyn)
        if network.uid not in self._matches:
            self._matches[network.uid] = match_network(self.keymap, network)
        return self._matches[network.uid]

    def _apply(self, wanted: list[_Wanted], refused: list[RefusedLora]) -> tuple[FusePlan, list[ApplyReport]]:
        """Plan and write. A LoRA that would overflow a weight leaves `wanted`, and the rest is planned again."""
        while True:
            plan = make_plan(((one.match, scale) for one, scale in self._scales(wanted)), self._compat)
            fused, hooked = self._divide(plan)
            try:
                done = [self._patcher.apply(fused), self._hooks.apply(hooked)]
            except NonFiniteError as error:
                culprits = [one for one in wanted if one.match.network.uid == error.network]
                if not culprits:
                    raise
                refused.extend(RefusedLora(one.request.name, str(error)) for one in culprits)
                wanted[:] = [one for one in wanted if one not in culprits]
            else:
                self._tell([layer for report in done for layer in (*report.written, *report.restored)])
                return plan, done

    def _scales(self, wanted: Sequence[_Wanted]) -> list[tuple[_Wanted, Scale]]:
        """The strengths of each LoRA. The WebUI gives a LoRA that is named twice its last strengths both times."""
        last = {one.match.network.uid: one for one in wanted}
        source = [last[one.match.network.uid] if self._compat == "a1111" else one for one in wanted]
        return [
            (one, Scale(of.request.te, of.request.unet)) for one, of in zip(wanted, source, strict=True)
        ]

    def _divide(self, plan: FusePlan) -> tuple[FusePlan, FusePlan]:
        """What is fused, and what is hooked."""
        if self._mode == "prefuse":
            return plan, FusePlan({}, plan.compat)
        hooked = {key: patch for key, patch in plan.patches.items() if is_hookable(patch.layer)}
        fused = {key: patch for key, patch in plan.patches.items() if key not in hooked}
        return FusePlan(fused, plan.compat), FusePlan(hooked, plan.compat)

    def _back_to_base(self) -> None:
        self._report = SessionReport(mode=self._mode)
        self._hooks.clear()
        self._patcher.restore()
        self._tell(list(self.keymap))

    def _tell(self, layers: Sequence[LayerRef]) -> None:
        if layers and self._on_weights_changed is not None:
            self._on_weights_changed(layers)

    def _trim_networks(self, wanted: Sequence[_Wanted]) -> None:
        """Forget the networks that were not used for longest, until the rest fits the budget."""
        used = {one.match.network.identity for one in wanted}
        idle = [network for identity, network in self._networks.items() if identity not in used]
        excess = sum(network.nbytes for network in idle) - NETWORK_CACHE_BYTES
        for network in idle:
            if excess <= 0:
                break
            excess -= network.nbytes
            del self._networks[network.identity]
        self._matches = {
            uid: match for uid, match in self._matches.items() if match.network.identity in self._networks
        }


def _describe(
    parsed: ParsedPrompt,
    plan: FusePlan,
    wanted: Sequence[_Wanted],
    refused: Sequence[RefusedLora],
    done: Sequence[ApplyReport],
    mode: Mode,
) -> SessionReport:
    written = sum(len(report.written) for report in done)
    notes = [note for one in wanted for note in (*one.entry.notes, *one.match.network.notes, one.match.note) if note]
    notes += [
        f"{one.request.name}: {', '.join(one.request.ignored)} is not understood here and was ignored"
        for one in wanted
        if one.request.ignored
    ]
    notes += [note for report in done for note in report.notes]
    return SessionReport(
        text=parsed.text,
        applied=tuple(_applied(one) for one in wanted),
        refused=tuple(refused),
        notes=tuple(dict.fromkeys(notes)),
        layers_written=written,
        layers_restored=sum(len(report.restored) for report in done),
        layers_kept=len(plan.patches) - written,
        mode=mode,
    )


def _applied(one: _Wanted) -> AppliedLora:
    network, request = one.match.network, one.request
    return AppliedLora(
        name=request.name,
        path=one.entry.path,
        te=request.te,
        unet=request.unet,
        layers=len(one.match.layers),
        unmatched=len(one.match.unmatched),
        rank=max(network.ranks, default=0),
        algorithm=network.algorithm,
    )
