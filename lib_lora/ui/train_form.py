"""The form of a training: what is asked for, and how the answers become the trainer's options, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.saving import output_path
from lib_lora.errors import JobError, PrefuseError
from lib_lora.hosts.standalone.demo import MODEL_DIR
from lib_lora.train.option_values import parse_toml
from lib_lora.train.options import TrainOptions
from lib_lora.ui.workshop_forms import ANSWERS, NONE, Field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lib_lora.hosts.host import Host

PICTURES, RESULTS = "train", "training"
"""Folders of training sets, beside that of the models; and of what trainings write, in that of pictures."""
DEMO = "demo"
TYPES = ("LierLa", "C3Lier", "DyLoRA")
PARTS: Mapping[str, Mapping[str, bool]] = {
    "both": {},
    "unet": {"network_train_unet_only": True},
    "text": {"network_train_text_encoder_only": True},
}
"""What is trained → options."""
OPTIMIZERS = ("AdamW", "AdamW8bit", "Lion8bit", "Adafactor", "SGD")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

FIELDS: Mapping[str, tuple[Field, ...]] = {
    "network": (
        Field("type", "options", "LierLa", TYPES),
        Field("parts", "options", "both", tuple(PARTS)),
        Field("network_dim", "whole", 16),
        Field("network_alpha", "number", 8),
        Field("conv_dim", "whole", 8, when={"type": ("C3Lier",)}),
        Field("conv_alpha", "number", 4, when={"type": ("C3Lier",)}),
        Field("unit", "whole", 4, when={"type": ("DyLoRA",)}),
    ),
    "course": (
        Field("max_train_steps", "whole", 1600),
        Field("max_train_epochs", "text", ""),
        Field("resolution", "text", "512"),
        Field("train_batch_size", "whole", 1),
        Field("learning_rate", "number", 1e-4),
        Field("unet_lr", "text", ""),
        Field("text_encoder_lr", "text", ""),
        Field("optimizer_type", "options", "AdamW", OPTIMIZERS),
        Field("lr_scheduler", "options", "constant", SCHEDULERS),
        Field("lr_warmup_steps", "number", 0),
        Field("seed", "whole", 0),
    ),
    "memory": (
        Field("mixed_precision", "options", "bf16" if torch.cuda.is_available() else "no", ("no", "fp16", "bf16")),
        Field("save_precision", "options", "fp16", ("float", "fp16", "bf16")),
        Field("gradient_checkpointing", "tick", False),
        Field("cache_latents", "tick", True),
        Field("cache_text_encoder_outputs", "tick", False),
    ),
    "blocks": tuple(
        Field(name, "text", "")
        for name in ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_dims", "block_alphas")
    ),
    "samples": (Field("sample_prompts", "text", ""), Field("sample_every_n_steps", "whole", 200)),
    "more": (Field("further", "text", ""),),
}
"""Section of the form → what it asks for; most fields are called as the trainer's options, which are kohya's."""
ASKED = tuple(field for section in FIELDS.values() for field in section)
CHOSEN = ("model", "pictures", "reg", "lora", "name")
"""Lists, and the name of the result."""
ANSWERED = (*CHOSEN, *(field.name for field in ASKED))
_BY_NAME = {one.name: one for one in ASKED}
_OWN = frozenset(
    {one.name for one in ASKED}
    | {"pretrained_model_name_or_path", "train_data_dir", "reg_data_dir", "network_module", "network_weights"}
    | {"network_train_unet_only", "network_train_text_encoder_only", "output_dir", "output_name", "force", "resume"}
)
"""Options that the page has controls for."""


@dataclass(frozen=True)
class Plan:
    """A training that can begin.

    Attributes:
        settings: Key → value, as a configuration has them.
        options: The same for the trainer.
        prompts: Text of the sample pictures' prompts; empty for none.
        name: Of the result.
        folder: Of all that the training writes.
        target: The LoRA file to be, where LoRAs are chosen.
    """

    settings: Mapping[str, Any]
    options: TrainOptions
    prompts: str
    name: str
    folder: Path
    target: Path

    @property
    def model(self) -> Path:
        """The checkpoint file or folder that is trained on."""
        named = self.settings["pretrained_model_name_or_path"]
        return MODEL_DIR if named == DEMO else Path(named)

    @property
    def configuration(self) -> Path:
        """The file that tells the command line, and the page later, of this training."""
        return output_path(self.folder, self.name, ".toml")

    @property
    def prompt_file(self) -> Path:
        """The prompts of the sample pictures, one in a line."""
        return _prompt_file(self.folder, self.name)

    @property
    def states(self) -> Path:
        """Folder of states to go on from."""
        return output_path(self.folder, f"{self.name}-state", "")

    def toml(self) -> str:
        """The configuration, for ``python -m lib_lora train``."""
        return to_toml(self.settings)


def picture_folders(host: Host) -> Mapping[str, Path]:
    """Name → folder of pictures, of all that can be chosen."""
    base = training_folder(host)
    found = sorted(base.iterdir()) if base.is_dir() else []
    return {path.name: path for path in found if path.is_dir() and not path.name.startswith(".")}


def training_folder(host: Host) -> Path:
    """Where folders of pictures are looked for."""
    return host.model_folder.parent / PICTURES


def result_folder(host: Host) -> Path:
    """Where trainings write, but for the LoRAs themselves."""
    return host.picture_folder / RESULTS


def earlier(host: Host) -> Mapping[str, Path]:
    """Name → configuration of earlier trainings, the newest first."""
    found = sorted(result_folder(host).glob("*.toml"), key=lambda path: -path.stat().st_mtime)
    return {path.stem: path for path in found}


def plan_of(host: Host, answers: Mapping[str, Any]) -> Plan:
    """What the form asks for.

    Args:
        host: Whose files are meant.
        answers: What stands in each of `ANSWERED`.

    Raises:
        PrefuseError: If an answer is missing, or none for a training.
    """
    name, folder = str(answers["name"] or "").strip(), result_folder(host)
    target = output_path(host.catalog.folders[0], name)
    given = {one.name: answers[one.name] for one in ASKED if one.counts(answers)}
    kind, parts = (ANSWERS["options"](host, _BY_NAME[key], given.pop(key)) for key in ("type", "parts"))
    further, prompts = _further(str(given.pop("further") or "")), str(given.pop("sample_prompts") or "").strip()
    settings = _files(host, answers) | {"output_dir": folder, "output_name": name}
    settings |= {"network_module": "dylora" if kind == "DyLoRA" else "lora", **PARTS[parts]}
    settings |= {key: value for key, value in given.items() if value not in (None, "")} | further
    if kind == "C3Lier" and "conv_dim" not in settings:
        raise JobError("C3Lier needs the rank of 3x3 convolutions; write one, or choose LierLa")
    if prompts:
        settings["sample_prompts"] = _prompt_file(folder, name)
    else:
        settings.pop("sample_every_n_steps", None)
    options = TrainOptions.of(settings)
    _check_further(options, further)
    return Plan(settings, options, prompts, name, folder, target)


def answers_of(host: Host, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The answers that a configuration stands for; what the page has no list of is left empty.

    Args:
        host: Whose files can be chosen.
        settings: Key → value, as of `Plan`.
    """
    values = {key: default for key, default, _ in TrainOptions.table()} | dict(settings)
    answers = {one.name: _answer(one, values[one.name]) for one in ASKED if one.name in values}
    answers |= {key: _BY_NAME[key].value for key, answer in answers.items() if answer is None}
    answers["type"] = "C3Lier" if values["conv_dim"] else "LierLa"
    if str(values["network_module"]).endswith("dylora"):
        answers["type"] = "DyLoRA"
    only = [part for part, given in PARTS.items() if given and given.items() <= settings.items()]
    answers["parts"] = only[0] if only else "both"
    others = {key: value for key, value in settings.items() if key not in _OWN}
    return answers | _choices(host, settings) | {"further": to_toml(others), "sample_prompts": _prompts(host, settings)}


