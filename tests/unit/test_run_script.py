"""run.py: the set-up on a machine with nothing but Python."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("prefuse_run_script", ROOT / "run.py")
run = importlib.util.module_from_spec(specification)
specification.loader.exec_module(run)


@pytest.fixture
def environment(tmp_path):
    """A virtual environment's skeleton without any package."""
    folder = tmp_path / ".venv"
    (folder / "lib/python3.11/site-packages").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("version = 3.11.7\n")
    return folder


def add_package(folder, name, version, files=("code.py",), missing=()):
    site = run.site_packages(folder)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [f"{name}/{file},sha256=x,1" for file in (*files, *missing)]
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    for file in files:
        (site / name).mkdir(exist_ok=True)
        (site / name / file).touch()
    return info


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 1)])
def test_python_3_10_to_3_12_is_accepted(version):
    assert run.unsupported(version) is None


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 1), (3, 13, 0), (4, 0, 0)])
def test_another_python_is_refused_in_one_sentence_that_names_it(version):
    sentence = run.unsupported(version)
    assert f"this is Python {version[0]}.{version[1]}" in sentence
    assert "\n" not in sentence


def test_the_interpreter_is_found_on_windows_and_elsewhere(tmp_path):
    assert run.venv_python(tmp_path, windows=True) == tmp_path / "Scripts/python.exe"
    assert run.venv_python(tmp_path, windows=False) == tmp_path / "bin/python"


def test_the_packages_of_a_windows_environment_are_found(tmp_path):
    (tmp_path / "Lib/site-packages").mkdir(parents=True)
    assert run.site_packages(tmp_path) == tmp_path / "Lib/site-packages"


def test_an_environment_without_packages_folder_has_no_torch(tmp_path):
    assert run.site_packages(tmp_path) is None
    assert run.installed_torch(None) is None


@pytest.mark.parametrize("version", ["2.1.2", "2.10.0+cu126", "2.13.0", "3.0.0.dev20270101+rocm7"])
def test_a_users_torch_is_left_alone(environment, version):
    add_package(environment, "torch", version)
    assert run.installed_torch(run.site_packages(environment)) == version


@pytest.mark.parametrize("version", ["1.13.1", "2.1.1", "2.0.1+cu118"])
def test_a_torch_that_is_too_old_counts_as_none(environment, version):
    add_package(environment, "torch", version)
    assert run.installed_torch(run.site_packages(environment)) is None


def test_packages_named_like_torch_are_not_torch(environment):
    add_package(environment, "torchvision", "0.28.0")
    assert run.installed_torch(run.site_packages(environment)) is None


def test_torch_is_taken_out_of_the_requirements_and_nothing_else(environment):
    text = "# comment\ntorch==2.13.0\ntorchsde==0.2.6\ntorch_tensorrt==2.13.0\nnumpy==2.4.6\n"
    line, rest = run.without_torch(text)
    assert line == "torch==2.13.0"
    assert rest == text.replace("torch==2.13.0\n", "")


def test_the_shipped_requirements_pin_torch_once():
    line, rest = run.without_torch((ROOT / "requirements.txt").read_text())
    assert line == "torch==2.13.0"
    assert "torch" not in rest.split("torch first and alone")[1]


def test_whole_packages_are_kept(environment):
    info = add_package(environment, "numpy", "2.4.6")
    assert run.forget_broken_packages(run.site_packages(environment)) == []
    assert info.is_dir()


def test_cleaned_byte_code_does_not_make_a_package_broken(environment):
    add_package(environment, "numpy", "2.4.6", missing=("__pycache__/code.cpython-311.pyc",))
    assert run.forget_broken_packages(run.site_packages(environment)) == []


def test_a_package_with_a_missing_file_is_installed_again(environment):
    info = add_package(environment, "numpy", "2.4.6", missing=("core.py",))
    assert run.forget_broken_packages(run.site_packages(environment)) == ["numpy"]
    assert not info.exists()


def test_a_package_whose_record_was_never_written_is_installed_again(environment):
    info = add_package(environment, "torch", "2.13.0")
    (info / "RECORD").unlink()
    assert run.forget_broken_packages(run.site_packages(environment)) == ["torch"]
    assert run.installed_torch(run.site_packages(environment)) is None


