"""Backends that are missing, fail, run out of memory or compute something else: the picture is right all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config

from lib_lora.compile.choose import prepare
from lib_lora.compile.inductor import Inductor

WAIT_SECONDS = 120


class Toy(nn.Module):
    """Two blocks that do not do the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.SiLU())])
        self.mid_block = nn.Linear(4, 4)

    def forward(self, x):
        return self.mid_block(self.down_blocks[0](x))


@pytest.fixture(autouse=True)
def torch_as_it_was():
    before = dynamo_config.error_on_recompile, dynamo_config.disable, inductor_config.freezing
    yield
    dynamo_config.error_on_recompile, dynamo_config.disable, inductor_config.freezing = before


X = torch.linspace(-1, 1, 8).view(2, 4)


@torch.no_grad()
def run(model, x=X):
    return model(x)


def drawn_with(lowering, calls=4):
    """A model that was used several times while `lowering` is tried, its handle, and whether every result was right."""
    model = Toy().eval().requires_grad_(False)
    expected = run(model)
    handle = prepare(model, Inductor(lowering=lowering))
    right = []
    for _ in range(calls):
        right.append(torch.equal(run(model), expected))
        assert handle.wait(WAIT_SECONDS)
    return model, handle, all(right)


def working(graph, inputs):
    return graph.forward


def test_a_backend_that_works_is_used():
    _, handle, right = drawn_with(working)
    assert right
    assert handle.status.compiled == ("down_blocks.0", "mid_block")
    assert handle.status.reason == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("No working C++ compiler found"), "No working C++ compiler found"),
        (ImportError("no triton"), "no triton"),
        (AssertionError(), "AssertionError"),
        (MemoryError("host"), "memory ran out"),
        (torch.cuda.OutOfMemoryError("device"), "memory ran out"),
    ],
)
def test_a_backend_that_fails_leaves_the_model_eager_and_says_why(error, words):
    def failing(graph, inputs):
        raise error

    model, handle, right = drawn_with(failing)
    assert right
    assert words in handle.status.reason
    assert handle.status.reason.startswith("All of it runs eagerly.")
    assert handle.status.compiled == ()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_one_block_that_can_not_be_compiled_leaves_the_others_compiled():
    def picky(graph, inputs):
        if sum(node.op.startswith("call") for node in graph.graph.nodes) < 2:
            raise RuntimeError("plain layers are beneath me")
        return graph.forward

    _, handle, right = drawn_with(picky)
    assert right
    assert handle.status.compiled == ("down_blocks.0",)
    assert "mid_block runs eagerly" in handle.status.reason
    assert "beneath me" in handle.status.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out * float("nan"), "NaN"),
        (lambda out: out + 0.1, "is allowed"),
        (lambda out: out[:1], "comes out instead of"),
        (lambda out: out.double(), "float64"),
    ],
)
def test_a_block_that_computes_something_else_is_never_used(change, words):
    def wrong(graph, inputs):
        return lambda *args: tuple(map(change, graph.forward(*args)))

    _, handle, right = drawn_with(wrong)
    assert right
    assert handle.status.compiled == ()
    assert words in handle.status.reason


def test_a_graph_that_fails_while_drawing_is_answered_eagerly():
    fails = []

    def moody(graph, inputs):
        def call(*args):
            if fails:
                raise torch.cuda.OutOfMemoryError("too late")
            return graph.forward(*args)

        return call

    model, handle, right = drawn_with(moody)
    expected = run(model)
    fails.append(True)
    assert torch.equal(run(model), expected)
    assert right
    assert "memory ran out" in handle.status.reason


def test_freezing_is_refused_before_and_after(monkeypatch):
    inductor_config.freezing = True
    handle = prepare(Toy(), Inductor())
    assert "freezing" in handle.status.reason
    assert handle.status.blocks == 0
    inductor_config.freezing = False
    model = Toy().eval().requires_grad_(False)
    handle = prepare(model, Inductor(lowering=working))
    inductor_config.freezing = True
    run(model)
    assert handle.wait(WAIT_SECONDS)
    assert "would ignore every change of LoRAs" in handle.status.reason
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_cuda_graphs_are_not_recorded_where_there_is_no_gpu():
    model = Toy().eval().requires_grad_(False)
    expected = run(model)
    handle = prepare(model, Inductor(lowering=working, cuda_graphs=True))
    for _ in range(4):
        assert torch.equal(run(model), expected)
        assert handle.wait(WAIT_SECONDS)
    assert handle.status.compiled == ("down_blocks.0", "mid_block")


def test_torch_compile_that_is_switched_off_is_noticed():
    dynamo_config.disable = True
    _, handle, right = drawn_with(working)
    assert right
    assert "switched off" in handle.status.reason


def test_a_call_of_another_form_is_right_from_the_first_on():
    model, handle, _ = drawn_with(working)
    for x in (X.double().float()[:1], torch.cat([X, X]), X.t().contiguous().t(), X[None].expand(3, 2, 4)):
        expected = model.mid_block.weight @ model.down_blocks[0](x)[..., None]
        expected = expected[..., 0] + model.mid_block.bias
        for _ in range(3):
            torch.testing.assert_close(run(model, x), expected)
            handle.wait(WAIT_SECONDS)
    model.double()
    expected = model.mid_block(model.down_blocks[0].forward(X.double())).detach()
    for _ in range(3):
        torch.testing.assert_close(run(model, X.double()), expected)
        handle.wait(WAIT_SECONDS)
    assert handle.status.recompiles == 0


def test_a_forward_that_somebody_else_put_over_ours_still_works_after_release():
    model, handle, _ = drawn_with(working)
    ours = model.mid_block.forward
    model.mid_block.forward = lambda x: ours(x) + 1
    expected = run(model)
    handle.release()
    assert torch.equal(run(model), expected)


def test_an_exception_of_the_block_itself_comes_through():
    model, _, _ = drawn_with(working)
    with pytest.raises(RuntimeError, match="shapes"):
        run(model, torch.zeros(2, 5))


def test_results_that_are_not_finite_are_no_reference():
    model, handle, _ = drawn_with(working, calls=1)
    run(model, torch.full((2, 4), float("nan")))
    assert handle.status.compiled == ()
    run(model)
    assert handle.status.compiled == ("down_blocks.0", "mid_block")
