"""The API, settings, what is installed, and the page's script by what it must not do."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.webui.stand_in import ROOT, SCRIPT

PINS = ("torch", "safetensors", "gradio", "tqdm", "numpy")


def call(webui, path, *body):
    endpoint, _ = webui.app.routes[f"/prefuse/v1/{path}"]
    answer = endpoint(*body)
    return getattr(answer, "model_dump", getattr(answer, "dict", None))()


def prompt(text):
    from lib_lora.hosts.webui.api import Prompt

    return Prompt(prompt=text)


def nothing():
    from lib_lora.hosts.webui.api import Nothing

    return Nothing()


def test_state_tells_what_is_applied_and_where_the_base_is(webui):
    webui.picture("a <lora:ink:0.8><lora:nosuch:1>")
    state = call(webui, "state")
    assert [(one["name"], one["te"], one["file"]) for one in state["applied"]] == [("ink", 0.8, "ink.safetensors")]
    assert state["refused"][0]["name"] == "nosuch"
    assert state["store"] == "device"
    assert state["store_bytes"] > 0
    assert state["layers"] > 0
    assert state["in_charge"]
    assert state["checkpoint"] == "first.ckpt"
    assert str(webui.lora_dir) not in json.dumps(state)


def test_resolve_changes_nothing(webui):
    base = webui.state()
    answer = call(webui, "resolve", prompt("a <lora:ink:0.8> cat <lora:ink:x>"))
    assert [one["name"] for one in answer["applied"]] == ["ink"]
    assert answer["text"] == "a  cat "
    assert "not a number" in answer["refused"][0]["reason"]
    assert webui.state() == base


def test_catalog_and_rescan_list_the_files(webui):
    files = {one["name"]: one for one in call(webui, "catalog")["files"]}
    assert files["alias"]["alias"] == "echo"
    assert "incomplete" in files["broken"]["notes"][0]
    assert call(webui, "rescan", nothing())["files"] == call(webui, "catalog")["files"]


def test_release_gives_the_base_back(webui, expected):
    base = webui.state()
    webui.picture("a cat <lora:ink:0.8>")
    assert call(webui, "release", nothing())["applied"] == []
    assert webui.state() == base
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([("ink", 0.8)], "a cat "))


def test_without_the_api_there_is_no_route(webui):
    webui.app.routes.clear()
    cmd_opts = webui.modules.shared.cmd_opts
    cmd_opts.api = False
    try:
        webui.reload()
        assert webui.app.routes == {}
        cmd_opts.nowebui = True  # which is an API alone
        webui.reload()
        assert len(webui.app.routes) == 5
    finally:
        cmd_opts.api, cmd_opts.nowebui = True, False


def test_passwords_are_those_of_the_webui(webui):
    from lib_lora.hosts.webui.api import is_allowed, known_passwords

    users = known_passwords("ann:secret, bob:a:b")
    assert users == {"ann": "secret", "bob": "a:b"}
    assert is_allowed(users, "ann", "secret")
    assert is_allowed(users, "bob", "a:b")
    assert not any(is_allowed(users, *pair) for pair in (("ann", "a:b"), ("ann", ""), ("eve", ""), ("", "")))


def test_what_is_refused_is_in_the_answer_and_not_in_the_infotext(webui):
    done = webui.generate("a <lora:nosuch:1>")
    assert "nosuch" not in done.infotexts[0]
    answer = json.loads(json.dumps({"extra_generation_params": done.extra_generation_params}))
    assert answer["extra_generation_params"]["Prefuse"][0]["refused"][0]["name"] == "nosuch"


def test_a_picture_without_tags_has_no_word_of_ours(webui):
    done = webui.generate("a cat")
    assert done.extra_generation_params == {}
    assert done.comments == ""


def test_the_status_of_a_job_counts_the_work_of_its_first_batch(webui):
    (status,) = webui.generate("a <lora:ink:0.8>", n_iter=3).extra_generation_params["Prefuse"]
    assert status["layers"] == 210
    assert status["milliseconds"] > 0


def test_the_arithmetic_is_in_the_infotext_where_it_is_not_the_usual(webui):
    compat = {"prefuse_compat": "a1111"}
    assert "Prefuse compat: a1111" in webui.generate("a <lora:ink:1>", override_settings=compat).infotexts[0]
    assert "Prefuse compat" not in webui.generate("a", override_settings=compat).infotexts[0]
    assert "Prefuse compat" not in webui.generate("a <lora:ink:1>").infotexts[0]


def test_settings_have_their_names_and_defaults(webui):
    labels = webui.modules.shared.opts.data_labels
    defaults = {name: label.default for name, label in labels.items() if name.startswith("prefuse_")}
    assert defaults == {
        "prefuse_enabled": True,
        "prefuse_mode": "auto",
        "prefuse_compat": "exact",
        "prefuse_base_store": "auto",
        "prefuse_compile": "off",
        "prefuse_cache_mb": 1024,
        "prefuse_language": "auto",
    }
    assert labels["prefuse_compat"].infotext == "Prefuse compat"


def test_settings_are_there_where_no_page_is_made(webui):
    """With --nowebui nothing runs the callbacks of the settings page, and the API reads the options early."""
    script_callbacks = webui.modules.script_callbacks
    assert script_callbacks.callback_map["ui_settings"] == []
    labels = webui.modules.shared.opts.data_labels
    script_callbacks.run("script_unloaded")
    labels.pop("prefuse_mode")
    runpy.run_path(str(SCRIPT))
    assert "prefuse_mode" in labels


def test_a_setting_that_makes_no_sense_is_the_default(webui, expected):
    webui.set(prefuse_mode="fast", prefuse_compat=3, prefuse_base_store="moon", prefuse_cache_mb=-5)
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([("ink", 0.8)], "a cat "))


def test_the_script_is_short():
    assert len((ROOT / "scripts" / "prefuse.py").read_text().splitlines()) <= 60


def test_the_start_does_not_wait_for_what_applies_loras():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests/webui/fake')!r}]; "
        "from lib_lora.hosts.webui import api, callbacks, conds, extra_network, takeover; "
        "print([name for name in sys.modules if name.startswith(('lib_lora.session', 'lib_lora.core.'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_page_gets_text_and_never_html():
    source = (ROOT / "javascript" / "prefuse.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|fetch\(", source
    )
    assert "textContent" in source


@pytest.fixture
def installer():
    return runpy.run_path(str(ROOT / "install.py"))


def test_nothing_is_installed_where_everything_is_there(installer, monkeypatch, capsys):
    monkeypatch.setitem(installer["main"].__globals__, "missing", list)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    installer["main"]()
    assert capsys.readouterr().out.count("\n") == 1


def test_what_is_there_is_held_at_its_version(installer, monkeypatch, capsys):
    seen = {}

    def run(command, **_):
        seen["command"] = command
        seen["constraints"] = Path(command[command.index("--constraint") + 1]).read_text()
        return subprocess.CompletedProcess(command, 1, "", "no network\nERROR: no matching distribution")

    monkeypatch.setitem(installer["main"].__globals__, "missing", lambda: ["tqdm"])
    monkeypatch.setattr(subprocess, "run", run)
    installer["main"]()
    assert seen["command"][-1] == "tqdm"
    assert "--upgrade" not in seen["command"]
    assert re.search(r"^torch==", seen["constraints"], re.MULTILINE)
    assert re.search(r"^numpy==", seen["constraints"], re.MULTILINE)
    assert capsys.readouterr().out == (
        "Prefuse: tqdm could not be installed (ERROR: no matching distribution); install by hand\n"
    )


def test_pip_itself_would_change_nothing_and_needs_no_network(installer, tmp_path):
    """With the packages of this environment: the WebUI's own pins, where the tests run with them."""
    there = [name for name in installer["NEEDED"] if name not in installer["missing"]()]
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join(f"{name}=={version}" for name, version in installer["installed"]().items()))
    command = [*installer["pip_command"](there, str(constraints)), "--no-index", "--dry-run", "--report", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(there) >= 4
    assert json.loads(done.stdout)["install"] == []


def test_all_that_is_needed_is_looked_for(installer):
    assert installer["NEEDED"] == PINS
