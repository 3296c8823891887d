"""Options of a training beside those of the network and of the pictures; names are kohya's where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_WARM_UP = 1.0
"""A number below is a part of all steps, from it on a number of steps."""


@dataclass(frozen=True)
class ModelOptions:
    """What is trained.

    Attributes:
        pretrained_model_name_or_path: ``demo``, a diffusers folder, or a checkpoint file of SD1, SD2 or SDXL.
        vae: Another autoencoder: a file or a folder.
        tokenizer: Folder or file with CLIP's vocabulary, for a checkpoint file.
        v_parameterization: Whether the model predicts v; by default as the model says.
        clip_skip: The layer of SD1's or SD2's text encoder that is read, counted from the last, which is 1.
        full: Train the whole UNet, as DreamBooth does, and no network.
    """

    pretrained_model_name_or_path: str = "demo"
    vae: Path | None = None
    tokenizer: Path | None = None
    v_parameterization: bool | None = None
    clip_skip: int | None = None
    full: bool = False


@dataclass(frozen=True)
class OptimizerOptions:
    """How weights move.

    Attributes:
        optimizer_type: AdamW, SGD or another of torch's; Adafactor; of packages Lion, Prodigy, DAdaptation, and of
            bitsandbytes AdamW8bit, Lion8bit, PagedAdamW and such.
        optimizer_args: Its further settings, such as ``weight_decay=0.01``.
        learning_rate: Of everything that has none of its own.
        unet_lr: Of the UNet.
        text_encoder_lr: Of the text encoders.
        lr_scheduler: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt,
            cosine_with_min_lr, warmup_stable_decay or piecewise_constant.
        lr_warmup_steps: Steps in which the rate grows to its full size; below 1, a part of all steps.
        lr_decay_steps: Steps in which the rate of warmup_stable_decay falls, at the end; below 1, a part of all steps.
        lr_scheduler_num_cycles: Restarts of cosine_with_restarts; half waves of those with a least rate.
        lr_scheduler_power: Exponent of polynomial.
        lr_scheduler_timescale: Of inverse_sqrt, in steps; by default the steps of its warm-up.
        lr_scheduler_min_lr_ratio: Least rate of cosine_with_min_lr and warmup_stable_decay, as a part of the full one.
        lr_scheduler_type: A class of torch.optim.lr_scheduler, in place of lr_scheduler.
        lr_scheduler_args: Its settings, such as ``T_max=100``.
        max_grad_norm: Gradients longer than this are shortened to it; 0 leaves them as they are.
        gradient_accumulation_steps: Batches that make one step.
        ema: Save a moving average of the weights.
        ema_decay: Its share that is kept at each step.
    """

    optimizer_type: str = "AdamW"
    optimizer_args: Sequence[str] = ()
    learning_rate: float = 1e-4
    unet_lr: float | None = None
    text_encoder_lr: float | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: float = 0
    lr_decay_steps: float = 0
    lr_scheduler_num_cycles: int = 1
    lr_scheduler_power: float = 1.0
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_args: Sequence[str] = ()
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    ema: bool = False
    ema_decay: float = 0.999


@dataclass(frozen=True)
class LossOptions:
    """What is learned of a picture.

    Attributes:
        loss_type: How far off a prediction is: l2 (squared), l1, huber (squared near 0, else not) or smooth_l1 (the
            same, divided by its border).
        huber_schedule: How the border of huber and smooth_l1 goes with the time: snr, exponential or constant.
        huber_c: That border, or the least of it.
        huber_scale: Its factor, but not of snr.
        min_snr_gamma: Weigh times by min(SNR, γ), such as 5; by default all alike.
        scale_v_pred_loss_like_noise_pred: Weigh times of a model that predicts v as if it predicted noise.
        v_pred_like_loss: Weigh times of a model that predicts noise more as if it predicted v, by such a part.
        debiased_estimation_loss: Weigh times by 1 / √SNR.
        zero_terminal_snr: Rescale the noise schedule so that nothing of the picture is left at its end.
        min_timestep: First time that is trained.
        max_timestep: First time above the last that is trained.

    Raises:
        JobError: If two contradict each other.
    """

    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False
    zero_terminal_snr: bool = False
    min_timestep: int = 0
    max_timestep: int = 1000

    def __post_init__(self) -> None:
        if self.min_timestep >= self.max_timestep:
            raise JobError(f"min_timestep {self.min_timestep} must be below max_timestep {self.max_timestep}")
        for name in ("huber_c", "huber_scale"):
            if (value := getattr(self, name)) <= 0:
                raise JobError(f"{name} must be above 0, not {value:g}")
        if self.scale_v_pred_loss_like_noise_pred and self.v_pred_like_loss is not None:
            raise JobError("scale_v_pred_loss_like_noise_pred is for v and v_pred_like_loss for noise; leave one out")


@dataclass(frozen=True)
class NoiseOptions:
    """The noise that is added to pictures, beside the plain one.

    Attributes:
        noise_offset: Added to each channel of the noise as a whole, such as 0.05, so that dark and light are learned.
        noise_offset_random_strength: A part of it by chance for each picture, from nothing to all.
        adaptive_noise_scale: noise_offset grows by so many times the mean of the channel; not below 0.
        multires_noise_iterations: Noise of so many coarser sizes is added, such as 6.
        multires_noise_discount: Each size counts so many times the one before, such as 0.3.
        ip_noise_gamma: More noise on the picture than the model is to find, such as 0.1.
        ip_noise_gamma_random_strength: A part of it by chance for each picture, from nothing to all.

    Raises:
        JobError: If one needs another.
    """

    noise_offset: float = 0.0
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False

    def __post_init__(self) -> None:
        if self.adaptive_noise_scale is not None and not self.noise_offset:
            raise JobError("adaptive_noise_scale changes noise_offset; give that too, such as 0.05")


@dataclass(frozen=True)
class RunOptions:
    """How long, with what numbers and in what memory.

    Attributes:
        max_train_steps: Steps of the optimizer.
        max_train_epochs: Epochs, in place of a number of steps.
        mixed_precision: Type of the products: no (float32), fp16 or bf16.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them: slower, in a
            fraction of the memory.
        device: ``auto``, or ``cpu`` even where there is a GPU.
    """

    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and when.

    Attributes:
        output_dir: Folder of all that is written.
        output_name: Of the result's file.
        save_precision: Type of the saved numbers: float, fp16 or bf16.
        save_every_n_epochs: Save what is learned so far, too.
        save_every_n_steps: Save what is learned so far, too.
        save_n_epoch_ratio: Save so many times in all, instead of save_every_n_epochs.
        save_last_n_epochs: Of those saved after epochs, so many are kept.
        save_last_n_steps: Those saved in so many last steps are kept.
        save_state_every_n_steps: Save all that is needed to go on; 0 for never.
        save_last_n_states: So many of these are kept.
        save_state_on_train_end: Save it at the end, too, so that the training can be made longer.
        resume: Go on from a state: its file, or the folder of states for the newest.
        sample_at_first: Draw pictures before the first step.
        sample_every_n_steps: Draw pictures.
        sample_every_n_epochs: Draw pictures.
        sample_prompts: A text file: in each line a prompt, then kohya's --n --w --h --d --l --s --ss; or kohya's .toml
            or .json.
        sample_sampler: The WebUI's name.
        logging_dir: Folder for TensorBoard.
        force: Replace existing files.
        no_metadata: Tell in the file what is needed to use it, and nothing of the training.
        metadata_title: Title in the file; by default output_name.
        metadata_author: Author in the file.
        metadata_description: Description in the file.
        metadata_license: Licence in the file.
        metadata_tags: Tags in the file.
        metadata_usage_hint: How to use it, in the file.
        metadata_trigger_phrase: Trigger words in the file.
        metadata_merged_from: What it was merged from, in the file.
        metadata_preprocessor: A preprocessor's name in the file.
        metadata_is_negative_embedding: Whether it is one, in the file.
        training_comment: Any text in the file, such as trigger words.
    """

    output_dir: Path = Path("outputs")
    output_name: str = "last"
    save_precision: Literal["float", "fp16", "bf16"] = "fp16"
    save_every_n_epochs: int | None = None
    save_every_n_steps: int | None = None
    save_n_epoch_ratio: int | None = None
    save_last_n_epochs: int | None = None
    save_last_n_steps: int | None = None
    save_state_every_n_steps: int = 500
    save_last_n_states: int = 2
    save_state_on_train_end: bool = False
    resume: Path | None = None
    sample_at_first: bool = False
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None
    sample_prompts: Path | None = None
    sample_sampler: str = "Euler a"
    logging_dir: Path | None = None
    force: bool = False
    no_metadata: bool = False
    metadata_title: str | None = None
    metadata_author: str | None = None
    metadata_description: str | None = None
    metadata_license: str | None = None
    metadata_tags: str | None = None
    metadata_usage_hint: str | None = None
    metadata_trigger_phrase: str | None = None
    metadata_merged_from: str | None = None
    metadata_preprocessor: str | None = None
    metadata_is_negative_embedding: str | None = None
    training_comment: str | None = None

    @property
    def samples(self) -> bool:
        """Whether pictures are drawn."""
        return self.sample_at_first or (self.sample_every_n_steps or self.sample_every_n_epochs) is not None


