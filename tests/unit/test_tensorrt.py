"""Blocks as TensorRT engines, through a stand-in of the package that is called only as the real one can be called."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_tensorrt import RECORD, FakeTensorRT
from signatures import read_signatures
from test_export import make_unet
from toys import c3lier, write_lora

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.compile import tensorrt, tensorrt_cache, tensorrt_package
from lib_lora.compile.tensorrt import TensorRT
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_bytes
from lib_lora.errors import CompileError

EXACT = 1e-5
"""Largest difference of float32 results of the same operations, in units of the largest number."""
SECONDS = 300.0
BLOCKS = 5

pytestmark = pytest.mark.newest


@pytest.fixture
def fake(monkeypatch):
    """The stand-in in the package's place."""
    fake = FakeTensorRT()
    monkeypatch.setattr(tensorrt, "load_package", fake.package)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of the test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return fake


@pytest.fixture
def loras(tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    keymap = KeyMap.from_modules({"unet": make_unet()})
    write_lora(folder / "ink.safetensors", c3lier(keymap))
    attention = [
        layer for layer in keymap if layer.key.endswith("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    ]
    write_lora(folder / "one.safetensors", attention)
    return LoraCatalog([folder])


@torch.no_grad()
def draw(unet):
    generator = torch.Generator().manual_seed(3)
    latent, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 4), (1, 77, 8)))
    return unet(latent, torch.tensor([500.0]), context, return_dict=False)[0]


def warm(handle, unet):
    """Until all blocks were built and compared."""
    draw(unet)
    assert handle.wait(SECONDS)
    draw(unet)


@torch.no_grad()
def far(one, other):
    return float((one - other).abs().max() / other.abs().max())


def test_switches_refit_only_what_was_touched_and_draw_what_eager_draws(fake, loras):
    unet, eager = make_unet(), make_unet()
    ours = LoraSession({"unet": eager}, loras)
    handle = TensorRT().prepare(unet)
    session = LoraSession({"unet": unet}, loras, on_weights_changed=handle.weights_changed)
    session.set([("ink", 1.0)])
    warm(handle, unet)
    assert len(handle.status.compiled) == BLOCKS, handle.status
    for request in ([("ink", 1.0)], [("ink", 2.0), ("one", 1.0)], [("one", 0.5)], ()):
        session.set(request)
        ours.set(request)
        assert far(draw(unet), draw(eager)) < EXACT
    fake.refits.clear()
    session.set([("one", 2.0)])
    assert [[name.count("to_q") for name in refit] for refit in fake.refits] == [[1]]
    ours.set([("one", 2.0)])
    assert far(draw(unet), draw(eager)) < EXACT
    assert (fake.builds, fake.package_refits, handle.status.recompiles) == (BLOCKS, 0, 0)
    assert fake.locations == {"DEVICE"}

    handle.release()
    fake.refits.clear()
    session.clear()
    ours.clear()
    assert torch.equal(draw(unet), draw(eager))


def test_weights_whose_way_into_an_engine_is_not_known_go_by_the_packages_own_refit(fake, loras):
    fake.hides = True
    unet, eager = make_unet(), make_unet()
    handle = TensorRT().prepare(unet)
    session = LoraSession({"unet": unet}, loras, on_weights_changed=handle.weights_changed)
    warm(handle, unet)
    session.set([("ink", 1.5)])
    LoraSession({"unet": eager}, loras).set([("ink", 1.5)])
    assert len(handle.status.compiled) == BLOCKS
    assert far(draw(unet), draw(eager)) < EXACT
    assert fake.package_refits == 2 * BLOCKS
    assert not fake.refits


def test_a_switch_while_engines_are_built_is_in_them(fake, loras, monkeypatch):
    unet, eager = make_unet(), make_unet()
    build = FakeTensorRT.compile

    def compile_meanwhile(self, program, **options):
        graph = build(self, program, **options)
        session.set([("ink", 1.0 + self.builds)])
        return graph

    monkeypatch.setattr(FakeTensorRT, "compile", compile_meanwhile)
    handle = TensorRT().prepare(unet)
    session = LoraSession({"unet": unet}, loras, on_weights_changed=handle.weights_changed)
    warm(handle, unet)
    LoraSession({"unet": eager}, loras).set([("ink", 1.0 + BLOCKS)])
    assert len(handle.status.compiled) == BLOCKS, handle.status
    assert far(draw(unet), draw(eager)) < EXACT


def test_engines_survive_a_restart_and_damaged_ones_are_built_again(fake, tmp_path):
    unet = make_unet()
    expected = draw(unet)
    for spoil, builds in ((None, BLOCKS), (None, 0), (b"", BLOCKS), (b"?" * 100, BLOCKS), (None, 0)):
        for path in tmp_path.rglob("*.engine") if spoil is not None else ():
            save_bytes(path, spoil, overwrite=True)
        fake.builds = 0
        handle = TensorRT(tmp_path).prepare(unet)
        warm(handle, unet)
        assert fake.builds == builds
        assert len(handle.status.compiled) == BLOCKS, handle.status
        assert far(draw(unet), expected) < EXACT
        handle.release()


