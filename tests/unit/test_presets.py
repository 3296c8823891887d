"""Presets of block weights: saved, renamed, deleted, imported and exported, and all else in the files as it was."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.errors import FileError, OutputError, PrefuseError, PresetError, TagError
from lib_lora.preset_editor import Imported, PresetEditor
from lib_lora.presets import PresetFiles
from lib_lora.prompt.block_weights import SHIPPED_WEIGHTS, BlockRequest
from lib_lora.prompt.preset_texts import ELEMENTS, MOST_LETTERS, MOST_REFUSED, WEIGHTS, checked_name
from lib_lora.prompt.tags import parse_prompt

if TYPE_CHECKING:
    from pathlib import Path

ONES, ZEROS, HALVES = (",".join([number] * 17) for number in ("1", "0", "0.5"))
SD1 = frozenset({"BASE", "M00", *(f"{part}{number:02d}" for part in ("IN", "OUT") for number in range(12))})


@pytest.fixture
def editor(tmp_path) -> PresetEditor:
    return PresetEditor([tmp_path])


def content(folder: Path, name: str = "lbwpresets.txt") -> bytes:
    return (folder / name).read_bytes()


def peer_presets(data: bytes) -> dict[str, str]:
    """As LoRA Block Weight reads its file: a line counts with a colon, 11, 16, 19, 25 or 60 commas, and no ``#``."""
    found = {}
    for line in re.split("\r\n|\r|\n", data.decode()):
        if ":" in line and "#" not in line and line.count(",") in (11, 16, 19, 25, 60):
            found[line.split(":")[0].strip()] = line.split(":")[1].strip()
    return found


def peer_elements(data: bytes) -> dict[str, list[str]]:
    """As LoRA Block Weight reads its other file: presets between empty lines, rules between commas and line ends."""
    sections = (section.partition(":") for section in data.decode().replace("\r\n", "\n").split("\n\n"))
    return {name.strip(): re.split("[,\n]", rules.strip()) for name, colon, rules in sections if colon}


def test_a_saved_preset_is_what_its_name_means_in_a_tag(editor, tmp_path):
    assert editor.save(" My 絵 (v1) ", " 1, R,U ,X+0.2," + "0," * 7 + "0.25") == ()
    assert content(tmp_path).decode() == f"My 絵 (v1):1,R,U,X+0.2,{'0,' * 7}0.25\n"
    (request,) = parse_prompt("<lora:a:1:lbw=My 絵 (v1):x=0.5>").requests
    weights = request.blocks.resolve(PresetFiles([tmp_path]).read(), SD1)
    assert (weights.of("BASE", ""), weights.of("IN07", ""), weights.of("OUT05", "")) == (1, 0.7, 0.25)
    assert editor.own() == peer_presets(content(tmp_path))


@pytest.mark.parametrize("length", [12, 17, 20, 26, 61])
def test_a_list_of_every_length_is_saved(editor, length):
    numbers = ",".join(str(index / 64) for index in range(length))
    editor.save("MY", numbers)
    assert editor.own() == {"MY": numbers}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "line_end"])
def test_comments_order_unknown_lines_and_line_ends_stay(editor, tmp_path, line_end, mark, last):
    lines = ["# mine", f"A:{ONES}", "", "what is this", f"  B : {HALVES} ", f"#C:{ONES}", "SHORT:1,2", f"A2:{ZEROS}"]

    def write(some: list[str]) -> bytes:
        return (mark + line_end.join(some)).encode() + (line_end.encode() if last else b"")

    path = tmp_path / "lbwpresets.txt"
    path.write_bytes(write(lines))
    editor.save("B", ZEROS, replace=True)
    assert path.read_bytes() == write([*lines[:4], f"B:{ZEROS} ", *lines[5:]])
    editor.rename("B", "D")
    assert path.read_bytes() == write([*lines[:4], f"D:{ZEROS} ", *lines[5:]])
    editor.delete("D")
    assert path.read_bytes() == write([*lines[:4], *lines[5:]])
    editor.save("NEW", ONES)
    assert path.read_bytes() == write([*lines[:4], *lines[5:], f"NEW:{ONES}"]).rstrip() + line_end.encode()


