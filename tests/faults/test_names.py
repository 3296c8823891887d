"""Hostile, strange and colliding names: looked up, never made into paths; never silent."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_lora.catalog import CatalogEntry, LoraCatalog, infotext_name
from lib_lora.errors import UnknownLoraError
from lib_lora.prompt.tags import parse_prompt

HOSTILE_NAMES = [
    "..",
    ".",
    "/",
    "\\",
    "//",
    "../",
    "../..",
    "../secret",
    "../secret.safetensors",
    "../../secret",
    "../loras/../secret",
    "./../secret",
    "style/../../secret",
    "style/../ink",
    "style//ink",
    "style/./ink",
    "/style/ink",
    "style/ink/",
    "..\\secret",
    "style\\..\\..\\secret",
    "....//secret",
    "..;/secret",
    "..%2fsecret",
    "%2e%2e/secret",
    "%2e%2e%2fsecret",
    "%252e%252e%252fsecret",
    "..%c0%afsecret",
    "．．/secret",
    "‥/secret",
    "..∕secret",
    "/etc/passwd",
    "../../../../../../../../etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "/dev/stdin",
    "file:///etc/passwd",
    "http://127.0.0.1/x",
    "~/secret",
    "~root/secret",
    "$HOME/secret",
    "${HOME}",
    "`id`",
    "$(id)",
    "; rm -rf x",
    "| cat",
    "C:\\Windows\\win.ini",
    "C:secret",
    "\\\\server\\share\\x",
    "\\\\?\\C:\\x",
    "CON",
    "NUL.safetensors",
    "COM1",
    "ink\0.txt",
    "\0",
    "ink\n",
    "\u202eknI",
    "*",
    "i?k",
    "\ud800",
    "x" * 1_000_000,
]


class FileWatch:
    """Paths that the process opens or lists while `on`. An audit hook can not be taken away again."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        events = ("open", "os.listdir", "os.scandir", "sqlite3.connect")
        if self.on and event in events and isinstance(args[0], (str, bytes, os.PathLike)):  # or a file open already
            self.seen.append(os.fsdecode(args[0]))

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        self.seen.clear()
        self.on = True
        try:
            yield self.seen
        finally:
            self.on = False


@pytest.fixture(scope="module")
def watch() -> FileWatch:
    return FileWatch()


def write_lora(path: Path, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_x.alpha": torch.tensor(1.0)}, path, metadata or None)
    return path


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:30])
def test_a_hostile_name_opens_nothing_outside_the_folders(tmp_path: Path, watch: FileWatch, name: str) -> None:
    folder = tmp_path / "loras"
    write_lora(folder / "style" / "ink.safetensors")
    write_lora(tmp_path / "secret.safetensors")
    catalog = LoraCatalog([folder], tmp_path / "loras" / "index.sqlite")
    catalog.refresh()
    write_lora(folder / "new.safetensors")
    with watch.watching() as seen, pytest.raises(UnknownLoraError) as caught:
        catalog.find(name)
    assert str(folder) in seen, "the hook sees that the folders were looked through"
    assert any(path.endswith("new.safetensors") for path in seen), "the hook sees files being opened"
    assert [path for path in seen if not path.startswith(str(folder))] == []
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_there_are_sixty_hostile_names() -> None:
    assert len(set(HOSTILE_NAMES)) == 60


STRANGE_NAMES = [
    "plain",
    "with space",
    " leading",
    "trailing ",
    "two  spaces",
    "dots.in.name.v1.2",
    "ends with dot.",
    "(parentheses) [brackets] {braces}",
    "comma, comma",
    "colon: colon",
    "a:b:c",
    "less < than",
    "greater > than",
    "<lora:x:1>",
    "equals=one",
    "equals=one=two",
    "te=0.5",
    "percent%20",
    "hash#tag",
    'quote"double',
    "quote'single",
    "back\\slash",
    "star*question?",
    "pipe|amp&semi;",
    "日本語の名前",
    "Ünïcödé",
    unicodedata.normalize("NFD", "Ünïcödé décomposé"),
    "emoji 🎨👩‍🎨",
    "العربية",
    "tab\there\nand line",
]


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=ascii)
def test_a_strange_name_makes_the_round_trip_from_file_to_tag_to_infotext_and_back(tmp_path: Path, name: str) -> None:
    path = write_lora(tmp_path / f"{name}.safetensors")
    write_lora(tmp_path / "another.safetensors")
    catalog = LoraCatalog([tmp_path])
    entry = catalog.find(name)
    assert (entry.name, entry.path) == (name, path)

    parsed = parse_prompt(f"a <lora:{entry.tag_name}:0.8> b")
    (request,) = parsed.requests
    assert parsed.text == "a  b"
    assert (request.te, request.unet, request.ignored) == (0.8, 0.8, ())
    assert catalog.find(request.name) == entry

    hashes = catalog.lora_hashes([entry], [request.name])
    key, _, value = hashes.rpartition(": ")
    assert key == infotext_name(request.name)
    assert not {":", ","} & set(key)
    assert catalog.data_hash(entry).startswith(value)


