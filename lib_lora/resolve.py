"""From the LoRAs a request names to networks that are laid over the model; what was read once is kept."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lib_lora.core.files import FileIdentity
from lib_lora.core.naming import CONTROLNETS, group_names
from lib_lora.core.network import load_network
from lib_lora.core.plan import FusePlan, Scale, make_plan, match_network
from lib_lora.errors import PrefuseError, TagError
from lib_lora.presets import PresetFiles
from lib_lora.prompt.block_weights import BlockWeights
from lib_lora.prompt.edit import with_block_weights
from lib_lora.prompt.values import shorten
from lib_lora.report import AppliedLora, RefusedLora, SessionReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lib_lora.catalog import CatalogEntry, LoraCatalog
    from lib_lora.core.keymap import KeyMap
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.network import Network
    from lib_lora.core.patch_state import ApplyReport
    from lib_lora.core.plan import Compat, Match
    from lib_lora.prompt.tags import LoraRequest, ParsedPrompt

MOST_LORAS = 1000
"""In one request; a text of 1 MB could name a hundred times as many, each of which is looked for in the folders."""
IDLE_BYTES = 1 << 30
"""Networks that are not in the last request stay in memory up to this size."""
MOST_PLANS = 4
"""That are kept, of requests that come again."""


@dataclass(frozen=True)
class ResolvedLora:
    """A LoRA of a request that was found, read and laid over the model."""

    request: LoraRequest
    entry: CatalogEntry
    match: Match
    scale: Scale
    weights: BlockWeights

    @property
    def network(self) -> Network:
        """The file's content, cut to the request's ranks."""
        return self.match.network

    def at(self, step: int, steps: int) -> ResolvedLora:
        """The same with the strengths of `step` of `steps`; itself if they are its own."""
        te, unet = self.request.strengths(step, steps)
        if (te, unet) == (self.scale.te, self.scale.unet):
            return self
        return replace(self, scale=replace(self.scale, te=te, unet=unet))

    def notes(self) -> list[str]:
        """Sentences about its name, its file, its layers and its arguments."""
        notes = [*self.entry.notes, *self.network.notes, self.match.note]
        name, schedule = self.request.name, self.request.schedule
        if self.request.ignored:
            notes.append(f"{name}: {', '.join(self.request.ignored)} is not understood here and was ignored")
        if schedule is not None and any(layer.component.startswith("te") for layer, _ in self.match.layers):
            if self.scale.te != self.request.te:
                notes.append(
                    f"{name} is off when the prompt is encoded, before step 0, so its text encoder part is too"
                )
            elif schedule.te is not None:
                notes.append(f"{name}: prompts are encoded once, so te stays at {self.scale.te:g}, its value in step 0")
        return [note for note in notes if note]

    def applied(self) -> AppliedLora:
        """Its line in the report."""
        return AppliedLora(
            name=self.request.name,
            path=self.entry.path,
            te=self.scale.te,
            unet=self.request.unet,
            layers=self.match.matched,
            unmatched=self.match.total - self.match.matched,
            rank=max(self.network.ranks, default=0),
            algorithm=self.network.algorithm,
            algorithms=self.network.algorithms,
            ranks=self.network.ranks,
            base_model=self.network.base_model.value,
            base_model_from=self.network.base_model_from,
            missing=group_names(self.match.unmatched),
            embeddings=tuple(self.network.embeddings),
            dyn=self.request.dyn,
            weights=self.weights.text,
            resolved=with_block_weights(self.request.raw, self.weights.text) if self.weights.says_more else "",
            schedule="" if self.request.schedule is None else str(self.request.schedule),
            control_layers=sum(layer.component in CONTROLNETS for layer, _ in self.match.layers),
        )


class Resolver:
    """Reads LoRA files for one model. A file that changed on disk is read again."""

    def __init__(self, catalog: LoraCatalog, keymap: KeyMap, presets: PresetFiles | None = None) -> None:
        self._catalog = catalog
        self._keymap = keymap
        self._presets = presets or PresetFiles()
        self._blocks = frozenset(layer.block for layer in keymap if layer.block)
        self._networks: OrderedDict[FileIdentity, Network] = OrderedDict()
        self._matches: dict[str, Match] = {}
        self._planned: deque[tuple[Compat, list[tuple[Match, Scale]], FusePlan]] = deque(maxlen=MOST_PLANS)

    def resolve(self, parsed: ParsedPrompt) -> tuple[list[ResolvedLora], list[RefusedLora]]:
        """Find, read and match each LoRA; one's fault is not the others'. Bad tags are refused before them."""
        found: list[ResolvedLora] = []
        refused = [RefusedLora(problem.raw, problem.message) for problem in parsed.problems]
        for request in parsed.requests[:MOST_LORAS]:
            try:
                found.append(self.lay(request, self._catalog.find(request.name)))
            except PrefuseError as error:  # noqa: PERF203 -- that is the point
                refused.append(RefusedLora(request.name, str(error)))
        more = len(parsed.requests) - MOST_LORAS
        if more > 0:
            reason = f"the last {more} of the LoRAs are not applied; a request can have {MOST_LORAS}"
            refused.append(RefusedLora(f"{more} more", reason))
        return found, refused

    def lay(self, request: LoraRequest, entry: CatalogEntry) -> ResolvedLora:
        """Read the file of one LoRA and lay it over the model.

        Raises:
            PrefuseError: If the file can not be read, or it or its block weights do not fit the model.
        """
        match = self._match(entry, request.dyn)
        weights = self._weights(request)
        return ResolvedLora(request, entry, match, _scale(request, weights, match), weights)

    def _weights(self, request: LoraRequest) -> BlockWeights:
        if request.blocks is None:
            return BlockWeights()
        presets = self._presets.read()
        try:
            return request.blocks.resolve(presets, self._blocks)
        except TagError as error:
            reasons = "; ".join((str(error), *self._presets.notes))
            raise TagError(f"{shorten(request.name)} is not applied: {reasons}") from error

    def plan(self, loras: Sequence[ResolvedLora], compat: Compat) -> FusePlan:
        """What LoRAs make of the model, as `plan_of`; the last plans are kept for requests that come again."""
        inputs = _plan_inputs(loras, compat)
        for kept in self._planned:
            if kept[:2] == (compat, inputs):
                return kept[2]
        self._planned.append((compat, inputs, make_plan(inputs, compat)))
        return self._planned[-1][2]

    def preview(self, parsed: ParsedPrompt, mode: str) -> SessionReport:
        """What a session would apply and refuse."""
        loras, refused = self.resolve(parsed)
        applied = tuple(lora.applied() for lora in loras)
        return SessionReport(parsed.text, applied, tuple(refused), notes_of(loras), mode=mode)

    def trim(self, used: Sequence[ResolvedLora], idle_bytes: int = IDLE_BYTES) -> None:
        """Forget the networks that were not used for longest, until those not in `used` fit `idle_bytes`."""
        identities = {lora.network.identity for lora in used}
        idle = [network for identity, network in self._networks.items() if identity not in identities]
        excess = sum(network.nbytes for network in idle) - idle_bytes
        for network in idle:
            if excess > 0:
                excess -= network.nbytes
                del self._networks[network.identity]
        kept = self._networks
        self._matches = {uid: match for uid, match in self._matches.items() if match.network.identity in kept}
        self._planned = deque(
            (plan for plan in self._planned if all(match.network.identity in kept for match, _ in plan[1])), MOST_PLANS
        )

    def clear(self) -> None:
        """Forget all networks."""
        self._networks.clear()
        self._matches.clear()
        self._planned.clear()

    def _match(self, entry: CatalogEntry, dyn: int | None) -> Match:
        network = self._networks.get(FileIdentity.of(entry.path))
        if network is None:
            network = load_network(entry.path)
            self._networks[network.identity] = network
        self._networks.move_to_end(network.identity)
        if dyn is not None:
            network = network.with_rank(dyn)
        if network.uid not in self._matches:
            self._matches[network.uid] = match_network(self._keymap, network)
        return self._matches[network.uid]


def notes_of(loras: Iterable[ResolvedLora], done: Iterable[ApplyReport] = ()) -> tuple[str, ...]:
    """What is to be told of LoRAs and of their application, each sentence once."""
    notes = [note for lora in loras for note in lora.notes()]
    return tuple(dict.fromkeys([*notes, *(note for report in done for note in report.notes)]))


def plan_of(loras: Sequence[ResolvedLora], compat: Compat) -> FusePlan:
    """What the LoRAs of a request make of the model."""
    return make_plan(_plan_inputs(loras, compat), compat)


def _plan_inputs(loras: Sequence[ResolvedLora], compat: Compat) -> list[tuple[Match, Scale]]:
    """The WebUI gives a LoRA that is named twice its last strengths both times."""
    last = {lora.network.uid: lora.scale for lora in loras} if compat == "a1111" else {}
    return [(lora.match, last.get(lora.network.uid, lora.scale)) for lora in loras]


def _scale(request: LoraRequest, weights: BlockWeights, match: Match) -> Scale:
    """Strengths and block weights of a request's LoRA."""
    layers = {layer.key: _weight(weights, layer) for layer, _ in match.layers} if weights.text else {}
    return Scale(*request.strengths(), layers)


def _weight(weights: BlockWeights, layer: LayerRef) -> float:
    name = layer.original.replace(".", "_")
    # The WebUI names a text encoder's layers so, and rules were written for its names.
    return weights.of(layer.block, f"transformer_{name}" if layer.component.startswith("te") else name)
