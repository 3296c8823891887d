"""A WebUI in miniature for each test."""

from __future__ import annotations

import pytest

from lib_lora.core.keymap import KeyMap
from tests.toys import c3lier, lierla, write_lora
from tests.webui import stand_in


@pytest.fixture(scope="session")
def templates():
    return stand_in.templates()


@pytest.fixture(scope="session")
def lora_dir(tmp_path_factory, templates):
    folder = tmp_path_factory.mktemp("Lora")
    keymap = KeyMap.from_modules(templates["first"].parts())
    write_lora(folder / "ink.safetensors", lierla(keymap), seed=1)
    write_lora(folder / "wash.safetensors", c3lier(keymap), seed=2, rank=8)
    write_lora(folder / "my lora (v1).2.safetensors", lierla(keymap), seed=3)
    write_lora(folder / "alias.safetensors", lierla(keymap), {"ss_output_name": "echo"}, seed=4)
    (folder / "broken.safetensors").write_bytes((folder / "ink.safetensors").read_bytes()[:5000])
    return folder


@pytest.fixture
def fake_modules():
    yield from stand_in.imported()


@pytest.fixture
def webui(fake_modules, templates, lora_dir, tmp_path):
    return stand_in.WebUI(templates, lora_dir, tmp_path)


@pytest.fixture
def expected(templates, lora_dir):
    """The picture that a session alone makes of a request."""

    def make(request, prompt, checkpoint="first", **options):
        return stand_in.reference(templates[checkpoint], lora_dir, request, prompt, **options)

    return make
