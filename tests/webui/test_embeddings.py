"""Textual inversions inside of LoRA files."""

from __future__ import annotations

import sys

import pytest
import torch

from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_tensors
from tests.toys import lierla, lora_tensors


@pytest.fixture
def bundle(webui, lora_dir):
    layers = lierla(KeyMap.from_modules(webui.model.parts()))
    vector = torch.ones(2, 32)
    inside = {"bundle_emb.glow.string_to_param.*": vector, "bundle_emb.plain.emb": vector}
    path = lora_dir / "bundle.safetensors"
    save_tensors(path, lora_tensors(layers) | inside, {})
    yield path
    path.unlink()


@pytest.fixture
def database(webui):
    return sys.modules["modules.sd_hijack"].model_hijack.embedding_db


def test_they_are_there_while_their_lora_is_applied(webui, bundle, database):
    webui.picture("a <lora:bundle:1>")
    assert set(database.word_embeddings) == {"glow", "plain"}
    assert str(database.word_embeddings["glow"].shorthash) == "bundle"
    webui.picture("a <lora:ink:1>")
    assert not database.word_embeddings


def test_their_hash_is_left_out_if_the_setting_says_so(webui, bundle, database):
    webui.set(lora_bundled_ti_to_infotext=False)
    webui.picture("a <lora:bundle:1>")
    assert str(database.word_embeddings["glow"].shorthash) == ""


def test_a_file_in_the_embeddings_folder_wins(webui, bundle, database):
    own = database.word_embeddings["glow"] = object()
    webui.picture("a <lora:bundle:1>")
    webui.picture("a")
    assert database.word_embeddings == {"glow": own}


def test_one_of_another_width_is_skipped(webui, bundle, database):
    database.expected_shape = 768
    webui.picture("a <lora:bundle:1>")
    assert not database.word_embeddings
    assert set(database.skipped_embeddings) == {"glow", "plain"}


def test_their_file_is_read_again_only_if_something_changed(webui, bundle, database, monkeypatch):
    webui.picture("a <lora:bundle:1>")
    read = []
    embeddings = sys.modules["lib_lora.hosts.webui.embeddings"]
    load = embeddings.load_network
    monkeypatch.setattr(embeddings, "load_network", lambda path: read.append(path) or load(path))
    webui.picture("a <lora:bundle:0.5>")
    assert not read
    database.word_embeddings.clear()  # as when the folder is looked through again
    webui.picture("a <lora:bundle:1>")
    assert read == [bundle]
    assert set(database.word_embeddings) == {"glow", "plain"}
