"""Blocks that other code changes between pictures: never a picture of an old graph, none that waits for a compiler."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.registry import lookup_backend

from lib_lora.compile.choose import prepare
from lib_lora.compile.inductor import Inductor
from tests.toys import sd1_unet

WAIT_SECONDS = 300
TOLERANCE = 1e-5
ROUNDED = 3e-2  # bfloat16
SIZES = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (8,),
    "layers_per_block": 1,
}
SWITCH = {"is_on": False}
"""Read by a forward, as programs read their options."""


@pytest.fixture(autouse=True)
def every_recompile_is_an_error():
    before, dynamo_config.error_on_recompile = dynamo_config.error_on_recompile, True
    yield
    dynamo_config.error_on_recompile = before


class Scale:
    """A processor that is a plain object."""

    def __init__(self) -> None:
        self.factors = [2.0]

    def __call__(self, x):
        return x * self.factors[0]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.processor = Scale()
        self.sizes = {"limits": [0.5]}
        self.shift = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.processor(self.conv(x)) + self.sizes["limits"][0] + self.shift


class Blocks(nn.Module):
    """One block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mid_block = nn.Sequential(nn.GroupNorm(2, 4), Part())
        self.mid_block.forward_count = 0

    def forward(self, x):
        return self.mid_block(x)


class Drawn:
    """A model under a backend that notes in which threads it compiles, beside the same model without it."""

    def __init__(self, model, inputs) -> None:
        self.model, self.inputs = model.eval().requires_grad_(False), inputs
        self.plain = copy.deepcopy(self.model)
        self.threads = []
        self.handle = prepare(self.model, Inductor(lowering=self._lower))

    def _lower(self, graph, example):
        self.threads.append(threading.get_ident())
        return lookup_backend("aot_eager")(graph, example)

    @torch.no_grad()
    def check(self, tolerance=TOLERANCE, **inputs):
        """Both draw the same."""
        got, expected = (model(**(self.inputs | inputs)) for model in (self.model, self.plain))
        got, expected = (getattr(result, "sample", result).float() for result in (got, expected))
        assert ((got - expected).abs().max() / expected.abs().max()).item() < tolerance
        assert threading.get_ident() not in self.threads
        return expected

    def warm(self, tolerance=TOLERANCE, **inputs):
        """Both draw the same, at once and when all is compiled."""
        for _ in range(4):
            expected = self.check(tolerance, **inputs)
            assert self.handle.wait(WAIT_SECONDS)
        assert (len(self.handle.status.compiled), self.handle.status.reason) == (self.handle.status.blocks, "")
        return expected

    def change(self, action, tolerance=TOLERANCE, **inputs):
        """Do something to both models; the picture is another one from then on. How much was compiled for it."""
        before, graphs = self.check(), len(self.threads)
        for model in (self.model, self.plain):
            action(model)
        changed = self.warm(tolerance, **inputs)
        assert changed.shape != before.shape or (changed - before).abs().max() > TOLERANCE
        return len(self.threads) - graphs


@pytest.fixture
def toy():
    drawn = Drawn(Blocks(), {"x": torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))})
    drawn.warm()
    yield drawn
    drawn.handle.release()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    latent, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 32)))
    drawn = Drawn(sd1_unet(**SIZES), {"sample": latent, "timestep": torch.tensor(500), "encoder_hidden_states": text})
    before, dynamo_config.error_on_recompile = dynamo_config.error_on_recompile, True
    drawn.warm()
    dynamo_config.error_on_recompile = before
    yield drawn
    drawn.handle.release()


def replace_module(model):
    model.mid_block[0] = nn.GroupNorm(4, 4).eval().requires_grad_(False)


def replace_class(model):
    class Merged(Part):
        def forward(self, x):
            return super().forward(x).flip(2)

    model.mid_block[1].__class__ = Merged


def replace_weight(model):
    model.mid_block[1].conv.weight = nn.Parameter(model.mid_block[1].conv.weight * -2, requires_grad=False)


def load_assigned(model):
    state = {name: tensor.flip(0) for name, tensor in model.mid_block.state_dict().items()}
    model.mid_block.load_state_dict(state, assign=True)


def replace_dtype(model):
    model.mid_block[1].shift.data = model.mid_block[1].shift.data.double() * 3


