"""Strengths that move beside others that stay: held sums, hooks, and what is left when the pass ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.core import numerics, patcher
from lib_lora.core.held import HeldSums
from lib_lora.core.saving import save_tensors
from lib_lora.errors import ForeignWriteError
from tests.family_files import family_tensors

OUT, IN, RANK, STEPS = 24, 16, 4, 6
CURVE = "0.3@0,1.2@1"
PLACES = ("one", "two")
STRENGTHS = {"ink": 0.8, "wash": -0.3, "glow": 0.5}
FLOAT_ERROR = 1e-6  # of float32 sums of order 1
DENSE = ("LoHa", "LoKr", "Full")
BOUND = ("OFT", "GLoRA", "DoRA of outputs")
"""What they add depends on the weight."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Toy(nn.Module):
    """Two layers where LoRAs act."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for place in PLACES:
            self.add_module(place, nn.Linear(IN, OUT, bias=False, dtype=dtype).requires_grad_(False))

    def forward(self, x):
        return self.one(x) + self.two(x)


def factors(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    shapes = {"lora_up.weight": (OUT, RANK), "lora_down.weight": (RANK, IN)}
    places = [f"lora_{part}_{place}" for part in ("unet", "te1") for place in PLACES]
    return {
        f"{place}.{role}": torch.randn(shape, generator=generator) * 0.3
        for place in places
        for role, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for name in (*STRENGTHS, "move", "other"):
        save_tensors(folder / f"{name}.safetensors", factors(name), {})
    for family in (*DENSE, *BOUND):
        tensors = {
            f"lora_unet_{place}.{role}": tensor
            for seed, place in enumerate(PLACES)
            for role, tensor in family_tensors(family, (OUT, IN), seed).items()
        }
        save_tensors(folder / f"{family}.safetensors", tensors, {})
    return folder


@pytest.fixture
def make(folder):
    def make(dtype=torch.float32, **options):
        torch.manual_seed(1)
        parts = {"unet": Toy(dtype), "te1": Toy(dtype)}
        return parts, LoraSession(parts, LoraCatalog([folder]), **options)

    return make


@pytest.fixture
def take(monkeypatch):
    """Takes one way, whatever it costs: toys are too small for any but the exact one."""
    return lambda way: monkeypatch.setattr("lib_lora.moving.choose", lambda *_: way)


def prompt(moving: str = f"<lora:move:te=1:unet={CURVE}>") -> str:
    return "".join(f"<lora:{name}:{strength}>" for name, strength in STRENGTHS.items()) + moving


def by_hand(moving: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return [(name, strength, strength) for name, strength in STRENGTHS.items()] + moving


def weights(part: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in part.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def set_by_hand(make, dtype, moving, **options) -> dict[str, torch.Tensor]:
    parts, session = make(dtype, **options)
    session.set(by_hand(moving))
    return weights(parts["unet"])


def oracle(base: torch.Tensor, place: str, strengths: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """base + Σ strength · up @ down in float64, and how far from it two roundings can be.

    Each rounding is off by half a unit in the last place of its result. Where the GEMM is one of halves, its factors
    were rounded too, twice with their strength, each time by half a unit of the product.
    """
    eps = torch.finfo(base.dtype).eps
    total, held, size = base.double(), base.double(), torch.zeros(OUT, IN, dtype=torch.float64)
    for name, strength in strengths.items():
        up, down = (factors(name)[f"lora_unet_{place}.lora_{role}.weight"].double() for role in ("up", "down"))
        total = total + strength * up @ down
        held = held + strength * up @ down if name in STRENGTHS else held
        size += abs(strength) * up.abs() @ down.abs()
    of_halves = has_half_gemm(base.dtype)
    return total, eps / 2 * (total.abs() + held.abs()) * 1.01 + 1.5 * eps * size * of_halves + FLOAT_ERROR


def has_half_gemm(dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and numerics.has_native_gemm(dtype, "cpu")


def check(unet: nn.Module, base: dict[str, torch.Tensor], strengths: dict[str, float]) -> None:
    for place in PLACES:
        total, allowed = oracle(base[f"{place}.weight"], place, strengths)
        assert ((unet.get_submodule(place).weight.double() - total).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moving", [("move",), ("move", "other")])
def test_curves_beside_others_are_within_two_roundings_of_the_exact_sum(make, take, dtype, moving):
    take("held")
    parts, session = make(dtype)
    base = weights(parts["unet"])
    session.set(prompt("".join(f"<lora:{name}:te=1:unet={CURVE}>" for name in moving)))
    for step in range(STEPS):
        session.advance(step, STEPS)
        now = 0.3 + 0.9 * step / (STEPS - 1)
        check(parts["unet"], base, STRENGTHS | dict.fromkeys(moving, now))
    assert session.report.moves == STEPS - 1
    assert session.report.held_bytes == sum(weight.nbytes for weight in base.values())
    told = [lora.moving for lora in session.active]
    assert told == [""] * 3 + ["5 moves, added to the held sum of the others"] * len(moving)
    assert told[-1] in str(session.report)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_curve_is_0_the_weights_are_those_of_the_others_bit_for_bit(make, take, dtype):
    take("held")
    parts, session = make(dtype)
    session.set(by_hand([("move", 1.0, 0.0)]))
    others, key = weights(parts["unet"]), session.applied_key
    session.set(prompt("<lora:move:te=1:unet=1@0,0@0.5,0@0.75,1@1>"))
    found = []
    for step in range(9):
        session.advance(step, 9)
        found.append((same(weights(parts["unet"]), others), session.applied_key == key))
    assert found == [(4 <= step <= 6,) * 2 for step in range(9)]
    assert session.report.moves == 6


def test_a_curve_without_others_and_one_whose_layers_can_not_hold_are_exact_bit_for_bit(make, take):
    take("held")
    for name in ("move", *BOUND):
        parts, session = make()
        others = "" if name == "move" else "<lora:ink:0.8>"
        session.set(f"{others}<lora:{name}:te=1:unet={CURVE}>")
        for step in range(STEPS):
            session.advance(step, STEPS)
        done = weights(parts["unet"])
        assert session.report.held_bytes == 0
        again, fresh = make()
        fresh.set([("ink", 0.8, 0.8)] * bool(others) + [(name, 1.0, 1.2)])
        assert same(done, weights(again["unet"]))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("other", ["ink", *BOUND])
def test_dense_families_move_beside_any_family(make, take, name, other):
    take("held")
    parts, session = make()
    session.set(f"<lora:{other}:0.7><lora:{name}:te=1:unet={CURVE}>")
    for step in range(STEPS):
        session.advance(step, STEPS)
    assert session.report.held_bytes
    moved = weights(parts["unet"])
    session.set([(other, 0.7, 0.7), (name, 1.0, 1.2)])
    exact = weights(parts["unet"])
    assert all((moved[key] - exact[key]).abs().max() < 4 * FLOAT_ERROR for key in exact)


def test_keys_differ_from_step_to_step_and_agree_at_equal_strengths(make, take):
    take("held")
    parts, session = make()
    session.set(prompt("<lora:move:te=1:unet=0.25@0,1.25@0.5,0.25@1>"))
    exact = session.applied_key
    keys, seen = [], []
    for step in range(9):
        session.advance(step, 9)
        keys.append(session.applied_key)
        seen.append(weights(parts["unet"]))
    assert keys[0] == exact
    assert len(set(keys[:5])) == 5
    assert keys[1:4] == keys[7:4:-1]
    assert all(same(seen[step], seen[8 - step]) for step in (1, 2, 3))
    assert exact not in keys[1:]


@pytest.mark.parametrize("way", ["held", "hooked"])
def test_after_a_pass_a_set_is_exact_and_a_restore_gives_the_base(make, take, way):
    take(way)
    parts, session = make(torch.bfloat16)
    base, wanted = weights(parts["unet"]), set_by_hand(make, torch.bfloat16, [("move", 1.0, 0.75)])
    for end in (lambda: session.set(by_hand([("move", 1.0, 0.75)])), session.clear, session.unload):
        session.set(prompt())
        for step in range(3):
            session.advance(step, STEPS)
        assert not same(weights(parts["unet"]), wanted)
        end()
        assert session._patcher.held_bytes == 0
        assert not any(module._forward_hooks for module in parts["unet"].modules())
        assert same(weights(parts["unet"]), wanted if session.active else base)


def test_memory_is_free_after_the_last_move_and_not_before(make, take):
    take("held")
    _, session = make()
    session.set(prompt("<lora:move:te=1:unet=0@0,1@4,1@9>"))
    held = []
    for step in range(10):
        session.advance(step, 10)
        held.append(session._patcher.held_bytes > 0)
    assert held == [False] + [True] * 3 + [False] * 6
    assert session.report.held_bytes > 0


def test_text_encoders_stay_as_the_prompt_was_encoded(make, take):
    for way in ("held", "hooked", "exact"):
        take(way)
        parts, session = make()
        session.set(prompt())
        encoded = weights(parts["te1"])
        for step in range(STEPS):
            session.advance(step, STEPS)
        assert same(weights(parts["te1"]), encoded)


@pytest.mark.parametrize("arguments", ["1:start=2", "1:stop=2", "1:step=1-4"])
def test_on_and_off_are_a_switch_by_hand_bit_for_bit(make, take, arguments):
    take("held")
    parts, session = make(torch.bfloat16)
    session.set(prompt(f"<lora:move:{arguments}>"))
    for step in range(STEPS):
        session.advance(step, STEPS)
        lora = session._loras[-1].scale
        assert same(weights(parts["unet"]), set_by_hand(make, torch.bfloat16, [("move", 1.0, lora.unet)]))


def test_another_lora_that_starts_within_a_curve_joins_the_held_sum(make, take):
    take("held")
    parts, session = make()
    base = weights(parts["unet"])
    session.set(prompt(f"<lora:move:te=1:unet={CURVE}><lora:other:1:start=3>"))
    for step in range(STEPS):
        session.advance(step, STEPS)
        now = {"move": 0.3 + 0.9 * step / (STEPS - 1), "other": float(step >= 3)}
        check(parts["unet"], base, STRENGTHS | now)
    assert [lora.moving for lora in session.active[3:]] == [
        "5 moves, added to the held sum of the others",
        "1 move, fused anew",
    ]


def test_a_hooked_lora_is_no_part_of_the_weights_and_its_output_is_that_of_a_set(make, take):
    take("hooked")
    parts, session = make()
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(3))
    session.set(prompt("<lora:move:te=1:unet=0@0,1@0.4,0@0.8>"))
    others, outputs = weights(parts["unet"]), []
    for step in range(STEPS):
        session.advance(step, STEPS)
        outputs.append(parts["unet"](x))
        assert same(weights(parts["unet"]), others)
    assert session.active[-1].moving == "4 moves, hooked, for it acts in 3 steps"
    for step, strength in enumerate((0, 0.5, 1, 0.5, 0, 0)):
        session.set(by_hand([("move", 1.0, strength)]))
        torch.testing.assert_close(outputs[step], parts["unet"](x), atol=4e-6, rtol=1e-5)


def test_nothing_is_hooked_unless_the_caller_may(make, monkeypatch):
    asked = []
    monkeypatch.setattr("lib_lora.moving.choose", lambda movement, _: asked.append(movement.can_hook) or "exact")
    for may in (False, True):
        _, session = make()
        session.may_hook = may
        session.set(prompt())
        session.advance(1, STEPS)
    assert asked == [False, True]


@pytest.mark.parametrize("options", [{"compat": "a1111"}, {"mode": "hook"}])
def test_the_webuis_rounding_and_hook_mode_have_one_way(make, monkeypatch, options):
    monkeypatch.setattr("lib_lora.moving.choose", lambda *_: pytest.fail("there is nothing to choose"))
    parts, session = make(torch.bfloat16, **options)
    session.set(prompt())
    session.advance(STEPS - 1, STEPS)
    assert same(weights(parts["unet"]), set_by_hand(make, torch.bfloat16, [("move", 1.0, 1.2)], **options))


def test_an_interrupt_in_mid_pass_gives_the_base_back_and_the_next_set_is_exact(make, take, monkeypatch):
    take("held")
    parts, session = make()
    base, fuse = weights(parts["unet"]), numerics.fuse_layer
    for layer in range(1, 5):  # two sums are made, then two weights written
        session.set(prompt())
        left = [layer]

        def interrupt(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            fuse(*arguments)

        monkeypatch.setattr(patcher.numerics, "fuse_layer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.advance(1, STEPS)
        monkeypatch.setattr(patcher.numerics, "fuse_layer", fuse)
        assert same(weights(parts["unet"]), base)
        assert session._patcher.held_bytes == 0
        session.set(by_hand([("move", 1.0, 0.5)]))
        assert same(weights(parts["unet"]), set_by_hand(make, torch.float32, [("move", 1.0, 0.5)]))


def test_another_programs_write_in_mid_pass_is_noticed_and_not_overwritten(make, take):
    take("held")
    parts, session = make()
    session.set(prompt())
    session.advance(1, STEPS)
    parts["unet"].one.weight.fill_(7.0)
    before = weights(parts["unet"])
    with pytest.raises(ForeignWriteError, match="changed 1 of 2 fused layers"):
        session.advance(2, STEPS)
    assert same(weights(parts["unet"]), before)


@pytest.mark.parametrize("error", [MemoryError, torch.cuda.OutOfMemoryError])
def test_without_memory_for_sums_all_is_fused_anew_and_that_is_told(make, take, monkeypatch, error):
    take("held")

    def fail(_, patches, fill):
        if any(patch.held for patch in patches):
            raise error("no memory for it")

    monkeypatch.setattr(HeldSums, "add", fail)
    parts, session = make()
    session.set(prompt())
    for step in range(STEPS):
        session.advance(step, STEPS)
    assert same(weights(parts["unet"]), set_by_hand(make, torch.float32, [("move", 1.0, 1.2)]))
    assert "no memory for it" in " ".join(session.report.notes)
    assert session.active[-1].moving == "5 moves, fused anew"
    assert session.report.refused == ()


def test_a_held_sum_that_overflows_where_the_whole_does_not_is_never_used(make, take, tmp_path, folder):
    take("held")
    loud = {key: tensor * (5e3 if "up" in key else 1.0) for key, tensor in factors("ink").items()}
    save_tensors(tmp_path / "loud.safetensors", loud, {})
    back = {key: tensor * (-5e3 if "up" in key else 1.0) for key, tensor in factors("ink").items()}
    save_tensors(tmp_path / "back.safetensors", back, {})
    torch.manual_seed(1)
    unet = Toy(torch.float16)
    session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]))
    assert session.set("<lora:loud:90><lora:back:te=90:unet=90@0,89@1>").refused == ()
    for step in range(STEPS):
        session.advance(step, STEPS)
        assert all(weight.isfinite().all() for weight in weights(unet).values())
    assert [lora.moving for lora in session.active] == ["", "5 moves, fused anew"]
    assert any("would overflow" in note for note in session.report.notes)
    moved = weights(unet)
    session.set([("loud", 0.0, 90.0), ("back", 0.0, 89.0)])
    assert same(weights(unet), moved)


def test_weights_in_fp8_are_fused_anew_bit_for_bit(make, take):
    take("held")
    parts, session = make(torch.bfloat16)
    for place in PLACES:
        layer = parts["unet"].get_submodule(place)
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    session.set(prompt())
    for step in range(STEPS):
        session.advance(step, STEPS)
    moved = [bits(parts["unet"].get_submodule(place).weight) for place in PLACES]
    assert session.report.held_bytes == 0
    session.set(by_hand([("move", 1.0, 1.2)]))
    assert all(
        torch.equal(bits(parts["unet"].get_submodule(place).weight), was)
        for place, was in zip(PLACES, moved, strict=True)
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.uint8).clone()
