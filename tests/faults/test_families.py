"""Bad tensors of every algorithm: that network is refused whole, in one sentence; the others are applied."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.adapters import load_adapter
from lib_lora.core.keymap import KeyMap
from lib_lora.core.naming import split_key
from lib_lora.core.network import load_network
from lib_lora.core.plan import match_network
from lib_lora.errors import AdapterError
from lib_lora.session import LoraSession
from tests.family_files import FAMILIES, KEYS, WEIGHTS, family_tensors, toys, write
from tests.toys import digest

SHAPES = {"linear": (24, 16), "3x3": (24, 8, 3, 3), "1x1": (16, 24, 1, 1), "rows": (16, 16)}
ODD_SHAPES = [(), (1,), (5,), (3, 3), (24, 16), (1, 1, 1), (2, 3, 3), (4, 4, 4, 4), (1, 2, 1, 2, 1)]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "good.safetensors", {kind: family_tensors("LoRA", SHAPES[kind]) for kind in SHAPES})
    return tmp_path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Weights with the good network alone."""
    folder = tmp_path_factory.mktemp("good")
    write(folder / "good.safetensors", {kind: family_tensors("LoRA", SHAPES[kind]) for kind in SHAPES})
    components = toys()
    LoraSession(components, LoraCatalog([folder])).set([("good", 0.5)])
    return digest(*components.values())


@pytest.fixture(scope="module")
def keymap():
    return KeyMap.from_modules(toys())


def refusal(folder, good: str) -> str:
    """Ask for the bad network beside the good one; the sentence about the bad one."""
    components = toys()
    base = digest(*components.values())
    session = LoraSession(components, LoraCatalog([folder]))
    report = session.set([("bad", 0.7), ("good", 0.5)])
    assert [refused.name for refused in report.refused] == ["bad"]
    assert [lora.name for lora in report.applied] == ["good"]
    assert digest(*components.values()) == good
    session.clear()
    assert digest(*components.values()) == base
    return report.refused[0].reason


def changed(family: str, kind: str, **tensors) -> dict:
    """A family's tensors, some replaced."""
    return family_tensors(family, SHAPES[kind]) | {
        name.replace("__", "."): value for name, value in tensors.items() if value is not None
    }


def spoilt(family: str, kind: str, name: str, value: float) -> dict:
    """A family's tensors, one number of one of them replaced."""
    tensors = {suffix: tensor.contiguous() for suffix, tensor in family_tensors(family, SHAPES[kind]).items()}
    tensors[name] = tensors[name].float()
    tensors[name].view(-1)[-1] = value
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_in_any_family_refuses_the_network(folder, good, family):
    name = next(iter(family_tensors(family, SHAPES["linear"])))
    tensors = {layer: family_tensors(family, SHAPES[layer]) for layer in WEIGHTS}
    write(folder / "bad.safetensors", tensors | {"3x3": spoilt(family, "3x3", name, float("nan"))})
    sentence = refusal(folder, good)
    assert sentence.startswith("bad: 1 of 4 layers hold NaN or infinity, the first is unet:conv3")


def adapter_of(tensors: dict):
    """The adapter of one layer, without a file around it, or why there is none."""
    roles = {split_key(f"lora_unet_linear.{suffix}").role: tensor for suffix, tensor in tensors.items()}
    try:
        return load_adapter(roles)
    except AdapterError as error:
        return error


