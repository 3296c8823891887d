"""The cost model of strengths that move, at the boundaries of its decisions and beside what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib_lora.core.memory import free_bytes
from lib_lora.core.numerics import has_native_gemm
from lib_lora.core.ways import (
    CPU,
    CPU_HALF,
    FEW_MOVES,
    GPU,
    Load,
    Movement,
    choose,
    exact_cost,
    held_bytes,
    held_cost,
    keeps_products,
    rates_of,
)

RANK, OTHERS = 32, 4 * 32
SD15 = tuple(Load(1280 * 1088, 4, 1280 + 1088, RANK, OTHERS, can_keep=True) for _ in range(192))
"""As many layers and weights as an SD1.5 LoRA of kohya's kind acts on, all of the mean size."""
CURVE = Movement(moves=19, active=20, is_fused=True, loads=SD15)
MULTIPLIED, KEPT = (0.24, 0.35), (0.1, 0.24)
"""What a move beside a held sum takes of a switch of five LoRAs, in fp32; see benchmarks/results/schedules-*.md."""


def test_a_curve_that_moves_at_each_step_is_added_to_a_held_sum():
    assert choose(CURVE, CPU) == "held"
    assert choose(replace(CURVE, can_hook=True), CPU) == "held"


@pytest.mark.parametrize("moves", range(FEW_MOVES + 1))
def test_on_and_off_are_exact_whatever_is_cheaper(moves):
    assert choose(Movement(moves, active=1, is_fused=False, loads=SD15, can_hook=True), CPU) == "exact"


@pytest.mark.parametrize("load", [SD15[0]._replace(others=0), SD15[0]._replace(can_hold=False)])
def test_nothing_is_held_where_nothing_stays_or_it_can_not_be(load):
    alone = replace(CURVE, loads=(load,) * len(SD15))
    assert held_bytes(alone) == 0
    assert choose(alone, CPU) == "exact"


def test_sums_are_held_only_if_they_fit_the_free_memory():
    needed = held_bytes(CURVE)
    assert needed == sum(load.elements * 4 for load in SD15)
    assert choose(replace(CURVE, free_bytes=needed), CPU) == "held"
    assert choose(replace(CURVE, free_bytes=needed - 1), CPU) == "exact"


def test_a_lora_that_acts_in_few_of_many_steps_is_hooked_where_that_is_possible():
    ways = [
        choose(Movement(moves=6, active=active, is_fused=False, loads=SD15, can_hook=True), CPU)
        for active in range(1, 200)
    ]
    first_held = ways.index("held")
    assert 0 < first_held < 60
    assert set(ways[:first_held]) == {"hooked"}
    assert set(ways[first_held:]) == {"held"}
    assert choose(Movement(moves=6, active=1, is_fused=False, loads=SD15), CPU) == "held"


def test_small_layers_cost_their_calls_alone_so_that_one_call_is_best():
    tiny = tuple(Load(64, 4, 16, 4, 8) for _ in range(192))
    assert choose(replace(CURVE, loads=tiny), CPU) == "exact"


def test_a_fast_device_fuses_all_anew_rather_than_hold_copies():
    half = tuple(load._replace(itemsize=2) for load in SD15)
    assert choose(replace(CURVE, loads=half), GPU) == "exact"


@pytest.mark.parametrize(("copies", "part"), [(1, MULTIPLIED), (2, KEPT)])
def test_a_move_beside_a_held_sum_takes_the_part_of_a_switch_that_was_measured(copies, part):
    switch = exact_cost(replace(CURVE, moves=1), CPU)
    curve = replace(CURVE, free_bytes=copies * held_bytes(CURVE))
    move = held_cost(replace(curve, moves=2), CPU) - held_cost(replace(curve, moves=1), CPU)
    assert part[0] < move / switch < part[1]


def test_products_are_kept_if_all_can_be_and_fit_the_free_memory_beside_the_sums():
    needed = 2 * held_bytes(CURVE)
    assert keeps_products(replace(CURVE, free_bytes=needed))
    assert not keeps_products(replace(CURVE, free_bytes=needed - 1))
    assert not keeps_products(replace(CURVE, loads=(*SD15, SD15[0]._replace(can_keep=False))))


def test_a_sum_that_is_in_the_weights_as_yet_is_only_copied():
    assert held_cost(replace(CURVE, is_fused=False), CPU) < held_cost(CURVE, CPU)


def test_each_device_and_dtype_has_its_rates():
    assert rates_of("cpu", torch.float32) == CPU
    assert rates_of("cpu", torch.float16) == CPU
    assert rates_of("cpu", torch.bfloat16) == (CPU_HALF if has_native_gemm(torch.bfloat16, "cpu") else CPU)
    assert rates_of("cuda", torch.float16) == GPU


def test_free_memory_is_told_in_bytes_or_not_at_all():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert free_bytes(torch.device("meta")) is None
