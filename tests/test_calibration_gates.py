"""Calibration of gates: knobs, their grid, the guarantee over knobs and thresholds together, and a trained model."""

import json
import math

import numpy as np
import pytest
import torch
from test_calibration_search import pool
from torch import nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.calibration import calibrate
from dyncompile.calibration.certify import Scores, Setting, Target, choose_among, designed, split
from dyncompile.calibration.knobs import OPEN, gate_groups, grid, spread, turned
from dyncompile.calibration.usage import Examples, work
from dyncompile.demo.datasets import load
from dyncompile.demo.models import ResNet
from dyncompile.errors import ArgumentError, CalibrationError, UnreachableTargetError

POOL, SAMPLES, LIMIT, DELTA, SPLITS = 20_000, 500, 0.05, 0.1, 200
BIASES = (OPEN, 0.0, -2.0, -1.0, -0.5, 0.5, 1.0)


def gated_pool(samples, exits, seed=0, blocks=6):
    """Scores and costs at every knob: gates skip blocks that hard samples need, each skip with luck of its own."""
    generator = np.random.default_rng(seed)
    confidence, losses = pool(samples, exits, seed=seed) if exits else (np.zeros((samples, 0), np.float32), None)
    need = generator.normal(size=(samples, blocks))
    found = []
    for bias in BIASES:
        opened = need + bias > 0
        missing = (np.maximum(need + 1.5, 0) * ~opened).sum(1)
        lost = generator.random(samples) < 1 - np.exp(-0.03 * missing)
        at_end = lost.astype(float)[:, None]
        both = at_end if losses is None else np.maximum(losses, at_end * (generator.random((samples, exits + 1)) < 0.5))
        both[:, -1:] = at_end
        shown = (confidence - 0.02 * missing[:, None]).clip(0, 1).astype(np.float32)
        found.append((bias, shown, both, opened))
    return found


def costs_by_sample(opened, bias, enabled, head=0.02, gate=0.003):
    """A stem, then blocks, exits between them; cost of leaving at each exit and at the end, `[N, E + 1]`."""
    blocks, exits = opened.shape[1], len(enabled)
    work = np.cumsum(opened * (0.9 / blocks) + (gate if bias < OPEN else 0), axis=1)
    ends = [math.ceil(blocks * (i + 1) / (exits + 1)) - 1 for i in range(exits + 1)]
    return 0.1 + work[:, ends] + head * np.cumsum([*enabled, False])


def settings(found, rows):
    made = []
    for bias, confidence, losses, opened in found:
        scores = Scores(
            exits=tuple(f"exit{i}" for i in range(confidence.shape[1])),
            confidence=confidence[rows],
            losses=losses[rows],
            correct=1 - losses[rows],
            binary=True,
        )

        def cost_of(enabled, opened=opened[rows], bias=bias):
            return costs_by_sample(opened, bias, enabled)

        made.append(Setting(scores=scores, cost_of=cost_of, knobs=(bias,)))
    return made


def outcome(calibration, index, found, rows):
    """Mean loss and cost on other samples."""
    bias, confidence, losses, opened = (v[rows] if isinstance(v, np.ndarray) else v for v in found[index])
    thresholds = np.array(list(calibration.thresholds.values()), dtype=np.float32)
    enabled = tuple(calibration.enabled.values())
    fires = (confidence >= thresholds) & np.array(enabled, dtype=bool)
    leave = np.column_stack([fires, np.ones(len(fires), dtype=bool)]).argmax(1)
    at = np.arange(len(leave)), leave
    return losses[at].mean(), costs_by_sample(opened, bias, enabled)[at].mean()


