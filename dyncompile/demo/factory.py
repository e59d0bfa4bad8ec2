"""What the command line names: factories as `package.module:name` or `file.py:name`."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dyncompile.errors import ArgumentError, DyncompileError

T = TypeVar("T")


def make(spec: str, kind: type[T], *, argument: str, options: Mapping[str, Any] | None = None) -> T:
    """Call the factory that `PACKAGE.MODULE:NAME` or `FILE.py:NAME` speaks of.

    Args:
        spec: Where the factory is.
        kind: What it must return.
        argument: What an error calls `spec`.
        options: Keyword arguments of the factory.

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
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise ArgumentError(argument, found=f"no file {module_name}", expected="a Python file, as in file.py:factory")
    expected = f"a factory that returns {kind.__module__}.{kind.__qualname__}"
    try:
        made = getattr(_import(module_name), name)(**(options or {}))
    except DyncompileError:
        raise
    except (Exception, SystemExit) as error:  # what a user's code raises can be anything; its exit code is not ours
        found = f"{spec}, which fails ({type(error).__name__}: {error})"
        raise ArgumentError(argument, found=found, expected=expected) from error
    if not isinstance(made, kind):
        found = f"a {type(made).__name__} from {spec}"
        raise ArgumentError(argument, found=found, expected=expected)
    return made


def origin(spec: str) -> tuple[str, int]:
    """File and line of a factory that `make` has called, for a person to look at; the file alone is line 1."""
    module_name, _, name = spec.rpartition(":")
    module = sys.modules[_in_sys(module_name)]
    file = Path(str(module.__file__))
    try:
        line = inspect.getsourcelines(getattr(module, name))[1]
    except (OSError, TypeError):
        line = 1
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file), line


def _in_sys(name: str) -> str:
    """The key of a module in `sys.modules`."""
    return f"_dyncompile_{Path(name).stem}" if name.endswith(".py") else name


@contextmanager
def _found_first(folder: Path) -> Iterator[None]:
    """Imports look into a folder first, as they do beside a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        with _found_first(Path.cwd()):
            return importlib.import_module(name)
    path = Path(name).resolve()
    module_name = _in_sys(name)
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with _found_first(path.parent):
        spec.loader.exec_module(module)
    return module