def test_a_rename_keeps_what_stands_behind_the_name(editor, tmp_path):
    (tmp_path / "lbwpresets.txt").write_text(f"A: {ONES} :rest\nA:{HALVES}\n")
    editor.rename("A", "B")
    assert content(tmp_path).decode() == f"B: {ONES} :rest\nB:{HALVES}\n"


def test_of_a_name_that_is_there_twice_the_later_is_replaced_and_both_are_deleted(editor, tmp_path):
    (tmp_path / "lbwpresets.txt").write_text(f"A:{ONES}\nA:{HALVES}\nB:{ONES}\n")
    editor.save("A", ZEROS, replace=True)
    assert content(tmp_path).decode() == f"A:{ONES}\nA:{ZEROS}\nB:{ONES}\n"
    editor.delete("A")
    assert editor.own() == {"B": ONES}


def test_a_preset_is_replaced_only_if_asked_for(editor, tmp_path):
    editor.save("A", ONES)
    with pytest.raises(PresetError, match="there is a preset 'A' already"):
        editor.save("A", ZEROS)
    with pytest.raises(PresetError, match="there is a preset 'MIDD' already"):
        editor.save("MIDD", ZEROS)
    assert editor.own() == {"A": ONES}


def test_shipped_presets_can_be_overridden_and_come_back_but_not_be_deleted(editor, tmp_path):
    for refuse in (lambda: editor.delete("MIDD"), lambda: editor.rename("MIDD", "OTHER")):
        with pytest.raises(PresetError, match="'MIDD' is a preset that comes with Prefuse and stays"):
            refuse()
    files = PresetFiles([tmp_path])
    editor.save("MIDD", ZEROS, replace=True)
    assert files.read().weights["MIDD"] == ZEROS
    editor.delete("MIDD")
    assert files.read().weights["MIDD"] == SHIPPED_WEIGHTS["MIDD"]


def test_a_name_that_is_not_there_is_told(editor):
    editor.save("A", ONES)
    for refuse in (lambda: editor.delete("a"), lambda: editor.rename("a", "b"), lambda: editor.export(["a"])):
        with pytest.raises(PresetError, match="there is no preset 'a' any more"):
            refuse()
    for taken in ("A", "MIDD"):
        with pytest.raises(PresetError, match=f"there is a preset {taken!r} already"):
            editor.rename("A", taken)


