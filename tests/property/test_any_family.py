"""What holds for every algorithm, whatever is mixed with it on a layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.catalog import LoraCatalog
from lib_lora.core.files import read_lora_file
from lib_lora.core.network import load_network
from lib_lora.core.saving import save_tensors
from lib_lora.session import LoraSession
from tests.family_files import (
    FAMILIES,
    WEIGHTS,
    family_tensors,
    fused,
    noise,
    relative,
    terms_of,
    toys,
    units_off,
    write,
)
from tests.toys import digest

SHAPES = {"linear": (24, 16), "1x1": (16, 24, 1, 1), "3x3": (24, 8, 3, 3), "rows": (16, 16)}
FILES = [*FAMILIES, "Norm"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HOOK_ERROR = 2e-5
"""Of the output, float32, relative to its largest number."""
MIXED_UNITS = {torch.float32: 200, torch.float16: 0.51, torch.bfloat16: 0.51}
"""Units of the last place of a sum of up to five large terms."""

requests = st.lists(
    st.tuples(st.sampled_from(range(len(FILES))), st.sampled_from([-0.7, 0.25, 0.5, 1.0])),
    min_size=1,
    max_size=5,
    unique_by=lambda pair: pair[0],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file for each family, on a layer of every kind; and one of norms."""
    folder = tmp_path_factory.mktemp("loras")
    for number, family in enumerate(FAMILIES):
        write(folder / f"{number}.safetensors", {k: family_tensors(family, SHAPES[k], number) for k in WEIGHTS})
    generator = torch.Generator().manual_seed(0)
    norms = {
        kind: {part: noise(generator, 24) for part in ("w_norm", "b_norm")} for kind in ("layer norm", "group norm")
    }
    write(folder / f"{len(FAMILIES)}.safetensors", norms)
    return folder


def session_of(components, folder, **options) -> LoraSession:
    return LoraSession(components, LoraCatalog([folder]), **options)


def named(request) -> list[tuple[str, float]]:
    return [(str(number), strength) for number, strength in request]


@torch.no_grad()
def run(unet) -> torch.Tensor:
    return unet(torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1)))


@given(request=requests)
@settings(max_examples=40, deadline=None)
def test_hooks_give_what_fused_weights_give(folder, request):
    fuse, hook = toys(), toys()
    assert not session_of(fuse, folder).set(named(request)).refused
    assert not session_of(hook, folder, mode="hook").set(named(request)).refused
    expected = run(fuse["unet"])
    assert (run(hook["unet"]) - expected).abs().max() < HOOK_ERROR * expected.abs().max()
    assert relative(hook["te1"].state_dict()[QKV], fuse["te1"].state_dict()[QKV]) < HOOK_ERROR


QKV = "transformer.resblocks.0.attn.in_proj_weight"


@given(request=requests, other=requests, dtype=st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_applied_and_taken_back_is_the_base_bit_for_bit(folder, request, other, dtype):
    components = toys(dtype)
    base = digest(*components.values())
    session = session_of(components, folder)
    session.set(named(request))
    fused_once = digest(*components.values())
    assert fused_once != base
    session.set(named(other))
    session.set(named(request))
    assert digest(*components.values()) == fused_once
    session.clear()
    assert digest(*components.values()) == base


@given(request=requests, dtype=st.sampled_from(DTYPES), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_order_of_networks_does_not_change_a_bit(folder, request, dtype, data):
    shuffled = data.draw(st.permutations(request))
    results = []
    for order in (request, shuffled):
        components = toys(dtype)
        session_of(components, folder).set(named(order))
        results.append(digest(*components.values()))
    assert results[0] == results[1]


@pytest.mark.parametrize("compat", ["exact", "a1111"])
def test_autocast_around_the_call_does_not_change_a_bit(folder, compat):
    """The WebUI activates networks under autocast."""
    for number in range(len(FILES)):
        plain, cast = toys(), toys()
        session_of(plain, folder, compat=compat).set([(str(number), 0.7)])
        with torch.autocast("cpu", torch.bfloat16):
            session_of(cast, folder, compat=compat).set([(str(number), 0.7)])
        assert digest(*plain.values()) == digest(*cast.values())


@given(request=requests)
@settings(max_examples=5, deadline=None)
def test_strength_0_is_no_plan(folder, request):
    components = toys()
    base = digest(*components.values())
    for mode in ("prefuse", "hook"):
        session = session_of(components, folder, mode=mode)
        report = session.set([(name, 0.0) for name, _ in named(request)])
        assert report.layers_written == 0
        assert digest(*components.values()) == base
        assert not any(module._forward_hooks for module in components["unet"].modules())
        session.unload()


@given(request=requests, kind=st.sampled_from(WEIGHTS), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_a_mixture_is_the_sum_of_what_each_adds_to_the_base(folder, request, kind, dtype):
    """Each starts from the untouched weight, those too whose update depends on it."""
    components = toys(dtype)
    found = [terms_of(folder / f"{number}.safetensors", components, strength) for number, strength in request]
    for key in {key for layers in found for key in layers}:
        base = next(layers[key][0] for layers in found if key in layers)
        terms = [term for layers in found if key in layers for term in layers[key][1]]
        exact = base.double() + sum(term.factor * term.adapter.delta_weight(base).double() for term in terms)
        assert relative(fused(base.float(), terms), exact) < 1e-6
        if dtype != torch.bfloat16:  # there a layer of low-rank terms alone is one bf16 GEMM
            assert units_off(fused(base, terms), exact) <= MIXED_UNITS[dtype]


@given(family=st.sampled_from(sorted(FAMILIES)), kind=st.sampled_from(WEIGHTS), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_what_is_read(tmp_path_factory, family, kind, seed):
    folder = tmp_path_factory.mktemp("round")
    dtype = DTYPES[seed % 3]
    write(folder / "a.safetensors", {kind: family_tensors(family, SHAPES[kind], seed, dtype)}, {"ss_key": "ü"})
    first = read_lora_file(folder / "a.safetensors")
    save_tensors(folder / "b.safetensors", first.tensors, first.metadata, overwrite=True)
    second = read_lora_file(folder / "b.safetensors")
    assert first.metadata == second.metadata
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())
    base = noise(torch.Generator().manual_seed(seed), *SHAPES[kind])
    networks = [load_network(folder / f"{name}.safetensors") for name in "ab"]
    assert networks[0].adapters.keys() == networks[1].adapters.keys()
    for layer, adapter in networks[0].adapters.items():
        twin = networks[1].adapters[layer]
        assert (twin.algorithm, twin.rank, twin.shape) == (adapter.algorithm, adapter.rank, adapter.shape)
        assert adapter.fits(SHAPES[kind])
        assert torch.equal(adapter.delta_weight(base), twin.delta_weight(base))
