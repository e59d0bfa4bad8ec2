"""Calibration of gates: the division of the data, what is reckoned and what is applied, and a trained model."""

import json
import math

import numpy as np
import pytest
import torch
from calibrating import assert_unchanged, gated, settings_of
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.calibration import calibrate
from dyncompile.calibration.knobs import OPEN, gate_groups
from dyncompile.calibration.target import Target, designed, split
from dyncompile.calibration.usage import Examples, work
from dyncompile.demo.datasets import load
from dyncompile.demo.models import ResNet
from dyncompile.errors import ArgumentError, CalibrationError, UnreachableTargetError

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
            kept.add([images[batch]], counted[batch])
        found.append(kept.of(np.arange(int(counted.sum()))))
    assert list(found[0]) == list(found[1])
    assert len(found[0]) == 40
    assert np.mean(list(found[0])) == pytest.approx(120, abs=30)
    shown = images[counted]
    assert all(np.array_equal(image, shown[i].numpy()) for i, image in found[0].items())
    large = Examples()
    large.add([torch.rand(2, 3, 200, 100)], torch.ones(2, dtype=torch.bool))
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
