"""Signatures of a package's functions from its source, which is read and not imported."""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PLACES = {
    "dynamo.compile": ("dynamo/_compiler.py", "compile"),
    "dynamo.refit_module_weights": ("dynamo/_refit.py", "refit_module_weights"),
    "BaseEngineCache.save": ("dynamo/_engine_cache.py", "BaseEngineCache.save"),
    "BaseEngineCache.load": ("dynamo/_engine_cache.py", "BaseEngineCache.load"),
    "BaseEngineCache.check": ("dynamo/_engine_cache.py", "BaseEngineCache.check"),
    "BaseEngineCache.insert": ("dynamo/_engine_cache.py", "BaseEngineCache.insert"),
    "ConversionContext.record_weight": ("dynamo/conversion/_ConversionContext.py", "ConversionContext.record_weight"),
    "TorchTensorRTModule": ("dynamo/runtime/_TorchTensorRTModule.py", "TorchTensorRTModule.__init__"),
}
"""What is used of torch_tensorrt → file in the package, and name there."""


def read_signatures(root: Path) -> dict[str, list[list[str | None]]]:
    """Name → (parameter, kind, default as it is written) of each function in `PLACES`."""
    return {
        name: list(_parameters(_find(ast.parse((root / file).read_text(encoding="utf-8")), path.split("."))))
        for name, (file, path) in PLACES.items()
    }


def signature(parameters: list[list[str | None]]) -> inspect.Signature:
    """To bind calls to; a default is its source."""
    return inspect.Signature(
        [
            inspect.Parameter(
                name, getattr(inspect.Parameter, kind), default=inspect.Parameter.empty if default is None else default
            )
            for name, kind, default in parameters
            if name != "self"
        ]
    )


def _find(node: ast.AST, path: list[str]) -> ast.FunctionDef:
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = next(child for child in ast.iter_child_nodes(node) if isinstance(child, kinds) and child.name == path[0])
    return _find(found, path[1:]) if path[1:] else found


def _parameters(function: ast.FunctionDef) -> Iterator[list[str | None]]:
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(plain, defaults, strict=True):
        yield [argument.arg, "POSITIONAL_OR_KEYWORD", default and ast.unparse(default)]
    if arguments.vararg:
        yield [arguments.vararg.arg, "VAR_POSITIONAL", None]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield [argument.arg, "KEYWORD_ONLY", default and ast.unparse(default)]
    if arguments.kwarg:
        yield [arguments.kwarg.arg, "VAR_KEYWORD", None]
