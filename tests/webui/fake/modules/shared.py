"""Options, command line and the model, which is loaded when it is first asked for."""

import sys
from types import ModuleType, SimpleNamespace


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, onchange=None, section=None, refresh=None, comment_before="", comment_after="", infotext=None, restrict_api=False, category_id=None):  # fmt: skip
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.section, self.infotext, self.onchange, self.refresh = section, infotext, onchange, refresh
        self.comment_after = comment_after
        self.do_not_save = False

    def info(self, info):
        self.comment_after += info
        return self


class Options:
    """`data` holds what was set; a label's default stands for what was not."""

    def __init__(self, data_labels):
        vars(self).update(data_labels=data_labels, data={})

    def __getattr__(self, item):
        if item in self.data:
            return self.data[item]
        if item in self.data_labels:
            return self.data_labels[item].default
        raise AttributeError(item)

    def __setattr__(self, key, value):
        self.data[key] = value

    def set(self, key, value, is_api=False, run_callbacks=True):
        if self.data.get(key) == value:
            return False
        label = self.data_labels[key]
        self.data[key] = value
        if run_callbacks and label.onchange is not None:
            label.onchange()
        return True

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)


cmd_opts = SimpleNamespace(
    lora_dir="", lyco_dir_backcompat="", api=True, nowebui=False, api_auth=None, no_hashing=False
)
options_templates = {
    "sd_lora": OptionInfo("None"),
    "lora_preferred_name": OptionInfo("Alias from file"),
    "lora_add_hashes_to_infotext": OptionInfo(True),
    "lora_bundled_ti_to_infotext": OptionInfo(True),
    "lora_not_found_gradio_warning": OptionInfo(False),
    "lora_functional": OptionInfo(False),
    "extra_networks_default_multiplier": OptionInfo(1.0),
    "persistent_cond_cache": OptionInfo(True),
    "sd_checkpoint_cache": OptionInfo(0),
    "sd_model_checkpoint": OptionInfo(None),
}
opts = Options(options_templates)
loaded_hypernetworks = []


class Shared(ModuleType):
    @property
    def sd_model(self):
        from modules import sd_models

        return sd_models.model_data.get_sd_model()


sys.modules[__name__].__class__ = Shared
