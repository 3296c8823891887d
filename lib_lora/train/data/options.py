"""What a training set is and how it is used: kohya's options, under kohya's names."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from pathlib import Path

LATENT_STEP = 8
"""Pixels that become one of the latents, along each side."""
CACHE_FOLDER = ".prefuse-cache"
PLACES = ("train_data_dir", "reg_data_dir", "in_json", "dataset_config", "cache_dir")
"""Options that say where something lies, and not how it is used."""

_RATES = ("caption_dropout_rate", "caption_tag_dropout_rate")
_COUNTS = ("train_batch_size", "vae_batch_size", "dataset_repeats", "bucket_reso_steps", "min_bucket_reso")
_NOT_NEGATIVE = (
    *("keep_tokens", "caption_dropout_every_n_epochs", "num_class_images", "max_data_loader_n_workers"),
    *("token_warmup_step", "token_warmup_min"),
)
_VARYING = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard", "token_warmup_step")
"""What makes another caption each time."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """A training set.

    kohya's defaults, but buckets are on, small pictures are not enlarged, and captions are .txt files.

    Attributes:
        train_data_dir: Folder of ``N_name`` folders, whose pictures are used N times in an epoch; or of pictures.
        reg_data_dir: The same with regularisation pictures, which show what the model should not forget.
        in_json: List of pictures with captions, .jsonl or kohya's .json; paths count from train_data_dir, or from the
            list's folder.
        dataset_config: kohya's file of several folders or lists with options of their own, in place of these.
        dataset_repeats: How often each picture of in_json is used in an epoch.
        resolution: Pixels of the sides, or width and height: 512 or 512,768. With buckets only their product counts.
        enable_bucket: Whether pictures keep about the ratio of their sides, or are all cropped to `resolution`.
        min_bucket_reso: Shortest side of a bucket in pixels; counts only without bucket_no_upscale.
        max_bucket_reso: Longest side of a bucket in pixels; counts only without bucket_no_upscale.
        bucket_reso_steps: Sides of buckets are multiples of it.
        bucket_no_upscale: Whether pictures are never enlarged.
        caption_extension: Of the captions' files; if not given, .txt and then .caption.
        caption_separator: What stands between tags.
        secondary_separator: What stands between tags that are shuffled and dropped together.
        shuffle_caption: Whether tags are shuffled.
        keep_tokens: So many tags at the beginning keep their places, and are never dropped.
        keep_tokens_separator: If it is in a caption, the tags before it are kept so, and those after a second one.
        enable_wildcard: Whether ``{a|b}`` in a caption is a or b by chance, and a caption of several lines one of them.
        caption_prefix: Put before each caption, with a space.
        caption_suffix: Put behind each caption, with a space.
        caption_dropout_rate: Probability that a caption is left empty.
        caption_dropout_every_n_epochs: All captions are empty in each n-th epoch; 0 for never.
        caption_tag_dropout_rate: Probability that a tag is left out.
        token_warmup_step: Batches until all tags are used: only the first ones in the beginning; 0 for all at once.
        token_warmup_min: So many tags are used in the beginning.
        flip_aug: Whether every second picture is mirrored, by chance.
        random_crop: Whether pictures are cropped anywhere, or in the middle.
        train_batch_size: Pictures of a step, in each process.
        cache_latents: Whether pictures are encoded once, before the training.
        cache_latents_to_disk: The same, kept in files for the next time.
        vae_batch_size: Pictures encoded at once for that.
        cache_text_encoder_outputs: Whether captions are encoded once, before the training.
        cache_text_encoder_outputs_to_disk: The same, kept in files for the next time.
        cache_dir: Folder of these files; if not given, .prefuse-cache in that of the pictures. May be deleted.
        prior_loss_weight: Weight of regularisation pictures.
        max_token_length: Tokens of a caption at most.
        max_data_loader_n_workers: Threads that read pictures; 0 to read them when they are needed.
        class_prompt: What missing regularisation pictures are drawn from, and their caption.
        num_class_images: How many regularisation pictures there must be.
        seed: Of all that is left to chance.

    Raises:
        JobError: If a value is impossible, or two contradict each other.
    """

    train_data_dir: Path | None = None
    reg_data_dir: Path | None = None
    in_json: Path | None = None
    dataset_config: Path | None = None
    dataset_repeats: int = 1
    resolution: tuple[int, ...] = (512,)
    enable_bucket: bool = True
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = True
    caption_extension: str | None = None
    caption_separator: str = ","
    secondary_separator: str = ""
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    enable_wildcard: bool = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_step: float = 0
    token_warmup_min: int = 1
    flip_aug: bool = False
    random_crop: bool = False
    train_batch_size: int = 1
    cache_latents: bool = False
    cache_latents_to_disk: bool = False
    vae_batch_size: int = 1
    cache_text_encoder_outputs: bool = False
    cache_text_encoder_outputs_to_disk: bool = False
    cache_dir: Path | None = None
    prior_loss_weight: float = 1.0
    max_token_length: Literal[75, 150, 225] = 75
    max_data_loader_n_workers: int = 4
    class_prompt: str = ""
    num_class_images: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        _check(
            [f"{name} {given[name]:g} is no probability; give 0 to 1" for name in _RATES if not 0 <= given[name] <= 1]
        )
        _check([f"{name} must be 1 or more, not {given[name]}" for name in _COUNTS if given[name] < 1])
        _check([f"{name} can not be negative: {given[name]}" for name in _NOT_NEGATIVE if given[name] < 0])
        _check(self._contradictions())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.resolution[0], self.resolution[-1]

    @property
    def caption_extensions(self) -> tuple[str, ...]:
        """Where captions are looked for, in this order."""
        if not self.caption_extension:
            return ".txt", ".caption"
        return (f".{self.caption_extension.removeprefix('.')}",)

    @property
    def caches_latents(self) -> bool:
        """In memory or on the disk."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_texts(self) -> bool:
        """In memory or on the disk."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    @property
    def makes_files(self) -> bool:
        """Whether anything is kept for the next time."""
        return self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk

    @property
    def cache_folder(self) -> Path:
        """Where files of encoded pictures and captions are."""
        if self.cache_dir is not None:
            return self.cache_dir
        return self.picture_folder / CACHE_FOLDER

    @property
    def picture_folder(self) -> Path:
        """What relative paths of the list count from, and where the cache is.

        Raises:
            JobError: If there is neither a folder nor a list.
        """
        if self.train_data_dir is not None and self.dataset_config is None:
            return self.train_data_dir
        named = self.dataset_config or self.in_json
        if named is None:
            raise JobError("there is nothing to train on; give train_data_dir, a folder of pictures")
        return named.parent

    def _contradictions(self) -> list[str]:
        varying = [name for name in _VARYING if getattr(self, name)]
        weight, steps = self.prior_loss_weight, self.bucket_reso_steps
        found = {
            f"prior_loss_weight {weight:g} is no weight; give 0 or more": not 0 <= weight < math.inf,
            f"captions can not be encoded once when {' and '.join(varying)} changes them; leave one of both out": (
                self.caches_texts and bool(varying)
            ),
            "latents can not be cached when random_crop changes what is seen; leave one of both out": (
                self.caches_latents and self.random_crop
            ),
            "caption_separator can not be empty; give what stands between tags, such as a comma": (
                not self.caption_separator
            ),
            f"token_warmup_step {self.token_warmup_step:g} is a part of all steps; give a number of batches": (
                0 < self.token_warmup_step < 1
            ),
            f"bucket_reso_steps must be a multiple of {LATENT_STEP}, not {steps}": steps % LATENT_STEP != 0,
            "num_class_images needs class_prompt, from which the pictures are drawn": (
                self.num_class_images > 0 and not self.class_prompt.strip()
            ),
            "num_class_images is for reg_data_dir, which is not read beside dataset_config; leave one of both out": (
                self.num_class_images > 0 and self.dataset_config is not None
            ),
            "num_class_images needs reg_data_dir, the folder of these pictures": (
                self.num_class_images > 0 and self.reg_data_dir is None
            ),
        }
        return [*_size_faults(self), *(sentence for sentence, wrong in found.items() if wrong)]


def _size_faults(options: DataOptions) -> list[str]:
    """Why `resolution` can not be used."""
    shown = ",".join(map(str, options.resolution))
    if len(options.resolution) not in (1, 2) or min(options.resolution) < LATENT_STEP:
        least = f"the smallest side is {LATENT_STEP}"
        return [f"resolution {shown or 'of nothing'} is none; write 512, or width and height as in 512,768; {least}"]
    shorter, longer = sorted(options.size)
    if not options.enable_bucket:
        uneven = shorter % LATENT_STEP or longer % LATENT_STEP
        return [f"without buckets resolution must be a multiple of {LATENT_STEP}, not {shown}"] if uneven else []
    if shorter * longer < options.bucket_reso_steps**2:
        step = options.bucket_reso_steps
        return [f"resolution {shown} is less than the smallest bucket, {step}x{step}; lower bucket_reso_steps {step}"]
    low, high = options.min_bucket_reso, options.max_bucket_reso
    within = options.bucket_no_upscale or low <= shorter <= longer <= high
    return [] if within else [f"resolution {shown} is not within buckets from {low} to {high}"]


def _check(faults: list[str]) -> None:
    if faults:
        raise JobError(faults[0])
