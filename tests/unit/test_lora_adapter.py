import math

import pytest
import torch

from lib_lora.core.adapters import is_low_rank, load_adapter
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.errors import AdapterError

RELATIVE_ERROR = 1e-6  # float32 against float64


def factors(out: int, rank: int, *rest: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * len(rest[1:])
    return {
        "lora_up": torch.randn(out, rank, *ones, generator=generator),
        "lora_down": torch.randn(rank, *rest, generator=generator),
    }


def relative(delta: torch.Tensor, exact: torch.Tensor) -> float:
    return ((delta.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("shape", [(12, 20), (12, 20, 1, 1), (12, 5, 3, 3)])
def test_delta_weight_is_alpha_over_rank_times_up_times_down(shape):
    tensors = factors(shape[0], 4, *shape[1:])
    adapter = load_adapter(tensors | {"alpha": torch.tensor(2.0)})
    exact = 0.5 * (tensors["lora_up"].double().flatten(1) @ tensors["lora_down"].double().flatten(1)).reshape(shape)
    assert relative(adapter.delta_weight(torch.zeros(shape)), exact) < RELATIVE_ERROR
    assert adapter.fits(shape)
    assert is_low_rank(adapter)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("alpha", ["absent", 0.0, 1.0, "rank", -1.0, math.nan, [2.0, 2.0]])
def test_alpha_is_followed_or_refused(rank, alpha):
    tensors = factors(32, rank, 48, seed=rank)
    if alpha != "absent":
        tensors["alpha"] = torch.tensor(float(rank) if alpha == "rank" else alpha)
    if alpha != "absent" and (tensors["alpha"].numel() > 1 or not torch.isfinite(tensors["alpha"])):
        with pytest.raises(AdapterError, match=r"alpha is .*not"):
            load_adapter(tensors)
        return
    scale = {"absent": 1.0, "rank": 1.0}.get(alpha) if isinstance(alpha, str) else alpha / rank
    exact = scale * tensors["lora_up"].double() @ tensors["lora_down"].double()
    delta = load_adapter(tensors).delta_weight(torch.zeros(32, 48))
    assert relative(delta, exact) < RELATIVE_ERROR if scale else not delta.any()


def test_an_alpha_in_a_list_of_one_is_a_number():
    tensors = factors(8, 2, 8)
    one = load_adapter(tensors | {"alpha": torch.tensor([3.0])}).delta_weight(torch.zeros(8, 8))
    assert torch.equal(one, load_adapter(tensors | {"alpha": torch.tensor(3.0)}).delta_weight(torch.zeros(8, 8)))


def test_the_files_own_scale_beats_alpha():
    tensors = factors(8, 2, 8) | {"alpha": torch.tensor(7.0), "scale": torch.tensor(0.25)}
    exact = 0.25 * tensors["lora_up"].double() @ tensors["lora_down"].double()
    assert relative(load_adapter(tensors).delta_weight(torch.zeros(8, 8)), exact) < RELATIVE_ERROR


def test_tuckers_core_is_folded_into_down():
    generator = torch.Generator().manual_seed(1)
    up, mid, down = (torch.randn(*s, generator=generator) for s in ((8, 4, 1, 1), (4, 3, 3, 3), (3, 5, 1, 1)))
    adapter = load_adapter({"lora_up": up, "lora_mid": mid, "lora_down": down, "alpha": torch.tensor(3.0)})
    exact = torch.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0].double(), mid.double(), down[:, :, 0, 0].double())
    assert relative(adapter.delta_weight(torch.zeros(8, 5, 3, 3)), exact) < RELATIVE_ERROR


def test_a_slice_of_ranks_keeps_the_scale_of_the_whole():
    tensors = factors(8, 6, 8) | {"alpha": torch.tensor(3.0)}
    exact = 0.5 * tensors["lora_up"][:, :2].double() @ tensors["lora_down"][:2].double()
    adapter = load_adapter(tensors).sliced(2)
    assert adapter.rank == 2
    assert relative(adapter.delta_weight(torch.zeros(8, 8)), exact) < RELATIVE_ERROR


def test_a_rank_larger_than_the_weight_is_right():
    tensors = factors(320, 4096, 320)
    exact = tensors["lora_up"].double() @ tensors["lora_down"].double()
    delta = load_adapter(tensors).delta_weight(torch.zeros(320, 320))
    assert relative(delta, exact) < 1e-5


def test_the_bound_is_one():
    tensors = factors(16, 4, 24)
    adapter = load_adapter(tensors)
    assert adapter.delta_weight(torch.zeros(16, 24)).abs().max() <= adapter.bound()
    tensors["lora_up"][3, 1] = math.nan
    assert not math.isfinite(load_adapter(tensors).bound())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_up": torch.ones(8, 4), "lora_down": torch.ones(3, 8)}, r"up \(8, 4\) and down \(3, 8\)"),
        ({"lora_up": torch.ones(8, 0), "lora_down": torch.ones(0, 8)}, "rank 0"),
        ({"lora_up": torch.ones(8, 4, 3, 3), "lora_down": torch.ones(4, 8, 1, 1)}, "up has the shape"),
        (
            {"lora_up": torch.ones(8, 4), "lora_mid": torch.ones(4, 4, 1, 1), "lora_down": torch.ones(4, 8, 3, 3)},
            r"mid \(4, 4, 1, 1\) and down \(4, 8, 3, 3\)",
        ),
        ({"hada_w1_a": torch.ones(8, 4)}, "no known algorithm"),
        ({"lora_up": torch.ones(8, 4), "lora_down": torch.ones(4, 8), "hada_w1_a": torch.ones(8)}, "no known"),
        ({"lora_up": torch.ones(8, 4)}, "no known algorithm"),
    ],
)
def test_what_is_no_lora_is_refused_with_its_shapes(tensors, message):
    with pytest.raises(AdapterError, match=message):
        load_adapter(tensors)


def test_an_adapter_can_not_exist_with_a_scale_that_is_no_number():
    with pytest.raises(AdapterError, match="scale"):
        LoraAdapter(torch.ones(2, 1), torch.ones(1, 2), math.inf)
