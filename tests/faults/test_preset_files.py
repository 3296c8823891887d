"""Preset files that are damaged, locked, full or edited by somebody else: nothing lost, and a sentence."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lib_lora.core import locking, replacing
from lib_lora.core.locking import editing
from lib_lora.errors import FileChangedError, FileError, OutputError, PresetError
from lib_lora.preset_editor import PresetEditor
from lib_lora.presets import MOST_BYTES, PresetFiles
from lib_lora.prompt.preset_texts import ELEMENTS, WEIGHTS

ROOT = Path(__file__).parents[2]
NAME = "lbwpresets.txt"
ONES, ZEROS = (",".join([number] * 17) for number in "10")
EDITORS, EDITS = 4, 25
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files or rights")

DAMAGED = {
    "bytes": (f"MY:{ONES}\n".encode() + b"\xff\xfe\x80", "is not a text in UTF-8 (byte 37)"),
    "utf-16": (f"MY:{ONES}".encode("utf-16"), "is not a text in UTF-8 (byte 0)"),
    "too long": (b"#" * (MOST_BYTES + 1), "has more than 4 MB"),
}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / NAME


def there(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_kept_beside_and_a_new_one_begun(path, damage):
    data, said = DAMAGED[damage]
    editor = PresetEditor([path.parent])
    new = f"A:{ONES}\n".encode()
    for names in (["lbwpresets.txt.bak"], ["lbwpresets.txt.bak", "lbwpresets.txt.bak2"]):
        path.write_bytes(data)
        (note,) = editor.save("A", ONES)
        assert note == f"lbwpresets.txt {said}; it is kept as {names[-1]}, and a new file is begun".replace(
            "has more than 4 MB", "has more than 4 MB, which no file of presets has"
        )
        assert there(path.parent) == {NAME: new} | dict.fromkeys(names, data)
    assert PresetFiles([path.parent]).read().weights["A"] == ONES


def test_a_damaged_file_stays_where_it_is_if_nothing_is_to_be_written(path):
    path.write_bytes(DAMAGED["bytes"][0])
    editor = PresetEditor([path.parent])
    for refuse in (lambda: editor.delete("MY"), lambda: editor.rename("MY", "B"), lambda: editor.save("a:b", ONES)):
        with pytest.raises(PresetError):
            refuse()
    assert editor.import_text(f"NONE:{ZEROS}").notes == ()
    assert there(path.parent) == {NAME: DAMAGED["bytes"][0]}


def test_an_import_sets_a_damaged_file_aside_too(path):
    path.write_bytes(DAMAGED["bytes"][0])
    (note,) = PresetEditor([path.parent]).import_text(f"B:{ONES}").notes
    assert "it is kept as lbwpresets.txt.bak" in note
    assert there(path.parent)[NAME] == f"B:{ONES}\n".encode()


@pytest.mark.parametrize("fails", ["write", "publish", "fsync"])
def test_a_disk_that_fails_loses_nothing(path, monkeypatch, fails):
    path.write_bytes(f"# mine\r\nMY:{ONES}".encode())
    before = there(path.parent)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = (replacing.os, "fsync") if fails == "fsync" else (replacing.TempFile, fails)
    monkeypatch.setattr(*place, fail)
    editor = PresetEditor([path.parent])
    edits = (
        lambda: editor.save("A", ONES),
        lambda: editor.save("MY", ZEROS, replace=True),
        lambda: editor.rename("MY", "A"),
        lambda: editor.delete("MY"),
        lambda: editor.import_text(f"B:{ONES}"),
    )
    for edit in edits:
        with pytest.raises(OutputError, match=r"lbwpresets\.txt was not saved: No space left on device"):
            edit()
        assert there(path.parent) == before


def test_a_disk_that_is_full_before_a_damaged_file_is_set_aside_leaves_it_in_its_place(path, monkeypatch):
    path.write_bytes(DAMAGED["bytes"][0])
    before = there(path.parent)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replacing.TempFile, "write", fail)
    with pytest.raises(OutputError, match="No space left"):
        PresetEditor([path.parent]).save("A", ONES)
    assert there(path.parent) == before


@posix_only
def test_what_is_no_file_is_left_alone_and_the_next_folder_taken(tmp_path):
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "precious").write_text(f"MY:{ONES}")
    (folders[0] / NAME).mkdir()
    (folders[1] / NAME).symlink_to(tmp_path / "precious")
    os.mkfifo(folders[2] / NAME)
    PresetEditor(folders).save("A", ONES)
    assert (folders[3] / NAME).read_text() == f"A:{ONES}\n"
    assert (tmp_path / "precious").read_text() == f"MY:{ONES}"
    editor = PresetEditor(folders[:3])
    for edit in (lambda: editor.save("B", ONES), lambda: editor.delete("MY")):
        with pytest.raises(OutputError, match=r"lbwpresets\.txt is a link, a folder or a device and is not replaced"):
            edit()
    assert (folders[1] / NAME).is_symlink()


READ_ONLY = """
import os, sys
from pathlib import Path
from lib_lora.errors import OutputError
from lib_lora.preset_editor import PresetEditor

