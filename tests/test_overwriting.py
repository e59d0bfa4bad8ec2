"""A segment adds a convolution's result to an input in that input's memory, where nothing else reads it."""

from collections.abc import Callable

import pytest
import torch
from test_inductor import check, images, traced
from torch import Tensor, nn

from dyncompile.lowering.inductor import SegmentInput, compile_segment


class Added(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.convolve, self.again = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.run = run

    def forward(self, x: Tensor, shortcut: Tensor) -> tuple[Tensor, ...]:
        return self.run(self, x, shortcut)


@pytest.mark.parametrize(
    ("run", "free"),
    [
        (lambda m, x, y: ((y + m.convolve(x)).relu(),), True),
        (lambda m, x, y: ((total := y + m.convolve(x)), total * 2), True),
        (lambda m, x, y: (m.convolve(m.again(y).relu()) + y,), True),
        (lambda m, x, y: (m.convolve(y) + y,), False),
        (lambda m, x, y: (m.convolve(y.transpose(2, 3)) + y,), False),
        (lambda m, x, y: ((y + m.convolve(x)) * y,), False),
        (lambda m, x, y: (y.flatten(1) * (y + m.convolve(x)).flatten(1),), False),
        (lambda m, x, y: (y + m.convolve(x), y), False),
        (lambda m, x, y: (m.again(y).relu(), y + m.convolve(x)), False),
        (lambda m, x, y: (m.again(y) + x, y + m.convolve(x)), False),
    ],
    ids=[
        "rectified",
        "read twice",
        "read before",
        "read by it",
        "read by it, seen otherwise",
        "read later",
        "read later, seen otherwise",
        "returned",
        "read by what is moved",
        "read by another sum",
    ],
)
def test_a_convolution_is_added_in_the_memory_of_an_input_that_nobody_reads_later(run, free, device):
    segment = traced(Added(run), device)
    examples = [images(4, device), images(4, device)]
    compiled = compile_segment(segment, examples, [SegmentInput()] * 2)
    assert compiled.overwrites == [False, free and device.type == "cpu"]
    again = compile_segment(segment, examples, [SegmentInput()] * 2, like=compiled)
    assert again.overwrites == compiled.overwrites
    for program in (compiled, again):
        for batch in (1, 2, 7):
            x, shortcut = images(batch, device), images(batch, device)
            kept = shortcut.clone()
            check(program, segment, [x, shortcut])
            assert torch.equal(shortcut, kept)  # called as a function it writes into a copy
            with torch.no_grad():
                total, *_ = program.serve(batch)([batch, x, shortcut])
            assert (total.data_ptr() == shortcut.data_ptr()) is compiled.overwrites[1]
