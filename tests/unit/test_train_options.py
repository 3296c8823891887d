"""Options of a training: from TOML files and command lines, with types, under kohya's names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lib_lora.__main__ import main
from lib_lora.errors import JobError
from lib_lora.train.option_values import read_arguments, read_toml
from lib_lora.train.options import TrainOptions

KOHYA = {
    "pretrained_model_name_or_path": "model.safetensors",
    "train_data_dir": "pictures",
    "network_module": "networks.lora",
    "network_dim": 8,
    "network_alpha": 4,
    "network_args": ["conv_dim=4", "conv_alpha=1"],
    "learning_rate": 1e-4,
    "unet_lr": 2e-4,
    "text_encoder_lr": 5e-5,
    "resolution": "512,768",
    "train_batch_size": 2,
    "max_train_epochs": 3,
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine_with_restarts",
    "lr_warmup_steps": 0.1,
    "min_snr_gamma": 5,
    "max_token_length": 225,
    "clip_skip": 2,
    "mixed_precision": "bf16",
    "save_precision": "fp16",
    "gradient_checkpointing": True,
    "output_name": "mine",
}


def in_toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def in_words(value: object) -> list[str]:
    return [] if value is True else [str(one) for one in (value if isinstance(value, list) else [value])]


def test_every_option_has_one_name_and_is_described():
    table = TrainOptions.table()
    assert [name for name, count in Counter(key for key, _, _ in table).items() if count > 1] == []
    assert [key for key, _, text in table if not text] == []
    assert set(KOHYA) <= {key for key, _, _ in table}


def test_a_toml_and_a_command_line_say_the_same(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("[network]\n" + "\n".join(f"{key} = {in_toml(value)}" for key, value in KOHYA.items()))
    words = [word for key, value in KOHYA.items() for word in (f"--{key}", *in_words(value))]
    from_file, from_words = TrainOptions.of(read_toml(file)), TrainOptions.of(read_arguments(words))
    assert from_file == from_words
    assert from_file.network.conv_dim == 4
    assert from_file.data.resolution == (512, 768)
    assert from_file.optimizer.lr_warmup_steps == 0.1
    assert from_file.data.train_data_dir == Path("pictures")
    assert from_file.run.gradient_checkpointing is True


def test_nothing_behind_an_equal_sign_leaves_an_option_out():
    options = TrainOptions.of(read_arguments(["--output_name=", "--caption_prefix="]))
    assert (options.output.output_name, options.data.caption_prefix) == ("last", "")


def test_dashes_and_equal_signs_are_as_good():
    words = ["--network-dim=16", "--optimizer-args", "weight_decay=0.1", "betas=(0.9,0.99)", "--full"]
    options = TrainOptions.of(read_arguments(words))
    assert options.network.network_dim == 16
    assert options.optimizer.optimizer_args == ("weight_decay=0.1", "betas=(0.9,0.99)")
    assert options.model.full


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"netwrok_dim": 4}, "no option netwrok_dim; did you mean network_dim"),
        ({"xyzzy": 4}, "no option xyzzy.*--options"),
        ({"network_dim": "many"}, "network_dim must be a whole number, not 'many'"),
        ({"network_dim": 2.5}, "network_dim must be a whole number"),
        ({"learning_rate": "nan"}, "learning_rate must be a number"),
        ({"learning_rate": -1}, "learning_rate must be at least 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16"),
        ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing must be true or false"),
        ({"max_token_length": 100}, "max_token_length must be one of 75, 150, 225"),
        ({"min_timestep": 500, "max_timestep": 100}, "min_timestep 500 must be below max_timestep 100"),
        ({"sample_every_n_steps": 5}, "sample_prompts"),
        ({"output_name": 3}, "output_name must be a text"),
    ],
)
def test_what_can_not_be_is_one_sentence(values, sentence):
    with pytest.raises(JobError, match=sentence):
        TrainOptions.of(values)


def test_a_file_that_says_a_key_twice_or_is_none_is_refused(tmp_path):
    twice = tmp_path / "twice.toml"
    twice.write_text("[a]\nseed = 1\n[b]\nseed = 2\n")
    with pytest.raises(JobError, match="says seed twice"):
        read_toml(twice)
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 2\n")
    with pytest.raises(JobError, match="is no TOML file"):
        read_toml(broken)
    with pytest.raises(JobError, match="can not be read"):
        read_toml(tmp_path / "missing.toml")


@pytest.mark.newest
@pytest.mark.parametrize("reader", ["tomlkit", "toml"])
def test_a_python_without_a_reader_of_its_own_takes_another(tmp_path, monkeypatch, reader):
    monkeypatch.setattr("lib_lora.train.option_values._TOML_READERS", ("no_such_module", reader))
    file = tmp_path / "config.toml"
    file.write_text('[a]\nseed = 3\nnetwork_args = ["conv_dim=4"]\nresolution = [512, 768]\nfull = true\n')
    options = TrainOptions.of(read_toml(file))
    assert options.data.seed == 3
    assert options.network.conv_dim == 4
    assert options.data.resolution == (512, 768)
    assert options.model.full


def test_a_value_without_a_key_is_refused():
    with pytest.raises(JobError, match="write --key 5"):
        read_arguments(["5"])


def test_the_command_lists_its_options(capsys):
    assert main(["train", "--options"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  ") for line in lines) == len(TrainOptions.table())
    found = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert found["network_dim"].split(maxsplit=2)[1:] == [
        "4",
        "Rank of Linear layers and 1x1 convolutions; 0 leaves them alone.",
    ]
    assert found["scale_weight_norms"].split(maxsplit=1)[1].startswith("No layer's change becomes longer")
    assert [line for line in lines if line.isupper()][:2] == ["WHAT IS TRAINED", "WHAT IS LEARNED BESIDE THE MODEL"]


def test_a_file_may_be_named_as_kohya_names_it(tmp_path, capsys):
    file = tmp_path / "config.toml"
    file.write_text("seed = 'many'\n")
    assert main(["train", "--config_file", str(file), "--network_dim", "4"]) == 1
    assert "seed must be a whole number, not 'many'" in capsys.readouterr().err


def test_the_command_refuses_with_one_sentence(tmp_path, capsys):
    assert main(["train"]) == 1
    assert main(["train", str(tmp_path / "no.toml"), "--seed", "3"]) == 1
    assert main(["train", "--lerning_rate", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "did you mean learning_rate?" in lines[2]


def test_what_decides_the_course_is_all_but_what_is_written():
    course = TrainOptions.of(KOHYA | {"output_dir": "elsewhere"}).course()
    assert course["network_dim"] == 8
    assert course["resolution"] == [512, 768]
    assert not {"train_data_dir", "output_dir", "output_name", "max_train_steps", "save_every_n_steps"} & set(course)
