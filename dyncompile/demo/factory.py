"""Objects that the command line names: `package.module:factory`, `file.py:factory`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dyncompile.errors import ArgumentError


def load_object(spec: str, *, argument: str) -> Callable[..., Any]:
    """Find the callable that `PACKAGE.MODULE:NAME` or `FILE.py:NAME` speaks of.

    Raises:
        ArgumentError: No such file, module or name, or it is no callable.

    >>> load_object("dyncompile.demo.models:resnet20", argument="model").__name__
    'resnet20'
    """
    module_name, _, name = spec.rpartition(":")
    expected = "package.module:factory or file.py:factory"
    if not module_name or not name:
        raise ArgumentError(argument, found=repr(spec), expected=expected)
    try:
        module = _import(module_name)
    except (ImportError, FileNotFoundError) as error:
        raise ArgumentError(argument, found=f"{spec!r} ({error})", expected=expected) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        found = f"no callable {name!r} in {module_name}"
        raise ArgumentError(argument, found=found, expected=expected)
    return factory  # type: ignore[no-any-return]


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
