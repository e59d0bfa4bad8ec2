"""Rows that a lowered program takes out of a tensor and puts back."""

import pytest
import torch

from dyncompile.lowering.runtime import gather, scatter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("offset", [0, 1], ids=["", "offset"])
@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("shape", [(), (8,), (3,), (16, 4, 4), (0,)], ids=str)
def test_scattered_rows_are_gathered_again(shape, entries, offset, dtype, device):
    count = 6 * entries * torch.Size(shape).numel()
    base = torch.randint(0, 9, (count + offset,), device=device).to(dtype)[offset:].view(6 * entries, *shape)
    rows = torch.randint(0, 9, (3 * entries, *shape), device=device).to(dtype)
    index = torch.tensor([4, 0, 2], device=device)
    expected = base.clone().view(6, entries, *shape)
    expected[index] = rows.view(3, entries, *shape)
    scatter(base, index, rows, 0, entries)
    assert torch.equal(base, expected.view(base.shape))
    assert torch.equal(gather(base, index, 0, entries), rows)


def test_rows_of_images_keep_their_layout(device):
    base = torch.randn(6, 8, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    index = torch.tensor([4, 0, 2], device=device)
    part = gather(base, index, 0)
    assert part.is_contiguous(memory_format=torch.channels_last)
    expected = base.clone()
    expected[index] = part * 2
    scatter(base, index, part * 2, 0)
    assert torch.equal(base, expected)
