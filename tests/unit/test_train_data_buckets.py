"""Sizes at which pictures are trained, as kohya's BucketManager chooses them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.errors import JobError
from lib_lora.train.data.buckets import Buckets, Fit, Size
from lib_lora.train.data.options import DataOptions

SD1 = {"resolution": (512,), "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
SDXL = {"resolution": (1024,), "min_bucket_reso": 256, "max_bucket_reso": 2048, "bucket_reso_steps": 32}
UPRIGHT = SD1 | {"resolution": (512, 768)}

# Made by running BucketManager.select_bucket of sd-scripts 48d368fa: picture, bucket, scaled picture.
KOHYA = [
    (SD1, True, (512, 512), (512, 512), (512, 512)),
    (SD1, True, (1920, 1080), (640, 384), (683, 384)),
    (SD1, True, (1080, 1920), (384, 640), (384, 683)),
    (SD1, True, (600, 400), (576, 384), (600, 400)),
    (SD1, True, (333, 1000), (256, 768), (256, 769)),
    (SD1, True, (300, 200), (256, 192), (300, 200)),
    (SD1, True, (129, 4000), (64, 1984), (64, 1984)),
    (SD1, False, (512, 512), (512, 512), (512, 512)),
    (SD1, False, (600, 400), (640, 384), (640, 427)),
    (SD1, False, (333, 1000), (256, 832), (277, 832)),
    (SD1, False, (300, 200), (640, 384), (640, 427)),
    (SD1, False, (1023, 767), (576, 448), (598, 448)),
    (SD1, False, (129, 4000), (256, 1024), (256, 7938)),
    (SDXL, True, (1920, 1080), (1344, 768), (1365, 768)),
    (SDXL, True, (4000, 3000), (1152, 864), (1152, 864)),
    (SDXL, True, (129, 4000), (128, 4000), (129, 4000)),
    (SDXL, False, (512, 512), (1024, 1024), (1024, 1024)),
    (SDXL, False, (333, 1000), (576, 1728), (576, 1730)),
    (SDXL, False, (4000, 3000), (1184, 864), (1184, 888)),
    (UPRIGHT, True, (1920, 1080), (768, 448), (796, 448)),
    (UPRIGHT, False, (512, 512), (576, 576), (576, 576)),
    (UPRIGHT, False, (333, 1000), (320, 1024), (341, 1024)),
]
FORMS = (SD1, SDXL, UPRIGHT, SD1 | {"resolution": (64,), "min_bucket_reso": 32, "bucket_reso_steps": 8})
sides = st.integers(1, 6000)


def buckets(form: dict[str, Any], *, no_upscale: bool) -> Buckets:
    return Buckets.of(DataOptions(**form, bucket_no_upscale=no_upscale))


def kohyas_own(width: int, height: int, area: int, step: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """select_bucket with no_upscale, written from its description; ZeroDivisionError where it has none."""
    ratio = width / height
    resized = (width, height)
    if width * height > area:
        wide, high = math.sqrt(area * ratio), area / math.sqrt(area * ratio)
        whole_wide, whole_high = (int(side + 0.5) // step * step for side in (wide, high))
        by_width = whole_wide / (int(whole_wide / ratio + 0.5) // step * step)
        by_height = int(whole_high * ratio + 0.5) // step * step / whole_high
        if abs(by_width - ratio) < abs(by_height - ratio):
            resized = (whole_wide, int(whole_wide / ratio + 0.5))
        else:
            resized = (int(whole_high * ratio + 0.5), whole_high)
    return tuple(side // step * step for side in resized), resized


@pytest.mark.parametrize(("form", "no_upscale", "size", "bucket", "resized"), KOHYA)
def test_pictures_go_where_kohya_puts_them(form, no_upscale, size, bucket, resized):
    assert buckets(form, no_upscale=no_upscale).fit(Size(*size)) == Fit(Size(*bucket), Size(*resized))


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.sampled_from(FORMS))
def test_without_enlarging_it_is_kohyas_rule(width, height, form):
    step, area = form["bucket_reso_steps"], form["resolution"][0] * form["resolution"][-1]
    own = buckets(form, no_upscale=True)
    try:
        bucket, resized = kohyas_own(width, height, area, step)
    except ZeroDivisionError:
        return
    if min(bucket) == 0:
        with pytest.raises(ValueError, match="smallest bucket"):
            own.fit(Size(width, height))
    else:
        assert own.fit(Size(width, height)) == (bucket, resized)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.sampled_from(FORMS), st.booleans())
def test_a_bucket_is_covered_and_of_the_area(width, height, form, no_upscale):
    step, area = form["bucket_reso_steps"], form["resolution"][0] * form["resolution"][-1]
    try:
        (wide, high), resized = buckets(form, no_upscale=no_upscale).fit(Size(width, height))
    except ValueError:
        assert no_upscale
        return
    assert wide % step == high % step == 0
    assert resized.width >= wide >= step
    assert resized.height >= high >= step
    if no_upscale:
        assert resized.width <= width
        assert resized.height <= height
    else:
        assert wide * high <= area


def test_without_buckets_all_have_one_size():
    one = Buckets.of(DataOptions(resolution=(512, 768), enable_bucket=False))
    assert one.fit(Size(1000, 1000)) == ((512, 768), (768, 768))
    assert one.fit(Size(512, 768)) == ((512, 768), (512, 768))


def test_without_buckets_a_small_picture_is_refused_or_enlarged():
    options = {"resolution": (512,), "enable_bucket": False}
    with pytest.raises(ValueError, match="it has 300x600 pixels, too few for 512x512"):
        Buckets.of(DataOptions(**options)).fit(Size(300, 600))
    with pytest.raises(ValueError, match="too few"):
        Buckets.of(DataOptions(**options)).fit(Size(600, 300))
    assert Buckets.of(DataOptions(**options, bucket_no_upscale=False)).fit(Size(300, 600)).resized == (512, 1024)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"resolution": (512, 512, 512)}, "resolution 512,512,512 is none"),
        ({"resolution": ()}, "resolution of nothing"),
        ({"resolution": (4,)}, "resolution 4 is none"),
        ({"resolution": (500,), "enable_bucket": False}, "multiple of 8, not 500"),
        ({"resolution": (48,)}, "less than the smallest bucket, 64x64"),
        ({"resolution": (2048,), "bucket_no_upscale": False}, "not within buckets from 256 to 1024"),
        ({"bucket_reso_steps": 20}, "multiple of 8, not 20"),
        ({"train_batch_size": 0}, "train_batch_size must be 1 or more, not 0"),
        ({"caption_dropout_rate": 1.5}, "caption_dropout_rate 1.5 is no probability"),
        ({"caption_tag_dropout_rate": math.nan}, "is no probability"),
        ({"keep_tokens": -1}, "keep_tokens can not be negative"),
        ({"prior_loss_weight": -1.0}, "is no weight"),
        ({"caption_separator": ""}, "caption_separator can not be empty"),
        ({"cache_latents": True, "random_crop": True}, "random_crop changes what is seen"),
        ({"cache_text_encoder_outputs": True, "shuffle_caption": True}, "when shuffle_caption changes them"),
        ({"cache_text_encoder_outputs_to_disk": True, "caption_tag_dropout_rate": 0.1}, "caption_tag_dropout_rate"),
        ({"num_class_images": 5}, "needs class_prompt"),
        ({"num_class_images": 5, "class_prompt": "a cat"}, "needs reg_data_dir"),
    ],
)
def test_impossible_options_are_one_sentence(options, sentence):
    with pytest.raises(JobError, match=sentence):
        DataOptions(**options)
