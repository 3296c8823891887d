"""Nothing from a file or a tag becomes a part of a page: the WebUI is given text, and so the page shows text."""

from __future__ import annotations

import html
import json
import shutil
from html.parser import HTMLParser

import pytest
import torch

from lib_lora.core.keymap import KeyMap
from lib_lora.prompt.tags import writable_name
from tests.browser import NAMES, Browser, find_browser
from tests.toys import write_lora
from tests.webui.stand_in import ROOT

MARK = "window.hit=1"
ELEMENTS = ("img src=x", "svg", "body", "input autofocus", "video src=x", "audio src=x", "embed src=x", "object data=x")
ENDS = ('"', "'", "`", "-->", "]]>", "</p>", "</textarea>", "</script>", "</title>", "</style>")
PAYLOADS = [
    *(f"<{element} onerror={MARK} onload={MARK}>" for element in ELEMENTS),
    *(f'{end}><img src=x onerror="{MARK}">' for end in ENDS),
    *(f'{quote} onmouseover="{MARK}" x={quote}' for quote in ('"', "'", "")),
    *(
        f"<script>{MARK}</script>",
        f"<ScRiPt>{MARK}</sCrIpT>",
        f"<script src=data:,{MARK}>",
        f"<<script>{MARK}//<</script>",
    ),
    *(f'<a href="javascript:{MARK}">x</a>', f"<math><mi xlink:href=data:x,{MARK}>", f"<details open ontoggle={MARK}>"),
    *(f"<iframe srcdoc='<script>{MARK}</script>'>", f"<style onload={MARK}>", f"<image src=x onerror={MARK}>"),
    *(f"&lt;img src=x onerror={MARK}&gt;", f"&#60;img src=x onerror={MARK}&#62;", f"\\u003cimg onerror={MARK}\\u003e"),
    *(f"${{{MARK}}}", f"{{{{{MARK}}}}}", f"javascript:{MARK}", f"<img src=x\nonerror={MARK}>", f"<form action={MARK}>"),
    f"<marquee onstart={MARK}>",
]
FIELDS = (
    *("ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_network_module", "ss_network_args"),
    *("ss_network_dim", "ss_network_alpha", "ss_training_comment", "ss_training_started_at", "sshs_model_hash"),
    *("modelspec.title", "modelspec.architecture"),
)
FILE_NAMES = [text.replace("/", "\\").replace("\n", " ") for text in PAYLOADS]


@pytest.fixture
def hostile(webui, lora_dir, monkeypatch):
    """A LoRA for each payload: in the name of its file and folder and in twelve fields of its metadata."""
    monkeypatch.setattr(webui.modules.processing, "denoise", lambda *_: torch.zeros(1))
    (layer, *_) = KeyMap.from_modules(webui.model.parts())
    folders = [lora_dir / f"{number} {name}" for number, name in enumerate(FILE_NAMES)]
    for number, (folder, name, text) in enumerate(zip(folders, FILE_NAMES, PAYLOADS, strict=True)):
        write_lora(folder / f"{name}.safetensors", [layer], dict.fromkeys(FIELDS, text), seed=number)
    webui.networks.list_available_networks()
    yield webui
    for folder in folders:
        shutil.rmtree(folder)


def spoken(webui) -> dict[str, object]:
    """All that is said of the payloads: applied, refused by name, refused by strength, resolved, listed."""
    from lib_lora.hosts.webui.api import Prompt

    routes = {path.rpartition("/")[2]: endpoint for path, (endpoint, _) in webui.app.routes.items()}
    tags = [one.tag for one in routes["catalog"]().files if MARK in one.name]
    asked = "".join(f"<lora:{name}:1>" for name in tags)
    spelled = [f"{number} {writable_name(text)}" for number, text in enumerate(PAYLOADS)]
    unknown, wrong = ("".join(f"<lora:{one}>" for one in some) for some in (spelled, [f"ink:{one}" for one in spelled]))
    jobs = [webui.generate(f"a {some}") for some in (asked, unknown, wrong)]
    return {
        "tags": tags,
        "comments": [job.comments for job in jobs],
        "infotexts": [job.infotexts[0] for job in jobs],
        "status": [entry for job in jobs for entry in job.extra_generation_params.get("Prefuse", ())],
        "answers": [repr(routes["state"]()), repr(routes["resolve"](Prompt(prompt=asked + unknown + wrong)))],
    }