folder, other, value = Path(sys.argv[1]), Path(sys.argv[2]), ",".join("1" * 17)
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
editor = PresetEditor([folder])
for edit in (lambda: editor.save("A", value), lambda: editor.delete("MY"), lambda: editor.import_text(f"A:{value}")):
    try:
        edit()
    except OutputError as error:
        print(error)
PresetEditor([folder, other]).save("A", value)
"""


@posix_only
def test_a_folder_that_can_not_be_written_to_is_told_and_the_next_one_taken(tmp_path):
    locked, free = tmp_path / "locked", tmp_path / "free"
    locked.mkdir()
    free.mkdir()
    for folder in (*(one for one in tmp_path.parents if one.name.startswith(("pytest-", "popen-"))), tmp_path, free):
        folder.chmod(0o777)
    (locked / NAME).write_text(f"MY:{ONES}")
    locked.chmod(0o555)
    command = [sys.executable, "-c", READ_ONLY, str(locked), str(free)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the folder locked can not be written to: Permission denied"] * 3
    assert there(locked) == {NAME: f"MY:{ONES}".encode()}
    assert there(free) == {NAME: f"A:{ONES}\n".encode()}


def test_a_file_that_would_become_too_long_to_be_read_is_not_written(path):
    path.write_bytes(b"#" * (MOST_BYTES - 10) + b"\n")
    before = path.read_bytes()
    with pytest.raises(PresetError, match="would have more than 4 MB"):
        PresetEditor([path.parent]).save("A", ONES)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


# Others edit too


def test_what_another_program_writes_meanwhile_is_kept(path, monkeypatch):
    path.write_text(f"MY:{ONES}\n")
    write, others = replacing.TempFile.write, ["THEIRS", "MORE"]

    def write_late(temp, data):
        write(temp, data)
        if others:
            path.write_text(f"{path.read_text()}{others.pop()}:{ZEROS}\n")

    monkeypatch.setattr(replacing.TempFile, "write", write_late)
    PresetEditor([path.parent]).save("A", ONES)
    assert path.read_text() == f"MY:{ONES}\nMORE:{ZEROS}\nTHEIRS:{ZEROS}\nA:{ONES}\n"


def test_a_name_that_another_program_takes_meanwhile_is_not_replaced(path, monkeypatch):
    write = replacing.TempFile.write

    def write_late(temp, data):
        write(temp, data)
        path.write_text(f"A:{ZEROS}\n")

    monkeypatch.setattr(replacing.TempFile, "write", write_late)
    with pytest.raises(PresetError, match="there is a preset 'A' already"):
        PresetEditor([path.parent]).save("A", ONES)
    assert there(path.parent) == {NAME: f"A:{ZEROS}\n".encode()}


def test_a_file_that_is_written_to_all_the_time_is_told(path, monkeypatch):
    write, texts = replacing.TempFile.write, (f"MY{number}:{ONES}\n" for number in range(100))

    def write_late(temp, data):
        write(temp, data)
        path.write_text(next(texts))

    monkeypatch.setattr(replacing.TempFile, "write", write_late)
    with pytest.raises(FileChangedError, match="is being written to; try again"):
        PresetEditor([path.parent]).save("A", ONES)
    assert len(list(path.parent.iterdir())) == 1


def test_who_edits_waits_for_another_and_says_so_after_a_while(path, monkeypatch):
    editor = PresetEditor([path.parent])
    monkeypatch.setattr(locking, "WAIT_SECONDS", 0.05)
    with (
        editing(path.parent),
        pytest.raises(OutputError, match="another program edits the files of the folder"),
    ):
        editor.save("A", ONES)
    editor.save("A", ONES)
    assert editor.own() == {"A": ONES}


def test_threads_that_edit_at_once_lose_nothing(tmp_path):
    def work(number):
        editor = PresetEditor([tmp_path])
        for edit in range(EDITS):
            editor.save(f"P{number}-{edit}", ONES)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(EDITORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {f"P{number}-{edit}" for number in range(EDITORS) for edit in range(EDITS)}
    assert PresetEditor([tmp_path]).own().keys() == names


WRITER = """
import sys
from lib_lora.preset_editor import PresetEditor

