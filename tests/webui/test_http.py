"""The API over HTTP, with the server that the WebUI has. Where there is none, tests/webui_real has the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib_lora.compile.protocol import CompileStatus
from lib_lora.report import SessionReport
from tests.faults.test_names import HOSTILE_NAMES

fastapi = pytest.importorskip("fastapi", reason="no fastapi here; the WebUI's own environment has it")
testclient = pytest.importorskip("fastapi.testclient", reason="no httpx here; the WebUI's own environment has it")

READS = ["state", "catalog"]
WRITES = ["resolve", "rescan", "release"]


@pytest.fixture
def released() -> list[int]:
    """Gets an item with each release of memory."""
    return []


@pytest.fixture
def client(fake_modules, released):
    def make(**cmd_opts):
        from modules import sd_models, shared

        from lib_lora.hosts.webui.api import Api, add_routes

        vars(shared.cmd_opts).update(cmd_opts)
        session = SimpleNamespace(preview=lambda *_: SessionReport(text="a cat"))
        catalog = SimpleNamespace(entries=lambda: (), notes=(), refresh=lambda: None)
        sessions = SimpleNamespace(get=lambda *_: session, catalog=catalog)
        loras = SimpleNamespace(
            report=SessionReport(),
            sessions=sessions,
            compile_status=CompileStatus("inductor", 25, recompiles=0),
            leave=lambda: released.append(1),
        )
        sd_models.model_data.was_loaded_at_least_once = True  # with no model, which these answers do not need
        app = fastapi.FastAPI()
        add_routes(app, Api(lambda: loras, SimpleNamespace(in_charge=True)))
        return testclient.TestClient(app)

    return make


def test_every_route_answers(client):
    web = client()
    for name in READS:
        assert web.get(f"/prefuse/v1/{name}").status_code == 200
    for name in WRITES:
        assert web.post(f"/prefuse/v1/{name}", json={}).status_code == 200
    assert web.post("/prefuse/v1/resolve", json={"prompt": "a <lora:b>"}).json()["text"] == "a cat"
    compiled = web.get("/prefuse/v1/state").json()["compiled"]
    assert (compiled["backend"], compiled["blocks"], compiled["recompiles"]) == ("inductor", 25, 0)


def test_a_form_of_a_foreign_page_changes_nothing(client):
    web = client()
    for name in WRITES:
        assert web.post(f"/prefuse/v1/{name}", data={"prompt": "a"}).status_code == 422
        assert web.post(f"/prefuse/v1/{name}").status_code == 422
        assert web.get(f"/prefuse/v1/{name}").status_code == 405


FOREIGN = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
"""What a browser sends to another site without asking it; the last stands for no type at all."""


@pytest.mark.parametrize("kind", FOREIGN)
def test_json_under_another_type_changes_nothing(client, released, kind):
    web = client()
    for name in WRITES:
        request = web.build_request("POST", f"/prefuse/v1/{name}", content=b"{}", headers={"content-type": kind})
        if not kind:
            del request.headers["content-type"]
        assert web.send(request).status_code == 422
    assert not released
    assert web.post("/prefuse/v1/release", json={}).status_code == 200
    assert released


def test_answers_and_refusals_are_json_and_never_a_page(client):
    web = client(api_auth="ann:secret")
    payload = {"prompt": ["<script>alert(1)</script>"]}
    answers = [web.get(f"/prefuse/v1/{name}", auth=auth) for name in READS for auth in (None, ("ann", "secret"))]
    answers += [web.post(f"/prefuse/v1/{name}", json=payload, auth=("ann", "secret")) for name in WRITES]
    answers += [web.post("/prefuse/v1/<script>", json=payload), web.put("/prefuse/v1/state")]
    assert {answer.headers["content-type"] for answer in answers} == {"application/json"}


def test_no_route_takes_a_name_of_a_file_a_path_or_an_address(client, tmp_path, monkeypatch):
    web = client()
    monkeypatch.chdir(tmp_path)
    described = web.get("/openapi.json").json()
    ours = {path: routes for path, routes in described["paths"].items() if path.startswith("/prefuse")}
    assert len(ours) == 5
    assert not any("{" in path for path in ours)
    fields = {
        name for model in ("Prompt", "Nothing") for name in described["components"]["schemas"][model]["properties"]
    }
    assert fields <= {"prompt", "seed"}
    for name in HOSTILE_NAMES:
        text = name.encode(errors="replace").decode()[:1000]
        body = dict.fromkeys(("prompt", "name", "path", "file", "url", "out"), text)
        assert all(web.post(f"/prefuse/v1/{route}", json=body).status_code == 200 for route in WRITES)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_without_end_is_refused(client):
    assert client().post("/prefuse/v1/resolve", json={"prompt": "a" * 1_000_001}).status_code == 422


def test_passwords_are_asked_for_on_every_route(client):
    web = client(api_auth="ann:secret")
    for auth in (None, ("ann", "wrong"), ("eve", "secret")):
        assert all(web.get(f"/prefuse/v1/{name}", auth=auth).status_code == 401 for name in READS)
        assert all(web.post(f"/prefuse/v1/{name}", json={}, auth=auth).status_code == 401 for name in WRITES)
    assert all(web.get(f"/prefuse/v1/{name}", auth=("ann", "secret")).status_code == 200 for name in READS)


def test_without_the_flag_there_is_nothing(client):
    web = client(api=False)
    assert web.get("/prefuse/v1/state").status_code == 404
    assert web.post("/prefuse/v1/release", json={}).status_code == 404