class Elements(HTMLParser):
    """Names of all elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {tag, *(name for name, _ in attrs)}


def as_page(text: str) -> str:
    """What the WebUI makes of comments and infotexts."""
    return f"<p class='comments'>{'<br>'.join(html.escape(line) for line in text.split(chr(10)))}</p>"


def test_there_are_forty_payloads_that_make_elements_where_they_are_not_escaped():
    assert len(set(PAYLOADS)) == 40
    assert len(FIELDS) == 12
    assert sum(bool(Elements(text).found) for text in PAYLOADS) > 25


def test_every_payload_is_told_and_none_is_more_than_text(hostile):
    said = spoken(hostile)
    assert len(said["tags"]) == 40
    applied, unknown, wrong = said["comments"]
    assert unknown.count("no LoRA of the") == wrong.count("not a number") == 40
    assert [len(entry["applied"]) for entry in said["status"]] == [40, 0, 0]
    for text in (*said["comments"], *said["infotexts"]):
        assert Elements(as_page(text)).found <= {"p", "br", "class"}
    for line in (*unknown.split("\n"), *wrong.split("\n"), *applied.split("\n")):
        assert line.isprintable()


PAGE = """<!doctype html><meta charset=utf-8>
<div id=tab><div id=html_log_txt2img></div><div id=generation_info_txt2img><textarea></textarea></div></div>
<script>
var opts = {extra_networks_add_text_separator: " "}, made = [], updated = [];
var gradioApp = () => document, onUiLoaded = (f) => made.push(f), onAfterUiUpdate = (f) => updated.push(f);
function tryToRemoveExtraNetworkFromPrompt() { return false; }
</script>
<script src="SCRIPT"></script>"""
COUNTS = """(() => {
    const all = [...document.querySelectorAll("#tab *")];
    return [all.map((one) => one.tagName).sort().join(), all.flatMap((one) => one.getAttributeNames()).sort().join()];
})()"""


@pytest.fixture
def page(tmp_path):
    browser = Browser(find_browser(), tmp_path / "profile")
    file = tmp_path / "page.html"
    file.write_text(PAGE.replace("SCRIPT", (ROOT / "javascript" / "prefuse.js").as_uri()), encoding="utf-8")
    browser.open(file.as_uri())
    browser.wait("!!made.length")
    browser.run("made.forEach((one) => one()); 0")
    yield browser
    browser.close()


def show(page, entries: list[dict]) -> str:
    """The status line that the page makes of a generation."""
    data = json.dumps(json.dumps({"extra_generation_params": {"Prefuse": entries}}))
    page.run(f"document.querySelector('textarea').value = {data}; updated.forEach((one) => one()); 0")
    return page.run("document.querySelector('#prefuse_status_txt2img').textContent")


NO_BROWSER = f"no browser: set PREFUSE_CHROMIUM, or have one of {', '.join(NAMES)}"


@pytest.mark.skipif(find_browser() is None, reason=NO_BROWSER)
def test_the_status_line_shows_every_payload_as_text(hostile, page):
    status = spoken(hostile)["status"]
    harmless = json.loads(json.dumps(status).replace(MARK, "x").replace("<", "").replace("onerror", ""))
    for entry, plain in zip(status, harmless, strict=True):
        show(page, [plain])
        before = page.run(COUNTS)
        line = show(page, [entry])
        names = [one["name"] for one in (*entry["applied"], *entry["refused"])]
        assert names
        assert all(name in line for name in names)
        assert page.run(COUNTS) == before
        assert page.run("window.hit") is None
    for text in PAYLOADS:
        tag = f"<lora:{writable_name(text)}:-1>"
        page.run(f"tryToRemoveExtraNetworkFromPrompt({{value: {json.dumps(f'a {tag}')}}}, {json.dumps(tag)}, false); 0")
    assert page.run(COUNTS) == before
    assert page.run("window.hit") is None
    assert not page.errors
