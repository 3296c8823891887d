"""Forwards and merged weights against what kohya's own scripts computed on the same model and LoRAs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.catalog import LoraCatalog
from lib_lora.session import LoraSession
from tests.golden.kohya_model import HERE, build, checkpoint, te_key, unet_keys
from tests.toys import digest

FORWARD_ERROR = 1e-5  # absolute, float32
FLOAT_MERGE_ERROR = 1e-6
FP16_MERGE_ERROR = 1e-3  # kohya rounds the product and the sum to fp16
FP16_ULP = 2**-10

REQUESTS = {
    "base": [],
    "A0.7": [("lora_A", 0.7)],
    "D0.7": [("lora_D_c3lier", 0.7)],
    "E-0.4": [("lora_E_c3lier", -0.4)],
    "A0.7_D0.3": [("lora_A", 0.7), ("lora_D_c3lier", 0.3)],
    "A_set0": [("lora_A", 0.0)],
    "A_set-1.5": [("lora_A", -1.5)],
    "merge_to_D0.7": [("lora_D_c3lier", 0.7)],
    "mergedfile_A0.8": [("lora_A", 0.8)],
    "mergedfile_A0.8_D0.5": [("lora_A", 0.8), ("lora_D_c3lier", 0.5)],
}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def vectors():
    return load_file(HERE / "forward.safetensors")


@pytest.fixture
def session(model):
    unet, te = model
    session = LoraSession({"unet": unet, "te1": te}, LoraCatalog([HERE]))
    yield session
    session.unload()


@torch.no_grad()
def outputs(model, vectors) -> dict[str, torch.Tensor]:
    unet, te = model
    encoded = te(vectors["input_ids"], output_hidden_states=True)
    noise = unet(vectors["x"], vectors["timesteps"], vectors["context"]).sample
    return {
        "unet": noise,
        "te_last": encoded.last_hidden_state,
        "te_hs-2": encoded.hidden_states[-2],
        "te_pool": encoded.pooler_output,
    }


@pytest.mark.parametrize("mode", ["prefuse", "hook"])
@pytest.mark.parametrize("tag", REQUESTS)
def test_a_forward_equals_kohyas(session, model, vectors, tag, mode):
    session.mode = mode
    report = session.set(REQUESTS[tag])
    assert not report.refused
    for name, output in outputs(model, vectors).items():
        assert (output - vectors[f"{name}_{tag}"]).abs().max() < FORWARD_ERROR, name


def test_every_layer_of_kohyas_files_is_found(session):
    report = session.set(REQUESTS["A0.7_D0.3"])
    assert [(lora.layers, lora.unmatched) for lora in report.applied] == [(210, 0), (296, 0)]


def merged_pairs(model, name: str):
    """(ours, kohya's) for every weight of the merged checkpoint."""
    unet, te = model
    ours = unet.state_dict()
    keys = unet_keys()
    for key, theirs in checkpoint(name).items():
        if key in keys:
            yield key, ours[keys[key]].reshape(theirs.shape), theirs
        elif "transformer.text_model" in key and "position_ids" not in key:
            yield key, te.state_dict()[te_key(te, key)], theirs


def test_merged_weights_equal_kohyas_float_merge(session, model):
    session.set([("lora_A", 0.8)])
    for key, ours, theirs in merged_pairs(model, "merge1_float"):
        assert (ours - theirs).abs().max() < FLOAT_MERGE_ERROR, key


def test_merged_weights_are_near_kohyas_fp16_merge():
    model = build(torch.float16)
    session = LoraSession({"unet": model[0], "te1": model[1]}, LoraCatalog([HERE]))
    session.set([("lora_A", 0.8)])
    for key, ours, theirs in merged_pairs(model, "merge1_fp16"):
        assert (ours.float() - theirs.float()).abs().max() < FP16_MERGE_ERROR, key


def test_a_float_merge_saved_as_fp16_is_within_one_step_of_kohyas(session, model):
    session.set([("lora_A", 0.8), ("lora_D_c3lier", 0.5)])
    for key, ours, theirs in merged_pairs(model, "merge2_float_savefp16"):
        step = theirs.float().abs().clamp_min(2**-14) * FP16_ULP
        assert ((ours.half().float() - theirs.float()).abs() <= step).all(), key


def test_clear_gives_the_base_weights_back(session, model):
    before = digest(*model)
    session.set(REQUESTS["A0.7_D0.3"])
    assert digest(*model) != before
    session.clear()
    assert digest(*model) == before
