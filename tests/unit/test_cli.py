"""The command line: exit codes, one sentence for a refusal, plain data with --json."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import make_tiny, write_folder
from torch._dynamo import config as dynamo_config
from toys import c3lier, write_lora

import lib_lora.__main__ as command_line
from lib_lora.__main__ import main
from lib_lora.core.files import data_sha256
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_tensors
from lib_lora.hosts.standalone.demo import LORA_DIR
from lib_lora.hosts.standalone.infotext import parse_infotext

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/sd1"
REFUSED, USAGE = 1, 2
STRENGTH_THAT_SHOWS = 3.0

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny SD1 in a diffusers folder with a folder of one LoRA for it."""
    folder = tmp_path_factory.mktemp("cli")
    tiny = make_tiny("sd1", folder / "config")
    keymap = KeyMap.from_modules({"unet": tiny.parts["unet"], "te1": tiny.parts["text_encoder"]})
    write_lora(folder / "loras/ink.safetensors", c3lier(keymap))
    return write_folder(tiny, folder / "tiny")


@pytest.fixture
def generate(model, tmp_path, capsys):
    """Run `generate` on the tiny model; returns exit code, stdout and stderr."""

    def run(prompt, *options):
        fixed = ["--model", str(model), "--lora-dir", str(model.parent / "loras"), "--device", "cpu"]
        size = ["--width", "32", "--height", "24", "--steps", "1", "--seed", "7"]
        code = main(["generate", "--prompt", prompt, *fixed, *size, *options])
        return code, *capsys.readouterr()

    return run


def test_generate_writes_a_png_that_says_how_it_was_made(generate, model, tmp_path):
    out = tmp_path / "new/picture.png"
    prompt = f"abc <lora:ink:{STRENGTH_THAT_SHOWS}>"
    code, stdout, stderr = generate(
        prompt, "--negative", "cab, cba", "--cfg", "4.5", "--sampler", "DDIM", "--out", str(out)
    )
    assert (code, stderr) == (0, "")
    assert "ink at 3" in stdout
    assert str(out) in stdout
    with Image.open(out) as image:
        assert image.size == (32, 24)
        info = parse_infotext(image.text["parameters"])
    assert info.prompt == prompt
    assert info.negative == "cab, cba"
    short = data_sha256(model.parent / "loras/ink.safetensors")[:12]
    expected = {"Steps": "1", "Sampler": "DDIM", "CFG scale": "4.5", "Seed": "7", "Size": "32x24", "Model": "tiny"}
    assert expected.items() <= info.parameters.items()
    assert info.parameters["Lora hashes"] == f"ink: {short}"
    assert info.parameters["Version"].startswith("Prefuse ")


def test_generate_with_json_prints_nothing_else(generate, tmp_path):
    code, stdout, stderr = generate("abc <lora:ink:0.5>", "--out", str(tmp_path / "a.png"), "--json")
    data = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert data["report"]["applied"][0]["name"] == "ink"
    assert data["out"] == str(tmp_path / "a.png")


def test_generate_says_how_far_compilation_is_and_why_it_was_given_up(generate, tmp_path):
    disabled = dynamo_config.disable
    dynamo_config.disable = True
    try:
        code, stdout, _ = generate(
            "abc <lora:ink:0.5>", "--out", str(tmp_path / "c.png"), "--compile", "inductor", "--json"
        )
    finally:
        dynamo_config.disable = disabled
    status = json.loads(stdout)["compile"]
    assert (code, status["backend"], status["blocks"]) == (0, "inductor", 9)
    assert status["compiled"] == []
    assert status["recompiles"] == 0
    code, stdout, _ = generate("abc <lora:ink:0.5>", "--out", str(tmp_path / "e.png"), "--json")
    assert json.loads(stdout)["compile"]["backend"] == "eager"
    assert Image.open(tmp_path / "c.png").tobytes() == Image.open(tmp_path / "e.png").tobytes()


def test_a_lora_changes_the_picture_and_both_modes_draw_the_same(generate, tmp_path):
    tag = f"<lora:ink:{STRENGTH_THAT_SHOWS}>"
    cases = {"plain": ("abc",), "fused": (f"abc {tag}",), "hooked": (f"abc {tag}", "--mode", "hook")}
    for name, arguments in cases.items():
        assert generate(*arguments, "--out", str(tmp_path / f"{name}.png"))[0] == 0
    pixels = {name: torch.tensor(list(Image.open(tmp_path / f"{name}.png").tobytes())).float() for name in cases}
    assert (pixels["fused"] - pixels["plain"]).abs().max() > 1
    assert (pixels["fused"] - pixels["hooked"]).abs().max() <= 1


def test_drawn_block_weights_are_in_the_infotext_as_a_tag_that_draws_the_same_picture(generate, tmp_path):
    tag = f"<lora:ink:{STRENGTH_THAT_SHOWS}:lbw={'R,' * 16}R>"
    pictures = []
    for name in ("drawn", "written"):
        code, stdout, _ = generate(f"abc {tag}", "--out", str(tmp_path / f"{name}.png"), "--json")
        assert code == 0
        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
        tag = json.loads(stdout)["parameters"].get("Lora resolved", tag)
        assert "R" not in tag
    assert pictures[0] == pictures[1]


def test_a_lora_that_is_missing_is_told_and_not_in_the_infotext(generate, tmp_path):
    out = tmp_path / "a.png"
    code, stdout, _ = generate("abc <lora:nothing:1>", "--out", str(out))
    assert code == 0
    assert "nothing" in stdout
    with Image.open(out) as image:
        assert "Lora hashes" not in parse_infotext(image.text["parameters"]).parameters


