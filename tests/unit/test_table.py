"""Tables for spreadsheets."""

from __future__ import annotations

import csv
from io import StringIO

import pytest

from lib_lora.errors import OutputError
from lib_lora.tools.table import csv_of, save_csv

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0", "＝1+1")


def cells(text: str) -> list[list[str]]:
    return list(csv.reader(StringIO(text, newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_becomes_a_formula(text):
    assert cells(csv_of(["name"], [[text]])) == [["name"], [f"'{text}"]]


def test_numbers_stay_numbers():
    assert cells(csv_of(list("abcde"), [[-1, -0.25, 1e-9, 123456789, None]]))[1] == [
        "-1",
        "-0.25",
        "1e-09",
        "123456789",
        "",
    ]


@pytest.mark.parametrize("text", ["a,b", 'say "x"', "two\nlines", "初音ミク", "", "a=b", ";"])
def test_other_texts_come_back_as_they_were(text):
    assert cells(csv_of(["name", "n"], [[text, 1]]))[1] == [text, "1"]


def test_a_file_is_utf_8_with_its_mark_and_not_replaced_unasked(tmp_path):
    save_csv("a\r\n漢\ud800", tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == b"\xef\xbb\xbfa\r\n\xe6\xbc\xa2?"
    with pytest.raises(OutputError, match="exists"):
        save_csv("b", tmp_path / "a.csv")
    save_csv("b", tmp_path / "a.csv", overwrite=True)
