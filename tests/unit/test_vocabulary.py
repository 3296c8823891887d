"""OpenAI's vocabulary for CLIP, where a checkpoint has no tokenizer beside it."""

from __future__ import annotations

import gzip

import pytest

import lib_lora.hosts.standalone.vocabulary as vocabulary_module
from lib_lora.errors import ModelError
from lib_lora.hosts.standalone.vocabulary import (
    MERGES,
    byte_symbols,
    clip_tokenizer,
    find_vocabulary,
    read_merges,
    vocabulary,
)

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

# Ids that OpenAI's tokenizer gives; 49406 and 49407 are start and end of text.
CAT_IDS = [49406, 320, 1125, 539, 320, 2368, 49407]


def test_the_installed_vocabulary_gives_openais_ids():
    tokenizer = clip_tokenizer(None, "<|endoftext|>")
    assert tokenizer("a photo of a cat")["input_ids"] == CAT_IDS
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77


def test_the_second_encoder_of_sdxl_pads_with_zero():
    padded = clip_tokenizer(None, "!")("a photo of a cat", padding="max_length")["input_ids"]
    assert padded == [*CAT_IDS, *[0] * (77 - len(CAT_IDS))]


def test_the_vocabulary_has_bytes_merges_and_two_marks():
    tokens = vocabulary(read_merges(find_vocabulary()))
    assert len(tokens) == 49408
    assert (tokens["!"], tokens["!</w>"], tokens["<|startoftext|>"], tokens["<|endoftext|>"]) == (0, 256, 49406, 49407)


def test_every_byte_has_a_symbol_of_its_own():
    assert len(set(byte_symbols())) == 256
    assert all(symbol.isprintable() and symbol != " " for symbol in byte_symbols())


def test_without_a_vocabulary_the_message_says_what_to_give(monkeypatch):
    monkeypatch.setattr(vocabulary_module, "PACKAGES", ("no_such_package",))
    with pytest.raises(ModelError, match="--tokenizer"):
        clip_tokenizer(None, "!")


@pytest.mark.parametrize("lines", [["#version", "a b"], ["#version", *["three symbols here"] * MERGES]])
def test_another_gzip_file_is_no_vocabulary(tmp_path, lines):
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(ModelError, match="not CLIP's vocabulary"):
        read_merges(path)


def test_a_file_that_is_no_gzip_is_no_vocabulary(tmp_path):
    path = tmp_path / "vocabulary.txt.gz"
    path.write_text("text")
    with pytest.raises(ModelError, match="can not be read"):
        read_merges(path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no CLIP tokenizer"):
        clip_tokenizer(tmp_path, "!")
