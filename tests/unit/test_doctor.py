"""What `doctor` says of the ways to compile: usable, or what is missing and what to do."""

from __future__ import annotations

import sysconfig

import pytest
import torch

import lib_lora.compile.requirements as requirements
import lib_lora.hosts.standalone.doctor as doctor
from lib_lora.compile.requirements import find_compiler, missing_for_inductor


@pytest.fixture
def findings():
    return lambda: {found.topic: found for found in doctor._backends()}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A computer without compilers, on Linux."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CXX", "CC", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(requirements.platform, "system", lambda: "Linux")


def test_each_backend_is_told_with_what_to_do(findings, bare):
    found = findings()
    assert {"C++ compiler", "inductor on cpu", "tensorrt"} <= found.keys()
    assert found["inductor on cpu"].value == "not usable"
    assert "There is no C++ compiler: install g++ (apt install g++)." in found["inductor on cpu"].advice
    if not torch.cuda.is_available():
        assert found["tensorrt"].value.startswith("not usable")
        assert "NVIDIA GPU" in found["tensorrt"].advice


def test_a_compiler_and_pythons_headers_are_all_that_a_cpu_needs(bare, monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert find_compiler() == str(compiler)
    assert missing_for_inductor("cpu") == []
    (tmp_path / "Python.h").unlink()
    (sentence,) = missing_for_inductor("cpu")
    assert "apt install python3." in sentence
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "TORCHDYNAMO_DISABLE=1 switches it off; remove that from the environment." in missing_for_inductor("cpu")


def test_a_gpu_needs_triton_and_a_c_compiler(bare, monkeypatch):
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    text = " ".join(missing_for_inductor("cuda"))
    assert "triton is not installed: pip install triton." in text
    assert "There is no C compiler, which triton needs" in text


def test_a_torch_that_freezes_weights_is_told(bare):
    from torch._inductor import config

    before, config.freezing = config.freezing, True
    try:
        assert any("TORCHINDUCTOR_FREEZING=0" in sentence for sentence in missing_for_inductor("cpu"))
    finally:
        config.freezing = before


def test_a_compiler_that_the_environment_names_goes_before(monkeypatch, tmp_path):
    own = tmp_path / "my-compiler"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("CXX", str(own))
    assert find_compiler() == str(own)