def broken(exits, splits=SPLITS, **target):
    """Share of the splits after which the bound does not hold on the rest of the pool, the savings, how often gated."""
    found = gated_pool(POOL, exits, seed=7)
    goal = Target(confidence=1 - DELTA, **target)
    failures, savings, gated = 0, [], 0
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(POOL)
        ours, rest = order[:SAMPLES], order[SAMPLES:]
        seen = np.random.default_rng(seed).permutation(256)[: designed(256)]
        design, held_out = split(SAMPLES, goal, binary=True, seed=seed, seen=seen, among=256)
        try:
            result, index = choose_among(settings(found, ours), goal, design=design, held_out=held_out)
        except UnreachableTargetError:
            continue
        risk, cost = outcome(result, index, found, rest)
        failures += risk > (LIMIT if result.bound is None else result.bound)
        savings.append(1 - cost)
        gated += index != 0
    return failures / splits, float(np.mean(savings)), gated / splits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exits", "splits", "target"),
    [
        (0, SPLITS, {"max_drop": LIMIT, "method": "ltt"}),
        (0, SPLITS, {"max_drop": LIMIT, "method": "ucb"}),
        (2, SPLITS, {"max_drop": LIMIT, "method": "ltt"}),
        (0, SPLITS, {"max_cost": 0.7}),
        (2, 60, {"max_cost": 0.6}),
    ],
)
def test_guarantee_holds_on_random_splits_of_a_gated_model(exits, splits, target):
    share, saving, gated = broken(exits, splits, **target)
    assert share <= DELTA
    assert saving > 0.15
    assert gated > 0.5  # it does not hold by leaving gates open


@pytest.mark.slow
def test_greedy_breaks_what_the_guarantee_holds_for_gates():
    share, _, _ = broken(2, 60, max_drop=LIMIT, method="greedy")
    assert share > 3 * DELTA


def test_gates_and_exits_together_beat_either():
    found = gated_pool(6000, 3)
    goal = Target(max_drop=0.05)
    design, held_out = split(6000, goal, binary=True, seed=0)
    made = settings(found, np.arange(6000))

    def cheapest(chosen):
        return choose_among(chosen, goal, design=design, held_out=held_out)[0].cost

    exits, both = cheapest(made[:1]), cheapest(made)
    knobs = [Setting(scores=without_exits(s), cost_of=ends_of(s), knobs=s.knobs) for s in made]
    gates = cheapest(knobs)
    assert both < min(exits, gates) - 0.02


def without_exits(setting):
    scores = setting.scores
    none = np.zeros((len(scores.losses), 0), dtype=np.float32)
    return Scores(exits=(), confidence=none, losses=scores.losses[:, -1:], binary=True)


def ends_of(setting):
    exits = len(setting.scores.exits)
    return lambda enabled: setting.cost_of((False,) * exits)[:, -1:]


def test_shares_and_costs_add_up():
    found = gated_pool(3000, 3)
    goal = Target(max_drop=0.05)
    design, held_out = split(3000, goal, binary=True, seed=0)
    result, index = choose_among(settings(found, np.arange(3000)), goal, design=design, held_out=held_out)
    parts = [*result.exits, result.final]
    assert sum(part.share * part.cost for part in parts if part.enabled) == pytest.approx(result.cost)
    risk, cost = outcome(result, index, found, held_out)
    assert (risk, cost) == (pytest.approx(result.risk), pytest.approx(result.cost))
    assert result.cost == min(point.cost for point in result.frontier if point.certified)
    assert result.frontier[0].cost > result.frontier[-1].cost


def test_nothing_certified_says_what_is_reachable_and_a_budget_of_one_takes_the_static_model():
    found = gated_pool(2000, 0)
    found = [(bias, c, losses if bias == OPEN else np.ones_like(losses), o) for bias, c, losses, o in found]
    made = settings(found, np.arange(2000))
    goal = Target(max_drop=0.05)
    design, held_out = split(2000, goal, binary=True, seed=0)
    with pytest.raises(UnreachableTargetError, match="no knobs that save anything keep the risk.*max_drop=1"):
        choose_among(made, goal, design=design, held_out=held_out)
    result, index = choose_among(made, Target(max_cost=1.0), design=design, held_out=held_out)
    assert (index, result.cost, result.risk) == (0, pytest.approx(1.0), 0.0)
    dear = [Setting(scores=s.scores, cost_of=lambda on: np.ones((2000, 1)), knobs=s.knobs) for s in made]
    with pytest.raises(UnreachableTargetError, match="no gate saves anything"):
        choose_among(dear, goal, design=design, held_out=held_out)


# --- the division of the data --------------------------------------------------------------------


