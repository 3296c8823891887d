"""The same LoRA through PEFT and diffusers, called live, gives the same picture elements."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lib_lora.catalog import LoraCatalog
from lib_lora.session import LoraSession
from tests.toys import digest, sd1_unet

ERROR = 2e-5  # absolute, float32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 16, 16), torch.tensor([17, 801]), torch.randn(2, 11, 32)


def peft_model(alphas: dict[str, int]):
    """A UNet with one PEFT adapter for each name, random factors."""
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = sd1_unet()
    for number, (name, alpha) in enumerate(alphas.items()):
        unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS), adapter_name=name)
        torch.manual_seed(10 + number)
        for key, parameter in unet.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter, std=0.2)
    return unet.requires_grad_(False)


def save_peft(unet, name: str, path, prefix: str = "unet.") -> None:
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(unet, adapter_name=name)
    save_file({f"{prefix}{key}": tensor.contiguous() for key, tensor in tensors.items()}, path)


@torch.no_grad()
def run(unet, inputs) -> torch.Tensor:
    return unet(*inputs).sample


@pytest.mark.parametrize("mode", ["prefuse", "hook"])
@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.unet.", ""])
def test_two_peft_adapters_at_two_strengths(tmp_path, inputs, mode, prefix):
    theirs = peft_model({"a": 4, "b": 4})
    for name in "ab":
        save_peft(theirs, name, tmp_path / f"{name}.safetensors", prefix)
    theirs.set_adapters(["a", "b"], weights=[0.8, -0.5])
    torch.manual_seed(0)
    ours = sd1_unet()
    session = LoraSession({"unet": ours}, LoraCatalog([tmp_path]), mode=mode)
    report = session.set([("a", 0.8), ("b", -0.5)])
    assert not report.refused
    assert all(not lora.unmatched for lora in report.applied)
    assert (run(ours, inputs) - run(theirs, inputs)).abs().max() < ERROR


def test_what_diffusers_saves_with_its_metadata_has_the_scale_it_had(tmp_path, inputs):
    theirs = peft_model({"a": 8})
    theirs.save_lora_adapter(tmp_path, adapter_name="a", weight_name="saved.safetensors")
    torch.manual_seed(0)
    ours = sd1_unet()
    session = LoraSession({"unet": ours}, LoraCatalog([tmp_path]))
    assert not session.set([("saved", 1.0)]).refused
    assert (run(ours, inputs) - run(theirs, inputs)).abs().max() < ERROR


def test_many_loras_can_be_taken_back_where_diffusers_unfuse_can_not(tmp_path, inputs):
    theirs = peft_model({"a": 4, "b": 4})
    for name in "ab":
        save_peft(theirs, name, tmp_path / f"{name}.safetensors")
    torch.manual_seed(0)
    ours = sd1_unet()
    base = digest(ours)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if "base_layer" in name}
    session = LoraSession({"unet": ours}, LoraCatalog([tmp_path]))
    session.set([("a", 0.8), ("b", 0.5)])
    session.clear()
    assert digest(ours) == base
    theirs.fuse_lora(adapter_names=["a", "b"])
    theirs.unfuse_lora()
    after = theirs.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
