"""The page's host when there is no WebUI: our own pipelines, with folders that the command line names."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.compile.choose import OFF
from lib_lora.compile.protocol import CompileStatus
from lib_lora.compile.together import CompiledModels
from lib_lora.core.memory import return_memory
from lib_lora.core.saving import save_bytes
from lib_lora.errors import ModelError
from lib_lora.hosts.host import Picture
from lib_lora.hosts.standalone.demo import LORA_DIR, MODEL_DIR
from lib_lora.hosts.standalone.infotext import png_bytes
from lib_lora.hosts.standalone.samplers import SAMPLERS
from lib_lora.presets import PresetFiles

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from lib_lora.core.keymap import KeyMap
    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import GenerateRequest
    from lib_lora.hosts.standalone.generate import GeneratedImage
    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.session import LoraSession, Mode

DEMO = "demo"
LORAS = Path("loras")
MODELS = Path("models")
OUTPUTS = Path("outputs")
MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt")


class StandaloneHost:
    """Folders, and a model that is loaded when it is first needed.

    Attributes:
        can_draw: True.
        catalog: The LoRA folders.
        presets: Files with presets of block weights, beside the LoRAs.
        model_folder: Where checkpoints are, and new ones are written.
        picture_folder: Where pictures are written.
    """

    can_draw = True

    def __init__(
        self,
        model: str = DEMO,
        lora_folders: Sequence[Path] = (),
        model_folder: Path = MODELS,
        picture_folder: Path = OUTPUTS,
        *,
        index: Path | None = None,
        **options: Any,
    ) -> None:
        """A host; nothing is loaded yet.

        Args:
            model: ``demo``, a file or a folder.
            lora_folders: By default ``loras``, and the demo's if that is the model.
            model_folder: Its checkpoints and diffusers folders can be chosen too.
            picture_folder: For pictures.
            index: As of `LoraCatalog`.
            options: As of `open_session`.

        Raises:
            ModelError: If a folder or the model is not there.
        """
        if model != DEMO and not Path(model).exists():
            raise ModelError(f"There is no model at {model}; give a folder, a file, or the word {DEMO}.")
        self.catalog = LoraCatalog(found_folders(lora_folders, model), index)
        self.presets = PresetFiles(self.catalog.folders)
        self.model_folder = model_folder.absolute()
        self.picture_folder = picture_folder.absolute()
        self._given = {DEMO: MODEL_DIR} if model == DEMO else {_model_name(Path(model)): Path(model).absolute()}
        self._options = options
        self._name = next(iter(self._given))
        self._loaded: tuple[LoadedModel, LoraSession] | None = None
        self._lock = threading.RLock()

    def models(self) -> Mapping[str, Path]:
        """Name → model, of all that can be chosen."""
        models = {DEMO: MODEL_DIR, **self._given}
        for path in sorted(self.model_folder.glob("*")) if self.model_folder.is_dir() else []:
            if _is_model(path) and path not in models.values():
                name = _model_name(path)
                models[f"{path.parent.name}/{path.name}" if name in models else name] = path
        return models

    def model(self) -> str:
        """Name of the model that pictures are made with."""
        return self._name

    def use_model(self, name: str) -> None:
        """Make pictures with another model.

        Raises:
            ModelError: If there is none of that name, or it can not be loaded; the former one stays.
        """
        models = self.models()
        if name not in models:
            raise ModelError(f"There is no model {name!r}; there are {', '.join(models)}.")
        with self._lock:
            if name != self._name or self._loaded is None:
                opened = self._open(DEMO if models[name] == MODEL_DIR else str(models[name]))
                if self._loaded is not None:
                    self._loaded[0].handle.release()
                self._loaded, self._name = opened, name

    @contextmanager
    def without_model(self) -> Generator[None]:
        """From its begin on no model is loaded, until the next picture."""
        self.close()
        return_memory()
        yield

    def keymap(self) -> KeyMap | None:
        """Layers of the loaded model; None before the first picture."""
        return None if self._loaded is None else self._loaded[1].keymap

    def compile_status(self) -> CompileStatus:
        """How the model runs."""
        return CompileStatus() if self._loaded is None else self._loaded[0].handle.status

    def compiler(self) -> str:
        """What models are compiled with: one of `BACKENDS`, or ``off``."""
        return self._options.get("compiler", OFF)

    def use_compiler(self, name: str) -> None:
        """Compile this model and the next ones with another backend; nothing is loaded again."""
        with self._lock:
            self._options["compiler"] = name
            if self._loaded is not None:
                loaded, session = self._loaded
                loaded.handle.use(name)
                session.may_hook = not loaded.handle.status.blocks

    def samplers(self) -> list[str]:
        """Names that a request can have."""
        return list(SAMPLERS)

    def generate(self, request: GenerateRequest, progress: Progress, *, save: bool = True) -> list[Picture]:
        """Draw.

        Raises:
            PrefuseError: If the model can not be loaded, or that can not be drawn.
        """
        from lib_lora.hosts.standalone.generate import generate

        with self._lock:
            self.use_model(self._name)
            loaded, session = self._loaded or self._open(self._name)
            drawn = generate(loaded, session, request, progress=progress)
        return [self._picture(one, save=save) for one in drawn]

    def close(self) -> None:
        """Base weights back, memory free."""
        with self._lock:
            if self._loaded is not None:
                self._loaded[0].handle.release()
                self._loaded[1].unload()
            self._loaded = None

    def _open(self, model: str) -> tuple[LoadedModel, LoraSession]:
        return open_session(model, self.catalog, self.presets, **self._options)

    def _picture(self, drawn: GeneratedImage, *, save: bool) -> Picture:
        path = None
        if save:
            path = next_free(self.picture_folder, drawn.infotext.parameters["Seed"])
            path.parent.mkdir(parents=True, exist_ok=True)
            save_bytes(path, png_bytes(drawn.image, drawn.infotext))
        return Picture(drawn.image, str(drawn.infotext), drawn.report, path)


def found_folders(given: Sequence[Path], model: str) -> list[Path]:
    """The LoRA folders to look into.

    Args:
        given: By the user; empty for ``loras``, and the demo's if that is the model.
        model: As the user named it.

    Raises:
        ModelError: If a given folder is not there.
    """
    missing = [folder for folder in given if not folder.is_dir()]
    if missing:
        raise ModelError(f"There is no LoRA folder {missing[0]}.")
    return list(given) or [LORAS, *([LORA_DIR] if model == DEMO else [])]


def open_session(
    model: str,
    catalog: LoraCatalog,
    presets: PresetFiles | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    mode: Mode = "prefuse",
    compiler: str = OFF,
    controlnets: Sequence[Path] = (),
    control_follows: bool = False,
    loading: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[LoadedModel, LoraSession]:
    """A model and the session that works on it.

    Args:
        model: As of `load_pipeline`.
        catalog: The LoRA folders.
        presets: Files with presets of block weights; None for those in the LoRA folders.
        device: As of `load_pipeline`.
        dtype: As of `load_pipeline`.
        mode: ``prefuse`` or ``hook``.
        compiler: What UNet and ControlNets are compiled with: one of `BACKENDS`, or ``off``.
        controlnets: As of `add_controlnets`.
        control_follows: As of `LoraSession`.
        loading: Further options of `load_pipeline`.

    Raises:
        ModelError: If there is no such model, or it is not one that pictures can be made with.
        FileError: If a file can not be read.
    """
    from lib_lora.hosts.standalone.cache import cache_file
    from lib_lora.hosts.standalone.controlnets import add_controlnets
    from lib_lora.hosts.standalone.loading import DEMO_THREADS, load_pipeline
    from lib_lora.pipelines import denoisers, pipeline_components
    from lib_lora.session import LoraSession

    if model == DEMO:
        torch.set_num_threads(DEMO_THREADS)
    loaded = add_controlnets(load_pipeline(model, device, dtype, **loading), controlnets)
    components = pipeline_components(loaded.pipe)
    handle = CompiledModels(denoisers(components), compiler, cache_file("compiled"))
    session = LoraSession(
        components,
        catalog,
        mode=mode,
        checkpoint=loaded.files or None,
        presets=presets,
        on_weights_changed=handle.weights_changed,
        control_follows=control_follows,
    )
    session.may_hook = not handle.status.blocks
    return replace(loaded, handle=handle), session


def next_free(folder: Path, seed: str | int) -> Path:
    """``00000-SEED.png`` with the first number above all that are there, as the WebUI counts."""
    numbers = [int(file.name[:5]) for file in folder.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")]
    return folder / f"{max(numbers, default=-1) + 1:05d}-{seed}.png"


def _is_model(path: Path) -> bool:
    return path.suffix.lower() in MODEL_SUFFIXES if path.is_file() else (path / "model_index.json").is_file()


def _model_name(path: Path) -> str:
    return path.stem if path.is_file() else path.name
