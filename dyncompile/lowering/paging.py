"""Weights in large pages.

A small batch reads every weight once and computes little with it, so that a good share of its time goes into looking up
where the weights lie, page by page of 4 KiB. Linux can put memory that is in use already into pages of 2 MiB.
"""

import ctypes
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

_LARGE = 2 << 20
_LEAST = 1 << 18
"""Bytes of a tensor below which the few pages that it fills do not matter."""

_HUGEPAGE, _COLLAPSE = 14, 25
"""Advice of `madvise`: it may use large pages from now on, and it shall use them now (Linux 6.1)."""


def into_large_pages(tensors: Iterable[Tensor]) -> None:
    """Put the memory in which tensors lie into large pages, with what shares these; nothing else becomes of it.

    Where the system refuses, or has no large pages, tensors stay where they are.

    Args:
        tensors: Dense, or packed by oneDNN; those that are not in the processor's memory are left alone.
    """
    if sys.platform != "linux":
        return
    pages: set[int] = set()
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        if tensor.is_mkldnn:
            start, size = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
        else:
            storage = tensor.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
        if size >= _LEAST:
            pages.update(range(start // _LARGE, (start + size - 1) // _LARGE + 1))
    advise = ctypes.CDLL(None).madvise
    for page in sorted(pages):
        for advice in (_HUGEPAGE, _COLLAPSE):
            advise(ctypes.c_void_p(page * _LARGE), ctypes.c_size_t(_LARGE), advice)
