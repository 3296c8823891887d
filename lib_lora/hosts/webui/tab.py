"""The WebUI as the page's host: its folders, its models, its pictures."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import call_queue, processing, sd_models, sd_samplers, shared

from lib_lora.core.keymap import KeyMap
from lib_lora.errors import ModelError, PrefuseError, RequestError
from lib_lora.hosts.host import Picture
from lib_lora.hosts.webui.model import components
from lib_lora.hosts.webui.settings import option, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from lib_lora.catalog import LoraCatalog
    from lib_lora.compile.protocol import CompileStatus
    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import GenerateRequest
    from lib_lora.hosts.webui.active import ActiveLoras
    from lib_lora.presets import PresetFiles

LOOK_SECONDS = 0.2
"""Between two looks at how far a picture is."""
SIZE, XL_SIZE = 512, 1024


class WebuiHost:
    """The WebUI as the page sees it.

    Attributes:
        can_draw: False, for txt2img does.
    """

    can_draw = False

    def __init__(self, loras: Callable[[], ActiveLoras]) -> None:
        """A host.

        Args:
            loras: Gives what applies LoRAs, which exists once the WebUI is up.
        """
        self._loras = loras

    @property
    def catalog(self) -> LoraCatalog:
        """The LoRA folders of the built-in extension."""
        return self._loras().sessions.catalog

    @property
    def presets(self) -> PresetFiles:
        """Files with presets of block weights."""
        return self._loras().sessions.presets

    @property
    def model_folder(self) -> Path:
        """Where checkpoints are."""
        return Path(shared.cmd_opts.ckpt_dir or sd_models.model_path)

    @property
    def picture_folder(self) -> Path:
        """Where txt2img saves."""
        return Path(_folder("samples"))

    def models(self) -> Mapping[str, Path]:
        """Name → checkpoint, as the list of checkpoints has them."""
        sd_models.list_models()
        return {info.name: Path(info.filename) for info in sd_models.checkpoints_list.values()}

    def model(self) -> str:
        """Name of the checkpoint that is chosen."""
        info = sd_models.checkpoint_aliases.get(option("sd_model_checkpoint", ""))
        return "" if info is None else info.name

    def use_model(self, name: str) -> None:
        """Load another checkpoint, as the list at the top does.

        Raises:
            ModelError: If there is none of that name.
        """
        info = next((info for info in sd_models.checkpoints_list.values() if info.name == name), None)
        if info is None:
            raise ModelError(f"There is no checkpoint {name!r}; refresh the list.")
        shared.opts.set("sd_model_checkpoint", info.title)  # which waits for its turn by itself

    @contextmanager
    def without_model(self) -> Generator[None]:
        """Inside of it the model is in the computer's memory, without LoRAs, and what is to be drawn waits.

        The WebUI's own training lets it wait too.
        """
        with call_queue.queue_lock:
            self._loras().leave()
            sd_model = sd_models.model_data.sd_model
            try:
                sd_models.send_model_to_cpu(sd_model)
                yield
            finally:
                if sd_model is not None:
                    sd_models.send_model_to_device(sd_model)

    def keymap(self) -> KeyMap | None:
        """Layers of the loaded model; None if there is none."""
        sd_model = sd_models.model_data.sd_model
        return None if sd_model is None else KeyMap.from_modules(components(sd_model))

    def compile_status(self) -> CompileStatus:
        """How the model that is loaded runs."""
        return self._loras().compile_status

    def compiler(self) -> str:
        """The setting."""
        return read_settings().compiler

    def use_compiler(self, name: str) -> None:
        """Change the setting, as the settings page does."""
        shared.opts.set("prefuse_compile", name)

    def samplers(self) -> list[str]:
        """Names that a request can have."""
        return [sampler.name for sampler in sd_samplers.visible_samplers()]

    def generate(self, request: GenerateRequest, progress: Progress, *, save: bool = True) -> list[Picture]:
        """Draw as txt2img does, after what is being drawn there; without the scripts of its page.

        Raises:
            RequestError: If it was interrupted elsewhere, or the WebUI loaded its page anew, which takes LoRAs away.
            PrefuseError: What `progress` raises.
        """
        request.check()
        with call_queue.queue_lock, closing(_processing(request, save=save)) as p:
            loras = self._loras()
            shared.state.begin(job="prefuse")
            try:
                with _watched(progress, request):
                    processed = processing.process_images(p)
            finally:
                interrupted = shared.state.interrupted
                shared.state.end()
        first = processed.index_of_first_image
        images = processed.images[first : first + request.count]
        if interrupted or len(images) < request.count:
            raise RequestError("The drawing was interrupted.")
        if self._loras() is not loras:
            raise RequestError("The WebUI loaded its page anew while this was drawn; draw it again.")
        texts = processed.infotexts[first:]
        return [Picture(image, text, loras.report, _path(image)) for image, text in zip(images, texts, strict=False)]


def _folder(kind: str) -> str:
    """Where txt2img writes its samples or grids."""
    return option(f"outdir_{kind}", "") or option(f"outdir_txt2img_{kind}", "outputs")


def _processing(request: GenerateRequest, *, save: bool) -> Any:
    size = XL_SIZE if getattr(shared.sd_model, "is_sdxl", False) else SIZE
    sampler, scheduler = sd_samplers.get_sampler_and_scheduler(request.sampler, None)
    return processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model,
        outpath_samples=_folder("samples"),
        outpath_grids=_folder("grids"),
        prompt=request.prompt,
        negative_prompt=request.negative,
        seed=request.seed,
        sampler_name=sampler,
        scheduler=scheduler,
        n_iter=request.count,
        steps=request.steps,
        cfg_scale=request.cfg,
        width=request.width or size,
        height=request.height or size,
        do_not_save_samples=not save,
        do_not_save_grid=True,
    )


@contextmanager
def _watched(progress: Progress, request: GenerateRequest) -> Generator[None]:
    """Tell `progress` how far the WebUI is, again and again; what it raises interrupts, and is raised at the end."""
    ended, raised = threading.Event(), list[PrefuseError]()

    def watch() -> None:
        try:
            while not ended.wait(LOOK_SECONDS):
                done = shared.state.job_no * request.steps + shared.state.sampling_step
                progress(min(done, request.count * request.steps), request.count * request.steps)
        except PrefuseError as error:
            raised.append(error)
            shared.state.interrupt()

    watcher = threading.Thread(target=watch, daemon=True)
    progress(0, request.count * request.steps)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    if raised:
        raise raised[0]


def _path(image: Any) -> Path | None:
    saved = getattr(image, "already_saved_as", None)
    return Path(saved) if saved else None
