"""Running statistics behind gates are those of the samples that get there."""

import copy

import pytest
import torch
from gating import Rows, Toy
from torch import nn

import dyncompile as dc
from dyncompile.errors import DataError
from dyncompile.training import recalibrate_norms

X = torch.randn(50, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1
Y = torch.zeros(50, dtype=torch.int64)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


def make(blocks=2):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, padding=1), *(Residual() for _ in range(blocks))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


@pytest.fixture
def dyn(device):
    return dc.dynamize(make().to(device), "layer_skip", example_inputs=X[:2].to(device))


class Bright(nn.Module):
    """Keeps what is brighter than a limit."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x, *_):
        return x.mean((1, 2, 3)) - self.limit


def gated(dyn, *limits):
    for gate, limit in zip(dyn.gates.values(), limits, strict=True):
        gate.policy, gate.standardise = Bright(limit), None
        gate.offset.zero_()
        gate.enabled.fill_(True)
    return dyn.eval()


def statistics(norm):
    return norm.running_mean.cpu(), norm.running_var.cpu()


def by_hand(values):
    """Mean and unbiased variance of `[M, C, H, W]`."""
    flat = values.double().movedim(1, 0).flatten(1)
    return flat.mean(1).float(), flat.var(1).float()


def assert_statistics(norm, values):
    for found, expected in zip(statistics(norm), by_hand(values.cpu()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [50, 16, 7])
def test_a_norm_behind_a_gate_has_the_statistics_of_the_samples_let_in(dyn, device, batch_size):
    stem, block = dyn.get_submodule("0"), dyn.get_submodule("1")
    with torch.no_grad():
        features = stem(X.to(device))
        limit = features.mean((1, 2, 3)).median().item()
        kept = features.mean((1, 2, 3)) > limit
        seen, others = (block.conv(features[rows]) for rows in (kept, ~kept))
    gated(dyn, limit, -1e9)
    reached = recalibrate_norms(dyn, (X, Y), batch_size=batch_size)
    assert reached == {"1.norm": int(kept.sum()), "2.norm": 50}
    assert 20 < reached["1.norm"] < 30
    assert_statistics(block.norm, seen)
    assert (by_hand(others.cpu())[0] - statistics(block.norm)[0]).abs().max() > 0.05  # it makes a difference


def test_all_samples_may_count_behind_the_decisions_of_evaluation(dyn, device):
    stem, first, second = (dyn.get_submodule(str(i)) for i in range(3))
    gated(dyn, 0.0, 0.4)
    assert recalibrate_norms(dyn, (X, Y), batch_size=50, reaching=False) == {"1.norm": 50, "2.norm": 50}
    with torch.no_grad():
        x = stem(X.to(device))
        inner = first.conv(x)
        mean, var = inner.mean((0, 2, 3)), inner.var((0, 2, 3), unbiased=False)
        normal = (inner - mean[:, None, None]) / (var[:, None, None] + first.norm.eps).sqrt()
        kept = x.mean((1, 2, 3)) > 0.0
        mixed = torch.where(kept[:, None, None, None], x + normal.relu(), x)
    assert_statistics(first.norm, inner)
    assert_statistics(second.norm, second.conv(mixed))


def test_the_next_norm_sees_what_the_first_made_of_it(dyn, device):
    """In one batch: both norms in turn, each with its own samples, the second behind the first's select."""
    stem, first, second = (dyn.get_submodule(str(i)) for i in range(3))
    gated(dyn, 0.0, 0.4)
    recalibrate_norms(dyn, (X, Y), batch_size=50)
    with torch.no_grad():
        x = stem(X.to(device))
        kept = x.mean((1, 2, 3)) > 0.0
        inner = first.conv(x[kept])
        mean, var = inner.mean((0, 2, 3)), inner.var((0, 2, 3), unbiased=False)
        normal = (inner - mean[:, None, None]) / (var[:, None, None] + first.norm.eps).sqrt()
        mixed = x.clone()
        mixed[kept] = x[kept] + normal.relu()
        late = mixed.mean((1, 2, 3)) > 0.4
    assert 0 < kept.sum() < 50
    assert 0 < late.sum() < 50
    assert_statistics(first.norm, inner)
    assert_statistics(second.norm, second.conv(mixed[late]))


