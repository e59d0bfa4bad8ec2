"""What the command line names: factories as `package.module:name` or `file.py:name`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dyncompile.errors import ArgumentError, DyncompileError

T = TypeVar("T")


def make(spec: str, kind: type[T], *, argument: str) -> T:
    """Call the factory that `PACKAGE.MODULE:NAME` or `FILE.py:NAME` speaks of.

    Args:
        spec: Where the factory is.
        kind: What it must return.
        argument: What an error calls `spec`.

    Raises:
        ArgumentError: There is no such file, module or name, it fails, or it returns another kind.

    >>> from torch import nn
    >>> type(make("dyncompile.demo.models:resnet20", nn.Module, argument="model")).__name__
    'ResNet'
    """
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        expected = "package.module:factory or file.py:factory"
        raise ArgumentError(argument, found=repr(spec), expected=expected)
    expected = f"a factory that returns {kind.__module__}.{kind.__qualname__}"
    try:
        made = getattr(_import(module_name), name)()
    except DyncompileError:
        raise
    except Exception as error:  # what a user's code raises can be anything
        found = f"{spec}, which fails ({type(error).__name__}: {error})"
        raise ArgumentError(argument, found=found, expected=expected) from error
    if not isinstance(made, kind):
        found = f"a {type(made).__name__} from {spec}"
        raise ArgumentError(argument, found=found, expected=expected)
    return made


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.pop(0)
    path = Path(name).resolve()
    module_name = f"_dyncompile_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
