"""Exported UNets compute what the model does, with LoRAs in them or switched in them; or nothing is written."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from tiny_pipelines import make_tiny
from toys import lierla, write_lora

from lib_lora import LoraSession
from lib_lora.__main__ import main
from lib_lora.catalog import LoraCatalog
from lib_lora.compile import onnx_files
from lib_lora.compile.export import export_unet
from lib_lora.compile.unet_inputs import ExportedUNet, UNetInputs, UNetSize
from lib_lora.core.files import map_checkpoint
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_bytes
from lib_lora.errors import JobError, OutputError
from lib_lora.hosts.standalone.loading import load_pipeline

EXACT = 1e-5
"""Largest difference of float32 results of the same operations in another order, in units of the largest number."""
SIZE = UNetSize(1, 64, 32)


def make_unet(family="sd1", seed=0):
    """Two blocks each way, with all inputs of the family."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added |= {"projection_class_embeddings_input_dim": 6 * 4 + 8}
    return UNet2DConditionModel(
        sample_size=8,
        norm_num_groups=4,
        attention_head_dim=2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **(added if family == "sdxl" else {}),
    ).eval()


@pytest.fixture
def unet():
    return make_unet()


@pytest.fixture
def loras(unet, tmp_path):
    """A catalog with a LoRA for the small UNet."""
    folder = tmp_path / "loras"
    folder.mkdir()
    write_lora(folder / "ink.safetensors", lierla(KeyMap.from_modules({"unet": unet})))
    return LoraCatalog([folder])


@torch.no_grad()
def expected(unet, inputs):
    return ExportedUNet(unet)(**inputs)


@torch.no_grad()
def far(one, other):
    return float((one - other).abs().max() / other.abs().max())


def inputs_of(unet, size=SIZE, seed=7, **options):
    return UNetInputs(unet, **{"controlnet": False, **options}).random(size, seed)


def test_torchscript_takes_what_it_was_recorded_with(unet, tmp_path):
    report = export_unet(unet, "torchscript", tmp_path / "unet.pt", SIZE)
    script = torch.jit.load(tmp_path / "unet.pt")
    inputs = inputs_of(unet)
    assert far(script(**inputs), expected(unet, inputs)) < EXACT
    assert report.difference < EXACT
    assert report.inputs["latent"] == "(1, 4, 8, 4)"
    assert not script.state_dict(), "weights that are not to be replaced are constants"


def test_a_swappable_torchscript_is_a_model_whose_loras_are_switched(unet, loras, tmp_path):
    """And given back bit for bit, by the same session as any model."""
    export_unet(unet, "torchscript", tmp_path / "unet.pt", SIZE, swappable=True)
    script = torch.jit.load(tmp_path / "unet.pt")
    assert {name.removeprefix("unet.") for name in script.state_dict()} == set(unet.state_dict())
    inputs = inputs_of(unet)
    base = script(**inputs)
    session = LoraSession({"unet": script.unet}, loras)
    session.set([("ink", 2.0)])
    ours = LoraSession({"unet": unet}, loras)
    ours.set([("ink", 2.0)])
    assert far(script(**inputs), expected(unet, inputs)) < EXACT
    assert far(script(**inputs), base) > 100 * EXACT
    session.clear()
    assert torch.equal(script(**inputs), base)


@pytest.mark.newest
def test_an_exported_program_of_sdxl_takes_a_controlnets_residuals_and_other_loras(tmp_path):
    unet = make_unet("sdxl")
    report = export_unet(unet, "exported-program", tmp_path / "unet.pt2", SIZE, controlnet=True)
    assert list(report.inputs) == ["latent", "timestep", "context", "text_embeds", "time_ids", "down", "mid"]
    program = torch.export.load(tmp_path / "unet.pt2")
    assert {name.removeprefix("unet.") for name in program.state_dict} == set(unet.state_dict())
    module = program.module()
    inputs = inputs_of(unet, controlnet=True)
    assert far(module(**inputs), expected(unet, inputs)) < EXACT
    other = make_unet("sdxl", seed=1)
    module.unet.load_state_dict(other.state_dict())
    assert far(module(**inputs), expected(other, inputs)) < EXACT


@pytest.mark.newest
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_residuals_have_the_shapes_that_a_controlnet_gives(family, tmp_path):
    from diffusers import ControlNetModel

    unet = make_tiny(family, tmp_path).parts["unet"]
    size = UNetSize(2, 128, 64)
    shapes = UNetInputs(unet, controlnet=True).shapes(size)
    inputs = inputs_of(unet, size)
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    with torch.no_grad():
        down, mid = ControlNetModel.from_unet(unet)(
            *(inputs[name] for name in ("latent", "timestep", "context")),
            controlnet_cond=torch.zeros(2, 3, 128, 64),
            added_cond_kwargs=added or None,
            return_dict=False,
        )
    assert [tuple(tensor.shape) for tensor in (*down, mid)] == [*shapes["down"], shapes["mid"]]


@pytest.mark.slow
@pytest.mark.newest
def test_a_dynamic_program_takes_any_size(unet, tmp_path):
    export_unet(unet, "exported-program", tmp_path / "unet.pt2", SIZE, controlnet=True, dynamic=True)
    module = torch.export.load(tmp_path / "unet.pt2").module()
    for size in (SIZE, UNetSize(3, 96, 160, 154)):
        inputs = inputs_of(unet, size, controlnet=True)
        assert far(module(**inputs), expected(unet, inputs)) < EXACT


