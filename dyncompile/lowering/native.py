"""Instructions carried out in C++, from the first segment to the last: what runs between two is a few microseconds.

At batch 1 a conditional costs what it costs to come back: the convolution before it has pushed Python's code and data
out of the caches. The interpreter (`native.cpp`) is compiled once a machine, as inductor compiles its kernels.
"""

import ctypes
import functools
import importlib.machinery
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncompile.lowering.instructions import Code, Program

_SOURCES = ("rows.cpp", "native.cpp")
_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"
"""What the C++ that inductor generates for a segment exports."""


def native_program(code: Code) -> Program | None:
    """What carries out the instructions of a model on the processor; None where that cannot be compiled."""
    interpreter = _interpreter()
    return None if interpreter is None else interpreter.Program(code)


def entry_point(run: Callable[[list[Any]], Sequence[Tensor]], arguments: int) -> tuple[int, list[Tensor]] | None:
    """Where the C++ program behind a function of inductor's starts, and what it reads behind its arguments.

    Args:
        run: `call` of a module that inductor generated with `cpp_wrapper`.
        arguments: How many it takes.

    Returns:
        The address of `void(AtenTensorHandle* inputs, AtenTensorHandle* outputs)`, and the program's constants; None if
        there is no such program.
    """
    wrap = getattr(run, "__globals__", {}).get("_wrap_func")
    compiled = next((cell.cell_contents for cell in getattr(run, "__closure__", None) or ()), None)
    path = getattr(getattr(compiled, "__self__", None), "__file__", None)
    if wrap is None or path is None:
        return None
    entry = getattr(ctypes.CDLL(path), _ENTRY, None)
    if entry is None:
        return None
    held: list[Tensor] = []

    def note(handles: Any) -> list[Any]:
        held.extend(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles))
        return []

    wrap(note)([torch.empty(0)] * arguments)
    address = ctypes.cast(entry, ctypes.c_void_p).value
    return None if address is None else (address, held[arguments:])


@functools.cache
def _interpreter() -> Any:
    """The interpreter, compiled: a module of Python's; None where that fails."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    flags = {"include_pytorch": True, "shared": True}
    cache: Any = type("Extensions", (CppCodeCache,), {"cpp_compile_command_flags": flags})
    source = "".join(Path(__file__).with_name(name).read_text() for name in _SOURCES)
    try:
        path = cache.load(source)._name
        loader = importlib.machinery.ExtensionFileLoader("dyncompile_native", path)
        module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(loader.name, loader, origin=path))
        loader.exec_module(module)
    except (CppCompileError, ImportError, OSError) as error:
        warnings.warn(f"lowered models run slower, for their interpreter cannot be built: {error}", stacklevel=2)
        return None
    return module
