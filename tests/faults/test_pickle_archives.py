"""Pickles' archives that torch would not write, or that contradict themselves: refused."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

from lib_lora.core.pickle_reader import read_pickle
from lib_lora.errors import PickleRefusedError
from tests.pickle_files import legacy, same_bits, table, tensor, write_zip

if TYPE_CHECKING:
    from pathlib import Path

SOUND = table({"a": tensor()})


def patched(path: Path, *changes: tuple[bytes, bytes]) -> None:
    content = path.read_bytes()
    for old, new in changes:
        assert old in content
        content = content.replace(old, new)
    path.write_bytes(content)


def bad_archives() -> dict[str, dict]:
    up, absolute, windows = ("archive/../../evil", b"x"), ("/etc/evil", b"x"), ("archive\\..\\evil", b"x")
    return {
        "zip slip upwards": {"members": [up]},
        "absolute name": {"members": [absolute]},
        "name with a backslash": {"members": [windows]},
        "name with a drive": {"members": [("archive/C:evil", b"x")]},
        "name beside the folder": {"members": [("other/file", b"x")]},
        "two pickles": {"members": [("archive/other/data.pkl", SOUND)]},
        "two pickles of one name": {"members": [("archive/data.pkl", SOUND)]},
        "two storages of one name": {"members": [("archive/data/0", bytes(8))]},
        "no storage": {"storage": False},
        "compressed": {"options": {"compression": zipfile.ZIP_DEFLATED}},
        "compressed otherwise": {"options": {"compression": zipfile.ZIP_LZMA}},
        "big-endian": {"members": [("archive/byteorder", b"big")]},
    }


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("fault", bad_archives())
def test_an_archive_that_torch_would_not_write_is_refused(tmp_path, fault):
    write_zip(tmp_path / "a.pt", SOUND, **bad_archives()[fault])
    with pytest.raises(PickleRefusedError, match=r"^a\.pt is refused: "):
        read_pickle(tmp_path / "a.pt")
    assert [file.name for file in tmp_path.rglob("*")] == ["a.pt"]


LOCAL, CENTRAL = b"PK\x03\x04\x14\x00", b"PK\x01\x02\x14\x03\x14\x00"
ARCHIVE_EDITS = {
    "encrypted": [(LOCAL + b"\0\0", LOCAL + b"\1\0"), (CENTRAL + b"\0\0", CENTRAL + b"\1\0")],
    "strongly encrypted": [(LOCAL + b"\0\0", LOCAL + b"\x40\0"), (CENTRAL + b"\0\0", CENTRAL + b"\x40\0")],
    "flags that differ": [(LOCAL + b"\0\0", LOCAL + b"\1\0")],
    "methods that differ": [(LOCAL + b"\0\0\0\0", LOCAL + b"\0\0\x08\0")],
    "checksum of a storage": [(struct.pack("<2f", 1, 2), struct.pack("<2f", 1, 3))],
    "checksum of the pickle": [(b"Vcpu", b"Vgpu")],
}


@pytest.mark.parametrize("fault", ARCHIVE_EDITS)
def test_an_archive_that_contradicts_itself_is_refused(tmp_path, fault):
    path = tmp_path / "a.pt"
    write_zip(path, SOUND)
    patched(path, *ARCHIVE_EDITS[fault])
    with pytest.raises((PickleRefusedError, NotImplementedError, RuntimeError)):
        read_pickle(path)


def test_a_member_with_two_names_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    write_zip(path, SOUND)
    path.write_bytes(path.read_bytes().replace(b"archive/data/0", b"archive/data/1", 1))
    with pytest.raises(PickleRefusedError, match="contradicts itself"):
        read_pickle(path)


def test_members_that_overlap_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    write_zip(path, SOUND)
    size = struct.pack("<II", 8, 8)
    content = path.read_bytes()
    central = content.rindex(size)
    path.write_bytes(content[:central] + struct.pack("<II", 80, 80) + content[central + 8 :])
    with pytest.raises(PickleRefusedError):
        read_pickle(path)


@pytest.mark.parametrize("keys", [(), ("1",), (1,), ("0", "0")])
def test_an_old_file_whose_storages_do_not_follow_is_refused(tmp_path, keys):
    (tmp_path / "a.pt").write_bytes(legacy(table({"a": tensor(numel="I2\nN")}), keys))
    with pytest.raises(PickleRefusedError):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("system", [{}, {"little_endian": False}, []])
def test_an_old_file_of_another_byte_order_is_refused(tmp_path, system):
    (tmp_path / "a.pt").write_bytes(legacy(SOUND, system=system))
    with pytest.raises(PickleRefusedError, match="big-endian"):
        read_pickle(tmp_path / "a.pt")


def test_a_cut_or_changed_file_never_gives_other_tensors(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.pt"
    buffer, saved = io.BytesIO(), {"a": torch.arange(50.0), "b": torch.ones(3).half()}
    torch.save(saved, buffer)
    good, read = buffer.getvalue(), 0
    for _ in range(60):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            tensors = read_pickle(path)
        except Exception:  # noqa: BLE001, S112 -- the process around it ends with any
            continue
        read += 1
        assert same_bits(tensors, saved)