def test_samples_that_knobs_were_chosen_on_are_not_held_out_and_no_sample_is_favoured():
    goal = Target(max_cost=0.5)
    counts = np.zeros(600)
    for seed in range(300):
        seen = np.random.default_rng(seed).permutation(200)[: designed(200)]
        design, held_out = split(600, goal, binary=True, seed=seed, seen=seen, among=200)
        assert set(seen) <= set(design.tolist())
        assert sorted([*design, *held_out]) == list(range(600))
        assert len(design) == designed(600)
        counts[design] += 1
    assert counts[:200].mean() / 300 == pytest.approx(0.3, abs=0.01)
    assert counts[200:].mean() / 300 == pytest.approx(0.3, abs=0.01)
    assert not (np.diff(held_out) > 0).all()


# --- knobs ---------------------------------------------------------------------------------------


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


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.layers(x)


class Network(nn.Module):
    """Residual blocks on vectors."""

    def __init__(self, blocks=4, width=16, classes=3):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)))


def gated(strategy="layer_skip", *, enabled=True, seed=0, **options):
    """A model whose gates were switched on as if trained, and data."""
    torch.manual_seed(seed)
    dyn = dc.dynamize(Network(), strategy, example_inputs=torch.zeros(2, 8), **options)
    for gate in dyn.gates.values():
        for parameter in gate.parameters():  # untrained gates decide alike for all
            with torch.no_grad():
                parameter.add_(0.5 * torch.randn_like(parameter))
        gate.offset.fill_(0.0)
        gate.enabled.fill_(enabled)
    return dyn.eval(), (torch.randn(600, 8), torch.randint(0, 3, (600,)))


def settings_of(dyn):
    return {name: buffer.clone() for name, buffer in dyn.state_dict().items()}


def assert_unchanged(dyn, before):
    assert all(torch.equal(value, before[name]) for name, value in dyn.state_dict().items())


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


# --- calibrate -----------------------------------------------------------------------------------


def assert_exact(result, dyn, x, y):
    """What was reckoned from scores is what the model does, on the very samples."""
    with torch.no_grad():
        trace = dyn.eval().trace(x)
        static = dyn.static().eval()(x)
    assert float(trace.cost.mean()) == pytest.approx(result.cost, abs=1e-5)
    right = trace.output.argmax(1) == y
    assert float(right.double().mean()) == pytest.approx(result.accuracy)
    lost = (static.argmax(1) == y) & ~right
    assert float(lost.double().mean()) == pytest.approx(result.risk)
    assert float((static.argmax(1) == y).double().mean()) == pytest.approx(result.static_accuracy)


@pytest.mark.parametrize("cost", [0.97, 0.8, 0.5])
@pytest.mark.parametrize(
    "strategy",
    ["layer_skip", "block_policy", "neuron_gate", ["layer_skip", "early_exit"], ["block_policy", "early_exit"]],
)
def test_reckoned_is_what_the_model_does(strategy, cost):
    dyn, (x, y) = gated(strategy)
    result = calibrate(dyn, (x, y), max_cost=cost, method="greedy", progress=False)
    assert result.cost <= cost
    assert_exact(result, dyn, x, y)
    groups = gate_groups(dyn)
    assert list(result.knobs) == list(groups)
    for setting in result.gates:
        for name in setting.gates:
            assert float(dyn.gates[name].bias) == np.float32(setting.bias)
            assert bool(dyn.gates[name].enabled) is setting.enabled
    if strategy in ("layer_skip", "block_policy"):
        # Whether what gates control ran, from the lowered model's own count of rows.
        lowered = dc.lower(dyn, backend="eager", decline=False)
        lowered(x)
        for name, rate in result.gates[0].rates.items():
            assert rate == pytest.approx(lowered.last_run.get(name, 0) / len(x))