AT_LEAST = {
    "clip_skip": 1,
    "learning_rate": 0,
    "unet_lr": 0,
    "text_encoder_lr": 0,
    "lr_warmup_steps": 0,
    "lr_scheduler_num_cycles": 1,
    "max_grad_norm": 0,
    "gradient_accumulation_steps": 1,
    "ema_decay": 0,
    "min_snr_gamma": 0,
    "lr_decay_steps": 0,
    "lr_scheduler_timescale": 1,
    "lr_scheduler_min_lr_ratio": 0,
    "v_pred_like_loss": 0,
    "noise_offset": 0,
    "multires_noise_iterations": 1,
    "multires_noise_discount": 0,
    "ip_noise_gamma": 0,
    "min_timestep": 0,
    "max_timestep": 1,
    "max_train_steps": 1,
    "max_train_epochs": 1,
    "save_every_n_epochs": 1,
    "save_every_n_steps": 1,
    "save_n_epoch_ratio": 1,
    "save_last_n_epochs": 1,
    "save_last_n_steps": 1,
    "save_state_every_n_steps": 0,
    "save_last_n_states": 1,
    "sample_every_n_steps": 1,
    "sample_every_n_epochs": 1,
}


AT_MOST = {"ema_decay": 1, "lr_scheduler_min_lr_ratio": 1}


def check_numbers(group: object) -> None:
    """Refuse numbers that are too small or too large.

    Raises:
        JobError: If there is one.
    """
    for key, value in vars(group).items():
        if value is not None and key in AT_LEAST and value < AT_LEAST[key]:
            raise JobError(f"{key} must be at least {AT_LEAST[key]}, not {value:g}")
        if value is not None and key in AT_MOST and value > AT_MOST[key]:
            raise JobError(f"{key} must be at most {AT_MOST[key]}, not {value:g}")