def make_project(tmp_path):
    for name in ("requirements.txt", "requirements-data.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    return ("requirements.txt", "requirements-data.txt")


def test_the_stamp_changes_with_each_requirement_file_and_with_the_python(environment, tmp_path):
    files = make_project(tmp_path)
    keys = [run.stamp_key(environment, files, tmp_path)]
    for name in files:
        (tmp_path / name).write_text("changed\n")
        keys.append(run.stamp_key(environment, files, tmp_path))
    (environment / "pyvenv.cfg").write_text("version = 3.12.1\n")
    keys.append(run.stamp_key(environment, files, tmp_path))
    assert len(set(keys)) == len(keys)


@pytest.fixture
def installs(environment, monkeypatch):
    """What `prepare` would have installed, without pip."""
    calls = []
    monkeypatch.setattr(run, "make_venv", lambda folder: calls.append("venv"))
    monkeypatch.setattr(run, "install", lambda folder, files: calls.append(files))
    python = run.venv_python(environment)
    python.parent.mkdir()
    python.touch()
    return calls


def test_a_second_start_installs_nothing(environment, installs):
    run.prepare(environment, run.RUN_FILES)
    assert installs == ["venv", run.RUN_FILES]
    run.prepare(environment, run.RUN_FILES)
    assert len(installs) == 2


def test_the_tests_need_more_than_the_demo(environment, installs):
    run.prepare(environment, run.RUN_FILES)
    run.prepare(environment, run.COMMANDS["test"][1])
    assert installs.count("venv") == 2


def test_an_interrupted_installation_is_done_again(environment, installs, monkeypatch):
    run.prepare(environment, run.RUN_FILES)
    stamp = next(environment.glob("*.stamp"))
    stamp.write_text("another requirement file")

    def interrupted(folder, files):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.prepare(environment, run.RUN_FILES)
    assert not stamp.exists()
    run.prepare(environment, run.RUN_FILES)
    assert installs.count(run.RUN_FILES) == 2
    assert stamp.exists()


def test_pip_gets_torch_alone_and_then_the_rest_under_a_constraint(environment, monkeypatch):
    calls = []

    def record(folder, *arguments):
        constraint = Path(arguments[-1]).read_text() if "-c" in arguments else None
        calls.append((arguments[0], constraint))
        if arguments[0].startswith("torch"):
            add_package(environment, "torch", "2.13.0+cpu")

    monkeypatch.setattr(run, "pip_install", record)
    run.install(environment, run.RUN_FILES)
    assert calls == [("torch==2.13.0", None), ("-r", "torch==2.13.0+cpu\n"), ("--no-deps", None)]


def test_pip_is_not_asked_for_torch_where_the_user_has_a_gpu_build(environment, monkeypatch):
    calls = []
    add_package(environment, "torch", "2.5.1+cu124")
    monkeypatch.setattr(run, "pip_install", lambda folder, *arguments: calls.append(arguments[0]))
    run.install(environment, run.RUN_FILES)
    assert calls == ["-r", "--no-deps"]


@pytest.mark.parametrize("arguments", [[], ["sing"], ["--help"]])
def test_an_unknown_command_prints_the_usage_and_exits_with_2(arguments, capsys):
    assert run.main(arguments) == 2
    assert "usage: python run.py" in capsys.readouterr().err


def test_an_unsupported_python_exits_with_1_and_installs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("it began to install"))
    assert run.main(["demo"]) == 1
    assert "this is Python 3.13" in capsys.readouterr().err


def test_the_exit_code_of_the_command_passes_through(monkeypatch):
    monkeypatch.setattr(run, "prepare", lambda *_: None)
    monkeypatch.setattr(run, "venv_python", lambda folder: Path(sys.executable))
    monkeypatch.setitem(run.COMMANDS, "test", (("-c", "import sys; sys.exit(int(sys.argv[1]))"), ()))
    assert run.main(["test", "7"]) == 7


def test_a_failed_installation_is_one_sentence_that_says_what_to_do(monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(run, "prepare", fail)
    assert run.main(["demo"]) == 1
    assert "disk full" in capsys.readouterr().err


def test_the_script_needs_the_standard_library_only():
    source = (ROOT / "run.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= sys.stdlib_module_names


def test_the_webuis_versions_have_an_environment_of_their_own():
    command, files, folder, rest = run.plan(["test", "--webui-pins", "-x"])
    assert files == ("requirements-webui.txt",)
    assert folder.name == ".venv-webui"
    assert "tests/webui" in command
    assert rest == ["-x"]


def test_tests_that_are_named_are_run_alone_with_the_webuis_versions():
    command, *_, rest = run.plan(["test", "tests/unit/test_tags.py", "--webui-pins"])
    assert "tests/webui" not in command
    assert rest == ["tests/unit/test_tags.py"]


def test_other_commands_have_the_pinned_environment_and_keep_their_options():
    _, files, folder, rest = run.plan(["test", "-k", "tags"])
    assert files[0] == "requirements.txt"
    assert folder.name == ".venv"
    assert rest == ["-k", "tags"]


@pytest.mark.parametrize("name", ["torch==2.1.2", "safetensors==0.4.2", "gradio==3.41.2", "fastapi==0.94.0"])
def test_the_webuis_pins_are_those_of_version_1_10(name):
    assert name in (ROOT / "requirements-webui.txt").read_text(encoding="utf-8").splitlines()
