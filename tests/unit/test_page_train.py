"""The form of a training without a browser: its answers as the trainer's options and back, and what its jobs do."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from contextlib import suppress
from html import unescape
from typing import TYPE_CHECKING, Any

import pytest
from train_runs import SIDE, tiny_folder, write_pictures

from lib_lora.core.files import read_lora_file
from lib_lora.core.saving import DiskSpace, no_progress
from lib_lora.errors import JobError, ModelError, OutputError, PrefuseError, TrainError, UnsafePathError
from lib_lora.hosts.host import GenerateRequest
from lib_lora.hosts.standalone.host import StandaloneHost
from lib_lora.hosts.standalone.libraries import TO_TRAIN, diffusers_class, install_command, missing_to_train
from lib_lora.train.control import Wish
from lib_lora.train.option_values import parse_toml, read_toml
from lib_lora.ui.jobs import CancelledError
from lib_lora.ui.texts import Texts
from lib_lora.ui.train_form import ANSWERED, ASKED, CHOSEN, answers_of, earlier, picture_folders, plan_of
from lib_lora.ui.train_panel import loss_panel, made_panel, preview_panel, running_line
from lib_lora.ui.train_run import Watch, preview, train_plan

if TYPE_CHECKING:
    from pathlib import Path

needs_libraries = pytest.mark.skipif(bool(missing_to_train()), reason="a training did not run: no accelerate")
STEPS = 3
STATES = "save_state_every_n_steps = 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and beside them a folder of pictures of which one can not be read."""
    base = tmp_path_factory.mktemp("page")
    tiny_folder(base / "models").rename(base / "models" / "tiny")
    write_pictures(base / "train" / "things")
    (base / "train" / "things" / "2_things" / "<b>.png").write_bytes(b"no picture")
    (base / "train" / ".hidden").mkdir()
    (base / "secret").mkdir()
    return base


@pytest.fixture
def host(folder: Path, tmp_path: Path) -> StandaloneHost:
    return StandaloneHost(
        lora_folders=[_made(tmp_path / "loras")], model_folder=folder / "models", picture_folder=tmp_path / "out"
    )


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def answers(**given: Any) -> dict[str, Any]:
    values = dict.fromkeys(CHOSEN) | {field.name: field.value for field in ASKED}
    values |= {"model": "tiny", "pictures": "things", "name": "made", "resolution": str(SIDE), "network_dim": 2}
    return values | {"max_train_steps": STEPS, "save_precision": "float"} | given


def train(host: StandaloneHost, watch: Watch | None = None, *, again: str = "", **given: Any) -> Any:
    plan = plan_of(host, answers(**given))
    return train_plan(host, plan, watch or Watch(), no_progress, replace=again == "replace", resume=again == "resume")


def test_answers_become_options_and_the_configuration_becomes_the_answers_again(host):
    given = answers(
        type="C3Lier",
        parts="unet",
        conv_dim=3,
        unet_lr="0.002",
        down_lr_weight="sine+0.25",
        up_lr_weight="0,0,0,1,1,1,1,1,1,1,1,1",
        further='noise_offset = 0.05\nxformers = true\noptimizer_args = ["weight_decay=0.1"]',
    )
    plan = plan_of(host, given)
    options = plan.options
    assert (options.network.conv_dim, options.network.network_train_unet_only) == (3, True)
    assert (options.optimizer.unet_lr, options.optimizer.optimizer_args) == (0.002, ("weight_decay=0.1",))
    assert options.network.down_lr_weight == "sine+0.25"
    assert options.noise.noise_offset == 0.05
    again = answers_of(host, parse_toml(plan.toml(), "the plan"))
    assert set(again) == set(ANSWERED)
    assert plan_of(host, again).options == options


