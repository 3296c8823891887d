"""Registers Prefuse with the WebUI, which loads this file at start and at each reload of its page."""

from functools import partial

from modules import script_callbacks

from lib_lora.hosts.webui.callbacks import Extension

extension = Extension()


def tabs():
    """Our page; what it is made of is imported when it is made."""
    from lib_lora.ui.jobs import LASTING
    from lib_lora.ui.page import build

    return extension.tabs(partial(build, jobs=LASTING))


script_callbacks.on_before_ui(extension.before_ui)
script_callbacks.on_ui_tabs(tabs)
script_callbacks.on_app_started(extension.app_started)
script_callbacks.on_model_loaded(extension.model_loaded)
script_callbacks.on_cfg_denoiser(extension.denoising)
script_callbacks.on_script_unloaded(extension.script_unloaded)
