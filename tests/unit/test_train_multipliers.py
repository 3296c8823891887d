"""A picture of a list is learned with the network at its own strength, kohya's network_multiplier."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from test_train_loop import TEXT_LAYERS, UNET_LAYERS, with_adapters
from test_train_processes import largest, trained_by_two
from train_runs import load_tiny, options_for, run, tensors_of

from lib_lora.errors import JobError, TrainError
from lib_lora.train.adapters import LoraLayer
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.data.loader import Loader
from lib_lora.train.data.order import ALONE, Shard
from lib_lora.train.noise import draw
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.newest

PEFT_TOLERANCE = 1e-5
PROCESSES_TOLERANCE = 1e-6
RATE = 1.0
STRENGTHS = (0.25, 1.0, -0.5, 2.0, 0.0, 0.75)
SGD = {
    "optimizer_type": "SGD",
    "learning_rate": RATE,
    "max_grad_norm": 0,
    "network_dim": 3,
    "network_alpha": 2,
    "max_train_steps": 1,
}


def listed(pictures: Path, path: Path, strengths: tuple[Any, ...] = STRENGTHS) -> Path:
    """A list of the pictures with these strengths; ... for one of which nothing is said."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for picture, strength in zip(sorted(pictures.rglob("*.png")), strengths, strict=False):
        said = {} if strength is ... else {"network_multiplier": strength}
        lines.append(json.dumps({"file_name": str(picture), "text": picture.with_suffix(".txt").read_text()} | said))
    path.write_text("\n".join(lines))
    return path


def loaded(list_: Path, shard: Shard = ALONE, **given: Any) -> Loader:
    options = options_for(list_.parent, list_.parent, in_json=list_, **given)
    return Loader(open_dataset(options.data), shard=shard)


def test_a_batch_has_the_strengths_of_its_pictures(pictures, tmp_path):
    loader = loaded(listed(pictures, tmp_path / "list.jsonl", (0.25, ..., None, -2, 0, 100)), train_batch_size=4)
    said = dict(zip([str(path) for path in sorted(pictures.rglob("*.png"))], (0.25, 1, 1, -2, 0, 100), strict=True))
    for step in range(2):
        batch = loader.batch(step)
        assert batch.network_multipliers.dtype == torch.float32
        assert batch.network_multipliers.tolist() == [said[name] for name in batch.names]
        assert torch.equal(batch.to("cpu").network_multipliers, batch.network_multipliers)


def test_where_all_strengths_are_1_there_are_none(pictures, tmp_path):
    assert loaded(listed(pictures, tmp_path / "list.jsonl", (1, 1.0, ..., None))).batch(0).network_multipliers is None
    assert Loader(open_dataset(options_for(pictures, tmp_path).data)).batch(0).network_multipliers is None


def test_processes_share_the_strengths_of_a_batch(pictures, tmp_path):
    path = listed(pictures, tmp_path / "list.jsonl")
    alone = loaded(path, train_batch_size=4).batch(0).network_multipliers
    parts = [loaded(path, Shard(rank, 2), train_batch_size=2).batch(0).network_multipliers for rank in range(2)]
    assert torch.equal(torch.cat(parts), alone)


def test_other_strengths_are_told(pictures, tmp_path):
    report = open_dataset(
        options_for(tmp_path, tmp_path, in_json=listed(pictures, tmp_path / "list.jsonl")).data
    ).report
    assert "5 pictures are learned with the network at another strength than 1: -0.5 to 2" in str(report)
    assert "strength" not in str(open_dataset(options_for(pictures, tmp_path).data).report)


@pytest.mark.parametrize("said", ['"0.5"', "true", "NaN", "Infinity", "-1e400", "[1]", "100.5", "1" + "0" * 400])
def test_a_strength_that_is_none_is_one_sentence(pictures, tmp_path, said):
    path = listed(pictures, tmp_path / "list.jsonl", (1, "HERE"))
    path.write_text(path.read_text().replace('"HERE"', said))
    with pytest.raises(JobError, match=r"list\.jsonl: the network_multiplier of .*1\.png is .*; it must be a number"):
        open_dataset(options_for(tmp_path, tmp_path, in_json=path).data)