SEPARATORS = (":", ";", ",", "=", "<", ">", "|", "#", "\n", "\r", "\t", "\0", "\x1b", "\x85", "\u2028", "\u202e")
OWN_MEANING = ("R", "U", "X", "X+0.2", "X-1", "sine", "cosine", "linear", "reverse_linear", "zeros", "sine+0.5")
BAD_NAMES = [f"A{letter}B" for letter in SEPARATORS] + ["#A", "A\ud800", "", "  ", "n" * (MOST_LETTERS + 1), "墨" * 90]
BAD_NAMES += [*OWN_MEANING, "0.5", "-1", "1e3", "nan", "１"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_a_tag_or_a_file_can_not_hold_is_refused(editor, tmp_path, name):
    editor.save("GOOD", ONES)
    before = content(tmp_path)
    for refuse in (lambda: editor.save(name, ONES, replace=True), lambda: editor.rename("GOOD", name)):
        with pytest.raises(PresetError) as caught:
            refuse()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 250
    assert content(tmp_path) == before


@pytest.mark.parametrize("value", ["", "1", "sine", "MIDD", ",".join("1" * 16), "1," * 16, "1," * 16 + "x"])
@pytest.mark.parametrize("more", ["", ":rest", "#", "\n"])
def test_a_list_that_is_none_is_refused(editor, tmp_path, value, more):
    with pytest.raises(TagError, match="lbw"):
        editor.save("MY", value + more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["nan", "inf", "101", "X*2", "1 2", "1;2", "0x1", "1:1", "1#", "R R"])
def test_a_number_that_is_none_is_refused(editor, tmp_path, number):
    with pytest.raises(TagError, match="number 17 of lbw"):
        editor.save("MY", "1," * 16 + number)
    assert list(tmp_path.iterdir()) == []


LETTERS = st.text(st.sampled_from("aX0:;,=<>|#\n\r\u2028 絵é\"'[](){}\\/.+-"), max_size=8) | st.text(max_size=8)


@settings(max_examples=1000, deadline=None)
@given(LETTERS, st.sampled_from([WEIGHTS, ELEMENTS]))
def test_every_name_that_is_not_refused_comes_back_from_the_file_and_from_the_tag(name, form):
    try:
        name = checked_name(name)
    except PresetError as error:
        assert str(error).isprintable()
        return
    value = ONES if form is WEIGHTS else "IN05:attn:0.5"
    text = form.with_preset("# before\r\n\r\n", name, value)
    assert form.presets(text)[name] == value
    read = peer_presets if form is WEIGHTS else peer_elements
    assert name in read(text.encode())
    (request,) = parse_prompt(f"a <lora:x:1:{form.argument}={name}> b").requests
    assert (request.blocks.weights or request.blocks.elements) == name


PIECES = st.sampled_from(["A:", "B:", ONES, HALVES, "\n", "\r\n", "\n\n", "#", ":", "IN05:attn:1", ",", " ", "x"])


@settings(max_examples=1000, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join), st.sampled_from([WEIGHTS, ELEMENTS]))
def test_an_edit_of_any_text_changes_one_preset_and_no_other(text, form):
    value = ONES if form is WEIGHTS else ":to_q:0.25"
    presets = form.presets(text)
    assert form.presets(form.with_preset(text, "A", value)) == presets | {"A": value}
    assert form.presets(form.without(text, "A")) == {k: v for k, v in presets.items() if k != "A"}
    renamed = {("C" if k == "A" else k): v for k, v in presets.items()}
    assert form.presets(form.renamed(text, "A", "C")) == renamed


def test_presets_of_elements_are_saved_as_the_extension_reads_them(tmp_path):
    editor = PresetEditor([tmp_path], ELEMENTS)
    (tmp_path / "elempresets.txt").write_bytes(b"OLD:IN05:attn:1\r\nOUT01:proj:0.5")
    editor.save("MY", "IN05-OUT05 ; attn2.to_q ; 0.5, NOT BASE;;0")
    text = content(tmp_path, "elempresets.txt")
    assert text == b"OLD:IN05:attn:1\r\nOUT01:proj:0.5\r\n\r\nMY:IN05-OUT05:attn2.to_q:0.5,NOT BASE::0\r\n"
    assert list(peer_elements(text)) == ["OLD", "MY"]
    rules = BlockRequest(elements="MY").resolve(PresetFiles([tmp_path]).read(), SD1).rules
    assert [rule.text for rule in rules] == ["IN05-OUT05;attn2.to_q;0.5", "NOT BASE;;0"]
    editor.save("THIRD", ";attn1;0")
    editor.delete("MY")
    assert content(tmp_path, "elempresets.txt") == (b"OLD:IN05:attn:1\r\nOUT01:proj:0.5\r\n\r\nTHIRD::attn1:0\r\n")
    for wrong in ("", "IN05;attn", "ATTNDEEPON", "IN05;attn;x", "IN05-OUT99;;1"):
        with pytest.raises(TagError, match=r"lbwe|elements"):
            editor.save("WRONG", wrong)


# Import and export


def test_an_import_tells_what_came_what_was_renamed_and_what_was_refused(editor, tmp_path):
    editor.save("SAME", ONES)
    editor.save("MINE", ONES)
    lines = [
        *("# their presets", f"NEW:{HALVES}", f"SAME:{ONES}", f"MINE:{ZEROS}", "", f"MIDD:{ZEROS}", "SHORT:1,2"),
        *(f"sine:{ONES}", f"BAD:{'1,' * 16}x", "hello", f"NONE:{ZEROS}", f"A=B:{ONES}"),
    ]
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("\ufeff" + "\r\n".join(lines))
    result = editor.import_file(theirs)
    assert (result.saved, result.known) == (("NEW",), ("SAME", "NONE"))
    assert result.renamed == {"MINE": "MINE 2", "MIDD": "MIDD 2"}
    numbers = [re.match(r"line (\d+): ", sentence).group(1) for sentence in result.refused]
    assert numbers == ["7", "8", "9", "10", "12"]
    assert "lbw holds 2 numbers" in result.refused[0]
    assert editor.own() == {"SAME": ONES, "MINE": ONES, "NEW": HALVES, "MINE 2": ZEROS, "MIDD 2": ZEROS}


