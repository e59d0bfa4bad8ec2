"""Grouped GEMM on the processor: rows times the matrix of each of their groups, in one call.

A GEMM a group takes a call each, and as much again to gather its rows and put the products back; few rows hardly fill
its tiles. The kernel beside this file, compiled by the compiler that inductor uses, reads rows where they lie.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class GroupedRows:
    """The rows of each group: those of the first, then those of the second, and so on.

    Args:
        opened: `[R, G]`, bool: which groups a row belongs to; a row may belong to any number of them.
    """

    def __init__(self, opened: Tensor) -> None:
        assert opened.dtype == torch.bool
        opened = opened.contiguous()
        count, groups = opened.shape
        self.stops = torch.empty(groups, dtype=torch.int64)
        listed = torch.empty(count * groups, dtype=torch.int64)
        addresses = map(_address, (listed, self.stops))
        self.count: int = _compiled().list_rows(_address(opened), count, groups, *addresses)
        self.listed = listed


class GroupedMatrices:
    """The matrices of some groups, packed, and their biases.

    Args:
        matrices: `[G, K, N]`, float32.
        bias: `[G, N]` or None.
    """

    def __init__(self, matrices: Tensor, bias: Tensor | None = None) -> None:
        assert matrices.dtype == torch.float32
        assert bias is None or bias.dtype == torch.float32
        panel = _compiled().panel()
        self.groups, self.depth, self.width = matrices.shape
        padded = F.pad(matrices, (0, -self.width % panel))
        self._packed = padded.view(self.groups, self.depth, -1, panel).transpose(1, 2).contiguous()
        self._bias = None if bias is None else bias.contiguous()

    def gathered(self, x: Tensor, rows: GroupedRows) -> Tensor:
        """Products of the rows of each group with its matrix, and its bias.

        Args:
            x: `[R, P, K]`, contiguous: P positions of each of R rows.
            rows: T in all groups.

        Returns:
            `[T, P, N]`.
        """
        make = x.new_zeros if self._bias is None else x.new_empty
        found = make(rows.count, x.shape[1], self.width)
        self._run(x, rows.listed, found, None, rows.stops)
        return found

    def scattered(self, found: Tensor, x: Tensor, rows: GroupedRows) -> None:
        """Add the products of `[T, P, K]` to rows of `[R, P, N]`; both are contiguous, the rest as in `gathered`."""
        self._run(x, None, found, rows.listed, rows.stops)

    def _run(self, x: Tensor, source: Tensor | None, y: Tensor, target: Tensor | None, stops: Tensor) -> None:
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert x.dtype == y.dtype == torch.float32
        assert (x.shape[-1], y.shape[-1]) == (self.depth, self.width)
        _compiled().grouped_gemm(
            *map(_address, (x, source, self._packed, self._bias, y, target, stops)),
            *(self.groups, x.shape[1], self.depth, self.width, torch.get_num_threads()),
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _compiled() -> Any:
    """The kernel, with the instructions that this processor has."""
    from torch._inductor.codecache import CppCodeCache

    kernel: Any = CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text())
    kernel.panel.restype = kernel.list_rows.restype = ctypes.c_int64
    kernel.list_rows.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 2]
    kernel.grouped_gemm.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 5
    kernel.grouped_gemm.restype = None
    return kernel