def test_a_dynamic_torchscript_takes_any_size(unet, tmp_path):
    report = export_unet(unet, "torchscript", tmp_path / "unet.pt", SIZE, controlnet=True, dynamic=True)
    script = torch.jit.load(tmp_path / "unet.pt")
    inputs = inputs_of(unet, UNetSize(3, 96, 160, 154), controlnet=True)
    assert far(script(**inputs), expected(unet, inputs)) < EXACT
    assert report.difference < EXACT


@pytest.mark.newest
def test_an_onnx_folder_has_its_weights_in_a_file_of_ours_and_runs_with_others(unet, loras, tmp_path):
    import onnxruntime

    report = export_unet(unet, "onnx", tmp_path / "unet", SIZE, swappable=True)
    assert report.difference < EXACT
    weights = map_checkpoint(tmp_path / "unet/model.safetensors")
    state = unet.state_dict()
    assert weights
    assert all(torch.equal(weights[name], state[name.removeprefix("unet.")]) for name in weights)
    names = list(weights)
    LoraSession({"unet": unet}, loras).set([("ink", 2.0)])
    options = onnxruntime.SessionOptions()
    fused = [
        onnxruntime.OrtValue.ortvalue_from_numpy(unet.get_parameter(name.removeprefix("unet.")).detach().numpy())
        for name in names
    ]
    options.add_external_initializers(names, fused)
    graph = str(tmp_path / "unet/model.onnx")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = inputs_of(unet)
    got = torch.as_tensor(session.run(["prediction"], {name: value.numpy() for name, value in inputs.items()})[0])
    assert far(got, expected(unet, inputs)) < EXACT


@pytest.mark.newest
def test_onnx_without_a_runtime_is_checked_for_its_form_and_says_so(unet, tmp_path, monkeypatch):
    absent(monkeypatch, "onnxruntime")
    report = export_unet(unet, "onnx", tmp_path / "unet.onnx", SIZE)
    assert report.difference is None
    assert "onnxruntime is not installed" in report.notes[0]
    assert str(tmp_path).encode() not in (tmp_path / "unet.onnx").read_bytes()
    monkeypatch.undo()
    inputs = inputs_of(unet)
    assert far(onnx_files.load_onnx(tmp_path / "unet.onnx")(inputs), expected(unet, inputs)) < EXACT

    monkeypatch.setattr(onnx_files, "MOST_BYTES", 1000)
    with pytest.raises(JobError, match="ends at 2 GB; give --out a name without a suffix"):
        export_unet(unet, "onnx", tmp_path / "large.onnx", SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["unet.onnx"]


def absent(monkeypatch, *packages):
    """As if they were not installed."""
    find = importlib.import_module

    def import_module(name, package=None):
        if name in packages:
            raise ImportError(name)
        return find(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_a_missing_package_is_named_before_anything_is_done(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    absent(monkeypatch, "onnx", "onnxscript")
    with pytest.raises(JobError, match="pip install onnx onnxscript"):
        export_unet(unet, "onnx", tmp_path / "unet.onnx", SIZE)


def test_an_old_torch_is_told_what_it_can_do(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.1.2+cpu")
    with pytest.raises(JobError, match=r"needs torch 2\.6 or newer.* take torchscript"):
        export_unet(unet, "exported-program", tmp_path / "unet.pt2", SIZE)


def test_a_file_that_computes_something_else_is_not_written(unet, tmp_path, monkeypatch):
    old = tmp_path / "unet.pt"
    save_bytes(old, b"old")
    freeze = torch.jit.freeze
    monkeypatch.setattr(torch.jit, "freeze", lambda traced: freeze(torch.jit.script(Doubled(traced)).eval()))
    with pytest.raises(OutputError, match=r"not saved: with .* it is 1\.0e\+00 from the model, 0\.002 is allowed"):
        export_unet(unet, "torchscript", old, SIZE, overwrite=True)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


class Doubled(torch.nn.Module):
    def __init__(self, traced):
        super().__init__()
        self.traced = traced

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return 2 * self.traced(latent, timestep, context)


@pytest.mark.parametrize(
    ("size", "dynamic", "text"),
    [
        (UNetSize(1, 64, 40), False, "40 x 64 pixels can not be exported; width and height must be multiples of 16"),
        (UNetSize(0, 64, 64), False, "A batch of 0"),
        (UNetSize(1, 16, 64), True, "too few for a dynamic export, which starts at 32"),
    ],
)
def test_sizes_that_the_unet_can_not_take_are_refused(unet, tmp_path, size, dynamic, text):
    with pytest.raises(JobError, match=text):
        export_unet(unet, "torchscript", tmp_path / "unet.pt", size, dynamic=dynamic)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(unet, tmp_path):
    def progress(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_unet(unet, "torchscript", tmp_path / "unet.pt", SIZE, progress=progress)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_demo_with_a_lora_in_it(tmp_path, capsys):
    out = tmp_path / "unet.pt"
    options = ["--format", "torchscript", "--prompt", "<lora:stripes:1>", "--out", str(out)]
    assert main(["export", *options, "--width", "64", "--height", "64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [lora["name"] for lora in data["loras"]] == ["stripes"]
    unet = load_pipeline("demo", "cpu").pipe.unet
    inputs = inputs_of(unet, UNetSize(1, 64, 64))
    assert far(torch.jit.load(out)(**inputs), expected(unet, inputs)) > 100 * EXACT

    assert main(["export", *options]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["export", *options[:2], "--prompt", "no tag", "--out", str(tmp_path / "b.pt")]) == 1
    assert "names no LoRA" in capsys.readouterr().err
    moving = ["--prompt", "<lora:stripes:0@0,1@1>", "--out", str(tmp_path / "c.pt")]
    assert main(["export", *options[:2], *moving]) == 1
    assert "moves while a picture is made" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]
