"""Knobs of gates: their groups, and the grid of biases that is tried."""

import numpy as np
import pytest
import torch
from calibrating import Network, assert_unchanged, gated, settings_of
from torch import nn

import dyncompile as dc
from dyncompile.calibration.knobs import OPEN, gate_groups, grid, spread, turned


@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_biases_spread_the_cost_evenly(scale):
    logits = np.sort(scale * np.random.default_rng(0).normal(size=5000))
    biases = spread(lambda bias: 0.2 + 0.8 * float((logits + bias > 0).mean()), 7)
    costs = [0.2 + 0.8 * float((logits + bias > 0).mean()) for bias in biases]
    assert costs[0] == 0.2
    assert 6 <= len(biases) <= 7  # 0 is left out, which is tried anyway
    wanted = 0.2 + 0.8 * np.arange(7) / 7
    assert max(min(abs(cost - w) for w in wanted) for cost in costs) < 0.06


def test_gates_that_do_not_listen_get_no_biases():
    assert spread(lambda bias: 0.5, 7) == []


def test_groups_are_the_gates_of_one_pass():
    both, _ = gated(["layer_skip", "neuron_gate"])
    groups = gate_groups(both)
    assert set(groups) == {"layer_skip", "neuron_gate"}
    assert sorted(name for names in groups.values() for name in names) == sorted(both.gates)
    assert gate_groups(gated("block_policy")[0]) == {"block_policy": ("policy",)}
    assert gate_groups(dc.dynamize(Network(), "early_exit", example_inputs=torch.zeros(2, 8))) == {}


def test_norms_of_narrow_arms_are_no_gates_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    dyn = dc.dynamize(model, "channel_gate", example_inputs=torch.zeros(2, 8))
    assert any(node.target.startswith("gates.width0.") for node in dyn.graph.fx.nodes if node.op == "call_module")
    assert gate_groups(dyn) == {"channel_gate": ("width0",)}


@pytest.mark.parametrize(
    ("strategy", "most"), [("layer_skip", 12), ("block_policy", 12), (["layer_skip", "neuron_gate"], 25)]
)
def test_grid_spans_open_as_trained_and_closed(strategy, most):
    dyn, (x, _) = gated(strategy)
    groups = gate_groups(dyn)
    before = settings_of(dyn)
    chosen = torch.rand(len(x)) < 0.3
    with torch.no_grad():
        found = grid(dyn, groups, [(x, chosen)], torch.device("cpu"))
    assert_unchanged(dyn, before)
    assert found[:2] == [(OPEN,) * len(groups), (0.0,) * len(groups)]
    assert len(groups) * 3 <= len(found) == len(set(found)) <= most
    with torch.no_grad():
        costs = []
        for knobs in found:
            with turned(dyn, groups, knobs):
                costs.append(float(dyn.trace(x[chosen]).cost.mean()))
    assert costs[0] == pytest.approx(1.0)
    closed = min(costs)
    with turned(dyn, groups, (-OPEN,) * len(groups)), torch.no_grad():
        assert closed == pytest.approx(float(dyn.trace(x).cost.mean()))
    assert_unchanged(dyn, before)


def test_the_grid_runs_no_sample_that_may_be_held_out():
    dyn, (x, _) = gated()
    chosen = torch.zeros(len(x), dtype=torch.bool)
    chosen[[1, 4, 5]] = True
    sizes = []
    trace = dyn.trace
    dyn.trace = lambda *args: sizes.append(len(args[0])) or trace(*args)
    with torch.no_grad():
        grid(dyn, gate_groups(dyn), [(x, chosen), (x, torch.zeros_like(chosen))], torch.device("cpu"))
    assert set(sizes) == {3}


def test_the_grid_looks_at_no_sample_that_may_be_held_out():
    dyn, (x, _) = gated()
    groups, chosen = gate_groups(dyn), torch.rand(len(x)) < 0.3
    other = x.clone()
    other[~chosen] = 1e3 * torch.randn(int((~chosen).sum()), 8)
    with torch.no_grad():
        assert grid(dyn, groups, [(x, chosen)], torch.device("cpu")) == grid(
            dyn, groups, [(other, chosen)], torch.device("cpu")
        )
