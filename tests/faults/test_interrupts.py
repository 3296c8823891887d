"""Interrupts at any line and memory that runs out at any allocation: the next request is right all the same."""

from __future__ import annotations

import itertools
import random
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lib_lora
from lib_lora.catalog import LoraCatalog
from lib_lora.core.patcher import ModelPatcher
from lib_lora.core.saving import save_tensors
from lib_lora.errors import ApplyError
from lib_lora.session import LoraSession
from tests.toys import digest

ROOM = Path(lib_lora.__file__).parent
HOLDING = ("session.py", "resolve.py", "core/patcher.py", "core/base_store.py", "core/fingerprint.py", "core/hooks.py")
"""Modules that remember something from one request to the next."""
LAYERS = ("one", "two", "three", "four")
WIDTH, RANK = 6, 2
BEFORE, NEXT, LAST = [("a", 1.0), ("b", 0.5)], [("b", -1.0), ("c", 0.3)], [("a", 0.2), ("c", 1.0)]


class Block(nn.Module):
    """Four layers, of which each LoRA changes three."""

    def __init__(self) -> None:
        super().__init__()
        for name in LAYERS:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(2)
    for left_out, name in enumerate("abc"):
        layers = LAYERS[:left_out] + LAYERS[left_out + 1 :]
        shapes = {"lora_up.weight": (WIDTH, RANK), "lora_down.weight": (RANK, WIDTH)}
        pairs = itertools.product(layers, shapes.items())
        tensors = {f"lora_unet_{layer}.{role}": torch.randn(size, generator=generator) for layer, (role, size) in pairs}
        save_tensors(folder / f"{name}.safetensors", tensors, {})
    return folder


@pytest.fixture(scope="module")
def make(folder):
    catalog = LoraCatalog([folder])
    catalog.refresh()

    def make() -> tuple[LoraSession, nn.Module]:
        torch.manual_seed(0)
        block = Block().requires_grad_(False)
        return LoraSession({"unet": block}, catalog), block

    return make


class Interrupts:
    """Counts the lines of some modules that are run, and raises a KeyboardInterrupt before one of them."""

    def __init__(self, at: int, modules: tuple[str, ...] = HOLDING) -> None:
        self.at, self.count, self.raised = at, 0, 0
        self.files = {str(ROOM / module) for module in modules}

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.files:
            return None
        self.count += event == "line"
        if event == "line" and self.count == self.at:
            self.raised += 1  # Python ends the tracing with the exception
            raise KeyboardInterrupt
        return self

    @contextmanager
    def on(self):
        sys.settrace(self)
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # an interrupt right before the end of no_grad leaves it off


def is_right_afterwards(session: LoraSession, block: nn.Module, expected: dict[str, str]) -> bool:
    """Whether the next request has the weights of an untouched model, and so has the base."""
    session.set(NEXT)
    fused = digest(block)
    session.clear()
    return (fused, digest(block)) == (expected["next"], expected["base"])


@pytest.fixture
def expected(make):
    session, block = make()
    base = digest(block)
    session.set(NEXT)
    return {"base": base, "next": digest(block)}


def test_an_interrupt_at_any_line_never_spoils_the_next_request(make, expected):
    """From base and from other LoRAs, while they are set and while they are taken out."""
    session, block = make()
    for before, request in (([], BEFORE), (BEFORE, LAST), (BEFORE, [])):
        for line in itertools.count(1):
            session.set(before)
            interrupts = Interrupts(line)
            with interrupts.on():
                session.set(request)
            assert is_right_afterwards(session, block, expected), (before, request, line)
            if not interrupts.raised:
                break
        assert line > 100


def test_an_interrupt_at_any_line_never_spoils_the_catalog(folder):
    for line in itertools.count(1):
        catalog, interrupts = LoraCatalog([folder]), Interrupts(line, ("catalog.py", "core/file_index.py"))
        with interrupts.on():
            catalog.find("b")
        assert catalog.find("b").path == folder / "b.safetensors", line
        assert len(catalog.entries()) == 3
        if not interrupts.raised:
            break
    assert line > 100


def test_a_second_interrupt_while_the_first_is_cleaned_up_spoils_nothing(make, expected, monkeypatch):
    rng = random.Random(5)
    restore = ModelPatcher._restore
    for _ in range(200):
        session, block = make()
        session.set(BEFORE)
        first, second = Interrupts(rng.randrange(200, 700)), Interrupts(rng.randrange(1, 60))

        def clean_up(patcher, layers, first=first, second=second):
            if first.raised:
                sys.settrace(second)
            restore(patcher, layers)

        monkeypatch.setattr(ModelPatcher, "_restore", clean_up)
        with first.on():
            session.set(LAST)
        monkeypatch.undo()
        assert is_right_afterwards(session, block, expected), (first.at, second.at)


class FullMemory(TorchDispatchMode):
    """Operations that make a new tensor find no memory, where `is_full` says so of their number."""

    def __init__(self, is_full) -> None:
        super().__init__()
        self.is_full, self.count, self.refused = is_full, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(result, torch.Tensor) and one.alias_info is None for one in func._schema.returns):
            self.count += 1
            if self.is_full(self.count):
                self.refused += 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result


WAYS = {
    "once": lambda at: lambda number: number == at,
    "from there on": lambda at: lambda number: number >= at,
    "every second time from there on": lambda at: lambda number: number >= at and (number - at) % 2 == 0,
}


@pytest.mark.parametrize("way", WAYS)
def test_when_memory_runs_out_at_any_allocation_the_session_says_what_is_applied(make, expected, way):
    """All of the request, or what of it could be read, or nothing, or what was there before."""
    session, block = make()
    by_names = {}
    for request in (BEFORE, NEXT, NEXT[:1], NEXT[1:], []):
        session.set(request)
        by_names[tuple(name for name, _ in request)] = digest(block)
    for at in itertools.count(1):
        session, block = make()
        session.set(BEFORE)
        full = FullMemory(WAYS[way](at))
        with suppress(ApplyError, torch.cuda.OutOfMemoryError), full:
            session.set(NEXT)
        assert digest(block) == by_names[tuple(lora.name for lora in session.active)], at
        assert is_right_afterwards(session, block, expected), at
        if not full.refused:
            break
    assert at > 5
