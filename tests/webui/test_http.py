"""The API over HTTP, with the server that the WebUI has. Where there is none, tests/webui_real has the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib_lora.report import SessionReport

fastapi = pytest.importorskip("fastapi", reason="no fastapi here; the WebUI's own environment has it")
testclient = pytest.importorskip("fastapi.testclient", reason="no httpx here; the WebUI's own environment has it")

READS = ["state", "catalog"]
WRITES = ["resolve", "rescan", "release"]


@pytest.fixture
def client(fake_modules):
    def make(**cmd_opts):
        from modules import sd_models, shared

        from lib_lora.hosts.webui.api import Api, add_routes

        vars(shared.cmd_opts).update(cmd_opts)
        session = SimpleNamespace(preview=lambda _: SessionReport(text="a cat"))
        catalog = SimpleNamespace(entries=lambda: (), notes=(), refresh=lambda: None)
        sessions = SimpleNamespace(get=lambda *_: session, catalog=catalog)
        loras = SimpleNamespace(report=SessionReport(), sessions=sessions, leave=lambda: None)
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


def test_a_form_of_a_foreign_page_changes_nothing(client):
    web = client()
    for name in WRITES:
        assert web.post(f"/prefuse/v1/{name}", data={"prompt": "a"}).status_code == 422
        assert web.post(f"/prefuse/v1/{name}").status_code == 422
        assert web.get(f"/prefuse/v1/{name}").status_code == 405


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