def test_an_engine_of_the_cache_that_the_package_refuses_is_built_again(fake, tmp_path):
    unet = make_unet()
    for _ in range(2):
        handle = TensorRT(tmp_path).prepare(unet)
        warm(handle, unet)
        handle.release()
        for path in tmp_path.rglob("*.engine"):
            tensorrt_cache.save_engine(path, b"of another version")
        fake.builds = 0
    handle = TensorRT(tmp_path).prepare(unet)
    warm(handle, unet)
    assert fake.builds == BLOCKS
    assert len(handle.status.compiled) == BLOCKS, handle.status


def test_engines_are_kept_apart_by_all_that_decides_them(fake, tmp_path, monkeypatch):
    block, package = make_unet().mid_block, fake.package()
    folders = {tensorrt_cache.cache_folder(tmp_path, block, "form", package)}
    assert tensorrt_cache.cache_folder(tmp_path, make_unet(seed=1).mid_block, "form", package) in folders
    folders.add(tensorrt_cache.cache_folder(tmp_path, block, "other form", package))
    folders.add(tensorrt_cache.cache_folder(tmp_path, make_unet().mid_block.half(), "form", package))
    folders.add(tensorrt_cache.cache_folder(tmp_path, make_unet().down_blocks[0], "form", package))
    folders.add(tensorrt_cache.cache_folder(tmp_path, block, "form", package._replace(versions=("2.14.0", "11.0.0"))))
    folders.add(tensorrt_cache.cache_folder(tmp_path, block, "form", package._replace(versions=("2.13.0", "11.1.0"))))
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    folders.add(tensorrt_cache.cache_folder(tmp_path, block, "form", package))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    folders.add(tensorrt_cache.cache_folder(tmp_path, block, "form", package))
    assert len(folders) == 8
    save_bytes(tmp_path / "a file", b"")
    assert tensorrt_cache.cache_folder(tmp_path / "a file", block, "form", package) is None


@pytest.mark.parametrize("fault", [ValueError("no converter"), torch.cuda.OutOfMemoryError("2 GB"), AssertionError()])
def test_what_can_not_be_compiled_stays_eager_and_says_why(fake, fault):
    unet = make_unet()
    expected = draw(unet)
    fake.fault = fault
    handle = TensorRT().prepare(unet)
    warm(handle, unet)
    assert torch.equal(draw(unet), expected)
    assert not handle.status.compiled
    assert "runs eagerly" in str(handle.status)
    assert str(fault) in handle.status.reason


def test_without_a_gpu_or_the_package_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU" in tensorrt_package.why_unusable()
    with pytest.raises(CompileError, match="needs an NVIDIA GPU"):
        TensorRT().prepare(make_unet())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: raised(importlib.metadata.PackageNotFoundError()))
    assert "is not installed; pip install torch_tensorrt" in tensorrt_package.why_unusable()

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0")
    text = "Unable to load libnvinfer.so.11"
    monkeypatch.setattr(importlib, "import_module", lambda name: raised(Exception(text)))
    assert f"can not be imported: {text}; pip install" in tensorrt_package.why_unusable()


def test_doctor_says_why_it_can_not_be_used_and_what_to_do(monkeypatch):
    from lib_lora.hosts.standalone import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (doctor, tensorrt_package):
        monkeypatch.setattr(module, "installed_version", lambda: "2.12.1")
    find = importlib.import_module

    def import_module(name, package=None):
        return raised(Exception("no libnvinfer.so.11")) if name.startswith("torch_tensorrt") else find(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    (found,) = [found for found in doctor.examine() if found.topic == "tensorrt"]
    assert found.value == "not usable (torch_tensorrt 2.12.1)"
    assert "no libnvinfer.so.11" in found.advice
    assert "pip install torch_tensorrt" in found.advice


def raised(error):
    raise error


def test_the_benchmark_refuses_without_a_gpu_in_one_sentence(monkeypatch, capsys):
    from benchmarks.tensorrt import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--tiny"]) == 1
    assert "Nothing was measured: torch_tensorrt needs an NVIDIA GPU" in capsys.readouterr().err


def test_importing_the_backend_does_not_import_the_package():
    assert "torch_tensorrt" not in sys.modules


def test_the_record_of_signatures_is_that_of_an_installed_package():
    """Read from its source, for it can not be imported without a GPU; where there is none, the record alone is read."""
    found = importlib.util.find_spec("torch_tensorrt")
    if found is None:
        assert RECORD["package"] == "torch_tensorrt"
        assert {name for name, _, _ in RECORD["signatures"]["dynamo.compile"]} >= {"immutable_weights", "arg_inputs"}
    elif importlib.metadata.version("torch_tensorrt") == RECORD["version"]:
        assert read_signatures(Path(found.origin).parent) == RECORD["signatures"]
    else:
        used = read_signatures(Path(found.origin).parent)
        for name, parameters in RECORD["signatures"].items():
            assert {one for one, _, _ in parameters} <= {one for one, _, _ in used[name]}, name
