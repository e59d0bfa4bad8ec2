"""Lowering writes a conditional's results into what nobody reads any more, and into nothing else."""

import pytest
import torch
from torch import fx, nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.conversion import describe
from dyncompile.lowering.absorbing import absorb_activations
from dyncompile.ops import SELECT, arms_of


def lowered(model, device, example, backend="eager"):
    model = model.to(device).eval()
    graph = capture(model, example, {})
    return model, dc.lower(dc.DynamicModule(graph, describe(graph, model, "given")), backend=backend, decline=False)


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


@pytest.mark.slow
def test_a_value_of_ones_own_is_written_into(device):
    _, fast = lowered(Chosen(BASES["of its own"]), device, (torch.randn(2, 4, device=device),), "inductor")
    assert ".clone()" not in fast.source
    _, fast = lowered(Chosen(BASES["the input"]), device, (torch.randn(2, 4, device=device),), "inductor")
    assert ".clone()" in fast.source


class Lives(nn.Module):
    """Two choices between which a value is lent: to a view, to another choice, or to an arm that returns a view."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x):
        base = self.first(x)
        if self.kind == "a choice":
            return dc.select(x[:, 0] > 0, self.second(base), base), dc.select(x[:, 1] > 0, self.first(base), base)
        y = dc.select(x[:, 0] > 0, self.second(base), base)
        if self.kind == "a view":
            lent = y.reshape(-1, 2, 2)
        else:
            lent = dc.select(x[:, 2] > 0, y.reshape(-1, 2, 2), y.reshape(-1, 2, 2).transpose(1, 2))
        decided = lent.flatten(1) if self.kind == "an arm" else y
        return dc.select(decided[:, 1] > decided[:, 2], self.first(y), y), lent


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("kind", ["a choice", "a view", "an arm"])
def test_what_was_lent_is_not_written_to(kind, backend, device):
    torch.manual_seed(0)
    model = Lives(kind).to(device).eval()
    graph = capture(model, (torch.randn(2, 4, device=device),), {}, prediction="0")
    dyn = dc.DynamicModule(graph, describe(graph, model, "given"))
    fast = dc.lower(dyn, backend=backend, decline=False)
    for batch in (2, 3, 7, 7, 33):
        x = torch.randn(batch, 4, device=device)
        if kind == "a choice":
            x[:, 0] = -1  # the first choice is the base itself
        if kind == "an arm":
            x[:, 2] = 1  # all take the arm that returns a view
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


class Branches(nn.Module):
    """A residual branch behind a choice, on a stem's result or on the input itself; `after` reads what it was given."""

    def __init__(self, stem, after):
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1) if stem else nn.Identity()
        self.branch, self.other = (
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)
        )
        self.after = after

    def forward(self, x):
        h = self.stem(x)
        keep = x[:, 0, 0, 0] > 0
        y = dc.select(keep, self.branch(h) + h, h)
        return self.after(self, keep, y, h)


BRANCHES = {
    "unread": lambda m, keep, y, h: y,
    "read later": lambda m, keep, y, h: y * h,
    "another's arm": lambda m, keep, y, h: y + dc.select(keep, h, h * 2),
    "chosen inside": lambda m, keep, y, h: dc.select(
        y[:, 1, 0, 0] > 0, dc.select(y[:, 2, 0, 0] > 0, m.other(y) + y, y), y
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("after", "stem"), [*((name, True) for name in BRANCHES), ("another's arm", False)])
def test_a_branch_is_added_to_what_nobody_reads_later(after, stem, device):
    torch.manual_seed(0)
    example = torch.randn(2, 4, 5, 5, device=device)
    model, fast = lowered(Branches(stem, BRANCHES[after]), device, (example,), "inductor")
    for batch in (1, 2, 7, 7, 33):
        for sign in (0, 1, -1):
            x = torch.randn(batch, 4, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
            if sign:
                x[:, 0] = x[:, 0].abs() * sign  # all take one arm: it runs on the values themselves
            kept = x.clone()
            with torch.no_grad():
                torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(x, kept)
    if device.type == "cpu":
        assert any(any(segment.overwrites) for segment in fast.segments.values())
    if stem and device.type == "cpu" and after in ("unread", "chosen inside"):
        assert ".clone()" not in fast.source


class Transposed(nn.Module):
    """A value that lies transposed, of which an arm returns a view once it is laid out in order."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(36, 36)

    def forward(self, x):
        h = self.first(x).transpose(1, 2)
        y = dc.select(x[:, 0, 0] > 0, h.flatten(1), self.second(h.flatten(1)))
        z = dc.select(y[:, 0] > 0, self.second(y).tanh(), y)
        return z.unflatten(1, (6, 6)) * h


@pytest.mark.slow
def test_a_view_of_what_was_laid_out_in_order_is_not_written_to(device):
    torch.manual_seed(0)
    model, fast = lowered(Transposed(), device, (torch.randn(4, 6, 6, device=device),), "inductor")
    for batch in (1, 4, 9):
        for sign in (1, -1):
            x = torch.randn(batch, 6, 6, device=device).abs() * sign
            with torch.no_grad():
                torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class LookedAt(nn.Module):
    """What a gate sees by a convolution, which compilers move behind the branch whose result is gated next."""

    def __init__(self):
        super().__init__()
        self.stem, *rest = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.early, self.look, self.last, *branch = rest
        self.branch = nn.Sequential(branch[0], nn.ReLU(), branch[1])

    def forward(self, x):
        h = self.stem(x)
        h = dc.select(h[:, 0, 0, 0] > 0, self.early(h).relu(), h)
        seen = self.look(h)
        total = h + self.branch(h)
        return dc.select(seen.relu()[:, 0, 3, 3] > 0.1, self.last(total).tanh(), total)


@pytest.mark.slow
def test_what_a_gate_looks_at_is_not_written_to(device):
    torch.manual_seed(0)
    model, fast = lowered(LookedAt(), device, (torch.randn(4, 8, 6, 6, device=device),), "inductor")
    for batch in (1, 4, 64):
        x = torch.randn(batch, 8, 6, 6, device=device)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


class Laid(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values, self.layer = values, nn.Linear(4, 4)

    def forward(self, x):
        h = self.values(x)
        return dc.select(x[:, 0, 0, 0] > 0, self.layer(h), h)


@pytest.mark.parametrize(
    "values",
    [lambda x: x.permute(0, 2, 3, 1).contiguous(), lambda x: (x * 2).flatten(2).unfold(2, 4, 2)],
    ids=["copied in one layout only", "overlapping"],
)
def test_the_layout_of_an_input_decides_nothing(values, device):
    torch.manual_seed(0)
    model, fast = lowered(Laid(values), device, (torch.randn(2, 4, 3, 3, device=device),))
    for batch in (2, 7):
        x = torch.randn(batch, 4, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
        kept = x.clone()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(x, kept)


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


def test_activations_behind_more_selects_than_python_recurses():
    graph = fx.Graph()
    x, decision = graph.placeholder("x"), graph.placeholder("decision")
    value = graph.call_function(torch.relu, (x,))
    for _ in range(1500):
        chosen = graph.call_function(SELECT, (decision, graph.call_function(torch.neg, (value,)), value))
        value = graph.call_function(torch.relu, (chosen,))
    graph.output((value,))
    absorb_activations(graph, nn.Module())
    last = graph.output_node().args[0][0]
    assert last.target is SELECT
    assert last.args[1].target is torch.relu
    assert sum(node.target is SELECT for node in graph.nodes) == 1500
