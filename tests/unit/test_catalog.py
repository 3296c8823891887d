"""The LoRA folders: what is listed, what names mean, what is kept across restarts."""

import hashlib
import os
import re
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_lora import catalog as catalog_module
from lib_lora.catalog import LoraCatalog, infotext_name
from lib_lora.errors import UnknownLoraError

EMPTY_HASH = hashlib.sha256(b"").hexdigest()


def write_lora(path: Path, value: float = 0.0, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_x.alpha": torch.tensor(value)}, path, metadata or None)
    return path


def names(catalog: LoraCatalog) -> list[str]:
    return [entry.name for entry in catalog.entries()]


def count_header_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    reads: list[Path] = []
    read_header = catalog_module.read_header

    def counted(path: Path) -> object:
        reads.append(path)
        return read_header(path)

    monkeypatch.setattr(catalog_module, "read_header", counted)
    return reads


# Listing


def test_files_are_listed_in_the_order_in_which_the_webui_walks(tmp_path: Path) -> None:
    folders = [tmp_path / "loras", tmp_path / "lycos"]
    for path in ("loras/b10", "loras/B9", "loras/a", "loras/s 2/x", "loras/s 10/c", "loras/S 1/d", "lycos/0"):
        write_lora(tmp_path / f"{path}.safetensors")

    def natural(text: str) -> list[object]:
        return [int(part) if part.isdigit() else part.lower() for part in re.split("([0-9]+)", text)]

    expected: list[str] = []
    for folder in folders:
        for _, _, files in sorted(os.walk(folder), key=lambda item: natural(item[0])):
            expected += [Path(file).stem for file in sorted(files, key=natural)]
    assert names(LoraCatalog(folders)) == expected
    assert expected[:3] == ["a", "B9", "b10"]


def test_loops_links_pipes_and_dangling_links_end_in_each_file_once(tmp_path: Path) -> None:
    folder, outside = tmp_path / "loras", tmp_path / "outside"
    real = write_lora(folder / "style" / "ink.safetensors")
    write_lora(outside / "far.safetensors")
    for link, target in (
        ("loop", folder),
        ("style/loop", folder / "style"),
        ("self", folder / "self"),
        ("outside", outside),
        ("one.safetensors", real),
        ("two.safetensors", real),
        ("style/three.safetensors", real),
        ("lost.safetensors", folder / "gone.safetensors"),
        ("self.safetensors", folder / "self.safetensors"),
    ):
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()

    catalog = LoraCatalog([folder, folder / "style"])
    start = time.process_time()
    assert sorted(names(catalog)) == ["far", "ink"]
    assert time.process_time() - start < 1
    assert {catalog.find(name).path for name in ("ink", "one", "two", "three", "style/ink")} == {real}
    assert all(not entry.notes for entry in catalog.entries())


def test_hidden_temporary_and_other_files_are_not_listed(tmp_path: Path) -> None:
    for name in (".tmp-0123456789abcdef.safetensors", "._a.safetensors", ".safetensors", "a.txt", "a.safetensors.part"):
        (tmp_path / name).write_bytes(b"")
    write_lora(tmp_path / "A.SafeTensors")
    write_lora(tmp_path / "b.sft")
    assert names(LoraCatalog([tmp_path])) == ["A", "b"]


def test_a_folder_that_is_not_there_holds_nothing_and_one_that_appears_is_found(tmp_path: Path) -> None:
    catalog = LoraCatalog([tmp_path / "later"])
    assert catalog.entries() == ()
    with pytest.raises(UnknownLoraError, match=r"there is none at all in .*later"):
        catalog.find("a")
    write_lora(tmp_path / "later" / "a.safetensors")
    assert catalog.find("a").name == "a"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("web.safetensors", b"<!DOCTYPE html><html></html>", "web page"),
        ("old.pt", b"PK\x03\x04" + b"archive/data.pkl" * 20, "convert"),
        ("cut.safetensors", (500).to_bytes(8, "little") + b'{"a"', "incomplete"),
    ],
)
def test_a_file_that_can_not_be_read_stays_listed_with_its_fault(
    tmp_path: Path, file: str, content: bytes, said: str
) -> None:
    (tmp_path / file).write_bytes(content)
    catalog = LoraCatalog([tmp_path])
    (entry,) = catalog.entries()
    assert said in entry.notes[0]
    assert file in entry.notes[0]
    assert catalog.find(entry.name) == entry
    assert catalog.data_hash(entry) == ""


