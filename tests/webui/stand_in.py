"""A WebUI in miniature: the package in fake/, real small networks for a model, and the extension's own script."""

from __future__ import annotations

import copy
import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib_lora.catalog import LoraCatalog
from lib_lora.session import LoraSession
from tests.toys import digest, sd1_unet, text_encoder

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake"
SCRIPT = ROOT / "scripts" / "prefuse.py"
OURS = "lib_lora.hosts.webui"
THEIRS = ("modules", "networks", "network", "lora_patches", "lora_script", "gradio")
MOST_TOKENS = 12
SERVER = SimpleNamespace(Depends=lambda check: check, Header=str, HTTPException=Exception)
"""Where the WebUI's server is not installed: what routes are made of. Their checks are tested with the real one."""


class Model(nn.Module):
    """What the WebUI's model is to an extension: a UNet, a wrapped text encoder, a checkpoint's name."""

    lowvram = False

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = sd1_unet()
        wrapped = nn.Module()
        wrapped.transformer = text_encoder()
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.wrapped = wrapped

    def get_learned_conditioning(self, prompts: list[str]) -> torch.Tensor:
        """(prompts, tokens, 32)."""
        letters = [list(prompt.encode()[:MOST_TOKENS].ljust(MOST_TOKENS)) for prompt in prompts]
        return self.cond_stage_model.wrapped.transformer(torch.tensor(letters)).last_hidden_state

    def parts(self) -> dict[str, nn.Module]:
        """As a session names them."""
        return {"unet": self.model.diffusion_model, "te1": self.cond_stage_model.wrapped}


class WebUI:
    """The process: started, reloaded, asked for pictures.

    Attributes:
        modules: The fake package's modules by name.
        app: Stands for the server; holds the routes that were added.
    """

    def __init__(
        self, templates: dict[str, Model], lora_dir: Path, cache_dir: Path, *, with_builtin: bool = True
    ) -> None:
        self.templates = templates
        self.with_builtin = with_builtin
        self.lora_dir = lora_dir
        self.app = SimpleNamespace(routes={}, add_api_route=self._add_route)
        names = (
            "shared",
            "extra_networks",
            "script_callbacks",
            "sd_models",
            "processing",
            "scripts",
            "errors",
            "patches",
            "devices",
            "sd_hijack",
        )
        self.modules = SimpleNamespace(**{name: importlib.import_module(f"modules.{name}") for name in names})
        importlib.import_module("modules.cache").cache_dir = str(cache_dir)
        paths = importlib.import_module("modules.paths_internal")
        paths.data_path, paths.extensions_dir = str(cache_dir), str(cache_dir / "extensions")
        cmd_opts = self.modules.shared.cmd_opts
        cmd_opts.lora_dir, cmd_opts.lyco_dir_backcompat = str(lora_dir), str(lora_dir / "lycoris")
        self.modules.sd_models.build = lambda: copy.deepcopy(next(iter(templates.values())))
        for title, template in templates.items():
            self.modules.sd_models.add_checkpoint(title, template.state_dict())
        self._load_scripts()
        self._page()

    @property
    def model(self) -> Model:
        """The model of the moment."""
        return self.modules.shared.sd_model

    @property
    def networks(self):
        """The built-in extension's module."""
        return sys.modules["networks"]

    @property
    def registered(self):
        """Who acts on `<lora:…>`."""
        return self.modules.extra_networks.extra_network_registry["lora"]

    def reload(self) -> None:
        """Reload UI."""
        self.modules.script_callbacks.run("script_unloaded")
        self.load()

    def load(self) -> None:
        """The second half of it."""
        self._load_scripts()
        self._page()

    def generate(self, prompt: str, *, txt2img: bool = True, **options):
        """One job; its pictures, infotexts, comments and parameters."""
        processing = self.modules.processing
        kind = processing.StableDiffusionProcessingTxt2Img if txt2img else processing.StableDiffusionProcessing
        return processing.process_images(kind(prompt=prompt, **options))

    def picture(self, prompt: str, **options) -> torch.Tensor:
        """The first picture of a job."""
        return self.generate(prompt, **options).images[0]

    def set(self, **options) -> None:
        """Settings, as applied on the settings page."""
        for key, value in options.items():
            self.modules.shared.opts.set(key, value)

    def state(self) -> str:
        """Hash of every weight."""
        return digest(*self.model.parts().values())

    def _load_scripts(self) -> None:
        callbacks = self.modules.script_callbacks
        callbacks.clear_callbacks()
        if self.with_builtin:
            importlib.import_module("lora_script").load()
        self.modules.scripts.load_xyz()
        runpy.run_path(str(SCRIPT))
        self.modules.extra_networks.initialize()

    def _page(self) -> None:
        callbacks = self.modules.script_callbacks
        callbacks.run("before_ui")
        callbacks.run("ui_settings")
        callbacks.run("app_started", None, self.app)

    def _add_route(self, path: str, endpoint, **options) -> None:
        self.app.routes[path] = (endpoint, options)


def templates() -> dict[str, Model]:
    """Two checkpoints of one structure."""
    found = {}
    for seed, title in enumerate(("first", "second")):
        torch.manual_seed(seed)
        found[title] = Model()
    return found


def reference(template: Model, lora_dir: Path, request, prompt: str, **options) -> torch.Tensor:
    """The picture that a session on a fresh model gives, without any WebUI."""
    model = copy.deepcopy(template)
    session = LoraSession(model.parts(), LoraCatalog([lora_dir]), **options)
    session.set(request)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        conds = [model.get_learned_conditioning([text]) for text in (prompt, "")]
        return sum(model.model.diffusion_model(noise, torch.tensor([10]), cond).sample for cond in conds)


def imported() -> Iterator[None]:
    """The fake package in the place of the WebUI's; torch and gradio are as they were afterwards."""
    forward, load = nn.Linear.forward, nn.Linear._load_from_state_dict
    sys.path[:0] = [str(FAKE), str(FAKE / "builtin_lora")]
    before = _taken_out()
    if "fastapi" not in sys.modules and importlib.util.find_spec("fastapi") is None:
        sys.modules["fastapi"] = SERVER
    yield
    _taken_out()
    sys.modules.update(before)  # a second gradio would not know the pages that are made with the first
    if sys.modules.get("fastapi") is SERVER:
        del sys.modules["fastapi"]
    del sys.path[:2]
    nn.Linear.forward, nn.Linear._load_from_state_dict = forward, load


def _taken_out() -> dict[str, ModuleType]:
    """Modules of the fake, or those in whose place they come, and ours that hold on to them."""
    names = [name for name in sys.modules if name.split(".")[0] in THEIRS or name.startswith(OURS)]
    return {name: sys.modules.pop(name) for name in names}
