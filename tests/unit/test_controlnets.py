"""ControlNets of the stand-alone host: loaded from folders and files, and drawn with beside diffusers itself."""

from __future__ import annotations

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from ldm_files import unet_name
from PIL import Image, ImageDraw
from tiny_pipelines import make_tiny, write_folder, write_tokenizer

from lib_lora.__main__ import main
from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_tensors
from lib_lora.errors import ModelError, PrefuseError, RequestError
from lib_lora.hosts.host import Control, GenerateRequest
from lib_lora.hosts.standalone.controlnets import add_controlnets
from lib_lora.hosts.standalone.demo import LORA_DIR, MODEL_DIR
from lib_lora.hosts.standalone.generate import generate
from lib_lora.hosts.standalone.host import open_session
from lib_lora.hosts.standalone.infotext import parse_infotext
from lib_lora.hosts.standalone.loading import load_pipeline
from lib_lora.hosts.standalone.samplers import make_scheduler
from tests.controlnets import controlnet_lora, controlnet_of
from tests.toys import exact_sum, is_lierla

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

ROUNDING = 1  # of 255 in a picture's colours
SEEN = 10  # of 255: a difference that shows
STEPS, SEED, SIZE = 4, 2, 64
FIRST, SECOND = 0.9, 0.4
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def drawn():
    """A control image, of the size that is drawn."""
    image = Image.new("RGB", (SIZE, SIZE), "black")
    ImageDraw.Draw(image).ellipse((10, 10, 40, 50), outline="white", width=3)
    return image


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two ControlNets of the embedded model, as diffusers saves them."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(MODEL_DIR / "unet", local_files_only=True)
    made = [tmp_path_factory.mktemp("controlnets") / name for name in ("edges", "depth")]
    for seed, folder in enumerate(made):
        controlnet_of(unet, seed + 1).save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Family → model in a file, its ControlNet, and what `load_pipeline` needs."""
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    made = {}
    for family in ("sd1", "sd2", "sdxl"):
        folder = tmp_path_factory.mktemp(family)
        model = make_tiny(family, folder / "config")
        file = model.write(folder / f"{family}.safetensors")
        options = {"device": "cpu", "tokenizer": tokenizer, "config": folder / "config"}
        made[family] = controlnet_of(model.parts["unet"]), file, options
    return made


def load(entry, **more):
    _, file, options = entry
    return load_pipeline(file, **options, **more)


def request(prompt, *controls, **options):
    settings = {"steps": STEPS, "cfg": 4.0, "seed": SEED, "sampler": "DDIM", **options}
    return GenerateRequest(prompt, controls=controls, **settings)


def pixels(image) -> np.ndarray:
    return np.asarray(image, int)


def reference(folders, scales, images, lora=None, control_lora=None):
    """Diffusers' own pipeline, eager, with the LoRA of its UNet and text encoder fused by PEFT."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    nets = [ControlNetModel.from_pretrained(folder, local_files_only=True) for folder in folders]
    if control_lora is not None:
        fuse_in_float64(nets[0], *control_lora)
    nets, scales, images = (value if folders[1:] else value[0] for value in (nets, list(scales), list(images)))
    options = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True}
    pipe = StableDiffusionControlNetPipeline.from_pretrained(MODEL_DIR, controlnet=nets, **options)
    pipe.scheduler = make_scheduler("DDIM", dict(pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(LORA_DIR / f"{lora}.safetensors"), adapter_name=lora)
        pipe.fuse_lora()
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "controlnet_conditioning_scale": scales}
    generator = torch.Generator().manual_seed(SEED)
    return pipe(PROMPT, image=images, width=SIZE, height=SIZE, generator=generator, **options).images[0]


@torch.no_grad()
def fuse_in_float64(model, tensors, strength):
    for name, weight in model.named_parameters():
        flat = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{flat}.lora_up.weight" in tensors:
            weight.copy_(exact_sum(weight, flat, [(tensors, strength)]))


