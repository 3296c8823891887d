"""The extension's settings, read anew for each generation."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from modules import shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib_lora.core.base_store import StoreKind
    from lib_lora.core.plan import Compat
    from lib_lora.session import Mode

SECTION = ("prefuse", "Prefuse")
MODES = ("auto", "prefuse", "hook")
COMPATS = ("exact", "a1111")
STORES = ("auto", "device", "pinned", "file")
COMPILERS = ("off", "inductor", "tensorrt")
LANGUAGES = ("auto", "en", "zh")
CACHE_MB = 1024
COMPAT_FIELD = "Prefuse compat"
"""Name in the infotext, by which pasting finds the setting."""


@dataclass(frozen=True)
class Settings:
    """How LoRAs are applied to the next picture.

    Attributes:
        enabled: Whether tags are ours, or the built-in extension's.
        mode: ``prefuse`` or ``hook``.
        compat: ``exact`` or ``a1111``.
        store: Where base weights are kept.
        cache_bytes: Memory for LoRAs that the prompt does not name at the moment.
        compiler: What the UNet is compiled with, or ``off``.
    """

    enabled: bool = True
    mode: Mode = "prefuse"
    compat: Compat = "exact"
    store: StoreKind = "auto"
    cache_bytes: int = CACHE_MB << 20
    compiler: str = COMPILERS[0]


def read_settings() -> Settings:
    """The settings as they are now, those of ``override_settings`` included."""
    store = _choice("prefuse_base_store", STORES)
    return Settings(
        enabled=bool(option("prefuse_enabled", True)),
        mode=_mode(_choice("prefuse_mode", MODES)),
        compat=cast("Compat", _choice("prefuse_compat", COMPATS)),
        store=cast("StoreKind", {"file": "checkpoint"}.get(store, store)),
        cache_bytes=_bytes(option("prefuse_cache_mb", CACHE_MB)),
        compiler=_choice("prefuse_compile", COMPILERS),
    )


def page_language() -> str:
    """Language of our page: as the user chose, or the WebUI's localization, such as ``zh-Hans (Stable)``."""
    choice = _choice("prefuse_language", LANGUAGES)
    return str(option("localization", "")) if choice == LANGUAGES[0] else choice


def option(name: str, default: Any) -> Any:
    """One setting of the WebUI; `default` while it is not registered, as at the load of the first model."""
    value = getattr(shared.opts, name, None)
    return default if value is None else value


def _choice(name: str, choices: tuple[str, ...]) -> str:
    value = option(name, choices[0])
    return value if value in choices else choices[0]


def _bytes(megabytes: Any) -> int:
    try:
        return max(0, int(megabytes)) << 20
    except (TypeError, ValueError, OverflowError):
        return CACHE_MB << 20


def _mode(choice: str) -> Mode:
    """The built-in's ``lora_functional`` asks for what hook mode is, unless the user chose a mode."""
    if choice == "auto":
        return "hook" if option("lora_functional", False) else "prefuse"
    return cast("Mode", choice)


def add_settings(compile_status: Callable[[], str], compile_anew: Callable[[], None]) -> None:
    """The section of the settings page.

    Args:
        compile_status: What is shown with the choice of a compiler.
        compile_anew: Called when another one was chosen.
    """
    import gradio as gr

    def radio(choices: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
        return gr.Radio, {"choices": list(choices)}

    _add("prefuse_enabled", True, "Apply LoRAs with Prefuse", "off: the built-in extension applies them")
    _add(
        "prefuse_mode",
        "auto",
        "How LoRAs are applied",
        "prefuse: summed into the weights, so steps take the time they take without; hook: beside the weights; "
        "auto: prefuse, or hook if the built-in extension's functional method is on",
        *radio(MODES),
    )
    _add(
        "prefuse_compat",
        "exact",
        "Arithmetic",
        "exact: one rounding, whatever the order of the tags; a1111: one LoRA after the other with the rounding of "
        "the built-in extension, to make old pictures again bit for bit",
        *radio(COMPATS),
        infotext=COMPAT_FIELD,
    )
    _add(
        "prefuse_base_store",
        "auto",
        "Where the untouched weights are kept while LoRAs are in the model",
        "device: beside the model; pinned: in RAM; file: nowhere, they are read from the checkpoint",
        *radio(STORES),
    )
    _add(
        "prefuse_compile",
        COMPILERS[0],
        "Compile the UNet",
        "inductor: torch.compile; tensorrt: TensorRT, for NVIDIA's GPUs, with torch_tensorrt; both work in the "
        "background while pictures are drawn, and LoRAs are switched without compiling again",
        gr.Radio,
        lambda: {"choices": list(COMPILERS), "info": compile_status()},
        onchange=compile_anew,
        refresh=lambda: None,
    )
    _add(
        "prefuse_language",
        "auto",
        "Language of the Prefuse tab",
        "auto: that of the localization; takes effect when the page is reloaded",
        *radio(LANGUAGES),
    )
    _add("prefuse_cache_mb", CACHE_MB, "Memory for LoRAs that were used before, in MB", "", gr.Number, {"precision": 0})


def _add(name: str, default: Any, label: str, info: str, *component: Any, **more: Any) -> None:
    shown = shared.OptionInfo(default, label, *component, section=SECTION, **more).info(info)
    shared.opts.add_option(name, shown)
