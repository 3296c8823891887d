"""The page's words: the same in every language, and a tooltip for every control."""

from __future__ import annotations

import ast
import json
import re
import string

import pytest

from lib_lora.ui.texts import ENGLISH, FOLDER, HINT, Texts, language_of, languages

pytest.importorskip("gradio", reason="a test of the page's words did not run: no gradio")

UI = FOLDER.parent
TABLES = {language: json.loads((FOLDER / f"{language}.json").read_text("utf-8")) for language in languages()}
OTHERS = [language for language in TABLES if language != ENGLISH]
CHINESE = re.compile("[\u4e00-\u9fff]")


def holes(text: str) -> set[str]:
    """Names of the values that a text takes."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def built(language: str):
    """Ids and words of all controls of the page, with its tooltips."""
    from lib_lora.hosts.standalone.host import StandaloneHost
    from lib_lora.ui.page import build

    return build(StandaloneHost(), language)


@pytest.fixture(scope="module")
def english():
    return built(ENGLISH)


def controls(blocks) -> set[str | None]:
    """Ids of what can be used or read, except what is no control: HTML and what is kept."""
    import gradio as gr

    kinds = gr.components.Component, (gr.HTML, gr.State)
    return {
        one.elem_id for one in blocks.blocks.values() if isinstance(one, kinds[0]) and not isinstance(one, kinds[1])
    }


def hints(blocks) -> dict[str, str]:
    from html import unescape

    (text,) = (one.value for one in blocks.blocks.values() if "data-hints" in str(getattr(one, "value", "")))
    return json.loads(unescape(re.search('data-hints="([^"]*)"', text)[1]))


def test_there_are_english_and_chinese():
    assert {ENGLISH, "zh"} <= set(TABLES)


@pytest.mark.parametrize("language", OTHERS)
def test_every_language_says_the_same_things(language):
    assert list(TABLES[language]) == list(TABLES[ENGLISH])


@pytest.mark.parametrize("language", OTHERS)
def test_every_language_takes_the_same_values(language):
    different = {key for key, text in TABLES[ENGLISH].items() if holes(text) != holes(TABLES[language][key])}
    assert not different


@pytest.mark.parametrize("language", TABLES)
def test_no_text_is_empty_and_every_hint_is_one_sentence(language):
    empty = [key for key, text in TABLES[language].items() if not text.strip() or text != text.strip()]
    assert not empty
    hints = {key: text for key, text in TABLES[language].items() if key.endswith(HINT)}
    assert not [text for text in hints.values() if not text.endswith((".", "。")) or "\n" in text]


def test_chinese_sentences_are_chinese():
    assert not [text for key, text in TABLES["zh"].items() if key.endswith(HINT) and not CHINESE.search(text)]


@pytest.mark.parametrize("language", TABLES)
def test_every_control_has_a_tooltip_and_every_tooltip_a_control(language, english):
    blocks = english if language == ENGLISH else built(language)
    assert set(hints(blocks)) == controls(blocks)
    assert all(hints(blocks).values())


def test_every_key_that_the_code_writes_out_is_in_the_table():
    called = {
        node.args[0].value
        for file in UI.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("texts", "_texts")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(called) > 10
    assert not called - set(TABLES[ENGLISH])


def test_a_locale_becomes_a_language_that_there_is():
    names = ("zh_CN.UTF-8", "zh-Hans (Stable)", "en_GB", "C", "", "tlh")
    assert [language_of(name) for name in names] == ["zh", "zh", "en", "en", "en", "en"]


def test_what_a_table_lacks_is_english(monkeypatch):
    monkeypatch.setattr("lib_lora.ui.texts._read", lambda language: {"en": {"a": "A {n}"}, "zh": {}}[language])
    assert Texts("zh")("a", n=1) == "A 1"
