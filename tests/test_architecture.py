"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lib_lora"
MODULES = sorted(PACKAGE.rglob("*.py"))

ROOMS = (
    ("errors",),
    ("core", "prompt"),
    ("catalog", "presets", "preset_editor", "report", "pipelines"),
    ("resolve",),
    ("applying", "moving", "tuning"),
    ("session",),
    ("compile", "tools", "train"),
    ("hosts",),
    ("ui",),
    ("cli",),
    ("__main__",),
)
"""From left to right: a module may import what stands to its left, and its own room."""
NETWORK = (
    "socket",
    "ssl",
    "urllib",
    "http",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "huggingface_hub",
    "yaml",
)
STRANGERS = ("modules", "gradio", "fastapi", "diffusers", "transformers", "accelerate")
WEIGHT_WRITERS = {
    "core/patcher.py",
    "core/numerics.py",
    "core/webui_rounding.py",
    "core/kohya_rounding.py",
    "core/base_store.py",
}
KERNEL = ("core/adapters/", "core/gpu/")
"""They add their part to the sum that `numerics` gives them, or make the sums of many layers that `patcher` gives."""
FILE_WRITERS = {"core/saving.py", "core/replacing.py"}
PRINTERS = ("__main__.py", "cli/")
BROAD_EXCEPT = {
    "__main__.py",
    "hosts/standalone/doctor.py",  # torch_tensorrt fails to import in its own ways
    "hosts/guard.py",
    "compile/attempt.py",  # a compiler's many parts raise whatever they raise
}

IN_PLACE = {"copy_", "add_", "sub_", "mul_", "div_", "fill_", "zero_", "addmm_", "baddbmm_", "normal_", "uniform_"}
WRITING = {"write_text", "write_bytes", "save_file", "replace", "rename", "unlink"}


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def rank(module: str) -> int:
    """Where a dotted module below lib_lora stands."""
    top = module.split(".")[0]
    return next(index for index, rooms in enumerate(ROOMS) if top in rooms)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, imported name) of every import, those for types too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    has_doc = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return lines - (first.end_lineno - first.lineno + 1 if has_doc else 0)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(last part of the called name, call)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            target = node.func
            yield getattr(target, "attr", getattr(target, "id", "")), node


def test_there_is_something_to_check():
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_flow_from_left_to_right(path):
    own = name(path).removesuffix(".py").replace("/", ".")
    if own == "__init__":
        own = "session"  # the package offers what is up to the session
    for module, imported in imports(path):
        if module.split(".")[0] != "lib_lora" or module == "lib_lora":
            continue
        below = module.removeprefix("lib_lora.")
        assert rank(below) <= rank(own), f"{own} imports {module}.{imported}"
        rooms = {below.split(".")[0], own.split(".")[0]}
        assert rooms != {"core", "prompt"}, f"{own} imports {module}: core and prompt do not know each other"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_hosts_know_the_libraries_of_hosts(path):
    if name(path).startswith(("hosts/", "ui/", "train/", "cli/")):
        return
    found = [module for module, _ in imports(path) if module.split(".")[0] in STRANGERS]
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nobody_imports_private_names(path):
    found = [
        f"{module}.{imported}"
        for module, imported in imports(path)
        if module.startswith("lib_lora") and (imported.startswith("_") or "._" in module)
        if imported != "__version__"
    ]
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_the_patcher_and_its_kernel_write_weights(path):
    if name(path) in WEIGHT_WRITERS or name(path).startswith((*KERNEL, "hosts/standalone/demo/", "train/")):
        return
    allowed = {"core/hooks.py": {"addmm_", "baddbmm_"}}.get(name(path), set())
    found = {called for called, _ in calls(path)} & IN_PLACE - allowed
    data = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute) and node.attr == "data"]
    assert not found
    assert not [line for line in data if "torch" in path.read_text().splitlines()[line - 1]]


def writes_a_file(called: str, call: ast.Call) -> bool:
    if called == "open":
        modes = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
        return any(isinstance(mode, str) and set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes)
    on_module = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    if called in {"replace", "rename", "unlink", "remove"}:
        return on_module and call.func.value.id in {"os", "shutil"}
    return called in WRITING


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_files_writes_files(path):
    if name(path) in FILE_WRITERS or name(path).startswith("hosts/standalone/demo/"):
        return
    assert not [f"line {call.lineno}: {called}" for called, call in calls(path) if writes_a_file(called, call)]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_that_runs_what_a_file_says(path):
    source = tree(path)
    for called, call in calls(path):
        owner = getattr(getattr(call.func, "value", None), "id", "")
        assert called not in {"eval", "exec"} or owner, f"line {call.lineno}"
        assert (owner, called) not in {("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("os", "system")}
        shell = [keyword for keyword in call.keywords if keyword.arg == "shell"]
        assert not shell, f"line {call.lineno}"
    assert not [node for node in ast.walk(source) if isinstance(node, ast.Global)]
    assert not [node for node in ast.walk(source) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_reaches_for_the_network(path):
    assert not [module for module, _ in imports(path) if module.split(".")[0] in NETWORK]


def caught_before(node: ast.Try, index: int) -> str:
    return " ".join(ast.unparse(handler.type) for handler in node.handlers[:index] if handler.type)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_memory_that_runs_out_is_never_taken_for_another_fault(path):
    """OutOfMemoryError is a RuntimeError: who catches one must have caught the other before, or raise it again."""
    if not name(path).startswith(("core/", "resolve", "session")) or name(path) == "core/opening.py":
        return  # which says itself that memory is short
    for node in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Try)):
        for index, handler in enumerate(node.handlers):
            caught = re.findall(r"\w+", ast.unparse(handler.type)) if handler.type else ["BaseException"]
            again = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
            if {"RuntimeError", "Exception", "BaseException"} & set(caught) and not again:
                assert re.search("(?i)out_?of_?memory", caught_before(node, index)), f"line {handler.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_name_of_a_request_becomes_a_path(path):
    """Where names come in, only constants are joined to folders."""
    if not name(path).startswith(("resolve", "session", "prompt/", "hosts/webui/")):
        return
    assert not [call.lineno for called, call in calls(path) if called in {"join", "joinpath"} and is_of_paths(call)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and "Path(" in ast.unparse(node.left):
            assert ast.unparse(node.right).isupper(), f"line {node.lineno}"


def is_of_paths(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "os.path.join" or call.func.attr == "joinpath"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_the_command_line_prints_and_catches_everything(path):
    if not name(path).startswith(PRINTERS):
        assert not [call.lineno for called, call in calls(path) if called == "print"]
    if name(path) in BROAD_EXCEPT:
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert caught not in {"everything", "Exception", "BaseException"} or reraises, f"line {node.lineno}"


def test_functions_are_small():
    lengths = sorted(length(function) for path in MODULES for function in functions(path))
    assert statistics.median(lengths) <= 8
    assert lengths[int(len(lengths) * 0.9)] <= 25
    long = [f"{name(path)}:{f.name} {length(f)}" for path in MODULES for f in functions(path) if length(f) > 50]
    assert not long


def test_modules_are_one_room_each():
    sizes = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {module: size for module, size in sizes.items() if size > 350}


def test_a_check_that_can_fail(tmp_path):
    """The checks above find what they look for."""
    bad = tmp_path / "bad.py"
    bad.write_text("import gradio\nopen('x', 'w')\nprint(1)\nw.copy_(x)\n")
    assert ("gradio", "") in list(imports(bad))
    assert [called for called, call in calls(bad) if writes_a_file(called, call)] == ["open"]
    assert {called for called, _ in calls(bad)} & IN_PLACE == {"copy_"}