def test_one_and_two_controlnets_with_a_lora_draw_what_diffusers_and_peft_draw(folders, drawn):
    other = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    controls = (Control(drawn, FIRST, "a.png"), Control(other, SECOND, "b.png"))
    for count in (1, 2):
        loaded, session = open_session("demo", LoraCatalog([LORA_DIR]), device="cpu", controlnets=folders[:count])
        plain = generate(loaded, session, request(PROMPT, *controls[:count]))[0]
        ours = generate(loaded, session, request(f"{PROMPT} <lora:stripes:1>", *controls[:count]))[0]
        theirs = reference(folders[:count], (FIRST, SECOND)[:count], (drawn, other)[:count], "stripes")
        assert np.abs(pixels(ours.image) - pixels(theirs)).max() <= ROUNDING
        assert np.abs(pixels(ours.image) - pixels(plain.image)).max() > SEEN
        assert not ours.report.notes


def test_a_lora_of_the_controlnet_draws_what_a_fused_one_draws_and_without_it_the_first_picture_is_back(
    folders, drawn, tmp_path
):
    loaded, session = open_session("demo", LoraCatalog([tmp_path]), device="cpu", controlnets=folders[:1])
    layers = [layer for layer in session.keymap if is_lierla(layer) and layer.component == "unet"]
    layers = [layer for layer in layers if not layer.key.startswith("unet.up_blocks")]
    tensors = controlnet_lora(layers, std=0.2)
    save_tensors(tmp_path / "sharp.safetensors", tensors)
    named = {key.replace("controlnet", "unet", 1): tensor for key, tensor in tensors.items()}
    asked = request(PROMPT, Control(drawn))
    before = generate(loaded, session, asked)[0]
    changed = generate(loaded, session, request(f"{PROMPT} <lora:sharp:0.7>", Control(drawn)))[0]
    after = generate(loaded, session, asked)[0]
    theirs = reference(folders[:1], [1.0], [drawn], control_lora=(named, 0.7))
    assert np.abs(pixels(changed.image) - pixels(theirs)).max() <= ROUNDING
    assert np.abs(pixels(changed.image) - pixels(before.image)).max() > SEEN
    assert np.array_equal(pixels(after.image), pixels(before.image))


def test_the_infotext_is_that_of_the_webuis_extension_and_names_the_pictures(folders, drawn):
    options = {"device": "cpu", "controlnets": folders, "control_follows": True}
    loaded, session = open_session("demo", LoraCatalog([LORA_DIR]), **options)
    controls = Control(drawn, FIRST, "a.png"), Control(drawn, 1, "b, c.png")
    picture = generate(loaded, session, request(f"{PROMPT} <lora:stripes:1>", *controls, steps=1))[0]
    said = parse_infotext(str(picture.infotext)).parameters
    units = [dict(item.split(": ") for item in said[f"ControlNet {number}"].split(", ")) for number in (0, 1)]
    assert [unit["Model"].partition(" ")[0] for unit in units] == ["edges", "depth"]
    assert all(re.fullmatch(r"\w+ \[[0-9a-f]{8}\]", unit["Model"]) for unit in units)
    assert [unit["Weight"] for unit in units] == ["0.9", "1"]
    assert (units[0]["Module"], units[0]["Resize Mode"]) == ("none", "Crop and Resize")
    assert said["Control image 1"].startswith("b, c.png [")
    assert said["Loras in ControlNet"] == "True"
    assert "(84 in the ControlNet)" not in str(picture.report)
    assert "(168 in the ControlNet)" in str(picture.report)
    assert "checkpoint (168 layers differ or are not in it, and are copied)" in str(picture.report)


