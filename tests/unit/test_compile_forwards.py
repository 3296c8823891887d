"""Other code keeps forwards that it meets in a compiled model, and puts them back when it likes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lib_lora.compile.blockwise import BlockwiseHandle

WAIT_SECONDS = 60
X = torch.linspace(-1, 1, 8).view(2, 4)
HOOKED = "mid_block run eagerly while something is hooked into their layers."


class Part(nn.Module):
    """Computes as LDM's blocks do: in a method that its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self._forward(x)

    def _forward(self, x):
        return self.linear(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mid_block = nn.Sequential(Part(), nn.SiLU())

    def forward(self, x):
        return self.mid_block(x)


class Compiler:
    """Its code is the block's, and counts how often it ran."""

    def __init__(self) -> None:
        self.built = self.calls = 0

    def build(self, block, form):
        self.built += 1

        def compiled(*args, **kwargs):
            self.calls += 1
            return block.eager(*args, **kwargs)

        return compiled

    def renew(self):
        return False

    def weights_changed(self, layers):
        pass


class Reference:
    """As ControlNet's "reference-only": it keeps the first forward that it meets, and puts that back each time."""

    def __init__(self, block) -> None:
        self.block = block
        self.kept = None

    def begin(self):
        self.kept = kept = self.kept or self.block.forward
        self.block.forward = lambda x: kept(x) + 1

    def end(self):
        self.block.forward = self.kept


class Compiled:
    """A model beside the same one that nothing was done to."""

    def __init__(self) -> None:
        self.model = Model().eval().requires_grad_(False)
        self.plain = copy.deepcopy(self.model)
        self.block = self.model.mid_block
        self.reference = Reference(self.block)
        self.prepare()

    def prepare(self):
        self.compiler = Compiler()
        self.handle = BlockwiseHandle(self.model, "inductor", self.compiler)

    @torch.no_grad()
    def is_right(self, more=0):
        return torch.equal(self.model(X), self.plain(X) + more)

    def draw(self, more=0):
        """Three pictures as the WebUI draws them: each step is announced."""
        for _ in range(3):
            self.handle.pause("")
            assert self.is_right(more)
            assert self.handle.wait(WAIT_SECONDS)

    def is_compiled(self):
        """Whether compiled code answers the next call."""
        before = self.compiler.calls
        self.draw()
        return (self.compiler.calls - before, self.handle.status.reason) == (3, "")


@pytest.fixture
def compiled():
    drawn = Compiled()
    drawn.draw()
    assert drawn.is_compiled()
    return drawn


def test_an_old_forward_that_is_put_back_leads_to_the_handle_of_today(compiled):
    compiled.reference.begin()
    compiled.handle.release()
    compiled.reference.end()
    compiled.prepare()
    compiled.reference.end()
    for _ in range(3):
        assert compiled.is_right()
        assert compiled.handle.wait(WAIT_SECONDS)
    assert compiled.compiler.calls == 2  # once to compare
    assert (compiled.handle.status.compiled, compiled.handle.status.reason) == (("mid_block",), "")


@pytest.mark.parametrize("was_met_before", [False, True])
def test_a_model_that_is_changed_for_a_while_is_compiled_again_afterwards(compiled, was_met_before):
    if was_met_before:
        compiled.handle.release()
        compiled.reference.begin()
        compiled.reference.end()
        compiled.prepare()
        compiled.draw()
    for _ in range(2):
        compiled.reference.begin()
        compiled.draw(more=1)
        assert compiled.handle.status.reason == HOOKED
        compiled.reference.end()
        assert compiled.is_compiled()
    assert compiled.compiler.built == 1


def test_a_model_that_is_taken_while_it_is_changed_is_right_then_and_compiled_afterwards(compiled):
    compiled.reference.begin()
    compiled.reference.end()
    compiled.handle.release()
    compiled.reference.begin()
    compiled.prepare()
    compiled.draw(more=1)
    compiled.reference.end()
    assert compiled.is_right()  # before the next step is announced
    compiled.draw()
    assert compiled.is_compiled()


def test_a_method_inside_that_is_replaced_runs_eagerly_until_the_classs_own_is_put_over_it(compiled):
    for part in (compiled.block[0], compiled.plain.mid_block[0]):
        part._forward = lambda x, own=part._forward: own(x) * 2
    compiled.draw()
    assert compiled.handle.status.reason == HOOKED
    for part in (compiled.block[0], compiled.plain.mid_block[0]):
        part._forward = Part._forward.__get__(part)
    compiled.draw()
    assert compiled.is_compiled()


def test_the_forward_is_given_back_whoever_put_which_of_ours_there(compiled):
    compiled.reference.begin()
    compiled.reference.end()
    compiled.handle.release()
    assert "forward" not in vars(compiled.block)
    compiled.reference.end()
    compiled.prepare()
    compiled.reference.end()
    compiled.handle.release()
    assert "forward" not in vars(compiled.block)
    assert compiled.is_right()


def test_a_handle_that_is_released_late_takes_nothing_from_its_successor(compiled):
    former = compiled.handle
    compiled.prepare()
    former.release()
    compiled.draw()
    assert compiled.is_compiled()
    compiled.handle.release()
    assert "forward" not in vars(compiled.block)