def test_a_configuration_of_kohyas_fills_the_form_and_leaves_strange_paths_out(host, folder):
    given = {
        "pretrained_model_name_or_path": "/elsewhere/sd15.safetensors",
        "train_data_dir": str(folder / "secret"),
        "network_module": "networks.dylora",
        "network_dim": 8,
        "resolution": "512,768",
        "sample_prompts": str(folder / "secret"),
        "min_snr_gamma": 5,
    }
    filled = answers_of(host, given)
    assert (filled["model"], filled["pictures"], filled["sample_prompts"]) == (None, None, "")
    assert (filled["type"], filled["network_dim"], filled["resolution"]) == ("DyLoRA", 8, "512,768")
    assert filled["further"] == "min_snr_gamma = 5"


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"pictures": "../secret"}, JobError, "no picture folder is chosen"),
        ({"pictures": ".hidden"}, JobError, "no picture folder is chosen"),
        ({"reg": "../secret"}, JobError, "no picture folder is chosen"),
        ({"model": None}, JobError, "no model is chosen"),
        ({"name": "../up"}, UnsafePathError, "not a plain file name"),
        ({"name": None}, UnsafePathError, "not a plain file name"),
        ({"type": "none"}, JobError, "choose one of LierLa, C3Lier, DyLoRA"),
        ({"type": "C3Lier", "conv_dim": None}, JobError, "C3Lier needs the rank"),
        ({"unet_lr": "fast"}, JobError, "unet_lr must be a number"),
        ({"down_lr_weight": "sines"}, JobError, "names no curve"),
        ({"further": 'logging_dir = "/tmp"'}, JobError, "logging_dir is a path"),
        ({"further": 'tokenizer = "/tmp"'}, JobError, "tokenizer is a path"),
        ({"further": 'output_dir = "/tmp"'}, JobError, "the page has a control for"),
        ({"further": 'pretrained_model_name_or_path = "/tmp"'}, JobError, "the page has a control for"),
        ({"further": "full = true"}, JobError, "the page trains LoRAs"),
        ({"further": "noise_ofset = 1"}, JobError, "did you mean noise_offset"),
        ({"further": "no toml"}, JobError, "the further options"),
    ],
)
def test_answers_that_are_none_are_refused_with_a_sentence(host, given, error, words):
    with pytest.raises(error, match=re.escape(words)):
        plan_of(host, answers(**given))