@pytest.mark.parametrize("kind", ["linear", "3x3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_number_that_is_none_is_found_in_any_tensor(family, kind):
    for name in family_tensors(family, SHAPES[kind]):
        for value in (float("nan"), float("inf"), float("-inf")):
            adapter = adapter_of(spoilt(family, kind, name, value))
            if isinstance(adapter, AdapterError):
                assert "not a finite number" in str(adapter)
            else:
                assert not math.isfinite(adapter.bound())


BAD = {
    "magnitudes of too few outputs": (
        "linear",
        changed("LoRA", "linear", dora_scale=torch.ones(23, 1)),
        r"unet\.linear is \(24, 16\) here, \(24, 16\) with magnitudes of 23 outputs in the LoRA",
    ),
    "magnitudes of too many inputs": (
        "3x3",
        changed("LoHa", "3x3", dora_scale=torch.ones(1, 9, 1, 1)),
        r"unet\.conv3 is \(24, 8, 3, 3\) here, \(24, 72\) with magnitudes of 9 inputs in the LoRA",
    ),
    "magnitudes that are a matrix": (
        "linear",
        changed("LoRA", "linear", dora_scale=torch.ones(24, 16)),
        r"layer unet:linear: dora_scale has the shape \(24, 16\), one for each output or input",
    ),
    "magnitudes twice": (
        "linear",
        changed("LoRA", "linear", dora_scale=torch.ones(24, 1), lora_magnitude_vector=torch.ones(24)),
        "dora_scale and lora_magnitude_vector are two spellings",
    ),
    "magnitudes beside what they can not stand with": (
        "linear",
        changed("Full", "linear", dora_scale=torch.ones(24, 1)),
        "layer unet:linear: no known algorithm has the tensors diff, dora_scale",
    ),
    "a Kronecker product of another size": (
        "linear",
        changed("LoKr", "linear", lokr_w1=torch.ones(4, 5)),
        r"unet\.linear is \(24, 16\) here, \(24, 20\) = \(4, 5\) ⊗ \(6, 4\) in the LoRA",
    ),
    "a Kronecker product for another kernel": (
        "3x3",
        changed("LoKr whole", "3x3", lokr_w2=torch.ones(12, 2, 1, 1)),
        r"unet\.conv3 is \(24, 8, 3, 3\) here, \(24, 8, 1, 1\) = \(2, 4\) ⊗ \(12, 2, 1, 1\) in the LoRA",
    ),
    "factors of a Kronecker factor that do not multiply": (
        "linear",
        changed("LoKr", "linear", lokr_w2_b=torch.ones(3, 4)),
        r"layer unet:linear: the factors \(6, 2\), \(3, 4\) share no rank",
    ),
    "a Kronecker factor given twice": (
        "linear",
        changed("LoKr", "linear", lokr_w2=torch.ones(6, 4)),
        "lokr_w2 or lokr_w2_a and lokr_w2_b were expected, found: lokr_w2, lokr_w2_a, lokr_w2_b",
    ),
    "rotations of too few outputs": (
        "linear",
        {"oft_blocks": torch.zeros(5, 4, 4)},
        r"unet\.linear is \(24, 16\) here, 5 blocks of 4 outputs in the LoRA",
    ),
    "rotations that are not square": (
        "linear",
        {"oft_blocks": torch.zeros(6, 4, 3)},
        r"layer unet:linear: the blocks have the shape \(6, 4, 3\), \(count, n, n\) was expected",
    ),
    "rotations with too few factors": (
        "linear",
        {"oft_blocks": torch.zeros(6, 4, 4), "rescale": torch.ones(23, 1)},
        r"rescale has the shape \(23, 1\), the blocks have 24 rows",
    ),
    "a butterfly that does not divide the outputs": (
        "linear",
        {"oft_blocks": torch.zeros(3, 6, 4, 4)},
        r"unet\.linear is \(24, 16\) here, 3 stages of 6 blocks of 4 outputs in the LoRA",
    ),
    "a butterfly of odd blocks": (
        "linear",
        {"oft_blocks": torch.zeros(1, 8, 3, 3)},
        r"the blocks have the shape \(1, 8, 3, 3\), \(stages, count, n, n\) with n even",
    ),
    "rotations that can not be inverted": (
        "linear",
        {"oft_blocks": torch.randn(8, 3, 3, generator=torch.Generator().manual_seed(0)) * 1e30},
        "1 of 1 layers hold NaN or infinity, the first is unet:linear",
    ),
    "halves of two shapes": (
        "linear",
        changed("LoHa", "linear", hada_w2_b=torch.ones(4, 15)),
        r"layer unet:linear: the two halves have the shapes \(24, 16\) and \(24, 15\)",
    ),
    "a half whose factors share no rank": (
        "linear",
        changed("LoHa", "linear", hada_w2_b=torch.ones(3, 16)),
        r"layer unet:linear: the factors of a half share no rank: \(24, 4\), \(3, 16\)",
    ),
    "factors of too many inputs": (
        "linear",
        {"weight": torch.ones(17), "on_input": torch.tensor(1)},
        r"unet\.linear is \(24, 16\) here, 17 inputs in the LoRA",
    ),
    "a generalised LoRA of another width": (
        "linear",
        changed("GLoRA", "linear", a1__weight=torch.ones(15, 3), a2__weight=torch.ones(3, 15)),
        r"layer unet:linear: A is \(15, 3\) times \(3, 15\), B is \(24, 16\)",
    ),
    "a generalised LoRA whose factors share no rank": (
        "linear",
        changed("GLoRA", "linear", b2__weight=torch.ones(5, 16)),
        r"a1, a2, b1, b2 of the shapes \(16, 3\), \(3, 16\), \(24, 3\), \(5, 16\) share no rank",
    ),
    "a whole change of another shape": (
        "3x3",
        {"diff": torch.ones(24, 8, 1, 1)},
        r"unet\.conv3 is \(24, 8, 3, 3\) here, \(24, 8, 1, 1\) in the LoRA",
    ),
    "a change of a bias of another length": (
        "linear",
        {"diff": torch.ones(24, 16), "diff_b": torch.ones(25)},
        r"unet\.linear\.bias is \(24,\) here, \(25,\) in the LoRA",
    ),
    "a norm of another length": (
        "layer norm",
        {"w_norm": torch.ones(23), "b_norm": torch.ones(23)},
        r"unet\.norm is \(24,\) here, \(23,\) in the LoRA",
    ),
    "a norm that is a matrix": ("layer norm", {"w_norm": torch.ones(24, 1)}, r"w_norm has the shape \(24, 1\)"),
    "a mixture of two families": (
        "linear",
        changed("LoRA", "linear", hada_w1_a=torch.ones(24, 4)),
        "layer unet:linear: no known algorithm has the tensors alpha, hada_w1_a, lora_down, lora_up",
    ),
    "half a family": (
        "linear",
        {"hada_w1_a": torch.ones(24, 4), "hada_w1_b": torch.ones(4, 16)},
        "layer unet:linear: no known algorithm has the tensors hada_w1_a, hada_w1_b",
    ),
    "no family that is known": (
        "linear",
        {"vera_lambda_b": torch.ones(24), "vera_lambda_d": torch.ones(4)},
        r"bad: none of its 0 layers .* 2 keys are not LoRA tensors \(first: lora_unet_linear\.vera_lambda_b",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_together_or_the_layer_is_refused_with_file_layer_and_shapes(folder, good, case):
    kind, tensors, words = BAD[case]
    write(folder / "bad.safetensors", {kind: tensors})
    sentence = refusal(folder, good)
    assert sentence.startswith("bad: ")
    assert re.search(words, sentence)
    assert "\n" not in sentence


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bad_layer_among_good_ones_refuses_all_of_them(folder, good, family):
    tensors = {kind: family_tensors(family, SHAPES[kind]) for kind in WEIGHTS}
    tensors["1x1"] = family_tensors(family, (20, 28, 1, 1))
    write(folder / "bad.safetensors", tensors)
    assert re.search(r"1 of 4 layers .* unet\.conv1 is \(16, 24, 1, 1\) here", refusal(folder, good))


@pytest.mark.parametrize("kind", ["linear", "3x3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_any_shape_are_refused_or_computed_and_nothing_else_is_raised(family, kind):
    base = torch.ones(SHAPES[kind])
    for name in family_tensors(family, SHAPES[kind]):
        for shape in ODD_SHAPES:
            adapter = adapter_of(family_tensors(family, SHAPES[kind]) | {name: torch.ones(shape)})
            if isinstance(adapter, AdapterError):
                continue
            assert adapter.shape_text()
            assert adapter.bound() >= 0
            if adapter.fits(base.shape):
                assert adapter.delta_weight(base).shape == base.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_without_numbers_changes_nothing_and_is_told(tmp_path, keymap, family):
    for name, tensor in family_tensors(family, SHAPES["linear"]).items():
        tensors = {layer: family_tensors(family, SHAPES[layer]) for layer in WEIGHTS}
        tensors["linear"][name] = torch.ones(0, *tensor.shape[1:])
        network = load_network(write(tmp_path / "empty.safetensors", tensors))
        assert network.notes == ("1 of 4 layers have rank 0 and change nothing",)
        layers = {layer.key for layer, _ in match_network(keymap, network).layers}
        assert layers == {KEYS[kind] for kind in WEIGHTS if kind != "linear"}