def test_a_second_import_of_the_same_changes_nothing(editor, tmp_path):
    editor.save("A", ONES)
    text = f"A:{ZEROS}\nB:{ONES}\nB:{HALVES}"
    assert editor.import_text(text) == Imported(saved=("B",), renamed={"A": "A 2"})
    before = content(tmp_path)
    assert editor.import_text(text) == Imported(known=("A", "B"))
    assert content(tmp_path) == before


def test_an_import_of_thousands_of_faults_tells_some_and_the_number(editor):
    result = editor.import_text("words\n" * 5000)
    assert len(result.refused) == MOST_REFUSED + 1
    assert result.refused[-1] == "4980 more are refused for such reasons"
    assert editor.own() == {}


def test_ten_thousand_presets_are_imported_in_linear_time(editor):
    presets = {f"P{number}": ONES for number in range(10_000)}
    result = editor.import_text(WEIGHTS.with_new("", presets))
    assert editor.own() == presets
    assert len(result.saved) == 10_000


def test_a_file_that_is_no_text_is_not_imported(editor, tmp_path):
    (tmp_path / "theirs.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(FileError, match="not a text in UTF-8"):
        editor.import_file(tmp_path / "theirs.png")
    with pytest.raises(FileError, match="a folder, not a file"):
        editor.import_file(tmp_path)


@pytest.mark.parametrize(("form", "values"), [(WEIGHTS, (ONES, ZEROS)), (ELEMENTS, ("IN05:attn:1,::0", ":ff:0.5"))])
def test_an_export_is_a_file_that_can_be_imported_again(tmp_path, form, values):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = (PresetEditor([tmp_path / folder], form) for folder in ("here", "there"))
    for name, value in zip(("A", "絵"), values, strict=True):
        here.save(name, value)
    assert there.import_text(here.export()).saved == ("A", "絵")
    assert there.own() == here.own() == dict(zip(("A", "絵"), values, strict=True))
    shipped = next(iter(form.shipped))
    assert form.presets(here.export([shipped, "A"])) == {shipped: form.shipped[shipped], "A": values[0]}


# Several folders


def test_new_presets_go_into_the_first_folder_and_others_are_changed_where_they_are(tmp_path):
    folders = [tmp_path / name for name in ("missing", "first", "second")]
    for folder in folders[1:]:
        folder.mkdir()
    editor, files = PresetEditor(folders), PresetFiles(folders)
    (folders[2] / "lbwpresets.txt").write_text(f"OLD:{ONES}\nBOTH:{ONES}")
    (folders[1] / "lbwpresets.txt").write_text(f"BOTH:{HALVES}")
    editor.save("NEW", ONES)
    editor.save("OLD", ZEROS, replace=True)
    assert content(folders[1]).decode() == f"BOTH:{HALVES}\nNEW:{ONES}\n"
    assert content(folders[2]).decode() == f"OLD:{ZEROS}\nBOTH:{ONES}"
    assert editor.own() == {"OLD": ZEROS, "BOTH": HALVES, "NEW": ONES}
    assert SHIPPED_WEIGHTS | editor.own() == files.read().weights
    editor.rename("BOTH", "ONE")
    assert editor.own() == {"OLD": ZEROS, "ONE": HALVES, "NEW": ONES}
    editor.delete("ONE")
    assert editor.own() == {"OLD": ZEROS, "NEW": ONES}


def test_without_a_folder_it_is_said(tmp_path):
    with pytest.raises(OutputError, match="there is no folder for presets"):
        PresetEditor([]).save("A", ONES)
    with pytest.raises(PrefuseError, match="missing"):
        PresetEditor([tmp_path / "missing"]).save("A", ONES)