def test_a_control_image_of_another_size_is_cropped_to_the_pictures_shape_and_told(folders, drawn):
    loaded, session = open_session("demo", LoraCatalog([LORA_DIR]), device="cpu", controlnets=folders[:1])
    wide = Image.new("RGB", (3 * SIZE, SIZE), "gray")
    wide.paste(drawn, (SIZE, 0))
    got = generate(loaded, session, request(PROMPT, Control(wide, name="wide.png")))[0]
    same = generate(loaded, session, request(PROMPT, Control(drawn)))[0]
    assert np.array_equal(pixels(got.image), pixels(same.image))
    assert got.report.notes == ("wide.png is 192x64; it was scaled to 64x64 and cropped to that shape",)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_file_of_every_family_and_both_layouts_becomes_the_controlnet_it_was_written_from(tiny, family, tmp_path):
    control = tiny[family][0]
    tensors = {name: tensor.contiguous() for name, tensor in control.state_dict().items()}
    files = {"diffusers": tensors}
    if family != "sdxl":  # whose authors published no other layout
        files["original"] = {original_name(name, control): tensor for name, tensor in tensors.items()}
    loaded = load(tiny[family])
    for name, content in files.items():
        save_tensors(tmp_path / f"{name}.safetensors", content)
        steered = add_controlnets(loaded, [tmp_path / f"{name}.safetensors"])
        found = steered.pipe.controlnet.state_dict()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    picture = steered.pipe("abc", image=Image.new("RGB", (32, 32), "white"), num_inference_steps=1, width=32, height=32)
    assert picture.images[0].size == (32, 32)


def original_name(name: str, control) -> str:
    """As lllyasviel's files name it."""
    kind = name.rpartition(".")[2]
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.\w+", name):
        return f"control_model.zero_convs.{match[1]}.0.{kind}"
    if name.startswith("controlnet_mid_block"):
        return f"control_model.middle_block_out.0.{kind}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.(?:blocks\.)?(\w+)\.\w+", name):
        place = {"conv_in": 0, "conv_out": 14}.get(match[1])
        return f"control_model.input_hint_block.{2 * int(match[1]) + 2 if place is None else place}.{kind}"
    return f"control_model.{unet_name(name, control)}"


def test_a_pickle_is_read_as_the_same_controlnet(tiny, tmp_path):
    control = tiny["sd1"][0]
    torch.save(control.state_dict(), tmp_path / "control.pth")
    found = add_controlnets(load(tiny["sd1"]), [tmp_path / "control.pth"])
    assert found.controlnets[0].name == "control"
    assert all(map(torch.equal, found.pipe.controlnet.parameters(), control.parameters()))


def test_a_controlnet_has_the_dtype_of_its_model(tiny, tmp_path):
    control = tiny["sd1"][0]
    control.save_pretrained(tmp_path / "control")
    loaded = load(tiny["sd1"], dtype="bf16")
    for path in (tmp_path / "control", tmp_path / "control/diffusion_pytorch_model.safetensors"):
        found = add_controlnets(loaded, [path]).pipe.controlnet
        assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in control.parameters()} == {torch.float32}


def test_a_controlnet_of_another_family_is_refused_from_a_folder_and_from_a_file(tiny, tmp_path):
    control = tiny["sdxl"][0]
    control.save_pretrained(tmp_path / "xl")
    loaded = load(tiny["sd1"])
    with pytest.raises(ModelError, match=r"^xl was made for SDXL, this model is .*: its \w+ is .*, the UNet's .*\.$"):
        add_controlnets(loaded, [tmp_path / "xl"])
    file = tmp_path / "xl/diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match=r"was made for SDXL, .* reads texts of 16 numbers a word, the UNet of 8\.$"):
        add_controlnets(loaded, [file])
    tiny["sd2"][0].save_pretrained(tmp_path / "sd2")
    with pytest.raises(ModelError, match=r"^diffusion_pytorch_model.safetensors does not fit this model's UNet: "):
        add_controlnets(loaded, [tmp_path / "sd2/diffusion_pytorch_model.safetensors"])