def moved_with_peft(model: Path, list_: Path, begun: Path, **given: Any) -> dict[str, Any]:
    """One step of SGD whose gradients are those of each picture alone, with PEFT's scaling times its strength."""
    pipe = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    file = load_file(begun)
    layers = with_adapters(pipe.unet, UNET_LAYERS, "lora_unet_", file)
    if not given.get("network_train_unet_only"):
        layers |= with_adapters(pipe.text_encoder, TEXT_LAYERS, "lora_te_text_model_", file)
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    options = options_for(list_.parent, model, in_json=list_, **given)
    said = map(json.loads, list_.read_text().splitlines())
    strengths = {facts["file_name"]: facts["network_multiplier"] for facts in said}
    dataset = open_dataset(options.data)
    batches = [dataset.order().rows(step) for step in range(options.optimizer.gradient_accumulation_steps)]
    for rows in batches:
        for row in rows:
            shown = dataset.pictures[row.picture]
            for layer in layers.values():
                layer.scaling["default"] = 2 / 3 * strengths[shown.name]
            drawn = draw(0, [row.place], (4, 8, 8), (0, 1000))
            found = pipe.vae.encode(pipe.image_processor.preprocess(Image.open(shown.path))).latent_dist
            latents = (found.mean + found.std * drawn.encoding) * pipe.vae.config.scaling_factor
            ids = pipe.tokenizer(shown.caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
            noisy = scheduler.add_noise(latents, drawn.noise, drawn.times)
            predicted = pipe.unet(noisy, drawn.times, pipe.text_encoder(ids)[0]).sample
            (torch.nn.functional.mse_loss(predicted, drawn.noise) / len(rows) / len(batches)).backward()
    torch.optim.SGD(
        [w for one in layers.values() for w in (one.lora_A["default"].weight, one.lora_B["default"].weight)], RATE
    ).step()
    return layers


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"network_train_unet_only": True, "cache_latents": True, "cache_text_encoder_outputs": True},
    ],
    ids=str,
)
def test_a_batch_has_the_gradients_of_its_pictures_trained_apart_with_peft(model, pictures, begun, tmp_path, given):
    path = listed(pictures, tmp_path / "list.jsonl")
    given = {"train_batch_size": 4, **given}
    reference = moved_with_peft(model, path, begun, **given)
    made = tensors_of(run(model, tmp_path, tmp_path / "out", in_json=path, network_weights=begun, **SGD, **given))
    before = load_file(begun)
    moved = 0.0
    for name, layer in reference.items():
        for ending, theirs in (("lora_down", layer.lora_A), ("lora_up", layer.lora_B)):
            key = f"{name}.{ending}.weight"
            wanted = theirs["default"].weight.detach().reshape(made[key].shape)
            moved = max(moved, (wanted - before[key]).abs().max().item())
            assert (made[key] - wanted).abs().max() < PEFT_TOLERANCE, key
    assert moved > 100 * PEFT_TOLERANCE


def test_all_pieces_of_a_caption_have_its_strength():
    layer = LoraLayer(torch.nn.Linear(3, 2), 2, 2.0)
    torch.nn.init.normal_(layer.lora_up.weight)
    x, base = torch.randn(4, 5, 3), torch.zeros(4, 5, 2)
    layer.multiplier = torch.tensor([0.5, 2.0])
    made: Tensor = layer.add(torch.nn.Identity(), (x,), base)
    plain = x @ layer.lora_down.weight.T @ layer.lora_up.weight.T
    assert torch.allclose(made, plain * torch.tensor([0.5, 0.5, 2.0, 2.0])[:, None, None])


def test_between_steps_the_strength_is_1_for_pictures_of_any_number(model, pictures, tmp_path):
    part, widths = load_tiny(model), []

    def look(_: Any) -> None:
        unet = part.unet
        states = torch.zeros(1, 77, unet.config.cross_attention_dim)
        widths.append(len(unet(torch.zeros(1, 4, 8, 8), 0, states).sample))

    path = listed(pictures, tmp_path / "list.jsonl")
    train(part, options_for(tmp_path, tmp_path / "out", in_json=path), progress=look)
    assert widths == [1, 1, 1]


def test_other_strengths_are_another_training(model, pictures, tmp_path):
    ended = run(
        model, tmp_path, tmp_path / "out", in_json=listed(pictures, tmp_path / "a.jsonl"), save_state_every_n_steps=1
    )
    other = listed(pictures, tmp_path / "b.jsonl", (*STRENGTHS[:-1], 0.5))
    with pytest.raises(TrainError, match="pictures"):
        run(model, tmp_path, tmp_path / "out", in_json=other, resume=ended.paths[0].with_name("made-state"))


def test_a_model_that_is_trained_itself_has_no_strength(model, pictures, tmp_path):
    with pytest.raises(JobError, match="network_multiplier is a network's strength, and full trains none"):
        run(model, tmp_path, tmp_path / "out", in_json=listed(pictures, tmp_path / "list.jsonl"), full=True)


@pytest.mark.slow
def test_two_processes_learn_at_the_strengths_that_one_would(model, pictures, begun, tmp_path):
    path = listed(pictures, tmp_path / "list.jsonl")
    given = {**SGD, "network_weights": begun, "in_json": path}
    alone = run(model, tmp_path, tmp_path / "alone", train_batch_size=4, **given).paths[0]
    joined = trained_by_two(model, tmp_path / "joined", **given)
    before, one, two = (load_file(file) for file in (begun, alone, joined))
    assert largest(before, one) > 100 * PROCESSES_TOLERANCE
    assert largest(one, two) < PROCESSES_TOLERANCE
