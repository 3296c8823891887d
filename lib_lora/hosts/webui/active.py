"""The LoRAs of the generation that runs: applied to the model of the moment, told, and known to the cond cache."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from modules import devices, sd_models, shared

from lib_lora.errors import ForeignWriteError, PrefuseError
from lib_lora.hosts.guard import attempt, logger, sentence
from lib_lora.hosts.webui.embeddings import BundledEmbeddings
from lib_lora.hosts.webui.extra_network import REQUEST
from lib_lora.hosts.webui.hashes import short_hashes
from lib_lora.hosts.webui.infotext import write_infotext, write_status
from lib_lora.hosts.webui.messages import tell
from lib_lora.hosts.webui.settings import option, read_settings
from lib_lora.prompt.tags import ParsedPrompt, TagProblem, parse_arguments
from lib_lora.report import RefusedLora, SessionReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lib_lora.compile.protocol import CompileStatus
    from lib_lora.hosts.webui.compiled import CompiledUnets
    from lib_lora.hosts.webui.model import Sessions
    from lib_lora.hosts.webui.settings import Settings
    from lib_lora.hosts.webui.takeover import TakeOver
    from lib_lora.session import LoraSession


class ActiveLoras:
    """What is applied now.

    Attributes:
        sessions: The models' sessions.
        compiled: The models' compiled parts.
        report: What the last change did.
    """

    def __init__(self, sessions: Sessions, compiled: CompiledUnets, takeover: TakeOver) -> None:
        self.sessions = sessions
        self.compiled = compiled
        self.report = SessionReport()
        self._takeover = takeover
        self._embeddings = BundledEmbeddings()
        self._request: ParsedPrompt | None = None
        # Weak, for a model that is thrown away shall not wait here until another one is loaded.
        self._applied_to: tuple[Callable[[], object], Callable[[], LoraSession | None]] = (_nothing, _nothing)

    def request(
        self, p: Any, tags: Sequence[tuple[Sequence[object], Mapping[str, object]]], *, hires: bool = False
    ) -> None:
        """Apply the tags of a pass, and tell what came of it.

        Args:
            p: The generation.
            tags: Positional and named arguments of each tag.
            hires: Whether they are the hires pass's.
        """
        parsed = parse_arguments(tags, _seed(p), hires=hires)
        settings = read_settings()
        setattr(p, REQUEST, parsed)
        self._apply(parsed, settings)
        self._tell(p)
        attempt("writing the infotext", lambda: self._write_infotext(p, settings))
        write_status(p, self.report, "hires" if hires else "first")

    def advance(self, p: Any, step: int, steps: int) -> None:
        """Bring strengths that are scheduled to a step, right before the model is called for it.

        Args:
            p: The generation, or None if it is not known.
            step: Counted from 0.
            steps: How many the pass has.
        """
        self.compiled.watch(self._applied_to[0]())
        session = self._applied_to[1]()
        if session is None or not any(lora.schedule for lora in self.report.applied):
            return
        with ExitStack() as without_autocast:
            _leave_autocast(without_autocast)
            _, error = attempt("moving strengths", lambda: session.advance(step, steps))
        before, notes = self.report, tuple(dict.fromkeys((*self.report.notes, *session.report.notes)))
        self.report = replace(session.report, notes=notes)
        if error is not None:
            self.report = _all_refused(self._request or ParsedPrompt(""), error)
        if p is None:
            return
        if len(self.report.refused) > len(before.refused) or notes != before.notes:
            self._tell(p)
        if self.report.refused != before.refused or self.report.applied != before.applied:
            write_status(p, self.report, "hires" if getattr(p, "is_hr_pass", False) else "first")

    @property
    def compile_status(self) -> CompileStatus:
        """How the model that is loaded runs."""
        return self.compiled.status(sd_models.model_data.sd_model)

    def compile_as_set(self) -> None:
        """The setting was changed."""
        sd_model = sd_models.model_data.sd_model
        if sd_model is not None and self._takeover.in_charge:
            self.compiled.use(sd_model, read_settings().compiler)

    def cond_state(self, p: Any) -> tuple[Any, ...]:
        """What the text encoder is made of, right before it encodes the prompts of `p`.

        A refiner or another checkpoint can have come since `request`: its LoRAs are applied here.
        """
        parsed = getattr(p, REQUEST, None)
        if not self._takeover.in_charge or parsed is None:
            return ()
        if not self._is_applied(parsed):
            _, error = attempt("applying LoRAs to another model", lambda: self._apply(parsed, read_settings()))
            if error is not None:
                return (object(),)
            self._log()
            write_status(p, self.report, "refiner")
        session = self._applied_to[1]()
        key = session.applied_key if session is not None else ""
        return ("prefuse", key and f"{self.report.mode}|{key}", *self._embeddings.names)

    def leave(self) -> None:
        """Base weights back in every model, memory free."""
        self._embeddings.show(())
        self._takeover.show(())
        self.compiled.release_all()
        self.sessions.release_all()
        self._request, self._applied_to = None, (_nothing, _nothing)
        self.report = SessionReport()

    def model_loaded(self, sd_model: Any) -> None:
        """Other weights may be in the model now."""
        self.sessions.weights_loaded(sd_model)
        self.compiled.forget_others(sd_model)
        self._request = None

    def _is_applied(self, parsed: ParsedPrompt) -> bool:
        sd_model, session = self._applied_to
        return (
            parsed is self._request
            and sd_model() is shared.sd_model
            and session() is self.sessions.known(shared.sd_model)
        )

    def _apply(self, parsed: ParsedPrompt, settings: Settings) -> None:
        sd_model = shared.sd_model
        self.sessions.rest(sd_model)
        attempt("compiling the model", lambda: self.compiled.use(sd_model, settings.compiler))
        session = self.sessions.known(sd_model)
        if session is None and not parsed.requests:
            self.report = SessionReport(refused=tuple(map(_refused, parsed.problems)))
        else:
            with ExitStack() as without_autocast:
                _leave_autocast(without_autocast)
                session, self.report = self._set(sd_model, parsed, settings)
        if reason := self.compiled.status(sd_model).reason:
            self.report = replace(self.report, notes=(*self.report.notes, reason))
        self._request = parsed
        self._applied_to = (ref(sd_model), _nothing if session is None else ref(session))
        attempt("registering embeddings of LoRAs", lambda: self._embeddings.show(self.report.applied))
        attempt("listing the LoRAs for other extensions", lambda: self._takeover.show(self.report.applied))

    def _set(self, sd_model: Any, parsed: ParsedPrompt, settings: Settings) -> tuple[LoraSession | None, SessionReport]:
        session, error = attempt("preparing the model", lambda: self.sessions.get(sd_model, settings))
        if session is None or error is not None:
            return None, _all_refused(parsed, error)
        note = _set_up(session, sd_model, settings, compiled=self.compiled.status(sd_model).blocks > 0)
        report = _set_or_refuse(session, parsed)
        return session, replace(report, notes=(*note, *report.notes))

    def _write_infotext(self, p: Any, settings: Settings) -> None:
        write_infotext(p, self.report, short_hashes(self.sessions.catalog, self.report.applied), settings)

    def _tell(self, p: Any) -> None:
        report = self.report
        for refused in report.refused:
            tell(p, refused.reason)
            if option("lora_not_found_gradio_warning", False):
                attempt("showing a warning", lambda text=refused.reason: _pop_up(text))
        for note in report.notes:
            tell(p, note)

    def _log(self) -> None:
        for refused in self.report.refused:
            logger.info("Prefuse: %s", refused.reason)


def _set_up(session: LoraSession, sd_model: Any, settings: Settings, *, compiled: bool) -> tuple[str, ...]:
    session.compat = settings.compat
    session.cache_bytes = settings.cache_bytes
    # Parts of the model move between memory and device right before their forwards; hooks' tensors would not.
    is_moved = getattr(sd_model, "lowvram", False)
    session.may_hook = not is_moved and not compiled
    moves = settings.mode == "hook" and is_moved
    session.mode = "prefuse" if moves else settings.mode
    return ("--medvram and --lowvram move the model's parts, so LoRAs are fused, not hooked",) if moves else ()


def _set_or_refuse(session: LoraSession, parsed: ParsedPrompt) -> SessionReport:
    """Set what can be set: a LoRA whose reading fails in a way that nobody thought of is left out."""
    report, error = attempt("applying LoRAs", lambda: session.set(parsed))
    if report is not None:
        return report
    if not isinstance(error, PrefuseError):
        parsed = _sifted(session, parsed)
        report, error = attempt("applying the other LoRAs", lambda: session.set(parsed))
        if report is not None:
            return report
    if not isinstance(error, ForeignWriteError):
        attempt("giving the base weights back", session.clear)
    return _all_refused(parsed, error)


def _sifted(session: LoraSession, parsed: ParsedPrompt) -> ParsedPrompt:
    good, problems = [], list(parsed.problems)
    for request in parsed.requests:
        alone = ParsedPrompt("", (request,))
        _, error = attempt(f"reading {request.name}", lambda alone=alone: session.preview(alone))
        if error is None:
            good.append(request)
        else:
            problems.append(TagProblem(request.name, f"{request.name} is not applied: {sentence(error)}"))
    return ParsedPrompt(parsed.text, tuple(good), tuple(problems))


def _seed(p: Any) -> int:
    """Seed of the first picture of this batch; the pass at a model's load has none."""
    seeds = getattr(p, "seeds", None)
    return int(seeds[0]) if seeds else 0


def _refused(problem: TagProblem) -> RefusedLora:
    return RefusedLora(problem.raw, problem.message)


def _all_refused(parsed: ParsedPrompt, error: Exception | None) -> SessionReport:
    reason = "" if error is None else sentence(error)
    refused = [RefusedLora(request.name, f"{request.name} is not applied: {reason}") for request in parsed.requests]
    return SessionReport(refused=(*map(_refused, parsed.problems), *refused))


def _nothing() -> None:
    """What a weak reference to nothing gives."""


def _leave_autocast(stack: ExitStack) -> None:
    """The WebUI activates under autocast, which would round the sums."""
    stack.enter_context(devices.without_autocast())
    stack.enter_context(torch.autocast("cpu", enabled=False))


def _pop_up(text: str) -> None:
    import gradio as gr

    gr.Warning(text)