def test_there_are_thirty_strange_names() -> None:
    assert len(set(STRANGE_NAMES)) == 30


def test_other_normal_forms_and_cases_mean_a_file_if_it_is_the_only_one(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Café")
    cafe = write_lora(tmp_path / f"{decomposed}.safetensors", ss_output_name="Straße")
    catalog = LoraCatalog([tmp_path])
    for name in ("Café", decomposed, "café", "CAFÉ", "straße", "STRASSE", f"{tmp_path.name}/CAFÉ".upper()):
        assert catalog.find(name).path == cafe
    composed = write_lora(tmp_path / "Café.safetensors")
    catalog.refresh()
    assert catalog.find("Café").path == composed, "the exact spelling counts more"
    assert catalog.find(decomposed).path == cafe
    with pytest.raises(UnknownLoraError, match="could be 2 LoRAs"):
        catalog.find("CAFÉ")


# Layout: files with aliases; the name to look up; the file it means; a word of the note, or None if nothing collides.
COLLISIONS = {
    "two folders, the later counts": (
        {"a/x.safetensors": "", "b/x.safetensors": ""},
        "x",
        "b/x.safetensors",
        "write 'a/x' for a/x.safetensors",
    ),
    "folders in folders, by natural order": (
        {"a/s10/x.safetensors": "", "a/s9/x.safetensors": ""},
        "x",
        "a/s10/x.safetensors",
        "write 's9/x' for s9/x.safetensors",
    ),
    "the folder itself and one in it": (
        {"a/x.safetensors": "", "a/s/x.safetensors": ""},
        "x",
        "a/s/x.safetensors",
        "write 'a/x' for a/x.safetensors",
    ),
    "two suffixes": (
        {"a/x.safetensors": "", "a/x.sft": ""},
        "x",
        "a/x.sft",
        "rename a/x.safetensors",
    ),
    "a pickle in the later folder does not hide a usable file": (
        {"a/x.safetensors": "", "b/x.pt": "pickle"},
        "x",
        "a/x.safetensors",
        "write 'b/x' for b/x.pt",
    ),
    "a file name and the alias of another": (
        {"a/x.safetensors": "", "b/y.safetensors": "x"},
        "x",
        "a/x.safetensors",
        "write 'y' for b/y.safetensors",
    ),
    "a file name and what another is spelled like": (
        {"a/p_q.safetensors": "", "b/p:q.safetensors": ""},
        "p_q",
        "a/p_q.safetensors",
        "write 'b/p_q' for b/p:q.safetensors",
    ),
    "two names that differ in case": (
        {"a/X.safetensors": "", "b/x.safetensors": ""},
        "X",
        "a/X.safetensors",
        None,
    ),
}


def write_layout(folder: Path, files: dict[str, str]) -> LoraCatalog:
    for file, alias in files.items():
        path = folder / file
        if alias == "pickle":
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"PK\x03\x04" + b"archive/data.pkl" * 20)
        else:
            write_lora(path, **({"ss_output_name": alias} if alias else {}))
    return LoraCatalog([folder / "a", folder / "b"])


def notes_on_names(entry: CatalogEntry) -> list[str]:
    return [note for note in entry.notes if " means " in note]


@pytest.mark.parametrize("layout", COLLISIONS.values(), ids=COLLISIONS)
def test_a_collision_is_decided_as_documented_and_told(
    tmp_path: Path, layout: tuple[dict[str, str], str, str, str | None]
) -> None:
    files, name, chosen, said = layout
    catalog = write_layout(tmp_path, files)
    entry = catalog.find(name)
    assert entry.path == tmp_path / chosen
    if said is None:
        assert notes_on_names(entry) == []
    else:
        (note,) = notes_on_names(entry)
        assert said in note
        assert chosen.rpartition("/")[2] in note


@pytest.mark.parametrize("layout", COLLISIONS.values(), ids=COLLISIONS)
def test_every_file_of_a_collision_has_a_tag_of_its_own_or_says_that_it_has_none(
    tmp_path: Path, layout: tuple[dict[str, str], str, str, str | None]
) -> None:
    catalog = write_layout(tmp_path, layout[0])
    for entry in catalog.entries():
        if entry.tag_name:
            assert catalog.find(parse_prompt(f"<lora:{entry.tag_name}>").requests[0].name) == entry
        else:
            assert any("rename it" in note for note in entry.notes)


def test_there_are_eight_collisions() -> None:
    assert len(COLLISIONS) == 8