def test_a_fault_leaves_when_the_file_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"<html>")
    catalog = LoraCatalog([tmp_path])
    assert catalog.find("a").notes
    write_lora(path)
    assert not catalog.find("a").notes


# Names


def test_a_name_is_a_file_name_then_an_alias_then_a_path_below_the_folder(tmp_path: Path) -> None:
    ink = write_lora(tmp_path / "style" / "ink.safetensors", ss_output_name="my ink")
    catalog = LoraCatalog([tmp_path])
    for name in ("ink", "my ink", "style/ink", f"{tmp_path.name}/style/ink"):
        assert catalog.find(name).path == ink
    assert catalog.find("ink").alias == "my ink"


def test_an_alias_of_several_files_is_refused_with_what_to_write(tmp_path: Path) -> None:
    for epoch in ("ink-01", "ink-02"):
        write_lora(tmp_path / f"{epoch}.safetensors", ss_output_name="ink")
    catalog = LoraCatalog([tmp_path])
    with pytest.raises(UnknownLoraError, match=r"'ink' could be 2 LoRAs; write 'ink-01' for .*, write 'ink-02' for"):
        catalog.find("ink")
    final = write_lora(tmp_path / "ink.safetensors", ss_output_name="ink")
    assert catalog.find("ink").path == final, "a file name counts more than aliases"


def test_an_alias_counts_more_than_a_path_as_the_webui_knows_no_paths(tmp_path: Path) -> None:
    write_lora(tmp_path / "style" / "ink.safetensors")
    aliased = write_lora(tmp_path / "other.safetensors", ss_output_name="style/ink")
    assert LoraCatalog([tmp_path]).find("style/ink").path == aliased


def test_the_alias_none_is_no_name(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", ss_output_name="None")
    catalog = LoraCatalog([tmp_path])
    assert catalog.find("a").alias == "a"
    with pytest.raises(UnknownLoraError):
        catalog.find("None")


def test_an_unknown_name_is_answered_with_at_most_three_close_ones(tmp_path: Path) -> None:
    for name in ("watercolor_v1", "watercolor_v2", "watercolor_v3", "watercolor_v4", "pixel"):
        write_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(UnknownLoraError) as caught:
        LoraCatalog([tmp_path]).find("Watercolour_v2")
    message = str(caught.value)
    assert "close names are: watercolor_v2" in message
    assert message.count("watercolor") == 3
    assert "pixel" not in message


def test_a_new_a_moved_and_a_replaced_file_are_found_without_a_refresh(tmp_path: Path) -> None:
    old = write_lora(tmp_path / "old.safetensors", ss_output_name="first")
    catalog = LoraCatalog([tmp_path])
    assert names(catalog) == ["old"]
    new = write_lora(tmp_path / "new.safetensors")
    assert catalog.find("new").path == new
    moved = old.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UnknownLoraError):
        catalog.find("old")
    assert catalog.find("first").path == moved
    write_lora(moved, ss_output_name="second name")
    assert catalog.find("moved").alias == "second name"


# Hashes


def test_the_hash_is_that_of_the_tensors_unless_the_metadata_has_one(tmp_path: Path) -> None:
    given = "ab" * 32
    write_lora(tmp_path / "given.safetensors", sshs_model_hash=given)
    catalog = LoraCatalog([tmp_path])
    assert catalog.data_hash(catalog.find("given")) == given
    for name, value in (("none", None), ("empty", EMPTY_HASH), ("short", "ab"), ("no_hex", "x" * 64)):
        path = write_lora(tmp_path / f"{name}.safetensors", 2.0, **({"sshs_model_hash": value} if value else {}))
        content = path.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        assert catalog.data_hash(catalog.find(name)) == hashlib.sha256(data).hexdigest()