def test_what_is_no_controlnet_is_told_by_a_sentence(tiny, tmp_path):
    loaded = load(tiny["sd1"])
    entry = copy.deepcopy(tiny["sd1"][0]).state_dict()
    files = {
        "lora": ({"lora_unet_x.lora_down.weight": torch.ones(1)}, "is a LoRA, which belongs"),
        "sai": ({**entry, "lora_controlnet": torch.ones(1)}, "is a Control-LoRA"),
        "half": ({key: value for key, value in entry.items() if "mid_block" not in key}, "lacks"),
        "unet": ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "no tensor for a control image"),
    }
    for name, (tensors, sentence) in files.items():
        save_tensors(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(ModelError, match=rf"^{name}\.safetensors .*{sentence}"):
            add_controlnets(loaded, [tmp_path / f"{name}.safetensors"])
    (tmp_path / "text.safetensors").write_text("<html>")
    (tmp_path / "empty").mkdir()
    (tmp_path / "union").mkdir()
    (tmp_path / "union/config.json").write_text(json.dumps({"_class_name": "ControlNetUnionModel"}))
    shutil.copytree(tmp_path / "union", tmp_path / "bare")
    (tmp_path / "bare/config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    for name in ("text.safetensors", "empty", "union", "bare", "nosuch"):
        with pytest.raises(PrefuseError, match=name.partition(".")[0]) as raised:
            add_controlnets(loaded, [tmp_path / name])
        assert "\n" not in str(raised.value)


def test_each_controlnet_needs_one_image_and_a_number_as_its_scale(folders, drawn):
    loaded, session = open_session("demo", LoraCatalog([LORA_DIR]), device="cpu", controlnets=folders[:1])
    for controls in ((), (Control(drawn), Control(drawn))):
        with pytest.raises(RequestError, match=f"ControlNets: 1, control images: {len(controls)}"):
            generate(loaded, session, request(PROMPT, *controls))
    with pytest.raises(RequestError, match="control scale must be a number"):
        generate(loaded, session, request(PROMPT, Control(drawn, float("nan"))))


@pytest.fixture
def run(tmp_path, capsys):
    """`generate` on the embedded model; exit code, stdout, stderr."""

    def run(*options):
        fixed = ["--prompt", PROMPT, "--steps", "1", "--seed", "2", "--device", "cpu", "--out", tmp_path / "out.png"]
        return main(["generate", *map(str, (*fixed, *options))]), *capsys.readouterr()

    return run


def test_the_command_line_draws_with_controlnets(run, folders, drawn, tmp_path):
    drawn.save(tmp_path / "control.png")
    control = ("--controlnet", folders[0], "--control-image", tmp_path / "control.png")
    code, stdout, _ = run(*control, "--control-scale", "0.5", "--control-follows", "--json")
    data = json.loads(stdout)
    assert code == 0
    assert "Weight: 0.5" in data["parameters"]["ControlNet 0"]
    assert data["parameters"]["Control image 0"].startswith("control.png [")


def test_the_command_line_refuses_before_it_loads_a_model(run, folders, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    fine = ("--controlnet", folders[0], "--control-image", tmp_path / "fine.png")
    for options, sentence in (
        (("--controlnet", folders[0]), "ControlNets: 1, control images: 0"),
        (("--controlnet", folders[0], "--control-image", tmp_path / "broken.png"), "broken.png can not be read"),
        (("--controlnet", folders[0], "--control-image", tmp_path / "nosuch.png"), "nosuch.png can not be read"),
        ((*fine, "--control-scale", "1", "--control-scale", "2"), "2 control scales are given for 1 ControlNets"),
        ((*fine, "--control-scale", "nan"), "control scale must be a number"),
    ):
        code, _, stderr = run("--model", "nosuch", *options)
        assert (code, stderr.count("\n")) == (1, 1)
        assert sentence in stderr
    assert not (tmp_path / "out.png").exists()


def test_a_folder_of_a_tiny_pipeline_is_steered_too(tiny, tmp_path):
    model = make_tiny("sd1", tmp_path / "config")
    folder = write_folder(model, tmp_path / "pipeline")
    controlnet_of(model.parts["unet"]).save_pretrained(tmp_path / "control", variant="fp16")
    steered = add_controlnets(load_pipeline(folder, "cpu"), [tmp_path / "control"])
    assert KeyMap.from_modules({"controlnet": steered.pipe.controlnet}).components == ("controlnet",)
    assert steered.controlnets[0].file.name == "diffusion_pytorch_model.fp16.safetensors"
