"""Lowering writes a conditional's results into what nobody reads any more, and into nothing else."""

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.conversion import describe
from dyncompile.lowering.absorbing import absorb_activations
from dyncompile.ops import SELECT, arms_of


def lowered(model, device, example):
    model = model.to(device).eval()
    graph = capture(model, example, {})
    return model, dc.lower(dc.DynamicModule(graph, describe(graph, model, "given")), backend="eager", decline=False)


class Chosen(nn.Module):
    """A layer behind a choice by the sign of the first column; `base` makes what the others keep."""

    def __init__(self, base, *, after=lambda y, base: y):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.base, self.after = base, after

    def forward(self, x):
        base = self.base(self, x)
        y = dc.select(x[:, 0] > 0, self.second(x), base)
        return self.after(y, base)


BASES = {
    "of its own": lambda m, x: m.first(x),
    "the input": lambda m, x: x,
    "a view of the input": lambda m, x: x.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4),
    "expanded": lambda m, x: x.sum(1, keepdim=True).expand(-1, 4),
    "one of two views": lambda m, x: m.first(x).unsqueeze(2).squeeze(2),
}
AFTER = {
    "unread": lambda y, base: y,
    "read later": lambda y, base: y * base,
    "chosen again": lambda y, base: dc.select(base[:, 1] > 0, y.relu() * 2, y),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("base", BASES)
def test_what_is_still_read_is_not_written_to(base, after, device):
    torch.manual_seed(0)
    model, fast = lowered(Chosen(BASES[base], after=AFTER[after]), device, (torch.randn(2, 4, device=device),))
    for batch in (1, 2, 7, 33):
        x = torch.randn(batch, 4, device=device)
        kept = x.clone()
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(x, kept)


def test_a_value_of_ones_own_is_written_into(device):
    _, fast = lowered(Chosen(BASES["of its own"]), device, (torch.randn(2, 4, device=device),))
    assert ".clone()" not in fast.source
    _, fast = lowered(Chosen(BASES["the input"]), device, (torch.randn(2, 4, device=device),))
    assert ".clone()" in fast.source


class Rectified(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), inner

    def forward(self, x):
        x = self.inner(x)
        return dc.select(x[:, 0] > 0.5, self.layer(x) + x, x).relu()


@pytest.mark.parametrize(("inner", "moves"), [(nn.ReLU(), True), (nn.Tanh(), False)], ids=["positive", "signed"])
def test_a_rectifier_moves_into_the_arm_where_that_changes_nothing(inner, moves, device):
    torch.manual_seed(0)
    model, fast = lowered(Rectified(inner), device, (torch.randn(2, 4, device=device),))
    graph = fast.dynamic.graph.fx
    before = [str(node) for node in graph.nodes]
    (select,) = [node for node in fast.plan.graph.nodes if node.target is SELECT]
    assert ("relu" in str(arms_of(select)[1].target)) is moves
    assert [str(node) for node in graph.nodes] == before
    x = torch.randn(33, 4, device=device)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    absorb_activations(fast.plan.graph, fast.dynamic)
    assert sum("relu" in str(node.target) for node in fast.plan.graph.nodes) == 1
