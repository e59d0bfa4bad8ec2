"""Grouped GEMM: against a product for each group by itself."""

import pytest
import torch

from dyncompile.nn.grouped_gemm import GroupedMatrices, GroupedRows


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# Widths beside those of the registers, rows that fill no tile, groups that nobody opens.
@pytest.mark.parametrize(("depth", "width"), [(1, 1), (7, 16), (12, 35), (64, 192)])
@pytest.mark.parametrize(("count", "block"), [(1, 1), (1, 17), (5, 3), (40, 1)])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_products_of_the_groups_that_a_row_opens(depth, width, count, block, biased, threads):
    torch.manual_seed(count)
    x, y = torch.randn(count, block, depth), torch.randn(count, block, width)
    matrices, back = torch.randn(4, depth, width), torch.randn(4, depth, width)
    bias = torch.randn(4, width) if biased else None
    opened = torch.rand(4, count).t() < 0.5  # lies the other way round
    opened[:, 2] = False
    rows = GroupedRows(opened)
    pairs = [(g, r) for g in range(4) for r in range(count) if opened[r, g]]
    assert rows.count == len(pairs)

    found = GroupedMatrices(matrices, bias).gathered(x, rows)
    one_by_one = [x[r] @ matrices[g] + (0 if bias is None else bias[g]) for g, r in pairs]
    expected = torch.stack(one_by_one) if pairs else torch.empty(0, block, width)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)

    hidden = torch.randn(len(pairs), block, depth)
    expected = y.clone()
    for (g, r), own in zip(pairs, hidden, strict=True):
        expected[r] += own @ back[g]
    GroupedMatrices(back).scattered(y, hidden, rows)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


def test_matrices_may_lie_the_other_way_round():
    torch.manual_seed(0)
    x, matrices = torch.randn(5, 3, 4), torch.randn(6, 2, 4).permute(1, 2, 0)
    found = GroupedMatrices(matrices).gathered(x, GroupedRows(torch.tensor([[True, False]] * 5)))
    torch.testing.assert_close(found, x @ matrices[0])


def test_more_rows_than_stay_in_the_cache(threads):
    torch.manual_seed(0)
    x, matrices = torch.randn(500, 2, 3), torch.randn(2, 3, 20)
    opened = torch.rand(500, 2) < 0.7
    found = torch.zeros(500, 2, 20)
    rows = GroupedRows(opened)
    GroupedMatrices(matrices).scattered(found, GroupedMatrices(torch.eye(3).expand(2, 3, 3)).gathered(x, rows), rows)
    expected = sum(opened[:, g].view(-1, 1, 1) * (x @ matrices[g]) for g in range(2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
