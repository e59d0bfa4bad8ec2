"""Instructions carried out in C++, from the first segment to the last: what runs between two is a few microseconds.

At batch 1 a conditional costs what it costs to come back: the convolution before it has pushed Python's code and data
out of the caches. The interpreter (`native.cpp`) is compiled once a machine, as inductor compiles its kernels.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncompile.lowering.instructions import Code, Program

_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"
"""What the C++ that inductor generates for a segment exports."""


def native_program(code: Code) -> Program:
    """What carries out the instructions of a model on the processor."""
    program: Program = _interpreter().Program(code)
    return program


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
    """The interpreter, compiled: a module of Python's."""
    from torch._inductor.codecache import CppCodeCache

    flags = {"include_pytorch": True, "shared": True}
    cache: Any = type("Extensions", (CppCodeCache,), {"cpp_compile_command_flags": flags})
    path = cache.load(Path(__file__).with_suffix(".cpp").read_text())._name
    spec = importlib.util.spec_from_file_location("dyncompile_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