CHANGES = {
    "a number": lambda model: setattr(model.mid_block[0], "eps", 0.7),
    "a number in a list": lambda model: model.mid_block[1].sizes["limits"].__setitem__(0, 9.0),
    "a number of a processor": lambda model: model.mid_block[1].processor.factors.__setitem__(0, -3.0),
    "another processor": lambda model: setattr(model.mid_block[1], "processor", nn.Tanh()),
    "seamless tiles": lambda model: setattr(model.mid_block[1].conv, "padding_mode", "circular"),
    "another part": replace_module,
    "another class": replace_class,
    "another tensor": replace_weight,
    "another dtype of one tensor": replace_dtype,
    "a state that is assigned": load_assigned,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_block_that_is_changed_is_compiled_anew_in_the_background(toy, what):
    assert toy.change(CHANGES[what]) == 1
    assert toy.handle.status.recompiles == 0


def test_what_is_switched_on_and_off_is_compiled_once(toy):
    part = [model.mid_block[0] for model in (toy.model, toy.plain)]
    for epsilon, compilations in ((0.7, 1), (1e-5, 1), (0.7, 1), (1e-5, 1)):
        for norm in part:
            norm.eps = epsilon
        toy.warm()
        assert len(toy.threads) == 1 + compilations


def test_a_forward_that_is_replaced_in_a_class_counts_at_once(toy, monkeypatch):
    before = toy.check()
    forward = Part.forward
    monkeypatch.setattr(Part, "forward", lambda self, x: forward(self, x).flip(3))
    assert (toy.warm() - before).abs().max() > TOLERANCE
    monkeypatch.undo()
    assert torch.equal(toy.warm(), before)


def test_a_forward_that_is_replaced_inside_runs_eagerly_until_it_is_back(toy):
    convs = [model.mid_block[1].conv for model in (toy.model, toy.plain)]
    for conv in convs:
        conv.forward = lambda x, own=conv.forward: own(x).flip(2)
    toy.check()
    assert "run eagerly while something is hooked" in toy.handle.status.reason
    for conv in convs:
        del conv.forward
    toy.warm()
    assert len(toy.threads) == 1


def test_a_switch_that_only_torch_knows_of_never_makes_a_picture_wait(toy, monkeypatch):
    monkeypatch.setitem(SWITCH, "is_on", False)
    forward = Part.forward
    monkeypatch.setattr(Part, "forward", lambda self, x: forward(self, x) * (3.0 if SWITCH["is_on"] else 1.0))
    before = toy.warm()
    SWITCH["is_on"] = True
    after = toy.warm()
    assert (after - before).abs().max() > TOLERANCE
    assert toy.handle.status.recompiles == 1
    SWITCH["is_on"] = False
    assert torch.equal(toy.warm(), before)
    assert toy.handle.status.recompiles == 1  # both graphs are there


def test_attributes_that_are_others_in_each_call_are_given_up(toy):
    for number in range(40):
        toy.model.mid_block.forward_count = number
        toy.check()
    assert toy.handle.wait(WAIT_SECONDS)
    toy.check()
    assert toy.handle.status.compiled == ()
    assert "its attributes are others in each call" in toy.handle.status.reason


def test_what_is_changed_while_it_is_compiled_is_not_used(toy):
    drawn, begun, changed = toy, threading.Event(), threading.Event()
    lower = drawn._lower

    def slow(graph, example):
        begun.set()
        assert changed.wait(WAIT_SECONDS)
        return lower(graph, example)

    drawn.handle._compiler._lowering = slow
    wide = {"x": drawn.inputs["x"].repeat(3, 1, 1, 1)}
    drawn.check(**wide)
    assert begun.wait(WAIT_SECONDS)
    for model in (drawn.model, drawn.plain):
        model.mid_block[0].eps = 0.7
    changed.set()
    assert drawn.handle.wait(WAIT_SECONDS)
    assert not [form for form in drawn.handle._blocks[0].variant.built if form.args]
    drawn.warm(**wide)


def test_other_weights_in_the_same_tensors_need_no_compilation(toy):
    state = {name: tensor.flip(0) * 2 for name, tensor in toy.model.mid_block.state_dict().items()}
    assert toy.change(lambda model: model.mid_block.load_state_dict(state)) == 0
    assert toy.handle.status.recompiles == 0


def test_other_dtypes_and_back(toy):
    assert toy.change(lambda model: model.bfloat16(), ROUNDED, x=toy.inputs["x"].bfloat16()) == 1
    for model in (toy.model, toy.plain):
        model.float()
    toy.warm()
    toy.check()


def test_other_sizes_and_batches_are_compiled_beside(toy):
    x = toy.inputs["x"]
    for batch in (2, 1, 3, 4, 2):
        toy.warm(x=x.repeat(batch, 1, 1, 1))
    for height, width in ((7, 9), (12, 6), (6, 12)):
        toy.warm(x=torch.randn(2, 4, height, width))
    assert toy.handle.status.recompiles == 0


def test_more_forms_than_torch_compiles_of_a_function_by_itself(toy):
    for number in range(1, 11):
        toy.warm(x=torch.randn(1, 4, 6, 6 + number).to(memory_format=torch.channels_last if number % 2 else None))
        toy.warm(x=torch.randn(number, 4, 6, 6).double().float().transpose(2, 3))
    assert toy.handle.status.recompiles == 0


@pytest.mark.newest  # torch 2.1 has no transforms of symbolic sizes
def test_freeu_is_seen_and_compiled_beside(unet):
    before = unet.check()
    for model in (unet.model, unet.plain):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert (unet.warm() - before).abs().max() > TOLERANCE
    graphs = len(unet.threads)
    for model in (unet.model, unet.plain):
        model.disable_freeu()
    unet.check()
    assert (unet.handle.status.recompiles, unet.handle.status.reason) == (0, "")
    assert len(unet.threads) >= graphs


@pytest.mark.slow
def test_processors_of_attention_are_seen(unet):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    class Louder(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return 1.5 * super().__call__(attn, hidden_states, *args, **kwargs)

    before = unet.check()
    for change, is_same in (
        (lambda model: model.set_attn_processor(Louder()), False),
        (lambda model: model.set_attn_processor(AttnProcessor()), True),
        (lambda model: model.set_attention_slice(1), True),
    ):
        for model in (unet.model, unet.plain):
            change(model)
        assert ((unet.warm() - before).abs().max() < TOLERANCE) == is_same
    assert unet.handle.status.recompiles == 0


@pytest.mark.slow
def test_a_batch_of_two_and_one_and_other_sizes_of_a_unet(unet):
    text = unet.inputs["encoder_hidden_states"]
    for batch, size in ((2, 8), (1, 16), (2, 16), (1, 8)):
        latent = torch.randn(batch, 4, size, size)
        unet.warm(sample=latent, encoder_hidden_states=text.repeat(batch, 2, 1))
    assert unet.handle.status.recompiles == 0