def test_the_hash_of_a_file_that_changes_meanwhile_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lora(tmp_path / "a.safetensors", 1.0)
    catalog = LoraCatalog([tmp_path])
    entry = catalog.find("a")
    write_lora(tmp_path / "b.safetensors", 2.0)
    before, replaced = path.stat(), catalog.data_hash(catalog.find("b"))
    data_sha256 = catalog_module.data_sha256

    def replace_and_hash(path: Path) -> str:
        write_lora(path, 2.0)
        return data_sha256(path)

    monkeypatch.setattr(catalog_module, "data_sha256", replace_and_hash)
    assert catalog.data_hash(entry) == replaced
    monkeypatch.undo()
    write_lora(path, 1.0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert catalog.data_hash(entry) != replaced


def test_lora_hashes_name_each_lora_as_the_infotext_does(tmp_path: Path) -> None:
    write_lora(tmp_path / "a, b.safetensors", 1.0, ss_output_name="style: ink")
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    catalog = LoraCatalog([tmp_path])
    entry = catalog.find("a, b")
    short = hashlib.sha256(torch.tensor(1.0).numpy().tobytes()).hexdigest()[:12]
    assert catalog.lora_hashes([entry, catalog.find("bad")]) == f"a b: {short}"
    assert catalog.lora_hashes([entry, entry], ["style: ink", "a, b"]) == f"style ink: {short}, a b: {short}"
    assert catalog.lora_hashes([]) == ""
    assert infotext_name("a:b,c d") == "abc d"


# The index


def test_a_restart_reads_no_file_again_but_new_and_changed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, index = tmp_path / "loras", tmp_path / "index.sqlite"
    for name in ("a", "b"):
        write_lora(folder / f"{name}.safetensors", ss_output_name=f"alias of {name}")
    (folder / "\udcff.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    first = LoraCatalog([folder], index)
    hashes = [first.data_hash(entry) for entry in first.entries()]

    reads = count_header_reads(monkeypatch)
    monkeypatch.setattr(catalog_module, "data_sha256", lambda path: pytest.fail(f"{path} was hashed again"))
    second = LoraCatalog([folder], index)
    assert second.entries() == first.entries()
    assert [second.data_hash(entry) for entry in second.entries()] == hashes
    assert reads == []

    changed = write_lora(folder / "a.safetensors", ss_output_name="another alias")
    added = write_lora(folder / "c.safetensors")
    third = LoraCatalog([folder], index)
    assert third.find("a").alias == "another alias"
    assert sorted(reads) == [changed, added]
    assert third.notes == ()


def test_a_refresh_reads_no_header_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(tmp_path / "a.safetensors")
    reads = count_header_reads(monkeypatch)
    catalog = LoraCatalog([tmp_path])
    for _ in range(3):
        catalog.refresh()
        catalog.find("a")
    assert len(reads) == 1


@pytest.mark.parametrize("damage", ["no_database", "cut", "other_table"])
def test_a_damaged_index_is_set_aside_and_started_afresh(tmp_path: Path, damage: str) -> None:
    folder, index = tmp_path / "loras", tmp_path / "index.sqlite"
    write_lora(folder / "a.safetensors")
    LoraCatalog([folder], index).refresh()
    content = index.read_bytes()
    if damage == "no_database":
        index.write_bytes(b"this is my diary\n" * 100)
    elif damage == "cut":
        index.write_bytes(content[:100] + os.urandom(len(content) // 2))
    else:
        index.unlink()
        with sqlite3.connect(index) as connection:
            connection.execute("CREATE TABLE lora_files_1 (something TEXT)")
    damaged = index.read_bytes()
    catalog = LoraCatalog([folder], index)
    assert names(catalog) == ["a"]
    assert len(catalog.notes) == 1
    assert "index.sqlite" in catalog.notes[0]
    kept = index.with_name("index.sqlite.damaged")
    if damage != "other_table":  # a sound database of someone else stays where it is
        assert kept.read_bytes() == damaged
        assert LoraCatalog([folder], index).notes == ()
    else:
        assert index.read_bytes() == damaged


def test_a_locked_index_or_one_that_can_not_be_made_costs_a_note_only(tmp_path: Path) -> None:
    folder, index = tmp_path / "loras", tmp_path / "index.sqlite"
    write_lora(folder / "a.safetensors")
    LoraCatalog([folder], index).refresh()
    other = sqlite3.connect(index)
    other.execute("BEGIN EXCLUSIVE")
    try:
        catalog = LoraCatalog([folder], index)
        assert names(catalog) == ["a"]
        assert "locked" in catalog.notes[0]
    finally:
        other.close()
    nowhere = LoraCatalog([folder], tmp_path / "no folder" / "index.sqlite")
    assert names(nowhere) == ["a"]
    assert len(nowhere.notes) == 1


def test_threads_may_look_up_hash_and_refresh_at_the_same_time(tmp_path: Path) -> None:
    for number in range(8):
        write_lora(tmp_path / f"lora{number}.safetensors", float(number))
    catalog = LoraCatalog([tmp_path], tmp_path / "index.sqlite")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                entry = catalog.find(f"lora{(number + turn) % 8}")
                assert len(catalog.data_hash(entry)) == 64
                catalog.refresh()
        except BaseException as error:  # noqa: BLE001 -- told in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
    assert catalog.notes == ()
