"""Our own pipelines for a training: the model it works on, and sample pictures with what is learned so far."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lib_lora.catalog import LoraCatalog
from lib_lora.hosts.host import GenerateRequest
from lib_lora.hosts.standalone.demo import MODEL_DIR
from lib_lora.hosts.standalone.generate import generate
from lib_lora.hosts.standalone.loading import DEMO, load_pipeline
from lib_lora.hosts.standalone.vae import load_vae
from lib_lora.pipelines import pipeline_components
from lib_lora.session import LoraSession
from lib_lora.train.model import TrainModel

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from PIL.Image import Image

    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.train.samples import Draw, SamplePrompt
    from lib_lora.train.settings import ModelOptions


def load_model(options: ModelOptions) -> LoadedModel:
    """The model that the options name, on the CPU in float32.

    Raises:
        ModelError: If there is no such model, or it can not be loaded.
        FileError: If a file can not be read.
    """
    named = options.pretrained_model_name_or_path
    predictions: dict[bool | None, Literal["auto", "epsilon", "v"]] = {None: "auto", True: "v", False: "epsilon"}
    prediction = predictions[options.v_parameterization]
    loaded = load_pipeline(named, "cpu", "fp32", tokenizer=options.tokenizer, prediction=prediction)
    if options.vae is not None:
        loaded.pipe.vae = load_vae(options.vae, loaded.pipe.vae)
    return loaded


def model_to_train(loaded: LoadedModel, options: ModelOptions) -> TrainModel:
    """The same for the trainer."""
    named = options.pretrained_model_name_or_path
    return TrainModel(loaded.pipe, loaded.name, MODEL_DIR if named == DEMO else Path(named), loaded.scheduler)


def picture_drawer(loaded: LoadedModel, lora_folders: Sequence[Path]) -> Draw:
    """What draws with a model in training; LoRAs of tags are looked up in these folders."""
    catalog = LoraCatalog(lora_folders)
    components = pipeline_components(loaded.pipe)

    def draw(sample: SamplePrompt, sampler: str) -> Image:
        names = ("prompt", "negative", "steps", "cfg", "seed", "width", "height")
        request = GenerateRequest(sampler=sampler, **{name: getattr(sample, name) for name in names})
        session = LoraSession(components, catalog)
        with _together(loaded.pipe):
            try:
                return generate(loaded, session, request)[0].image
            finally:
                session.unload()

    return draw


@contextmanager
def _together(pipe: Any) -> Generator[None]:
    """All parts are where the UNet is; those that were elsewhere go back."""
    parts = [part for name in ("vae", "text_encoder", "text_encoder_2") if (part := getattr(pipe, name, None))]
    away = [(part, part.device) for part in parts if part.device != pipe.unet.device]
    for part, _ in away:
        part.to(pipe.unet.device)
    try:
        yield
    finally:
        for part, device in away:
            part.to(device)
