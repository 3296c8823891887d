"""Pickles: nothing in them is run; honest ones become .safetensors bit for bit, all others are refused."""

from __future__ import annotations

import os
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.core.pickle_reader import read_pickle
from lib_lora.core.pickles import convert_pickle
from lib_lora.core.saving import save_tensors
from lib_lora.errors import FileError, ForeignFileError, OutputError, PickleRefusedError
from tests.pickle_files import ORDERED_DICT, call, legacy, same_bits, table, tensor, tensors_of, write_zip

SMALL_MEMORY = 300_000_000


# Honest files


def honest() -> dict[str, tuple[object, dict]]:
    """Objects to save, and how `torch.save` is told to."""
    torch.manual_seed(0)
    base = torch.arange(100.0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    kinds = [torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    legacy = {"_use_new_zipfile_serialization": False}
    return {
        "dict": ({"a": torch.randn(3, 4), "b": torch.randn(2)}, {}),
        "parameters": ({"a": torch.nn.Parameter(torch.randn(3))}, {}),
        "ordered dict with _metadata": (model.state_dict(), {}),
        "bfloat16": ({"a": torch.randn(5).bfloat16(), "b": torch.randn(3)}, {}),
        "shared storages": ({"a": base[10:20], "b": base[15:40:3], "c": base}, {}),
        "scattered": (
            {"a": torch.randn(4, 6).t(), "b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)},
            {},
        ),
        "state_dict": (
            {"epoch": 3, "state_dict": OrderedDict(a=torch.randn(2)), "names": ["x"], "b": torch.ones(1)},
            {},
        ),
        "other dtypes": ({str(kind): torch.ones(3).to(kind) for kind in kinds} | {"c": torch.tensor([1 + 2j])}, {}),
        "empty and single": ({"a": torch.zeros(0, 3), "b": torch.tensor(2.5), "c": base[:1]}, {}),
        "legacy": ({"a": base[10:20], "b": base, "c": torch.randn(3).half()}, legacy),
        "legacy ordered dict": (model.state_dict(), legacy),
        "legacy state_dict": ({"state_dict": {"a": torch.nn.Parameter(torch.randn(2))}, "step": 1}, legacy),
        "protocol 4": ({"a": torch.randn(3)}, {"pickle_protocol": 4}),
    }


@pytest.mark.parametrize("case", honest())
def test_an_honest_file_is_read_bit_for_bit(tmp_path, case):
    saved, options = honest()[case]
    torch.save(saved, tmp_path / "a.pt", **options)
    assert same_bits(read_pickle(tmp_path / "a.pt"), tensors_of(saved))


def test_an_honest_file_is_converted_bit_for_bit(tmp_path):
    saved, options = honest()["state_dict"]
    torch.save(saved, tmp_path / "a.pt", **options)
    (tmp_path / "a.safetensors").write_bytes(b"old")
    convert_pickle(tmp_path / "a.pt", tmp_path / "a.safetensors", overwrite=True)
    assert same_bits(load_file(tmp_path / "a.safetensors"), tensors_of(saved))


def test_an_older_target_is_replaced_only_if_asked_for(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"


def test_the_training_state_of_old_checkpoints_is_ignored(tmp_path):
    state = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(Vf8\nI0\nI1\ntR(I3\nV<\nNNNI-1\nI-1\nI0\ntbVbytes\ntR"
    write_zip(tmp_path / "a.ckpt", table({"callbacks": b"(" + state + b"}d", "loss": scalar, "a": tensor()}))
    assert read_pickle(tmp_path / "a.ckpt")["a"].tolist() == [1.0, 2.0]


def test_what_is_no_pickle_is_not_converted(tmp_path):
    save_tensors(tmp_path / "a.pt", {"a": torch.ones(1)})
    (tmp_path / "page.pt").write_bytes(b"<html></html>")
    with pytest.raises(PickleRefusedError, match=r"a\.pt is a \.safetensors file already"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "b.safetensors")
    with pytest.raises(ForeignFileError, match="web page"):
        convert_pickle(tmp_path / "page.pt", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


# Bombs. The pickles are written by hand, opcode by opcode.


CANARY = "the canary"


def code_bombs(canary: Path) -> dict[str, bytes]:
    """Pickles that would make the canary's file if one of their names were called."""
    touch = f"open({str(canary)!r}, 'w')"
    importing = f"__import__('os').mkdir({str(canary)!r})"
    nested = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVmkdir\ntR" + f"(V{canary}\ntR".encode()
    stack_global = b"\x8c\x02os\x8c\x05mkdir\x93(V" + str(canary).encode() + b"\ntR"
    return {
        "os.system": call("os", "system", f"touch {canary}"),
        "posix.system": call("posix", "system", f"touch {canary}"),
        "os.mkdir": call("os", "mkdir", str(canary)),
        "os.mkdir by stack": stack_global,
        "eval": call("builtins", "eval", touch),
        "eval of Python 2": call("__builtin__", "eval", touch),
        "exec": call("builtins", "exec", importing),
        "open": call("builtins", "open", str(canary), "w"),
        "io.open": call("io", "open", str(canary), "w"),
        "getattr of an import": nested,
        "subprocess": call("subprocess", "getoutput", f"touch {canary}"),
        "runpy": call("runpy", "run_path", str(canary)),
        "torch.load": call("torch", "load", str(canary)),
        "torch._utils of another name": call("torch._utils", "_import_dotted_name", "os.system"),
        "a dotted name": call("torch._utils", "_rebuild_tensor_v2.__globals__", "x"),
        "a dotted OrderedDict": call("collections", "OrderedDict.fromkeys", "x"),
        "a function as instance": b"(S'" + f"touch {canary}".encode() + b"'\nios\nsystem\n",
        "an object by OBJ": b"(cos\nsystem\n" + f"V{canary}\no".encode(),
        "NEWOBJ": b"cos\nsystem\n)\x81",
        "an extension code": b"\x82\x01)R",
        "state of a stand-in": ORDERED_DICT + b"(Vfromkeys\ncos\nsystem\ndb",
        "state of a stand-in's class": ORDERED_DICT + b"N}V__setstate__\nVx\ns\x86b",
        "attributes of a function": b"ctorch._utils\n_rebuild_parameter\nN}V__code__\nVx\ns\x86b",
        "pickle in a pickle": call("pickle", "loads", "cos\\nsystem\\n"),
        "__reduce__ of numpy": call("numpy.core.multiarray", "_reconstruct", "x"),
        "numpy.load": call("numpy", "load", str(canary)),
        "webbrowser": call("webbrowser", "open", "file:///"),
        "ctypes": call("ctypes", "CDLL", "libc.so.6"),
    }


CODE_BOMBS = tuple(code_bombs(Path()))


@pytest.mark.parametrize("bomb", CODE_BOMBS)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_no_name_is_called(tmp_path, bomb, container):
    canary, path = tmp_path / CANARY, tmp_path / "bomb.pt"
    root = table({"a": tensor(), "bomb": code_bombs(canary)[bomb]})
    write_zip(path, root) if container == "zip" else path.write_bytes(legacy(root))
    with pytest.raises(BaseException) as caught:
        read_pickle(path)
    assert not canary.exists()
    known = PickleRefusedError, pickle.UnpicklingError, TypeError, AttributeError, ValueError
    assert isinstance(caught.value, known), repr(caught.value)


def test_the_bombs_are_live_ones(tmp_path):
    """What the tests above are worth: Python's own reader makes the canary's file."""
    for bomb in ("os.mkdir", "os.mkdir by stack", "getattr of an import", "os.system"):
        canary = tmp_path / bomb.replace(" ", "-")
        pickle.loads(b"\x80\x02" + code_bombs(canary)[bomb] + b".")
        assert canary.exists() or os.name == "nt"


def test_the_hand_written_pickles_are_sound(tmp_path):
    write_zip(tmp_path / "a.pt", table({"a": tensor()}))
    (tmp_path / "b.pt").write_bytes(legacy(table({"a": tensor(numel="I2\nN")})))
    assert read_pickle(tmp_path / "a.pt")["a"].tolist() == [1.0, 2.0]
    assert read_pickle(tmp_path / "b.pt")["a"].tolist() == [1.0, 2.0]


LYING_TENSORS = {
    "beyond its storage": tensor(size="(I3\nt"),
    "beyond by offset": tensor(offset=1),
    "beyond by stride": tensor(stride="(I2\nt"),
    "negative offset": tensor(offset=-1),
    "negative size": tensor(size="(I-2\nt"),
    "negative stride": tensor(stride="(I-1\nt"),
    "size of 2^64": tensor(size="(L18446744073709551616L\nt"),
    "stretched to a petabyte": tensor(size="(I1000000\nI1000000\nI1000\nt", stride="(I0\nI0\nI0\nt"),
    "more sizes than strides": tensor(size="(I1\nI2\nt"),
    "a thousand dimensions": tensor(size="(" + "I1\n" * 1000 + "t", stride="(" + "I1\n" * 1000 + "t"),
    "a text as size": tensor(size="Vabc\n"),
    "truth as size": tensor(size="(I01\nt"),
    "storage of another size": tensor(numel="I3\n"),
    "storage of 2^62 elements": tensor(numel="L4611686018427387904L\n"),
    "storage of another type": tensor(kind="torch\nDoubleStorage"),
    "unknown storage type": tensor(kind="torch\nQInt8Storage"),
    "storage outside": tensor(key="../data.pkl"),
    "no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n(I2\nt(I1\ntI00\nNtR",
    "conjugated": tensor(rest="(Vconj\nI01\nd"),
    "reference to a module": b"(Vmodule\nVa\nVb\nVc\nI1\ntQ",
    "no tensor": b"I1\n",
}


@pytest.mark.parametrize("lie", LYING_TENSORS)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_tensor_that_lies_is_refused(tmp_path, lie, container):
    path, root = tmp_path / "a.pt", table({"a": LYING_TENSORS[lie]})
    write_zip(path, root) if container == "zip" else path.write_bytes(legacy(root))
    with pytest.raises(PickleRefusedError, match=r"^a\.pt is refused: "):
        read_pickle(path)


@pytest.mark.parametrize("root", [b"\x80\x02N.", b"\x80\x02](V1\ne.", b"\x80\x02}.", b"\x80\x02I1\n."])
def test_a_pickle_without_a_table_of_tensors_is_refused(tmp_path, root):
    write_zip(tmp_path / "a.pt", root)
    with pytest.raises(PickleRefusedError, match="holds no table of tensors"):
        read_pickle(tmp_path / "a.pt")


# The process with limits

NESTED_KEY = b"}(Vx\n" + b"2\x86" * 45 + b"Nu"
"""A tuple of a tuple twice, 45 deep: hashing it takes 2^45 steps."""
LIMIT_BOMBS = {
    "index": (b"Nr\xff\xff\xff\xff", "takes more than 300,000,000 bytes of memory"),
    "length": (b"\x8e" + struct.pack("<Q", 2**40), "refused"),
    "time": (NESTED_KEY, "it takes too much time or memory"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give a process no such limits")
@pytest.mark.parametrize("bomb", LIMIT_BOMBS)
def test_a_bomb_of_time_or_memory_ends_its_own_process(tmp_path, bomb):
    content, message = LIMIT_BOMBS[bomb]
    write_zip(tmp_path / "bomb.pt", table({"a": tensor(), "bomb": content}))
    with pytest.raises(PickleRefusedError, match=message):
        convert_pickle(tmp_path / "bomb.pt", tmp_path / "a.safetensors", timeout_s=2, memory_bytes=SMALL_MEMORY)
    assert [file.name for file in tmp_path.iterdir()] == ["bomb.pt"]


def test_a_code_bomb_is_refused_in_a_sentence_and_not_run(tmp_path):
    canary = tmp_path / CANARY
    write_zip(tmp_path / "bomb.pt", table({"a": tensor(), "bomb": code_bombs(canary)["os.system"]}))
    with pytest.raises(PickleRefusedError, match=r"bomb\.pt is refused: it uses os\.system"):
        convert_pickle(tmp_path / "bomb.pt", tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["bomb.pt"]  # noqa: PTH208


def test_a_damaged_pickle_is_refused_in_a_sentence(tmp_path):
    write_zip(tmp_path / "a.pt", b"\x80\x02(((")
    with pytest.raises(FileError, match=r"a\.pt is refused: its pickle is damaged"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "a.safetensors")