editor = PresetEditor([sys.argv[1]])
for edit in range(int(sys.argv[3])):
    editor.save(f"P{sys.argv[2]}-{edit}", ",".join("1" * 17))
    if edit % 5 == 4:
        editor.rename(f"P{sys.argv[2]}-{edit}", f"Q{sys.argv[2]}-{edit}")
"""


def test_processes_that_edit_at_once_lose_nothing(tmp_path):
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), str(number), str(EDITS)] for number in range(EDITORS)]
    writers = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for command in commands]  # noqa: S603
    faults = [writer.communicate()[1].decode() for writer in writers]
    assert faults == [""] * EDITORS
    kinds = {edit: "Q" if edit % 5 == 4 else "P" for edit in range(EDITS)}
    names = {f"{kinds[edit]}{number}-{edit}" for number in range(EDITORS) for edit in range(EDITS)}
    assert PresetEditor([tmp_path]).own().keys() == names
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from lib_lora.preset_editor import PresetEditor

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
value, path, rng = ",".join("1" * 17), folder / "lbwpresets.txt", random.Random(0)
path.write_text("# mine\\n" + "".join(f"OLD{number}:{value}\\n" for number in range(2000)))
ended = 0
for kill in range(kills):
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        PresetEditor([folder]).save(f"NEW{kill}", value)
        os._exit(0)
    time.sleep(rng.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    after = path.read_bytes()
    assert after in (before, before + f"NEW{kill}:{value}\\n".encode()), kill
    ended += after != before
PresetEditor([folder]).save("LAST", value)  # no killed process holds the lock
print(ended)
"""


@posix_only
def test_a_kill_at_any_time_leaves_the_file_before_or_after_the_edit(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 60
    assert "LAST" in PresetEditor([tmp_path]).own()


def test_random_bytes_are_kept_whatever_they_are(tmp_path):
    rng, kept = random.Random(0), {"beside": 0, "in its place": 0}
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = bytes(rng.choice(b"AB:1,#\n\r\xe7\xb5\xb5 \0\x0b" + b"A" * 9) for _ in range(rng.randrange(30)))
        for form, value in ((WEIGHTS, ONES), (ELEMENTS, "IN05::1")):
            path, backup = folder / form.file_name, folder / f"{form.file_name}.bak"
            path.write_bytes(data)
            notes = PresetEditor([folder], form).save("NEW", value)
            assert bool(notes) == backup.exists()
            kept["beside" if notes else "in its place"] += 1
            assert backup.read_bytes() == data if notes else path.read_bytes().startswith(data)
    assert min(kept.values()) > 5


def test_a_file_that_vanishes_is_told(tmp_path):
    with pytest.raises(FileError, match=r"theirs\.txt can not be opened"):
        PresetEditor([tmp_path]).import_file(tmp_path / "theirs.txt")