def to_toml(settings: Mapping[str, Any]) -> str:
    """Lines of ``key = value``."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items())


def _files(host: Host, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of what is chosen from lists."""
    model = ANSWERS["model"](host, Field("model", "model"), answers["model"])
    folders = picture_folders(host)
    files: dict[str, Any] = {"pretrained_model_name_or_path": DEMO if model == MODEL_DIR else str(model)}
    for key, name in (("train_data_dir", answers["pictures"]), ("reg_data_dir", answers["reg"])):
        if name in folders:
            files[key] = folders[name]
        elif key == "train_data_dir" or name not in (None, "", NONE):
            raise JobError(f"no picture folder is chosen; put one into {training_folder(host)} and choose it")
    if answers["lora"] not in (None, "", NONE):
        files["network_weights"] = host.catalog.find(str(answers["lora"])).path
    return files


def _further(text: str) -> dict[str, Any]:
    """Options that are written as lines."""
    further = parse_toml(text, "the further options") if text.strip() else {}
    if own := sorted(_OWN & further.keys()):
        raise JobError(f"the further options say {own[0]}, which the page has a control for; take that line out")
    return further


def _check_further(options: TrainOptions, further: Mapping[str, Any]) -> None:
    """No path comes from what is typed, and what is made is a LoRA."""
    values = options.values()
    if paths := [key for key in further if isinstance(values.get(key), Path)]:
        raise JobError(f"{paths[0]} is a path, which the page takes from lists alone; give it to the command line")
    if options.model.full:
        raise JobError("the page trains LoRAs; the whole model is trained by the command line, with --full")


def _answer(field: Field, value: Any) -> Any:
    """As it stands in the field."""
    if field.kind != "text":
        return value
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def _choices(host: Host, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is chosen in the lists, where the files are still there."""
    model = settings.get("pretrained_model_name_or_path")
    models = {DEMO if path == MODEL_DIR else str(path): name for name, path in host.models().items()}
    folders = {str(path): name for name, path in picture_folders(host).items()}
    lora = settings.get("network_weights")
    return {
        "model": models.get(str(model)),
        "pictures": folders.get(str(settings.get("train_data_dir"))),
        "reg": folders.get(str(settings.get("reg_data_dir")), NONE),
        "lora": (host.catalog.tag_name(lora) if lora else "") or NONE,
        "name": settings.get("output_name"),
    }


def _prompt_file(folder: Path, name: str) -> Path:
    return output_path(folder, f"{name}-prompts", ".txt")


def _prompts(host: Host, settings: Mapping[str, Any]) -> str:
    """Those that the page wrote for this training; any other file is not read."""
    try:
        file = _prompt_file(result_folder(host), str(settings.get("output_name", "")))
        return file.read_text(encoding="utf-8") if "sample_prompts" in settings else ""
    except (OSError, ValueError, PrefuseError):
        return ""
