"""Scripts that were loaded, and the one of the X/Y/Z plot."""

from types import ModuleType, SimpleNamespace

scripts_data = []


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


def load_xyz():
    """As a reload of the scripts does: a module of its own each time."""
    module = ModuleType("xyz_grid.py")
    module.AxisOption = AxisOption
    module.axis_options = [AxisOption("Nothing", str, None)]
    script_class = type("Script", (), {"__module__": "xyz_grid.py"})
    scripts_data[:] = [SimpleNamespace(script_class=script_class, module=module)]
    return module
