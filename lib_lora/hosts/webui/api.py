"""``/prefuse/v1/…``: what is applied, what a prompt would apply, the catalog. Only with ``--api``."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from modules import call_queue, sd_models, shared
from pydantic import BaseModel, Field

from lib_lora.hosts.webui.loaded import checkpoint_file
from lib_lora.hosts.webui.settings import read_settings
from lib_lora.prompt.tags import parse_prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib_lora.hosts.webui.active import ActiveLoras
    from lib_lora.hosts.webui.takeover import TakeOver
    from lib_lora.report import SessionReport

PREFIX = "/prefuse/v1"
MOST_LETTERS = 1_000_000


class Applied(BaseModel):
    """One LoRA in the model, or one that a prompt would bring there."""

    name: str
    file: str
    te: float
    unet: float
    weights: str = ""
    schedule: str = ""
    moving: str = ""
    layers: int
    rank: int
    algorithm: str
    base_model: str


class Refused(BaseModel):
    """One that is not, and why."""

    name: str
    reason: str


class Report(BaseModel):
    """What came of a request."""

    text: str = ""
    applied: list[Applied] = []
    refused: list[Refused] = []
    notes: list[str] = []


class Compiled(BaseModel):
    """What of the model runs compiled; `text` says it in a line."""

    text: str = ""
    backend: str = "eager"
    blocks: int = 0
    compiled: list[str] = []
    asked: int = 0
    done: int = 0
    progress: float = 0.0
    recompiles: int = 0
    switches: int = 0
    switch_ms: float = 0.0
    reason: str = ""


class State(Report):
    """What is applied now.

    `milliseconds` and `layers` are of the last change, `store_bytes` what keeping the base weights takes.
    """

    enabled: bool = True
    in_charge: bool = False
    checkpoint: str = ""
    mode: str = "prefuse"
    compat: str = "exact"
    store: str = ""
    store_bytes: int = 0
    milliseconds: float = 0.0
    layers: int = 0
    compiled: Compiled = Compiled()


class Prompt(BaseModel):
    """A prompt with tags; random block weights are drawn from the seed."""

    prompt: str = Field(default="", max_length=MOST_LETTERS)
    seed: int = 0


class Nothing(BaseModel):
    """The body of requests that change something: a form on a foreign page can not send JSON."""


class File(BaseModel):
    """One LoRA file."""

    name: str
    alias: str
    tag: str
    notes: list[str] = []


class Catalog(BaseModel):
    """All LoRA files."""

    files: list[File] = []
    notes: list[str] = []


class Api:
    """The answers, without HTTP."""

    def __init__(self, loras: Callable[[], ActiveLoras], takeover: TakeOver) -> None:
        self._loras = loras
        self._takeover = takeover

    def state(self) -> State:
        """What is applied now."""
        loras, settings = self._loras(), read_settings()
        report, compiled = loras.report, loras.compile_status
        return State(
            **_report(report),
            enabled=settings.enabled,
            in_charge=self._takeover.in_charge,
            checkpoint=checkpoint_file(sd_models.model_data.sd_model).replace("\\", "/").rpartition("/")[2],
            mode=report.mode,
            compat=settings.compat,
            store=report.store,
            store_bytes=report.store_bytes,
            milliseconds=report.milliseconds,
            layers=report.layers_written + report.layers_restored,
            compiled=Compiled(text=str(compiled), **compiled.to_dict()),
        )

    def resolve(self, body: Prompt) -> Report:
        """What a prompt would apply to the model of the moment; nothing is changed."""
        session = self._loras().sessions.get(shared.sd_model, read_settings())
        return Report(**_report(session.preview(parse_prompt(body.prompt, body.seed))))

    def catalog(self) -> Catalog:
        """All LoRA files."""
        catalog = self._loras().sessions.catalog
        files = [
            File(name=entry.name, alias=entry.alias, tag=entry.tag_name, notes=list(entry.notes))
            for entry in catalog.entries()
        ]
        return Catalog(files=files, notes=list(catalog.notes))

    def rescan(self, body: Nothing) -> Catalog:
        """Look for new, changed and lost files."""
        self._loras().sessions.catalog.refresh()
        return self.catalog()

    def release(self, body: Nothing) -> State:
        """Base weights back and all memory free, as soon as no picture is being made."""
        with call_queue.queue_lock:
            self._loras().leave()
        return self.state()


def add_routes(app: Any, api: Api) -> None:
    """Put the answers on the WebUI's server, if it has an API, with its passwords.

    Args:
        app: The FastAPI application.
        api: The answers.
    """
    if not (shared.cmd_opts.api or shared.cmd_opts.nowebui):
        return
    reads: dict[str, Any] = {"methods": ["GET"], "dependencies": _authentication(), "tags": ["prefuse"]}
    asks = {**reads, "methods": ["POST"], "dependencies": [*reads["dependencies"], _json_alone()]}
    app.add_api_route(f"{PREFIX}/state", api.state, response_model=State, **reads)
    app.add_api_route(f"{PREFIX}/resolve", api.resolve, response_model=Report, **asks)
    app.add_api_route(f"{PREFIX}/catalog", api.catalog, response_model=Catalog, **reads)
    app.add_api_route(f"{PREFIX}/rescan", api.rescan, response_model=Catalog, **asks)
    app.add_api_route(f"{PREFIX}/release", api.release, response_model=State, **asks)


def known_passwords(text: str) -> dict[str, str]:
    """``user:password,…`` of ``--api-auth``."""
    return dict(pair.strip().split(":", 1) for pair in text.split(",") if ":" in pair)


def is_allowed(users: dict[str, str], user: str, password: str) -> bool:
    """Whether a user has this password; takes as long for a wrong one as for a right one."""
    known = users.get(user)
    return secrets.compare_digest(password.encode(), (known or "").encode()) and known is not None


def _authentication() -> list[Any]:
    if not shared.cmd_opts.api_auth:
        return []
    from fastapi import Depends, HTTPException
    from fastapi.security import HTTPBasic

    users = known_passwords(shared.cmd_opts.api_auth)
    basic = Depends(HTTPBasic())

    def check(credentials: Any = basic) -> None:
        if not is_allowed(users, credentials.username, credentials.password):
            headers = {"WWW-Authenticate": "Basic"}
            raise HTTPException(status_code=401, detail="Incorrect username or password", headers=headers)

    return [Depends(check)]


def _json_alone() -> Any:
    """Foreign pages can make a browser send forms, texts and bodies of no type; FastAPI takes the last for JSON."""
    from fastapi import Depends, Header, HTTPException

    given = Header("")

    def check(content_type: Any = given) -> None:
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(status_code=422, detail="send JSON")

    return Depends(check)


def _report(report: SessionReport) -> dict[str, Any]:
    return {
        "text": report.text,
        "applied": [
            Applied(
                name=lora.name,
                file=lora.path.name,
                te=lora.te,
                unet=lora.unet,
                weights=lora.weights,
                schedule=lora.schedule,
                moving=lora.moving,
                layers=lora.layers,
                rank=lora.rank,
                algorithm=lora.algorithm,
                base_model=lora.base_model,
            )
            for lora in report.applied
        ],
        "refused": [Refused(name=refused.name, reason=refused.reason) for refused in report.refused],
        "notes": list(report.notes),
    }
