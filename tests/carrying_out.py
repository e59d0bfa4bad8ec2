"""Instructions carried out in C++ and in Python, side by side."""

import torch
from torch.utils import _pytree as pytree

from dyncompile.lowering.native import native_program
from dyncompile.lowering.source import python_program


def same_in_both(fast, *args, **kwargs):
    """Assert that a lowered model returns the same, counts the same rows and changes no input, in C++ and in Python."""
    kept = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    own, runs = fast._program, []
    try:
        for program in (python_program(fast._code), native_program(fast._code)):
            fast._program = program
            with torch.no_grad():
                runs.append((pytree.tree_leaves(fast(*args, **kwargs)), fast.last_run))
    finally:
        fast._program = own
    (expected, counted), (found, rows) = runs
    assert rows == counted
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        if isinstance(a, torch.Tensor):
            assert a.stride() == b.stride()
    for a, b in zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(kept), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
