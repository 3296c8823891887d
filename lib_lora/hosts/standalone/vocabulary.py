"""CLIP's vocabulary, found among the installed packages, and a tokenizer made of it without a download.

The file: bpe_simple_vocab_16e6.txt.gz of https://github.com/openai/CLIP, which open_clip ships too.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from lib_lora.core.saving import save_bytes
from lib_lora.errors import ModelError
from lib_lora.hosts.standalone.libraries import transformers_class

FILE_NAME = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("open_clip", "clip")
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")
MERGES = 49152 - 256 - 2
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def find_vocabulary() -> Path | None:
    """The vocabulary file of an installed open_clip or clip package, which is not imported."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / FILE_NAME).is_file():
                return Path(folder) / FILE_NAME
    return None


def byte_symbols() -> list[str]:
    """One printable letter for each byte, in the order of the vocabulary: bytes that are printable Latin-1 first.

    Source: bytes_to_unicode of GPT-2's tokenizer.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(256, 256 + others))]


def read_merges(path: Path) -> list[str]:
    """CLIP's 48,894 merges, such as ``"th e</w>"``.

    Raises:
        ModelError: If the file is not CLIP's vocabulary.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            merges = lines.read().split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} can not be read as CLIP's vocabulary: {error}.") from error
    if len(merges) < MERGES or any(len(merge.split()) != 2 for merge in merges):
        raise ModelError(f"{path} is not CLIP's vocabulary: {MERGES:,} merges of two symbols were expected.")
    return merges


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Token → number: bytes, bytes that end a word, merges, start and end of text; 49,408 with CLIP's merges."""
    symbols = byte_symbols()
    joined = ("".join(merge.split()) for merge in merges)
    tokens = chain(symbols, (symbol + WORD_END for symbol in symbols), joined, (START, END))
    return {token: number for number, token in enumerate(tokens)}


def clip_tokenizer(source: Path | None, pad_token: str) -> Any:
    """A transformers CLIPTokenizer.

    Args:
        source: A folder with vocab.json and merges.txt (or tokenizer.json), a vocabulary file, or None to look among
            the installed packages.
        pad_token: Fills a prompt up to 77 tokens.

    Raises:
        ModelError: If there is no vocabulary, or `source` is none.
    """
    source = source or find_vocabulary()
    if source is None:
        raise ModelError(
            "CLIP's vocabulary was not found: run `pip install --no-deps open_clip_torch`, or give the tokenizer "
            "folder of any SD model (vocab.json and merges.txt) with --tokenizer."
        )
    if source.is_dir():
        return _from_folder(source, pad_token)
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in _files(read_merges(source)).items():
            save_bytes(Path(scratch) / name, content)
        return _from_folder(Path(scratch), pad_token)


def tokenizer_files(source: Path | None, pad_token: str) -> dict[str, bytes]:
    """What a tokenizer's folder in a diffusers model holds: file name → content; nothing if there is no vocabulary.

    Args:
        source: See `clip_tokenizer`.
        pad_token: See `clip_tokenizer`.

    Raises:
        ModelError: If `source` is no vocabulary.
    """
    source = source or find_vocabulary()
    if source is None:
        return {}
    if source.is_dir():
        _check_folder(source)
        files = {
            name: (source / name).read_bytes() for name in (*TOKENIZER_FILES, "merges.txt") if (source / name).is_file()
        }
    else:
        files = _files(read_merges(source))
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = tokens | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    texts = {"special_tokens_map.json": tokens, "tokenizer_config.json": settings}
    return files | {name: json.dumps(values, indent=2).encode() for name, values in texts.items()}


def _files(merges: list[str]) -> dict[str, bytes]:
    lines = "\n".join(("#version: 0.2", *merges, ""))
    return {"vocab.json": json.dumps(vocabulary(merges)).encode(), "merges.txt": lines.encode()}


def _check_folder(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder} holds no CLIP tokenizer: neither {' nor '.join(TOKENIZER_FILES)} is there.")


def _from_folder(folder: Path, pad_token: str) -> Any:
    _check_folder(folder)
    try:
        return transformers_class("CLIPTokenizer").from_pretrained(
            folder, local_files_only=True, pad_token=pad_token, model_max_length=77
        )
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"The tokenizer in {folder} can not be read: {error}") from error
