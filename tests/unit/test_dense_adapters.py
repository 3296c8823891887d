"""How the updates of all families are added up: by rows, from any memory layout, to any type, rounded to fp8."""

from __future__ import annotations

import pytest
import torch

from lib_lora.core import numerics
from lib_lora.core.adapters import load_adapter
from lib_lora.core.adapters.padded import PaddedAdapter
from lib_lora.core.naming import split_key
from lib_lora.core.numerics import Term, round_stochastically
from lib_lora.core.workspace import Workspace
from tests.family_files import DELTA_ERROR, FAMILIES, family_tensors, fused, noise, relative

SHAPES = ((24, 16), (16, 24, 1, 1), (24, 8, 3, 3))
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MEAN_ERROR = 0.02
"""Of the mean of 20,000 roundings, in steps of the type: a standard deviation is at most 0.0036."""


def adapter_of(family: str, shape: tuple[int, ...], seed: int = 0):
    tensors = family_tensors(family, shape, seed)
    return load_adapter({split_key(f"lora_unet_x.{name}").role: tensor for name, tensor in tensors.items()})


def base_of(shape: tuple[int, ...], seed: int = 5) -> torch.Tensor:
    return noise(torch.Generator().manual_seed(seed), *shape, std=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_some_rows_are_the_rows_of_the_whole(family):
    for shape in SHAPES:
        adapter, base = adapter_of(family, shape), base_of(shape)
        whole = adapter.delta_weight(base).flatten(1)
        step = adapter.row_step or shape[0]
        cuts = range(0, shape[0] + 1, step)
        for start, stop in ((start, stop) for start in cuts for stop in cuts if start < stop):
            total = torch.ones(stop - start, whole.shape[1])
            adapter.add_to(total, base, slice(start, stop), -0.5, Workspace())
            assert torch.allclose(total, 1 - 0.5 * whole[start:stop], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_pieces_is_the_layer_at_once(monkeypatch, family, dtype):
    for shape in SHAPES:
        base = base_of(shape).to(dtype)
        terms = [Term(adapter_of(family, shape), 0.7), Term(adapter_of("OFT rescaled", shape, 1), -0.3)]
        at_once = fused(base, terms, torch.float32)
        monkeypatch.setattr(numerics, "SCRATCH_BYTES", 1)
        assert torch.allclose(fused(base, terms, torch.float32), at_once, rtol=0, atol=2e-6)
        monkeypatch.undo()


def test_pieces_are_whole_blocks_of_every_adapter():
    shape = (48, 16)
    adapters = [load_adapter({"oft_blocks": noise(torch.Generator(), 48 // n, n, n)}) for n in (4, 6, 16)]
    base = base_of(shape)
    exact = base.double() + sum(adapter.delta_weight(base).double() for adapter in adapters)
    assert relative(fused(base, [Term(adapter, 1.0) for adapter in adapters]), exact) < DELTA_ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FP8], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_base_counts_as_the_numbers_it_holds(family, dtype):
    for shape in SHAPES:
        adapter, base = adapter_of(family, shape), base_of(shape).to(dtype)
        delta = adapter.delta_weight(base)
        assert delta.dtype == torch.float32
        assert torch.equal(delta, adapter.delta_weight(base.float()))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_read_and_written_as_they_lie(family):
    for shape in SHAPES:
        base, terms = base_of(shape), [Term(adapter_of(family, shape), 0.7)]
        plain = fused(base, terms)
        moved = base.to(memory_format=torch.channels_last) if len(shape) == 4 else base.t().contiguous().t()
        out = torch.empty_like(moved)
        assert out.stride() == moved.stride()
        numerics.fuse_layer(moved, terms, out)
        assert torch.allclose(out, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_is_one_for_any_base(family):
    for shape in SHAPES:
        adapter = adapter_of(family, shape)
        for scale in (0.0, 1e-3, 1.0, 100.0):
            base = base_of(shape) * scale
            bound = adapter.bound(base.abs().max().item())
            assert adapter.delta_weight(base).abs().max().item() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_an_adapter_does_not_know_are_left_alone(family):
    shape, narrow = (24, 9, 3, 3), (24, 4, 3, 3)
    inner, base = adapter_of(family, narrow), base_of(shape)
    padded = PaddedAdapter(inner, shape, 4)
    delta = padded.delta_weight(base)
    assert padded.fits(shape)
    assert torch.allclose(delta[:, :4], inner.delta_weight(base[:, :4]), rtol=0, atol=2e-6)
    assert not delta[:, 4:].any()
    out = fused(base, [Term(padded, 0.5), Term(adapter_of("LoRA", shape), 0.0)])
    assert torch.equal(out[:, 4:], base[:, 4:])


@pytest.mark.parametrize("family", ["DoRA of outputs", "DoRA of inputs"])
def test_a_direction_without_length_stays_zero(family):
    tensors = {split_key(f"lora_unet_x.{k}").role: tensor for k, tensor in family_tensors(family, (24, 16)).items()}
    tensors["lora_up"][3] = 0
    tensors["lora_down"][:, 5] = 0
    base = base_of((24, 16))
    base[3], base[:, 5] = 0, 0
    delta = load_adapter(tensors).delta_weight(base)
    assert delta.isfinite().all()
    assert not delta[3].any()
    assert not delta[:, 5].any()


@pytest.mark.parametrize("family", ["OFT", "OFT rescaled", "BOFT"])
def test_a_small_turn_keeps_its_digits_beside_the_weight(family):
    tensors = {k: tensor.double() for k, tensor in family_tensors(family, (24, 16)).items()}
    tensors["oft_blocks"] *= 1e-4
    if "rescale" in tensors:
        tensors["rescale"] = (1 + 1e-4 * (tensors["rescale"] - 1)).flatten().float().double()  # as a file has it
    tensors["alpha"] *= 0
    base = base_of((24, 16))
    ours = load_adapter(tensors).delta_weight(base)
    assert relative(ours, turned(tensors, base.double()) - base.double()) < DELTA_ERROR


def turned(tensors: dict, weight: torch.Tensor) -> torch.Tensor:
    """The definition in float64, with whole matrices."""
    blocks = tensors["oft_blocks"] - tensors["oft_blocks"].transpose(-1, -2)
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    turns = (eye + blocks) @ torch.linalg.inv(eye - blocks)
    if turns.ndim == 3:
        weight = torch.block_diag(*turns).t() @ weight
    else:
        for stage, turn in enumerate(turns):
            rows = torch.arange(len(weight)).view(-1, 2, 2**stage * turn.shape[-1] // 2).transpose(1, 2).flatten()
            weight = (torch.block_diag(*turn) @ weight[rows])[rows.argsort()]
    return weight if "rescale" not in tensors else tensors["rescale"][:, None] * weight


def numbers_of(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of an fp8 type, ascending, float64."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return every[every.isfinite()].unique()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_a_weight_in_fp8_is_the_nearest_number_to_the_exact_sum(dtype):
    for number, family in enumerate(FAMILIES):
        for shape in SHAPES:
            base = base_of(shape, number).half()  # a master wider than what is written
            terms = [Term(adapter_of(family, shape), 0.7), Term(adapter_of("LoRA", shape, 1), -0.4)]
            exact = base.double() + sum(term.factor * term.adapter.delta_weight(base).double() for term in terms)
            distance = (numbers_of(dtype) - exact.flatten()[:, None]).abs().amin(1)
            ours = fused(base, terms, dtype).double().flatten()
            assert ((ours - exact.flatten()).abs() <= distance + 1e-6).all()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_a_number_is_rounded_at_random_to_one_of_its_neighbours_and_right_in_the_mean(dtype):
    table = numbers_of(dtype)
    middle = table[(table > -300) & (table < 300)]
    generator = torch.Generator().manual_seed(0)
    low = middle[torch.randint(len(middle) - 1, (40,), generator=generator)]
    high = table[torch.searchsorted(table, low) + 1]
    values = (low + (high - low) * torch.rand(40, generator=generator, dtype=torch.float64)).float()
    rounded = torch.stack([round_stochastically(values, dtype, generator) for _ in range(20_000)]).double()
    assert ((rounded == low) | (rounded == high)).all()
    assert ((rounded.mean(0) - values.double()).abs() <= MEAN_ERROR * (high - low)).all()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_what_fp8_holds_is_never_moved_by_chance(dtype):
    table = numbers_of(dtype).float()
    generator = torch.Generator().manual_seed(0)
    many = table.repeat(30_000)
    assert torch.equal(round_stochastically(many, dtype, generator), many)
    beyond = torch.tensor([1e30, -1e30, 1.01 * table[-1].item()])
    assert torch.equal(round_stochastically(beyond, dtype, generator), table[[-1, 0, -1]])


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_the_same_seed_rounds_alike_and_another_one_otherwise(dtype):
    base, terms = base_of((24, 16)).half(), [Term(adapter_of("LoHa", (24, 16)), 0.7)]
    outs = [torch.empty(24, 16, dtype=dtype) for _ in range(3)]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        numerics.fuse_layer(base, terms, out, seed=seed)
    bits = [out.view(torch.uint8) for out in outs]
    assert torch.equal(bits[0], bits[1])
    assert not torch.equal(bits[0], bits[2])
