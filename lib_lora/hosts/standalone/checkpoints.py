"""A diffusers pipeline from one checkpoint file, offline: SD1, SD2 and SDXL under their original names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from lib_lora.core.files import MappedTensors, map_checkpoint
from lib_lora.core.single_file import CONFIGS, UNET_PREFIX, VAE_PREFIX, Family, recognise
from lib_lora.core.text_towers import tower_tensors
from lib_lora.errors import ModelError
from lib_lora.hosts.standalone.libraries import diffusers_class, dtype_option, transformers_class
from lib_lora.hosts.standalone.vocabulary import clip_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from lib_lora.core.single_file import TextTower

Prediction = Literal["epsilon", "v_prediction"]

MISSING_SHOWN = 3
V_PREDICTION_MEAN = -1.0


def load_single_file(
    path: Path,
    dtype: torch.dtype,
    *,
    tokenizer: Path | None = None,
    config: Path | None = None,
    prediction: Prediction | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """A pipeline on the CPU, its weights copied from a .safetensors file, and notes for the user.

    Args:
        path: The checkpoint.
        dtype: Of the weights in memory.
        tokenizer: Where CLIP's vocabulary is; None to look among the installed packages.
        config: Folder of configurations in diffusers' layout, for a model of another size; None for the family's own.
        prediction: What the UNet predicts; None to find out.

    Raises:
        FileError: If the file can not be read.
        ModelError: If it is not a complete SD1, SD2 or SDXL checkpoint, or there is no vocabulary.
    """
    tensors = map_checkpoint(path)
    family = recognise({name: info.shape for name, info in tensors.header.tensors.items()}, path.name)
    folder = config or CONFIGS / family.config
    parts = {tower.tokenizer: clip_tokenizer(tokenizer, tower.pad_token) for tower in family.towers}
    parts |= _unet_and_vae(tensors, folder, dtype, path)
    parts |= {tower.component: _load_tower(tower, tensors, folder, dtype, path) for tower in family.towers}
    found, note = _prediction(family, tensors, parts["unet"], prediction)
    parts["scheduler"] = _scheduler(folder, found)
    if len(family.towers) > 1:
        return diffusers_class("StableDiffusionXLPipeline")(**parts, add_watermarker=False), (note,)
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers_class("StableDiffusionPipeline")(**parts, **unused), (note,)


def _unet_and_vae(tensors: MappedTensors, folder: Path, dtype: torch.dtype, path: Path) -> dict[str, nn.Module]:
    parts = {}
    for name, kind, prefix in (("unet", "UNet2DConditionModel", UNET_PREFIX), ("vae", "AutoencoderKL", VAE_PREFIX)):
        own = owned({key: tensors[key] for key in tensors if key.startswith(prefix)}, dtype)
        try:
            parts[name] = diffusers_class(kind).from_single_file(
                own, config=str(folder), subfolder=name, local_files_only=True, **dtype_option(dtype)
            )
        except (KeyError, ValueError, RuntimeError) as error:  # whatever the conversion trips over
            raise ModelError(f"{path.name}: the {name} does not fit the configuration in {folder}: {error}") from error
        check_complete(parts[name], name, path)
    return parts


def _load_tower(tower: TextTower, tensors: MappedTensors, folder: Path, dtype: torch.dtype, path: Path) -> nn.Module:
    """A text encoder, filled without being initialised first."""
    from accelerate import init_empty_weights

    config = transformers_class("CLIPTextConfig").from_pretrained(folder / tower.component, local_files_only=True)
    with init_empty_weights():
        model = transformers_class((config.architectures or ["CLIPTextModel"])[0])(config)
    state = owned(tower_tensors(tower, tensors), dtype)
    if not hasattr(model, "text_model"):  # CLIPTextModel of transformers 5 is the text model itself
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path.name}: the {tower.component} does not fit {folder}: {error}") from error
    check_complete(model, tower.component, path)
    return model.eval().requires_grad_(False)


def owned(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies in memory: weights are written in place later, and a mapped file may go away."""
    return {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in tensors.items()}


def check_complete(model: nn.Module, part: str, path: Path) -> None:
    """Whether a file gave every weight of a part.

    Raises:
        ModelError: If it did not.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        names = ", ".join(missing[:MISSING_SHOWN])
        raise ModelError(f"{path.name} lacks {len(missing)} weights of the {part}, such as {names}.")


def _scheduler(folder: Path, prediction: Prediction) -> Any:
    kind = diffusers_class("EulerDiscreteScheduler")
    return kind.from_config(kind.load_config(folder / "scheduler", local_files_only=True), prediction_type=prediction)


def _prediction(
    family: Family, tensors: MappedTensors, unet: nn.Module, asked: Prediction | None
) -> tuple[Prediction, str]:
    """What the UNet predicts, and how that is known."""
    if asked:
        return asked, f"{family.title}, prediction {asked} as asked"
    metadata = tensors.header.metadata
    said = metadata.get("modelspec.prediction_type", metadata.get("modelspec.architecture", ""))
    if "v_pred" in tensors or said in ("v", "v_prediction") or said.endswith("768-v"):
        return "v_prediction", f"{family.title}, velocity prediction according to the file"
    if family.may_predict_v and not said and probe_v_prediction(unet):
        return "v_prediction", f"{family.title}, velocity prediction by a test of the UNet"
    return "epsilon", f"{family.title}, noise prediction"


@torch.no_grad()
def probe_v_prediction(unet: Any) -> bool:
    """Whether a UNet predicts velocity, by one call at the last step, where a sample is all noise.

    There a noise predictor gives back its input, a velocity predictor the negated picture. The test and its threshold
    are the WebUI's (constant sample 0.5, constant context 0.5, mean difference below -1).
    """
    parameter = next(unet.parameters())
    options = {"device": parameter.device, "dtype": parameter.dtype}
    sample = torch.full((1, unet.config.in_channels, 8, 8), 0.5, **options)
    context = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, **options)
    answer = unet(sample, 999, encoder_hidden_states=context).sample
    return bool((answer - sample).float().mean() < V_PREDICTION_MEAN)
