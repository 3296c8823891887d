"""Callbacks by kind. Those of `before_ui` and `script_unloaded` run in reverse order."""

from modules import errors

callback_map = {
    kind: []
    for kind in (
        "app_started",
        "ui_tabs",
        "model_loaded",
        "ui_settings",
        "before_ui",
        "script_unloaded",
        "infotext_pasted",
        "cfg_denoiser",
    )
}
REVERSED = {"before_ui", "script_unloaded"}


def clear_callbacks():
    for callbacks in callback_map.values():
        callbacks.clear()


def run(kind, *args):
    callbacks = callback_map[kind]
    for callback in reversed(callbacks) if kind in REVERSED else list(callbacks):
        try:
            callback(*args)
        except Exception as e:
            errors.display(e, kind)


def on_ui_tabs(callback, *, name=None):
    callback_map["ui_tabs"].append(callback)


def on_app_started(callback, *, name=None):
    callback_map["app_started"].append(callback)


def on_model_loaded(callback, *, name=None):
    callback_map["model_loaded"].append(callback)


def on_ui_settings(callback, *, name=None):
    callback_map["ui_settings"].append(callback)


def on_cfg_denoiser(callback, *, name=None):
    callback_map["cfg_denoiser"].append(callback)


def on_before_ui(callback, *, name=None):
    callback_map["before_ui"].append(callback)


def on_script_unloaded(callback, *, name=None):
    callback_map["script_unloaded"].append(callback)


def on_infotext_pasted(callback, *, name=None):
    callback_map["infotext_pasted"].append(callback)
