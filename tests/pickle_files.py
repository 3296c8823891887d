"""Pickles written by hand, opcode by opcode, as torch writes them and as it does not."""

from __future__ import annotations

import pickle
import struct
import zipfile
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

ORDERED_DICT = b"ccollections\nOrderedDict\n"


def tensors_of(saved: object) -> dict[str, torch.Tensor]:
    table = saved.get("state_dict", saved)
    return {name: tensor.detach() for name, tensor in table.items() if isinstance(tensor, torch.Tensor)}


def same_bits(ours: dict, theirs: dict) -> bool:
    def flat(tensor: torch.Tensor):
        return tensor.dtype, tensor.shape, tensor.contiguous().clone().reshape(-1).view(torch.uint8).tolist()

    return {name: flat(ours[name]) for name in ours} == {name: flat(theirs[name]) for name in theirs}


def tensor(
    offset=0, size="(I2\nt", stride="(I1\nt", key="0", numel="I2\n", kind="torch\nFloatStorage", rest=""
) -> bytes:
    storage = f"(Vstorage\nc{kind}\nV{key}\nVcpu\n{numel}tQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{size}{stride}I00\nN{rest}tR".encode()


def table(entries: dict[str, bytes]) -> bytes:
    return b"\x80\x02(" + b"".join(f"V{key}\n".encode() + value for key, value in entries.items()) + b"d."


def call(module: str, name: str, *arguments: str) -> bytes:
    texts = "".join(f"V{argument}\n" for argument in arguments)
    return f"c{module}\n{name}\n({texts}tR".encode()


def write_zip(path: Path, root: bytes, members=(), *, folder="archive/", storage=True, options=None) -> None:
    with zipfile.ZipFile(path, "w", **(options or {})) as archive:
        archive.writestr(f"{folder}data.pkl", root)
        if storage:
            archive.writestr(f"{folder}data/0", struct.pack("<2f", 1, 2))
        for name, content in members:
            archive.writestr(name, content)


def legacy(root: bytes, keys: object = ("0",), storages: bytes = struct.pack("<q2f", 2, 1, 2), system=None) -> bytes:
    system = {"little_endian": True} if system is None else system
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join(start) + root + pickle.dumps(list(keys), 2) + storages
