"""The loop: what it computes, that it goes on to the same bits, and that several processes compute what one does."""

from __future__ import annotations

import math
import random
import statistics
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from train_runs import load_tiny, options_for, run, same, tensors_of

from lib_lora.core import replacing
from lib_lora.errors import OutputError, TrainError
from lib_lora.train import trainer
from lib_lora.train.control import Wish
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.noise import draw
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

pytestmark = pytest.mark.newest

PEFT_TOLERANCE = 1e-5
CHECKPOINTING_TOLERANCE = 1e-6
CACHING_TOLERANCE = 1e-6  # products of other numbers of pictures are rounded in another way
ACCUMULATION_TOLERANCE = 0.05
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANDOM_THINGS = {
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "network_dropout": 0.2,
    "module_dropout": 0.2,
    "caption_dropout_rate": 0.3,
    "flip_aug": True,
    "noise_offset": 0.05,
    "min_snr_gamma": 5,
    "ema": True,
    "max_train_steps": 6,
    "gradient_accumulation_steps": 2,
}


def with_adapters(module: nn.Module, targets: list[str], prefix: str, file: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's adapters in a module, with the factors of a file of kohya's: name in the file → layer."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=2, target_modules=targets), module)
    layers = {}
    for path, layer in module.named_modules():
        if hasattr(layer, "lora_A"):
            name = f"{prefix}{path.removeprefix('text_model.').replace('.', '_')}"
            shape = layer.lora_A["default"].weight.shape
            layer.lora_A["default"].weight.data = file[f"{name}.lora_down.weight"].reshape(shape).clone()
            shape = layer.lora_B["default"].weight.shape
            layer.lora_B["default"].weight.data = file[f"{name}.lora_up.weight"].reshape(shape).clone()
            layers[name] = layer
    return layers


def trained_with_peft(model: Path, pictures: Path, begun: Path, steps: int, rate: float) -> dict[str, Any]:
    """The same training in diffusers' and PEFT's words; only the order of pictures and their noise are ours."""
    pipe = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    file = load_file(begun)
    layers = with_adapters(pipe.unet, UNET_LAYERS, "lora_unet_", file)
    layers |= with_adapters(pipe.text_encoder, TEXT_LAYERS, "lora_te_text_model_", file)
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    weights = [one["default"].weight for layer in layers.values() for one in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.SGD(weights, lr=rate)
    dataset = open_dataset(options_for(pictures, model).data)
    for step in range(steps):
        rows = dataset.order().rows(step)
        shown = [dataset.pictures[row.picture] for row in rows]
        pixels = torch.stack([pipe.image_processor.preprocess(Image.open(one.path))[0] for one in shown])
        drawn = draw(0, [row.place for row in rows], (4, 8, 8), (0, 1000))
        noise, times = drawn.noise, drawn.times
        found = pipe.vae.encode(pixels).latent_dist
        latents = (found.mean + found.std * drawn.encoding) * pipe.vae.config.scaling_factor
        tokens = pipe.tokenizer(
            [one.caption for one in shown], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        states = pipe.text_encoder(tokens)[0]
        predicted = pipe.unet(scheduler.add_noise(latents, noise, times), times, states).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
    return layers


def test_three_steps_of_sgd_are_those_of_an_independent_loop_with_peft(model, pictures, begun, tmp_path):
    rate = 5.0
    made = tensors_of(
        run(
            model,
            pictures,
            tmp_path,
            optimizer_type="SGD",
            learning_rate=rate,
            max_grad_norm=0,
            network_dim=3,
            network_alpha=2,
            network_weights=begun,
        )
    )
    layers = trained_with_peft(model, pictures, begun, 3, rate)
    before = load_file(begun)
    assert len(layers) * 3 == len(made)
    moved: list[Tensor] = []
    for name, layer in layers.items():
        for ours, theirs in (("lora_down", layer.lora_A), ("lora_up", layer.lora_B)):
            key = f"{name}.{ours}.weight"
            expected = theirs["default"].weight.reshape(made[key].shape)
            assert (made[key] - expected).abs().max() < PEFT_TOLERANCE
            moved.append((made[key] - before[key]).abs().max())
    assert statistics.median(moved) > 10 * PEFT_TOLERANCE


def gradients(model: Path, pictures: Path, out: Path, begun: Path, **given: Any) -> dict[str, Tensor]:
    """Of the first step: what SGD at rate 1 takes off."""
    options: dict[str, Any] = {"optimizer_type": "SGD", "learning_rate": 1.0, "max_grad_norm": 0, "max_train_steps": 1}
    ranks = {"network_dim": 3, "network_alpha": 2, "network_weights": begun}
    after, before = tensors_of(run(model, pictures, out, **{**options, **ranks, **given})), load_file(begun)
    return {name: before[name] - after[name] for name in after if not name.endswith("alpha")}


def test_gradients_are_the_same_with_gradient_checkpointing(model, pictures, begun, tmp_path):
    plain = gradients(model, pictures, tmp_path / "plain", begun)
    less = gradients(model, pictures, tmp_path / "less", begun, gradient_checkpointing=True)
    assert max(gradient.abs().max() for gradient in plain.values()) > 100 * CHECKPOINTING_TOLERANCE
    assert max((plain[name] - less[name]).abs().max() for name in plain) < CHECKPOINTING_TOLERANCE


def test_what_is_encoded_before_is_what_is_encoded_in_each_step(model, pictures, begun, tmp_path):
    given = {"network_train_unet_only": True}
    plain = gradients(model, pictures, tmp_path / "plain", begun, **given)
    cached = gradients(
        model, pictures, tmp_path / "cached", begun, cache_latents=True, cache_text_encoder_outputs=True, **given
    )
    assert plain.keys() == cached.keys()
    assert max((plain[name] - cached[name]).abs().max() for name in plain) < CACHING_TOLERANCE


def test_a_step_of_two_accumulated_batches_goes_the_mean_way_of_both(model, pictures, begun, tmp_path):
    """At a rate at which the second of two steps is where the first was, as good as."""
    rate = {"learning_rate": 1e-2}
    one = gradients(model, pictures, tmp_path / "one", begun, gradient_accumulation_steps=2, **rate)
    two = gradients(model, pictures, tmp_path / "two", begun, max_train_steps=2, **rate)
    whole = torch.cat([gradient.flatten() for gradient in one.values()])
    parts = torch.cat([gradient.flatten() for gradient in two.values()]) / 2
    assert (whole - parts).norm() < ACCUMULATION_TOLERANCE * whole.norm()


class Stopped(Exception):  # noqa: N818 - it stands for a kill
    """Ends a training at once."""


def killed_at(step: int) -> dict[str, Any]:
    def progress(now: Any) -> None:
        if now.step == step:
            raise Stopped

    return {"progress": progress}


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_to_the_same_bits(model, pictures, tmp_path):
    whole = tensors_of(run(model, pictures, tmp_path / "whole", **RANDOM_THINGS))
    for step in random.Random(0).sample(range(2, 7), 2):
        out = tmp_path / str(step)
        with pytest.raises(Stopped):
            run(model, pictures, out, calls=killed_at(step), save_state_every_n_steps=1, **RANDOM_THINGS)
        torch.randn(step)  # chance elsewhere in the process
        made = run(model, pictures, out, resume=out / "made-state", **RANDOM_THINGS)
        assert same(tensors_of(made), whole)


def test_a_training_that_is_ended_saves_and_goes_on_to_the_same_bits(model, pictures, tmp_path):
    whole = tensors_of(run(model, pictures, tmp_path / "whole", **RANDOM_THINGS))
    wishes = iter([Wish.GO, Wish.PAUSE, Wish.GO, Wish.STOP])
    ended = run(model, pictures, tmp_path / "out", calls={"wishes": lambda: next(wishes)}, **RANDOM_THINGS)
    assert ended.stopped
    assert ended.step == 3
    assert ended.paths[0].exists()
    assert not same(tensors_of(ended), whole)
    made = run(model, pictures, tmp_path / "out", resume=ended.state, **RANDOM_THINGS)
    assert same(tensors_of(made), whole)


def test_only_the_newest_states_are_kept(model, pictures, tmp_path):
    run(model, pictures, tmp_path, max_train_steps=6, save_state_every_n_steps=1, save_last_n_states=2)
    names = sorted(path.name for path in (tmp_path / "made-state").iterdir())
    assert names == ["step-00000004.safetensors", "step-00000005.safetensors"]


def test_a_state_of_another_training_is_refused_by_what_differs(model, pictures, tmp_path):
    run(model, pictures, tmp_path, save_state_every_n_steps=1)
    with pytest.raises(TrainError, match=r"network_dim was 4 and is 8"):
        run(model, pictures, tmp_path, resume=tmp_path / "made-state", network_dim=8)
    with pytest.raises(TrainError, match="holds no state of a training"):
        run(model, pictures, tmp_path, resume=tmp_path / "nowhere")
    with pytest.raises(TrainError, match="network_weights"):
        run(model, pictures, tmp_path, resume=tmp_path / "made.safetensors")


def test_a_loss_that_is_no_number_ends_the_training_and_the_last_state_stays(model, pictures, tmp_path):
    given = {"optimizer_type": "SGD", "learning_rate": 1e30, "max_grad_norm": 0, "save_state_every_n_steps": 1}
    with pytest.raises(TrainError, match=r"loss of step \d+ is (nan|inf).*1e\+30|holds NaN or infinity"):
        run(model, pictures, tmp_path, max_train_steps=9, **given)
    assert not (tmp_path / "made.safetensors").exists()
    for state in (tmp_path / "made-state").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(state).values())


def test_memory_that_runs_out_is_told_with_what_takes_less(model, pictures, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.Training, "_loss", full)
    with pytest.raises(TrainError, match=r"memory ran out in step 1.*gradient_checkpointing"):
        run(model, pictures, tmp_path)


def test_memory_that_runs_out_before_the_first_step_is_told_with_what_takes_less(
    model, pictures, tmp_path, monkeypatch
):
    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "make_optimizer", full)
    with pytest.raises(TrainError, match=r"memory ran out while .* prepared .*gradient_checkpointing"):
        run(model, pictures, tmp_path)


def test_a_full_disk_leaves_the_last_state(model, pictures, tmp_path, monkeypatch):
    usage = replacing.shutil.disk_usage

    def progress(now: Any) -> None:
        if now.step == 2:
            monkeypatch.setattr(replacing.shutil, "disk_usage", lambda path: usage(path)._replace(free=10))

    with pytest.raises(OutputError, match="the disk is full"):
        run(model, pictures, tmp_path, calls={"progress": progress}, save_state_every_n_steps=1)
    assert [path.name for path in (tmp_path / "made-state").iterdir()] == ["step-00000001.safetensors"]


def test_a_result_that_is_there_is_refused_before_anything_is_done(model, pictures, tmp_path):
    (tmp_path / "made.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        run(model, pictures, tmp_path)
    assert (tmp_path / "made.safetensors").read_bytes() == b"mine"


def test_the_model_computes_as_before_when_the_training_is_over(model, pictures, tmp_path):
    loaded = load_tiny(model)
    before = {name: tensor.clone() for name, tensor in loaded.unet.state_dict().items()}
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 8)
    expected = loaded.unet(*inputs).sample
    train(loaded, options_for(pictures, tmp_path, gradient_checkpointing=True))
    assert torch.equal(loaded.unet(*inputs).sample, expected)
    assert same(dict(loaded.unet.state_dict()), before)
    assert not loaded.unet.is_gradient_checkpointing


def test_what_is_told_after_each_step_adds_up(model, pictures, tmp_path):
    told: list[Any] = []
    outcome = run(model, pictures, tmp_path, calls={"progress": told.append}, max_train_epochs=1)
    assert [now.step for now in told] == list(range(1, 7))
    assert {now.steps for now in told} == {outcome.steps} == {6}
    assert all(math.isfinite(now.loss) and now.steps_per_second > 0 for now in told)
    assert told[0].rates == {"textencoder": 1e-2, "unet": 1e-2}