def test_an_existing_picture_is_replaced_with_force_only(generate, tmp_path):
    out = tmp_path / "a.png"
    out.write_bytes(b"mine")
    code, _, stderr = generate("abc", "--out", str(out))
    assert code == REFUSED
    assert "--force" in stderr
    assert out.read_bytes() == b"mine"
    assert generate("abc", "--out", str(out), "--force")[0] == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_pictures_without_a_name_get_the_next_number(generate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert generate("abc")[0] == 0
    assert sorted(file.name for file in Path("outputs").iterdir()) == ["00000-7.png", "00001-7.png"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--width", "30"), "multiple of 8"),
        (("--height", "0"), "multiple of 8"),
        (("--steps", "0"), "At least 1 step"),
        (("--cfg", "nan"), "guidance scale"),
        (("--seed", "-2"), "seed"),
        (("--sampler", "Euler z"), "did you mean Euler"),
        (("--model", "no/such/model"), "There is no model"),
        (("--lora-dir", "no/such/folder"), "There is no LoRA folder"),
    ],
)
def test_a_refusal_is_one_sentence_on_stderr_and_exit_code_1(generate, tmp_path, options, said):
    code, stdout, stderr = generate("abc", "--out", str(tmp_path / "a.png"), *options)
    assert (code, stdout) == (REFUSED, "")
    assert said in stderr
    assert stderr.strip().count("\n") == 0
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["generate"], ["doctor", "--nothing"], ["inspect"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == USAGE
    assert "usage:" in capsys.readouterr().err


def test_inspect_says_what_a_lora_is(capsys):
    assert main(["inspect", str(GOLDEN / "lora_D_c3lier.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["base_model"], found["problem"]) == ("LoRA", "SD 1.x", None)
    assert len(found["layers"]) == 296
    assert {layer["rank"] for layer in found["layers"]} == {2, 4}
    assert {layer["alpha"] for layer in found["layers"]} == {1.0, 2.0}
    assert found["sha256"] == found["metadata"]["sshs_model_hash"]
    assert set(found["blocks"]) >= {"BASE", "IN01", "M00", "OUT11"}


def test_inspect_prints_lines_for_people(capsys):
    assert main(["inspect", str(GOLDEN / "lora_A.safetensors")]) == 0
    stdout = capsys.readouterr().out
    assert "LoRA for SD 1.x" in stdout
    assert "ranks            4 (210)" in stdout


def test_inspect_describes_a_lora_that_can_not_be_applied(tmp_path, capsys):
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.full((2, 8), torch.nan),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2),
    }
    save_tensors(tmp_path / "bad.safetensors", tensors)
    assert main(["inspect", str(tmp_path / "bad.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["not_finite"] == ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"]
    assert "NaN" in found["problem"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_inspect_refuses_what_is_no_model_file(tmp_path, capsys, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == REFUSED
    assert "a.safetensors" in capsys.readouterr().err


def test_convert_pickle_keeps_every_bit(tmp_path, capsys):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.float16)}
    torch.save(tensors, tmp_path / "lora.pt")
    assert main(["convert-pickle", str(tmp_path / "lora.pt")]) == 0
    written = load_file(tmp_path / "lora.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert "lora.safetensors" in capsys.readouterr().out


def test_convert_pickle_refuses_code_and_existing_files(tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(print))
    assert main(["convert-pickle", str(tmp_path / "bad.pt")]) == REFUSED
    torch.save({"a": torch.ones(1)}, tmp_path / "good.pt")
    (tmp_path / "good.safetensors").write_bytes(b"mine")
    assert main(["convert-pickle", str(tmp_path / "good.pt")]) == REFUSED
    assert (tmp_path / "good.safetensors").read_bytes() == b"mine"
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.newest
def test_doctor_names_versions_devices_and_what_to_do(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert torch.__version__.startswith(found["torch"]["value"])
    assert "speed of fp32" in found["CPU bf16"]["value"]
    assert {"device cpu", "diffusers", "CLIP vocabulary", "inductor on cpu", "tensorrt"} <= found.keys()


def test_bench_hands_its_options_to_the_suite(monkeypatch):
    import benchmarks.steps

    seen = []
    monkeypatch.setattr(benchmarks.steps, "main", seen.append)
    assert main(["bench", "--suite", "steps", "--dtype", "fp32"]) == 0
    assert seen == [["--dtype", "fp32"]]


def test_bench_says_where_the_benchmarks_are_if_they_are_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_line.bench, "BENCHMARKS", tmp_path / "nothing")
    assert main(["bench", "--suite", "switch"]) == REFUSED
    assert "repository" in capsys.readouterr().err


def test_a_fault_of_the_program_is_logged_and_told_in_a_sentence(monkeypatch, capsys, caplog):
    def fail(*_):
        raise ZeroDivisionError("oh")

    import lib_lora.tools.inspect

    monkeypatch.setattr(lib_lora.tools.inspect, "inspect_file", fail)
    assert main(["inspect", "file"]) == REFUSED
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert "Traceback" in caplog.text


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    import lib_lora.tools.inspect

    monkeypatch.setattr(lib_lora.tools.inspect, "inspect_file", interrupt)
    assert main(["inspect", "file"]) == command_line.INTERRUPTED
    assert capsys.readouterr().err == "Interrupted.\n"


def test_the_command_line_starts_without_loading_torch():
    code = "import sys, lib_lora.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "False\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows tells of a closed pipe in another way")
def test_a_reader_that_has_enough_is_no_fault():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lib_lora", "inspect", str(LORA_DIR / "stripes.safetensors")]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (1, "")
    os.close(write)