def test_what_ran_heeds_exits_and_outer_gates():
    dyn, (x, y) = gated(["layer_skip", "early_exit"])
    result = calibrate(dyn, (x, y), max_cost=0.5, method="greedy", progress=False)
    used = [name for name, on in result.enabled.items() if on]
    with torch.no_grad():
        trace = dyn.trace(x)
    decided = {name: value.numpy() for name, value in trace.decisions.items() if name not in dyn.exits}
    left = np.column_stack([trace.decisions[n].numpy() for n in dyn.exits] + [np.ones(len(x), dtype=bool)]).argmax(1)
    ran = work(dyn, decided, left, used)
    model = dyn.cost_model(used)
    total = np.zeros(len(x))
    for region, weight in zip(model.regions, model.weights, strict=True):
        steps = {unit.name: arm for unit, arm in region.guard}
        gates = [name for name in steps if name in ran]
        exits = [list(dyn.exits).index(name) for name in steps if name not in ran]
        needed = ran[gates[-1]] if gates else np.all([left != i for i in exits], axis=0) if exits else np.ones(len(x))
        total += weight * np.where(any(steps[n] for n in steps if n not in ran), left == (exits or [0])[-1], needed)
    assert total.mean() == pytest.approx(result.cost, abs=1e-4)


def test_other_losses_and_measured_time():
    dyn, (x, y) = gated()

    def brier(prediction, targets, final):
        return (prediction.softmax(1) - F.one_hot(targets, prediction.shape[1])).square().sum(1) / 2

    own = calibrate(dyn, (x, y), max_cost=0.7, risk=brier, progress=False)
    assert own.risk <= own.bound
    timed = calibrate(dyn, (x, y), max_cost=0.9, unit="time", method="greedy", progress=False)
    assert timed.unit == "time"
    with torch.no_grad():
        decisions = dyn.eval().trace(x).decisions
    assert float(dyn.cost_model(unit="time").expected(decisions).mean()) == pytest.approx(timed.cost, abs=1e-5)


def test_the_data_pass_once_and_in_any_batches():
    dyn, (x, y) = gated()
    dataset = torch.utils.data.TensorDataset(x, y)
    first = calibrate(dyn, (x, y), max_cost=0.7, progress=False)
    assert calibrate(dyn, dataset, max_cost=0.7, batch_size=64, progress=False) == first

    class Once(torch.utils.data.IterableDataset):
        passes = 0

        def __iter__(self):
            Once.passes += 1
            return iter(dataset)

    found = calibrate(dyn, torch.utils.data.DataLoader(Once(), batch_size=64), max_cost=0.7, progress=False)
    assert found == first
    assert Once.passes == 1


def test_gates_that_a_calibration_switched_off_can_be_calibrated_again():
    dyn, data = gated()
    opened = calibrate(dyn, data, max_cost=1.0, progress=False)
    assert opened.knobs == {"layer_skip": OPEN}
    assert not opened.gates[0].enabled
    assert opened.gates[0].rates == {}
    with torch.no_grad():
        assert torch.equal(dyn(data[0]), dyn.static()(data[0]))
    again = calibrate(dyn, data, max_cost=0.7, progress=False)
    assert again.gates[0].enabled
    assert all(bool(gate.enabled) for gate in dyn.gates.values())


def test_result_prints_serialises_and_applies():
    dyn, data = gated()
    result = calibrate(dyn, data, max_cost=0.7, progress=False)
    assert "layer_skip (4)" in str(result)
    assert result.gates[0].knob in str(result)
    again = json.loads(json.dumps(result.to_dict()))
    assert again["gates"][0]["bias"] == result.knobs["layer_skip"]
    after = settings_of(dyn)
    for gate in dyn.gates.values():
        gate.bias.fill_(7.0)
        gate.enabled.fill_(False)
    result.apply(dyn)
    assert_unchanged(dyn, after)
    other, _ = gated("block_policy")
    with pytest.raises(ArgumentError, match="found the gates block_policy: policy; expected layer_skip: gate0, gate1"):
        result.apply(other)
    both, data = gated(["layer_skip", "early_exit"])
    joint = calibrate(both, data, max_cost=0.7, progress=False)
    assert f"layer_skip: knob {joint.gates[0].knob}" in str(joint)


def test_refuses_untrained_gates_and_leaves_the_model_as_it_was():
    dyn, data = gated(enabled=False)
    before = settings_of(dyn)
    with pytest.raises(ArgumentError, match=r"gates of layer_skip \(gate0, .*\) that are switched off.*target_cost"):
        calibrate(dyn, data)
    assert_unchanged(dyn, before)
    dyn, data = gated()
    dyn.train()
    before = settings_of(dyn)
    for options, error in (
        ({"max_drop": 1e-3}, CalibrationError),
        ({"max_cost": 1e-3}, UnreachableTargetError),
        ({"max_cost": 0.7, "risk": lambda p, y, f: p[:, 0] * math.nan}, ArgumentError),
    ):
        with pytest.raises(error):
            calibrate(dyn, data, progress=False, **options)
        assert_unchanged(dyn, before)
        assert all(module.training for module in dyn.modules())


