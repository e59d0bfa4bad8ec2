"""Weights in large pages: where they lie, and that they stay what they are."""

import ctypes
import re
import sys
from pathlib import Path

import torch

from dyncompile.lowering.paging import into_large_pages

SIZE, PAGE = 16 << 20, 2 << 20


def large(address: int) -> int:
    """Bytes in large pages of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def within(address: int) -> tuple[int, int]:
    """Start and size of the large pages that lie inside of a block of `SIZE`; those at its ends may be refused."""
    first = -(-address // PAGE) * PAGE
    return first, (address + SIZE) // PAGE * PAGE - first


def collapses() -> bool:
    """Whether this system puts memory into large pages when asked to."""
    block = torch.ones(SIZE // 4)
    start, size = within(block.data_ptr())
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 25) == 0


def test_large_tensors_move_and_keep_their_values() -> None:
    given = torch.randn(SIZE // 4 // 1024, 1024)
    packed, dense = given.to_mkldnn(), given.clone()
    blocks = [within(torch.ops.mkldnn.data_ptr(packed)), within(dense.data_ptr())]
    into_large_pages([packed, dense, torch.ones(3), torch.empty(4, device="meta")])
    # Looked up before this system is asked what it does, which may use pages beside them.
    found = [large(start) for start, _ in blocks if sys.platform == "linux"]
    for tensor in (packed.to_dense(), dense):
        torch.testing.assert_close(tensor, given, rtol=0, atol=0)
    if sys.platform == "linux" and collapses():
        assert all(inside >= size for inside, (_, size) in zip(found, blocks, strict=True))
