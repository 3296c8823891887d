"""Noise, losses, captions and optimizers are those of diffusers, transformers and torch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from tiny_pipelines import make_tiny, write_folder, write_tokenizer
from transformers import CLIPTokenizer

from lib_lora.errors import JobError
from lib_lora.train.averages import MovingAverage
from lib_lora.train.losses import min_snr_weights, sample_losses, time_weights
from lib_lora.train.noise import NoiseSchedule, draw, learned_noise
from lib_lora.train.optimizers import make_optimizer
from lib_lora.train.schedules import make_schedule
from lib_lora.train.settings import LossOptions, NoiseOptions, OptimizerOptions
from lib_lora.train.text import PIECE, captions_to_tokens, tokenize, tokens_to_states

pytestmark = pytest.mark.newest

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TOLERANCE = 1e-6
TIMES = torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True])
def test_noise_and_targets_are_those_of_diffusers(prediction, zero):
    theirs = DDPMScheduler(**SD, prediction_type=prediction, rescale_betas_zero_snr=zero)
    ours = NoiseSchedule.of_scheduler(SD | {"prediction_type": prediction}, zero_terminal_snr=zero)
    latents, noise = torch.randn(2, len(TIMES), 4, 8, 8).unbind()
    expected = noise if prediction == "epsilon" else theirs.get_velocity(latents, noise, TIMES)
    assert torch.allclose(
        ours.add_noise(latents, noise, TIMES), theirs.add_noise(latents, noise, TIMES), atol=TOLERANCE
    )
    assert torch.allclose(ours.target(latents, noise, TIMES), expected, atol=TOLERANCE)
    assert torch.allclose(ours.snr(TIMES), compute_snr(theirs, TIMES), rtol=1e-4, atol=1e-9)


def test_nothing_of_the_picture_is_left_at_the_end_with_zero_terminal_snr():
    last = torch.tensor([999])
    assert NoiseSchedule.of_scheduler(SD).snr(last) > 1e-3
    for said in ({}, {"rescale_betas_zero_snr": True}):  # by the options, or by the model
        assert NoiseSchedule.of_scheduler(SD | said, zero_terminal_snr=not said).snr(last) < 1e-12


def test_weights_of_times_are_those_of_min_snr():
    gamma = 5.0
    snr = compute_snr(DDPMScheduler(**SD), TIMES)
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    epsilon, velocity = (NoiseSchedule.of_scheduler(SD, v_prediction=v) for v in (False, True))
    assert torch.allclose(min_snr_weights(epsilon, TIMES, gamma), least / snr, rtol=1e-4)
    assert torch.allclose(min_snr_weights(velocity, TIMES, gamma), least / (snr + 1), rtol=1e-4)


def test_weights_of_times_are_finite_where_nothing_of_the_picture_is_left():
    for v in (False, True):
        schedule = NoiseSchedule.of_scheduler(SD, zero_terminal_snr=True, v_prediction=v)
        assert min_snr_weights(schedule, TIMES, 5.0).isfinite().all()


def test_a_gamma_of_0_weighs_all_times_alike():
    weights = time_weights(NoiseSchedule.of_scheduler(SD), TIMES, LossOptions(min_snr_gamma=0.0))
    assert torch.equal(weights, torch.ones(len(TIMES)))


def test_losses_of_pictures_have_the_mean_of_all_numbers():
    predicted, target = torch.randn(2, 3, 4, 8, 8).unbind()
    expected = torch.nn.functional.mse_loss(predicted, target)
    assert torch.allclose(sample_losses(predicted, target).mean(), expected)
    assert sample_losses(predicted.half(), target).dtype == torch.float32


def test_what_chance_gives_a_picture_depends_on_seed_and_place_alone():
    together, alone = draw(7, [3, 4, 5], (4, 8, 8), (0, 1000)), draw(7, [4], (4, 8, 8), (0, 1000))
    assert torch.equal(together.noise[1], alone.noise[0])
    assert together.times[1] == alone.times[0]
    assert not torch.equal(draw(8, [4], (4, 8, 8), (0, 1000)).noise, alone.noise)


def test_noise_is_normal_times_are_even_and_an_offset_moves_channels():
    options = NoiseOptions(noise_offset=0.5)
    plain, moved = (draw(0, range(400), (4, 8, 8), (100, 900), one) for one in (NoiseOptions(), options))
    assert abs(plain.noise.mean()) < 0.02
    assert abs(plain.noise.std() - 1) < 0.02
    assert plain.times.min() >= 100
    assert plain.times.max() < 900
    assert abs(plain.times.float().mean() - 500) < 40
    assert torch.equal(plain.times, moved.times)
    offsets = (learned_noise(moved, plain.noise, options) - plain.noise).mean((2, 3))
    assert abs(offsets.std() - 0.5) < 0.05


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> StableDiffusionPipeline:
    folder = tmp_path_factory.mktemp("sd1")
    return StableDiffusionPipeline.from_pretrained(
        write_folder(make_tiny("sd1", folder / "configs"), folder / "model"), local_files_only=True
    )


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_captions_are_encoded_as_diffusers_does(sd1, clip_skip, monkeypatch):
    # diffusers looks for the text model in a model around it, which transformers 5 has not any more
    monkeypatch.setitem(sd1.text_encoder.__dict__, "text_model", sd1.text_encoder)
    captions = ["a b c", ""]
    tokens = captions_to_tokens([sd1.tokenizer], captions, PIECE)
    ours = tokens_to_states([sd1.text_encoder], tokens, clip_skip)
    skipped = None if clip_skip in (None, 1) else clip_skip - 1  # theirs counts layers that are left out
    theirs = sd1.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False, clip_skip=skipped)[0]
    assert torch.allclose(ours["states"], theirs, atol=TOLERANCE)
    assert "pooled" not in ours


def test_captions_of_sdxl_are_encoded_as_diffusers_does(tmp_path):
    model = make_tiny("sdxl", tmp_path / "configs")
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"), model_max_length=77)
    pipe = StableDiffusionXLPipeline(
        **model.parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=DDPMScheduler(**SD),
        add_watermarker=False,
    )
    captions = ["a b c", "d"]
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    ours = tokens_to_states(encoders, captions_to_tokens([tokenizer, tokenizer], captions, PIECE), None)
    states, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    assert torch.allclose(ours["states"], states, atol=TOLERANCE)
    assert torch.allclose(ours["pooled"], pooled, atol=TOLERANCE)


def test_a_long_caption_is_encoded_in_pieces_between_one_start_and_one_end(sd1):
    words = [chr(ord("a") + index % 26) for index in range(100)]
    tokenizer = sd1.tokenizer
    tokens = tokenize(tokenizer, [" ".join(words)], 150)
    ids = tokenizer(" ".join(words), add_special_tokens=False).input_ids
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokens.shape == (1, 2, 77)
    assert tokens[0, 0].tolist() == [start, *ids[:75], end]
    assert tokens[0, 1, :27].tolist() == [start, *ids[75:], end]
    states = tokens_to_states([sd1.text_encoder], {"1": tokens}, None)["states"]
    pieces = sd1.text_encoder(tokens[0]).last_hidden_state
    expected = torch.cat([pieces[0, :-1], pieces[1, 1:]])
    assert states.shape[1] == 152
    assert torch.allclose(states[0], expected, atol=TOLERANCE)


def test_where_another_token_fills_up_each_piece_ends_as_kohyas():
    class Tokenizer:
        eos_token_id, pad_token_id = 99, 0

        def __call__(self, captions, **_):
            rows = [[98, *[5] * len(caption), 99] for caption in captions]
            return SimpleNamespace(input_ids=torch.tensor([row + [0] * (152 - len(row)) for row in rows]))

    full, short = tokenize(Tokenizer(), ["x" * 100, "x" * 3], 150)
    assert full[0].tolist() == [98, *[5] * 75, 99]
    assert full[1, :28].tolist() == [98, *[5] * 25, 99, 0]
    assert short[0, :6].tolist() == [98, 5, 5, 5, 99, 0]
    assert short[1, :3].tolist() == [98, 99, 0]


def groups() -> list[dict[str, object]]:
    return [{"name": "unet", "lr": 0.1, "params": [torch.nn.Parameter(torch.ones(3, 3))]}]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("AdamW", "AdamW"), ("adamw", "AdamW"), ("SGD", "SGD"), ("SGDNesterov", "SGD"), ("AdaFactor", "Adafactor")],
)
def test_optimizers_are_found_by_name_and_move_parameters(name, kind):
    made = make_optimizer(groups(), OptimizerOptions(optimizer_type=name))
    assert type(made).__name__ == kind
    parameter = made.param_groups[0]["params"][0]
    parameter.grad = torch.ones(3, 3)
    made.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"optimizer_type": "AdmaW"}, "did you mean AdamW"),
        ({"optimizer_args": ("wieght_decay=1",)}, "has no setting wieght_decay"),
        ({"optimizer_args": ("weight_decay",)}, "is not name=value"),
        ({"optimizer_args": ("weight_decay=-1",)}, "refuses its settings"),
    ],
)
def test_an_optimizer_that_can_not_be_is_one_sentence(given, sentence):
    with pytest.raises(JobError, match=sentence):
        make_optimizer(groups(), OptimizerOptions(**given))


def test_an_8_bit_optimizer_needs_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    for name in ("AdamW8bit", "PagedAdamW"):
        with pytest.raises(JobError, match=f"{name} needs bitsandbytes.*AdamW or Adafactor"):
            make_optimizer(groups(), OptimizerOptions(optimizer_type=name))


@pytest.mark.parametrize(
    ("name", "package"), [("Prodigy", "prodigyopt"), ("Lion", "lion_pytorch"), ("DAdaptLion", "dadaptation")]
)
def test_an_optimizer_of_another_package_is_taken_from_there(name, package, monkeypatch):
    kind = type(name, (torch.optim.SGD,), {})
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{name: kind}))
    assert type(make_optimizer(groups(), OptimizerOptions(optimizer_type=name.lower()))) is kind
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(JobError, match=f"{name} needs .* pip install {package.replace('_', '-')}"):
        make_optimizer(groups(), OptimizerOptions(optimizer_type=name))


def test_an_optimizer_that_finds_the_rate_has_one_for_all(monkeypatch):
    kind = type("Prodigy", (torch.optim.SGD,), {})
    monkeypatch.setitem(sys.modules, "prodigyopt", SimpleNamespace(Prodigy=kind))
    two = [*groups(), {**groups()[0], "lr": 0.2}]
    with pytest.raises(JobError, match="one learning rate for all that is trained, and here are 2"):
        make_optimizer(two, OptimizerOptions(optimizer_type="Prodigy"))


def test_adafactor_finds_its_rate_if_asked_to():
    made = make_optimizer(groups(), OptimizerOptions("AdaFactor", ("relative_step=True", "warmup_init=True")))
    assert made.defaults["lr"] is None
    assert made.defaults["relative_step"]


def test_rates_of_0_everywhere_leave_nothing_to_train():
    with pytest.raises(JobError, match="leave nothing to train: they are 0"):
        make_optimizer([], OptimizerOptions(learning_rate=0))


@pytest.mark.parametrize("warm", [4, 0.2])
def test_rates_warm_up_and_fall(warm):
    made = make_optimizer(groups(), OptimizerOptions())
    schedule = make_schedule(made, OptimizerOptions(lr_scheduler="linear", lr_warmup_steps=warm), 20)
    rates = []
    for _ in range(20):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    assert rates[0] == 0
    assert rates.index(max(rates)) == 4
    assert max(rates) == pytest.approx(0.1)
    assert made.param_groups[0]["lr"] == pytest.approx(0)


def test_an_unknown_schedule_is_one_sentence():
    with pytest.raises(JobError, match="no lr_scheduler 'cosin'; there are constant"):
        make_schedule(make_optimizer(groups(), OptimizerOptions()), OptimizerOptions(lr_scheduler="cosin"), 5)


def test_the_moving_average_follows_and_gives_the_parameters_back():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage([parameter], 0.5)
    mean = torch.zeros(3)
    for step in range(1, 6):
        with torch.no_grad():
            parameter.fill_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * step
    with average.applied():
        assert torch.allclose(parameter, mean)
    assert torch.equal(parameter.detach(), torch.full((3,), 5.0))
