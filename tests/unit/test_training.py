"""What metadata tells of a training, whatever is written there."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lora.tools.training import MOST_LETTERS, Training, TrainingFolder, read_training

KOHYA = {
    "ss_sd_model_name": "sd-v1-5.safetensors",
    "ss_base_model_version": "sd_v1",
    "ss_resolution": "(512, 512)",
    "ss_steps": "1500",
    "ss_max_train_steps": "2000",
    "ss_num_epochs": "10",
    "ss_epoch": "8",
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001",
    "ss_text_encoder_lr": "None",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_training_finished_at": "1700000000.5",
    "ss_dataset_dirs": '{"10_cat": {"n_repeats": 10, "img_count": 20}, "1_reg": {"n_repeats": 1, "img_count": 300}}',
    "ss_tag_frequency": '{"10_cat": {"cat": 20, "sitting": 5}, "1_reg": {"cat": 7, " sitting": 1, "dog": 300}}',
}
"""As sd-scripts' train_network.py writes it."""
DATASETS = [
    {
        "subsets": [{"img_count": 4, "num_repeats": 3, "image_dir": "a"}, {"image_dir": 7}, "nonsense"],
        "tag_frequency": {"a": {"x": 2}},
    },
    {"tag_frequency": {"b": {"x": 3, "y": 1}}},
]


def test_facts_of_kohyas_trainer_are_found():
    facts = read_training(KOHYA).facts
    assert facts["base_model"] == "sd-v1-5.safetensors"
    assert (facts["steps"], facts["epochs"], facts["resolution"]) == ("1500", "8", "(512, 512)")
    assert facts["optimizer"].endswith("AdamW8bit(weight_decay=0.1)")
    assert facts["network_args"] == '{"conv_dim": "4"}'
    assert facts["finished"] == "2023-11-14"
    assert "text_encoder_lr" not in facts


def test_tags_are_added_up_over_folders_the_most_first():
    assert list(read_training(KOHYA).tags.items()) == [("dog", 300), ("cat", 27), ("sitting", 6)]


def test_folders_have_their_repeats():
    assert read_training(KOHYA).folders == (TrainingFolder("10_cat", 20, 10), TrainingFolder("1_reg", 300, 1))


def test_datasets_tell_what_folders_do_not():
    found = read_training({"ss_datasets": json.dumps(DATASETS)})
    assert found.folders == (TrainingFolder("a", 4, 3),)
    assert found.tags == {"x": 5, "y": 1}


def test_long_texts_are_cut():
    assert len(read_training({"ss_training_comment": "x" * 10_000}).facts["comment"]) == MOST_LETTERS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        "[" * 100_000,
        "9" * 10_000,
        '{"a": 1}',
        '{"a": {"b": "3"}}',
        '{"a": {"b": -1, "c": 1e99, "d": true, "e": null, "f": NaN, "g": [1], "h": 99999999999}}',
        '{"a": {"": 5, "  ": 5}}',
        '{"a": [["b", 1]]}',
        '[{"subsets": {"image_dir": "x"}}]',
        '[{"tag_frequency": [1]}]',
        "\ud800",
    ],
)
def test_nonsense_is_no_fact(text):
    keys = ("ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "ss_training_finished_at")
    found = read_training(dict.fromkeys(keys, text))
    assert found.tags == {}
    assert all(folder.pictures is None and folder.repeats is None for folder in found.folders)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*KOHYA, "ss_datasets"]), JSON.map(json.dumps) | st.text(), max_size=6))
def test_no_metadata_raises(metadata):
    found = read_training(metadata)
    assert isinstance(found, Training)
    assert all(count > 0 for count in found.tags.values())
    assert all(isinstance(text, str) and text for text in found.facts.values())