@pytest.mark.parametrize("training", [False, True])
def test_exits_are_calibrated_beside_gates_that_were_never_trained(training):
    both, data = gated(["layer_skip", "early_exit"], enabled=False)
    before = settings_of(both)
    both.train(training)
    with pytest.warns(UserWarning, match=r"leaves gates of layer_skip \(gate0, .*\) switched off.*target_cost"):
        result = calibrate(both, data, max_cost=0.6, progress=False)
    assert result.gates == ()
    assert any(result.enabled.values())
    assert_unchanged(both.gates, {k.removeprefix("gates."): v for k, v in before.items() if k.startswith("gates.")})
    for gate in both.gates.values():
        gate.enabled.fill_(True)
    with pytest.raises(ArgumentError, match="found the gates layer_skip: gate0"):
        result.apply(both)
    for gate in both.gates.values():
        gate.enabled.fill_(False)
    trace = both.eval().trace(data[0])
    assert result.cost == pytest.approx(float(trace.cost.mean()), abs=0.05)


def test_gates_of_a_pass_are_calibrated_beside_those_of_another_that_were_never_trained():
    both, data = gated(["layer_skip", "neuron_gate"])
    for name, gate in both.gates.items():
        gate.enabled.fill_(not name.startswith("neurons"))
    with pytest.warns(UserWarning, match="leaves gates of neuron_gate"):
        result = calibrate(both, data, max_cost=0.8, progress=False)
    assert [setting.name for setting in result.gates] == ["layer_skip"]
    assert not any(gate.enabled for name, gate in both.gates.items() if name.startswith("neurons"))


def test_examples_are_a_fair_sample_whatever_the_batches():
    images, counted = torch.rand(300, 1, 4, 4), torch.rand(300) > 0.2
    found = []
    for size in (300, 7):
        kept = Examples(count=40)
        for batch in torch.arange(300).split(size):
            kept.add(images[batch], counted[batch])
        found.append(kept.of(np.arange(int(counted.sum()))))
    assert list(found[0]) == list(found[1])
    assert len(found[0]) == 40
    assert np.mean(list(found[0])) == pytest.approx(120, abs=30)
    shown = images[counted]
    assert all(np.array_equal(image, shown[i].numpy()) for i, image in found[0].items())
    large = Examples()
    large.add(torch.rand(2, 3, 200, 100), torch.ones(2, dtype=torch.bool))
    assert large.of(np.arange(2))[0].shape == (3, 96, 48)


# --- a trained model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_network_with_gates_and_exits(needs):
    needs("sklearn")
    needs("lightning")
    digits = load("digits")
    torch.manual_seed(0)
    x, y = digits.train.tensors
    model = ResNet(14, width=8, in_channels=1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    dyn = dc.dynamize(model.eval(), ["layer_skip", "early_exit"], example_inputs=x[:2])
    dc.finetune(dyn, (x, y), epochs=20, mode="joint", target_cost=0.6, lr=5e-3, progress=False)
    result = calibrate(dyn, digits.calibration, max_drop=0.04, confidence=0.9, progress=False)
    assert result.cost < 0.75
    assert result.risk <= 0.04 == result.bound
    x, y = digits.calibration.tensors
    greedy = calibrate(dyn, (x, y), max_drop=0.02, method="greedy", progress=False)
    assert greedy.cost < 0.75
    fast = dc.lower(dyn, backend="eager", decline=False)
    with torch.no_grad():
        assert torch.equal(fast(x[:50]).argmax(1), dyn(x[:50]).argmax(1))
        trace = dyn.trace(x)
    assert float(trace.cost.mean()) == pytest.approx(greedy.cost, abs=1e-5)
    assert float((trace.output.argmax(1) == y).double().mean()) == pytest.approx(greedy.accuracy)
