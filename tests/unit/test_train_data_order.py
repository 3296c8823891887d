"""Which pictures are in which batch: by seed and step alone, for any number of processes."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.errors import JobError
from lib_lora.train.data.captions import drawn_caption, possible_captions
from lib_lora.train.data.options import DataOptions
from lib_lora.train.data.order import ALONE, Bucket, Order, Row, Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

MEAN_ERROR = 1e-5

bucket_lists = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda sizes: [[100 * number + i for i in range(size)] for number, size in enumerate(sizes)]
)


def ordered(buckets: Sequence[Sequence[int]], batch_size: int, seed: int) -> Order:
    return Order([Bucket(bucket, batch_size) for bucket in buckets], seed)


def epoch_of(order: Order, epoch: int, shard: Shard = ALONE) -> list[list[Row]]:
    first = epoch * order.batches_per_epoch
    return [order.rows(step, shard) for step in range(first, first + order.batches_per_epoch)]


@settings(max_examples=60, deadline=None)
@given(bucket_lists, st.integers(1, 5), st.integers(0, 99))
def test_an_epoch_has_every_picture_once_and_batches_of_one_bucket(buckets, batch_size, seed):
    order = ordered(buckets, batch_size, seed)
    batches = epoch_of(order, 3)
    assert Counter(row.picture for batch in batches for row in batch) == Counter(
        picture for bucket in buckets for picture in bucket
    )
    assert all(len({row.picture // 100 for row in batch}) == 1 for batch in batches)
    assert all(row.share == 1 and row.epoch == 3 for batch in batches for row in batch)
    assert len(batches) == sum(-(-len(bucket) // batch_size) for bucket in buckets)


@settings(max_examples=60, deadline=None)
@given(bucket_lists, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_processes_share_the_batch_that_one_would_have(buckets, batch_size, processes, seed):
    alone = ordered(buckets, batch_size * processes, seed)
    shared = [ordered(buckets, batch_size * processes, seed) for _ in range(processes)]
    for step in range(2 * alone.batches_per_epoch):
        parts = [order.rows(step, Shard(rank, processes)) for rank, order in enumerate(shared)]
        assert len({len(part) for part in parts}) == 1  # or one would wait for the others for ever
        assert 0 < len(parts[0]) <= batch_size
        real = [row for part in parts for row in part if row.share]
        whole = alone.rows(step)
        assert [(row.picture, row.place) for row in real] == [(row.picture, row.place) for row in whole]
        weights = torch.tensor([[row.share for row in part] for part in parts])
        losses = torch.tensor([[float(row.place) for row in part] for part in parts])
        mean = sum(row.place for row in whole) / len(whole)
        assert (weights * losses).mean(1).mean().item() == pytest.approx(mean, rel=MEAN_ERROR)


def test_a_step_is_the_same_whatever_was_asked_before():
    buckets = [list(range(17)), list(range(17, 40))]
    forwards = ordered(buckets, 3, 7)
    batches = [forwards.rows(step) for step in range(60)]
    backwards = ordered(buckets, 3, 7)
    assert [backwards.rows(step) for step in reversed(range(60))] == batches[::-1]


def test_epochs_and_seeds_differ_and_places_do_not_repeat():
    order = ordered([list(range(20))], 4, 1)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert [[row.picture for row in batch] for batch in first] != [[row.picture for row in batch] for batch in second]
    assert first != epoch_of(ordered([list(range(20))], 4, 2), 0)
    places = [row.place for batch in first + second for row in batch]
    assert len(set(places)) == len(places)


def test_batches_of_all_buckets_are_mixed():
    order = ordered([list(range(40)), list(range(100, 140))], 2, 3)
    kinds = [batch[0].picture >= 100 for batch in epoch_of(order, 0)]
    assert sum(kinds) == 20
    assert sum(one != other for one, other in pairwise(kinds)) > 8


def row(place: int, epoch: int = 0) -> Row:
    return Row(0, epoch, place, place, 1.0)


def drawn(caption: str, *, place: int = 0, epoch: int = 0, **options) -> str:
    return drawn_caption(caption, row(place, epoch), DataOptions(**options))


def test_tags_are_shuffled_behind_the_kept_ones():
    captions = {drawn("cat, sofa, red, big", place=place, shuffle_caption=True, keep_tokens=1) for place in range(100)}
    assert len(captions) == 6
    assert all(caption.startswith("cat, ") for caption in captions)
    assert {frozenset(caption.split(", ")) for caption in captions} == {frozenset(["cat", "sofa", "red", "big"])}


def test_a_mark_keeps_tags_at_the_beginning_and_the_end():
    caption = "a, b ||| c, d, e ||| f"
    captions = {drawn(caption, place=p, shuffle_caption=True, keep_tokens_separator="|||") for p in range(100)}
    assert len(captions) == 6
    assert all(caption.startswith("a, b, ") and caption.endswith(", f") for caption in captions)


def test_tags_are_dropped_at_their_rate_but_for_the_kept_ones():
    captions = [
        drawn("keep, a, b, c, d", place=place, caption_tag_dropout_rate=0.25, keep_tokens=1) for place in range(2000)
    ]
    tags = Counter(tag for caption in captions for tag in caption.split(", "))
    assert tags["keep"] == 2000
    assert all(abs(tags[tag] / 2000 - 0.75) < 0.05 for tag in "abcd")


def test_captions_are_dropped_at_their_rate():
    empty = sum(drawn("cat", place=place, caption_dropout_rate=0.3) == "" for place in range(2000))
    assert abs(empty / 2000 - 0.3) < 0.05
    assert all(drawn("cat", place=place, caption_dropout_rate=1.0) == "" for place in range(20))


def test_all_captions_of_each_nth_epoch_are_dropped():
    said = [drawn("cat", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(7)]
    assert said == ["cat", "cat", "", "cat", "cat", "", "cat"]  # kohya counts epochs from 1


def test_tags_behind_a_second_separator_stay_together():
    captions = {
        drawn("cat;;;sofa, red", place=place, shuffle_caption=True, secondary_separator=";;;") for place in range(50)
    }
    assert captions == {"cat,sofa, red", "red, cat,sofa"}
    assert drawn("a;b", secondary_separator=";") == "a,b"


def test_one_of_the_texts_in_braces_is_chosen_and_doubled_braces_are_single_ones():
    caption = "a {red|blue|} cat with {one|two} {{brace}}"
    seen = Counter(drawn(caption, place=place, enable_wildcard=True) for place in range(3000))
    expected = {f"a {colour} cat with {count} {{brace}}" for colour in ("red", "blue", "") for count in ("one", "two")}
    assert set(seen) == expected
    assert all(abs(number / 3000 - 1 / 6) < 0.03 for number in seen.values())
    assert drawn(caption) == caption  # unless it is asked for


def test_one_of_several_lines_is_chosen_and_each_has_prefix_and_suffix():
    options = {"enable_wildcard": True, "caption_prefix": "{a|the}", "caption_suffix": "photo"}
    seen = {drawn("cat\ndog", place=place, **options) for place in range(60)}
    assert seen == {f"{article} {animal} photo" for article in ("a", "the") for animal in ("cat", "dog")}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 20), st.integers(0, 8), st.integers(0, 3))
def test_in_the_beginning_only_the_first_tags_are_used_as_the_formula_says(step, steps, least, kept):
    """As process_caption: floor(step · (tags - least) / steps) + least of the tags that may move."""
    tags = [f"t{index}" for index in range(8)]
    movable = len(tags) - kept
    count = math.floor(step * ((movable - least) / steps)) + least if step < steps else movable
    options = DataOptions(token_warmup_step=steps, token_warmup_min=least, keep_tokens=kept)
    caption = drawn_caption(", ".join(tags), Row(0, 0, step, 5, 1.0), options)
    assert caption == ", ".join(tags[:kept] + tags[kept:][:count])


def test_prefix_and_suffix_stand_around_what_is_not_dropped():
    options = {"caption_prefix": "photo of", "caption_suffix": ", 4k"}
    assert drawn("cat", **options) == "photo of cat , 4k"
    assert drawn("", **options) == "photo of , 4k"
    assert drawn("cat", caption_dropout_rate=1.0, **options) == ""


def test_chance_for_one_purpose_does_not_move_another():
    kept = [place for place in range(200) if drawn("a, b, c", place=place, caption_dropout_rate=0.5)]
    assert kept == [p for p in range(200) if drawn("a, b, c", place=p, caption_dropout_rate=0.5, shuffle_caption=True)]


@pytest.mark.parametrize("dropout", [{}, {"caption_dropout_rate": 0.5}, {"caption_dropout_every_n_epochs": 2}])
def test_possible_captions_are_those_that_occur(dropout):
    options = DataOptions(caption_prefix="a", **dropout)
    occurring = {drawn_caption(text, row(place, place % 4), options) for text in ("cat", "dog") for place in range(40)}
    possible = {caption for text in ("cat", "dog") for caption in possible_captions(text, options)}
    assert possible == occurring


@pytest.mark.parametrize(
    "name", ["shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard", "token_warmup_step"]
)
def test_captions_that_change_each_time_can_not_be_encoded_once(name):
    with pytest.raises(JobError, match=f"captions can not be encoded once when {name} changes them"):
        DataOptions(cache_text_encoder_outputs=True, **{name: 1})