def test_a_preview_counts_and_writes_nothing(host, tmp_path):
    found = preview(plan_of(host, answers(train_batch_size=2, max_train_epochs="2")), no_progress)
    assert (found.report.train_images, found.steps, found.epochs) == (12, 12, 2)
    shown = preview_panel(Texts("en"), found)
    assert "2_things/&lt;b&gt;.png" in shown
    assert "<b>" not in shown
    assert "12, which are 2 epochs" in shown
    assert 'network_module = "lora"' in unescape(shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loras"]


def test_only_folders_that_are_not_hidden_can_be_chosen(host):
    assert list(picture_folders(host)) == ["things"]


def versions(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    """As if these libraries were installed, and none of the others that a training needs."""

    def version(name: str) -> str:
        if name in given:
            return given[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("lib_lora.hosts.standalone.libraries.importlib.metadata.version", version)


def test_where_a_library_is_missing_or_too_old_a_training_is_refused_and_says_how_to_get_it(host, monkeypatch):
    versions(monkeypatch, transformers="4.30.2", accelerate="0.21.0")
    with pytest.raises(JobError, match=re.escape(f"{sys.executable} -m pip install diffusers==0.31.0")):
        train(host)
    versions(monkeypatch, diffusers="0.14.0", transformers="5.0.0")
    assert missing_to_train() == ["diffusers", "accelerate"]
    assert install_command(missing_to_train()).endswith('install "diffusers>=0.31" "accelerate>=0.21"')
    versions(monkeypatch, **{name: ".".join(map(str, oldest)) for name, oldest in TO_TRAIN.items()})
    assert missing_to_train() == []


def test_a_diffusers_that_does_not_go_with_its_neighbours_is_one_sentence(monkeypatch):
    class Lazy:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError(f"Failed to import {name}:\ncannot import name 'SiglipImageProcessor'")

    monkeypatch.setitem(sys.modules, "diffusers", Lazy())
    versions(monkeypatch, transformers="4.30.2")
    with pytest.raises(ModelError, match=r"SiglipImageProcessor.*diffusers==0\.31\.0"):
        diffusers_class("UNet2DConditionModel")


def test_the_disk_is_said_to_be_too_small_before_the_training(host, monkeypatch):
    plan, words = plan_of(host, answers()), Texts("en")
    found = preview(plan, no_progress)
    assert 0 < found.disk.needed < found.disk.free
    assert words("train.short") not in preview_panel(words, found)
    short = found._replace(disk=DiskSpace(found.disk.needed, found.disk.needed - 1))
    assert words("train.short") in preview_panel(words, short)


@needs_libraries
def test_a_training_ends_among_the_loras_and_can_be_gone_on_with(host):
    watch, texts = Watch(), Texts("en")
    made = train(host, watch, sample_prompts="a cat --s 1 --w 64 --h 64", sample_every_n_steps=2, further=STATES)
    assert (made.name, made.outcome.step, len(watch.losses)) == ("made", STEPS, STEPS)
    assert [(one.step, one.prompt) for one in watch.samples] == [(2, "a cat")]
    assert [entry.tag_name for entry in host.catalog.entries()] == ["made"]
    assert read_lora_file(made.path).metadata["ss_steps"] == f"{STEPS}"
    assert "&lt;lora:made:1&gt;" in made_panel(texts, made)
    assert f"Step {STEPS} of {STEPS}" in running_line(texts, watch)
    assert "<svg" in loss_panel(texts, watch)

    with pytest.raises(OutputError, match="exists"):
        train(host)
    (name, configuration), *_ = earlier(host).items()
    filled = answers_of(host, read_toml(configuration)) | {"max_train_steps": STEPS + 2}
    assert (name, filled["sample_prompts"]) == ("made", "a cat --s 1 --w 64 --h 64")
    plan, watch = plan_of(host, filled), Watch()
    train_plan(host, plan, watch, no_progress, replace=False, resume=True)
    assert (watch.first, watch.now.step) == (3, STEPS + 2), "the last state was of step 2"
    assert read_lora_file(made.path).metadata["ss_steps"] == f"{STEPS + 2}"


@needs_libraries
def test_a_training_that_is_stopped_is_saved_and_one_that_is_cancelled_is_not(host, tmp_path):
    watch = Watch()
    watch.stop()
    made = train(host, watch, max_train_steps=500)
    assert (made.outcome.step, made.outcome.stopped) == (1, True)
    assert "State to go on from" in made_panel(Texts("en"), made)

    def cancelled(done: int, total: int) -> None:
        if total == 500 and done == 2:
            raise CancelledError("cancelled")

    plan = plan_of(host, answers(max_train_steps=500, name="other"))
    with pytest.raises(CancelledError):
        train_plan(host, plan, Watch(), cancelled, replace=False, resume=False)
    assert sorted(path.name for path in (tmp_path / "loras").iterdir()) == ["made.safetensors"]


@needs_libraries
def test_there_is_nothing_to_go_on_from_before_the_first_state(host):
    with pytest.raises(TrainError, match="holds no state"):
        train(host, again="resume")


def test_the_model_that_draws_is_let_go_for_a_training_and_loaded_again_for_the_next_picture(host):
    request = GenerateRequest("a red circle", steps=1, seed=1, width=64, height=64)
    host.use_model("tiny")
    (before,) = host.generate(request, no_progress, save=False)
    with host.without_model():
        assert host.keymap() is None
    (after,) = host.generate(request, no_progress, save=False)
    assert host.model() == "tiny"
    assert host.keymap() is not None
    assert after.image.tobytes() == before.image.tobytes()


def test_a_pause_is_taken_back_by_a_second_one_and_ended_by_a_stop():
    watch, line = Watch(), Texts("en")
    watch.toggle_pause()
    assert watch.asked() is Wish.PAUSE
    watch.toggle_pause()
    assert watch.asked() is Wish.GO
    watch.stop()
    watch.toggle_pause()
    assert watch.asked() is Wish.STOP
    watch.bar("encoding <pictures>")
    assert "Encoding &lt;pictures&gt;" in running_line(line, watch)
    assert loss_panel(line, watch) == ""


@pytest.mark.parametrize("value", ["\0", "x" * 300, -1])
@pytest.mark.parametrize("name", ANSWERED)
def test_whatever_stands_in_a_field_is_used_or_refused_with_a_sentence(host, name, value):
    with suppress(PrefuseError):
        plan_of(host, answers(**{name: value}))
