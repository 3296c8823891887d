"""Optimizers by name: of torch, transformers (Adafactor) and other packages.

The names are those of kohya's train_util.py (sd-scripts) too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from lib_lora.train.settings import OptimizerOptions

_NESTEROV = {"momentum": 0.9, "nesterov": True}
_ADAFACTOR = {"relative_step": False, "scale_parameter": False}
"""With a learning rate of our own."""
_NO_USE = {"LBFGS", "SparseAdam", "Optimizer"}
"""The first asks for the loss again and again, the second for sparse gradients, the last is their base."""
_BITSANDBYTES = re.compile(r"(?:paged.*|.*8bit)")
_PACKAGES = {
    "lion": "lion_pytorch.Lion",
    "prodigy": "prodigyopt.Prodigy",
    "dadaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadampreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadagrad": "dadaptation.DAdaptAdaGrad",
    "dadaptadam": "dadaptation.DAdaptAdam",
    "dadaptadan": "dadaptation.DAdaptAdan",
    "dadaptlion": "dadaptation.DAdaptLion",
    "dadaptsgd": "dadaptation.DAdaptSGD",
}
"""Name in small letters → class of a package that may be installed."""
_FINDS_RATE = ("prodigy", "dadapt")
"""How names of optimizers begin that find the learning rate, one for all parameters; theirs is a factor of it."""


def make_optimizer(groups: Sequence[Mapping[str, Any]], options: OptimizerOptions) -> Optimizer:
    """An optimizer of groups of parameters with their rates.

    Raises:
        JobError: If there is no such optimizer, it does not take the settings or the rates, or nothing is trained.
    """
    kind, settings = _kind(options.optimizer_type)
    settings = {**settings, **read_settings(options.optimizer_args)}
    unknown = set(settings) - set(inspect.signature(kind).parameters)
    if unknown:
        raise JobError(f"{options.optimizer_type} has no setting {min(unknown)}; see optimizer_args")
    _check_rates(groups, options.optimizer_type)
    rate = None if settings.get("relative_step") else options.learning_rate  # Adafactor's own
    try:
        return _made(kind, groups, {"lr": rate, **settings})
    except (TypeError, ValueError) as error:
        raise JobError(f"{options.optimizer_type} refuses its settings: {error}; see optimizer_args") from error


def _check_rates(groups: Sequence[Mapping[str, Any]], name: str) -> None:
    rates = {group["lr"] for group in groups} - {0}
    if not rates:
        raise JobError("learning_rate, unet_lr or text_encoder_lr leave nothing to train: they are 0")
    if name.lower().startswith(_FINDS_RATE) and len(rates) > 1:
        raise JobError(
            f"{name} finds one learning rate for all that is trained, and here are {len(rates)}; "
            "leave unet_lr, text_encoder_lr, weights of blocks and LoRA+ out"
        )


def _made(kind: Any, groups: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Optimizer:
    """In one kernel for all parameters, where torch has one for this optimizer and device."""
    if "fused" in inspect.signature(kind).parameters and not {"fused", "foreach"} & set(settings):
        try:
            return kind([dict(group) for group in groups], **settings, fused=True)
        except RuntimeError:  # what torch says where it has none
            pass
    return kind([dict(group) for group in groups], **settings)


def read_settings(texts: Sequence[str], option: str = "optimizer_args") -> dict[str, Any]:
    """Name → value of ``name=value`` texts, the values as Python writes them.

    Args:
        texts: Of an option.
        option: Its name.

    Raises:
        JobError: If one is no such text.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            settings[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise JobError(f"{option}: {text!r} is not name=value, such as weight_decay=0.01") from error
    return settings


def _kind(name: str) -> tuple[Any, dict[str, Any]]:
    """The class of that name, and settings that go with the name."""
    low = name.lower()
    if _BITSANDBYTES.fullmatch(low):
        return _of_bitsandbytes(name)
    if low in _PACKAGES:
        return _of_package(name, _PACKAGES[low]), {}
    if low == "adafactor":
        return importlib.import_module("transformers.optimization").Adafactor, _ADAFACTOR
    if low == "sgdnesterov":
        return torch.optim.SGD, _NESTEROV
    found = _optimizers_of(torch.optim)
    if low not in found:
        names = {**{low: kind.__name__ for low, kind in found.items()}, "adafactor": "Adafactor"}
        names |= {low: path.rpartition(".")[2] for low, path in _PACKAGES.items()}
        close = get_close_matches(low, names, n=1)
        hint = f"did you mean {names[close[0]]}? " if close else ""
        raise JobError(f"there is no optimizer {name!r}; {hint}there are {', '.join(dict.fromkeys(names.values()))}")
    return found[low], {}


def _of_package(name: str, path: str) -> Any:
    module, _, kind = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), kind)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise JobError(f"{name} needs {package} ({error}); install it with: pip install {package}") from error


def _of_bitsandbytes(name: str) -> tuple[Any, dict[str, Any]]:
    try:
        found = _optimizers_of(importlib.import_module("bitsandbytes.optim"))
    except ImportError as error:
        raise JobError(f"{name} needs bitsandbytes ({error}); install it, or choose AdamW or Adafactor") from error
    kind = found.get(re.sub("nesterov", "", name.lower()))
    if kind is None:
        raise JobError(f"bitsandbytes has no {name}; it has {', '.join(kind.__name__ for kind in found.values())}")
    return kind, _NESTEROV if "nesterov" in name.lower() else {}


def _optimizers_of(module: Any) -> dict[str, Any]:
    """Name in small letters → class."""
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind)]
    fit = [kind for kind in kinds if issubclass(kind, torch.optim.Optimizer) and kind.__name__ not in _NO_USE]
    return {kind.__name__.lower(): kind for kind in fit}