def test_in_evaluation_what_a_norm_lets_out_is_normal(dyn, device):
    """Joint training leaves statistics of all samples; afterwards they are those of evaluation."""
    gated(dyn, 0.0, 0.2)
    dyn.train()
    for _ in range(40):
        dyn(X.to(device))  # running statistics of every sample
    out = {}

    def record(name):
        def hook(module, inputs, output):
            out[name] = output

        return hook

    apart = []
    for recalibrated in (False, True):
        dyn.eval()
        if recalibrated:
            recalibrate_norms(dyn, (X, Y), batch_size=50)
        handle = dyn.get_submodule("1.norm").register_forward_hook(record("1"))
        trace = dyn.trace(X.to(device))
        handle.remove()
        let_in = out["1"][trace.decisions["gate0"]]
        apart.append(let_in.mean((0, 2, 3)).abs().max().item())
    assert apart[1] < 1e-4 < 0.05 < apart[0]


def test_a_norm_that_nobody_reaches_keeps_its_statistics(dyn, device):
    gated(dyn, 1e9, -1e9)
    before = [t.clone() for t in statistics(dyn.get_submodule("1.norm"))]
    reached = recalibrate_norms(dyn, (X, Y))
    assert reached["1.norm"] == 0
    for a, b in zip(before, statistics(dyn.get_submodule("1.norm")), strict=True):
        assert torch.equal(a, b)
    assert_statistics(dyn.get_submodule("2.norm"), dyn.get_submodule("2.conv")(dyn.get_submodule("0")(X.to(device))))


def test_batches_are_counted_and_modes_stay(dyn, device):
    gated(dyn, -1e9, -1e9)
    dyn.train()
    dyn.get_submodule("1").eval()
    modes = [m.training for m in dyn.modules()]
    assert recalibrate_norms(dyn, (X, Y), batch_size=8, batches=3) == {"1.norm": 24, "2.norm": 24}
    assert [m.training for m in dyn.modules()] == modes
    assert not any(m._forward_pre_hooks for m in dyn.modules())
    with pytest.raises(DataError, match="`data`: found no samples"):
        recalibrate_norms(dyn, (X[:0], Y[:0]))


def test_disabled_gates_let_everyone_in(dyn, device):
    """Then it is the static model's own re-estimation."""
    static = copy.deepcopy(dyn.static()).train()
    for norm in (static[1].norm, static[2].norm):
        norm.reset_running_stats()
        norm.momentum = None
    static(X.to(device))
    recalibrate_norms(dyn, (X, Y), batch_size=50)
    for i in (1, 2):
        expected = statistics(static[i].norm)
        for a, b in zip(statistics(dyn.get_submodule(f"{i}.norm")), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_behind_an_exit_come_those_who_stay(device):
    dyn = dc.dynamize(make().to(device), "early_exit", exits=["1"], example_inputs=X[:2].to(device)).eval()
    recalibrate_norms(dyn, (X, Y), batch_size=50)  # so that the first norm, and with it the exit, stay as they are
    exit_ = dyn.exits["exit0"]
    exit_.enabled.fill_(True)
    exit_.threshold.copy_(dyn.trace(X.to(device)).confidence["exit0"].median())
    left = dyn.trace(X.to(device)).decisions["exit0"]
    reached = recalibrate_norms(dyn, (X, Y), batch_size=50)
    assert reached["1.norm"] == 50
    assert reached["2.norm"] == pytest.approx(int((~left).sum()), abs=2)
    assert 20 < reached["2.norm"] < 30


def test_routes_and_rows(device):
    """An arm's norm sees the samples routed to it, a norm over rows (tokens, frames) the rows of its decision."""
    x = torch.randn(40, 3, 4).to(device)
    dyn = dc.dynamize(Rows().to(device), Toy(), example_inputs=x[:2]).eval()
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    reached = recalibrate_norms(dyn, (x, torch.zeros(40, dtype=torch.int64)), batch_size=40)
    rows = x.flatten(0, 1)
    let_in = rows[:, 0] > 0
    assert reached["rows"] == int(let_in.sum())
    assert_statistics(dyn.get_submodule("rows"), rows[let_in])
    trace = dyn.trace(x)
    assert torch.equal(trace.decisions["rows"].flatten(), let_in)
    assert 5 < reached["large"] < 35
    normal = (rows[let_in] - rows[let_in].mean(0)) / (rows[let_in].var(0, unbiased=False) + 1e-5).sqrt()
    mixed = rows.clone()
    mixed[let_in] = normal
    summed = mixed.unflatten(0, (40, 3)).sum(1)
    assert reached["large"] == int((summed[:, 0] > 0).sum())
    assert_statistics(dyn.get_submodule("large"), summed[summed[:, 0] > 0])
