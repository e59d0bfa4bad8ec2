"""Calibration of real dynamic models: what it sets, what it says, what it refuses."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.calibration import calibrate, excess_error
from dyncompile.calibration.temperature import (
    TEMPERATURES,
    fit_temperatures,
    negative_log_likelihood,
)
from dyncompile.errors import (
    ArgumentError,
    CalibrationError,
    DataError,
    UnreachableTargetError,
)


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, width in ((1, 8), (8, 16), (16, 32), (32, 32)):
        stride = 2 if width == 16 else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def digits(device):
    """A dynamic model trained on digits for a few seconds, and data it has not seen."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs sklearn")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    dyn = dc.dynamize(convolutional(), "early_exit", example_inputs=x[:2], exits=3).to(device)
    dyn.train()
    optimiser = torch.optim.Adam(dyn.parameters(), 3e-3)
    for _ in range(10):
        for batch, target in zip(x[:600].split(50), y[:600].split(50), strict=True):
            trace = dyn.trace(batch.to(device))
            predictions = (*trace.exits.values(), trace.final)
            loss = sum(F.cross_entropy(p, target.to(device)) for p in predictions)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return dyn.eval(), (x[600:], y[600:])


@pytest.fixture
def untrained():
    """A dynamic model and data for which every kind of refusal can be had in no time."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3)
    )
    dyn = dc.dynamize(model, "early_exit", example_inputs=torch.zeros(2, 8), exits=2)
    return dyn, (torch.randn(600, 8), torch.randint(0, 3, (600,)))


def settings(dyn):
    return {name: buffer.clone() for name, buffer in dyn.state_dict().items()}


def assert_unchanged(dyn, before):
    assert all(torch.equal(value, before[name]) for name, value in dyn.state_dict().items())


def assert_exact(result, dyn, inputs, targets, device):
    """What was reckoned from scores is what the model does, on the very samples."""
    with torch.no_grad():
        trace = dyn.eval().trace(inputs.to(device))
    assert float(trace.cost.mean()) == pytest.approx(result.cost, abs=1e-5)
    left = torch.zeros(len(inputs), dtype=torch.bool, device=device)
    for setting in result.exits:
        leaves = trace.decisions[setting.name] & ~left
        assert float(leaves.double().mean()) == pytest.approx(setting.share, abs=1e-9)
        left |= leaves
    if result.accuracy is not None and targets.ndim == 1:
        right = trace.output.argmax(1).cpu() == targets
        assert float(right.double().mean()) == pytest.approx(result.accuracy)
        lost = (trace.final.argmax(1).cpu() == targets) & ~right
        assert float(lost.double().mean()) == pytest.approx(result.risk)


@pytest.mark.parametrize("method", ["ltt", "ucb", "greedy"])
def test_calibrates_digits(digits, method):
    dyn, data = digits
    result = calibrate(dyn, data, max_drop=0.02, confidence=0.9, method=method)
    assert result.cost < 0.5
    assert result.risk <= 0.02
    assert result.static_accuracy - result.accuracy <= result.risk
    assert result.bound == (None if method == "greedy" else 0.02)
    for setting in result.exits:
        module = dyn.exits[setting.name]
        assert float(module.threshold) == np.float32(setting.threshold)
        assert float(module.temperature) == np.float32(setting.temperature)
        assert bool(module.enabled) == setting.enabled
        assert 0 <= setting.threshold <= 1
    assert list(dyn.exit_costs().values()) == [part.cost for part in (*result.exits, result.final) if part.enabled]


@pytest.mark.parametrize("criterion", ["max_softmax", "margin", "entropy", "patience"])
def test_reckoned_is_what_the_model_does(digits, device, criterion):
    dyn, (x, y) = digits
    model = dc.dynamize(dyn.static().cpu(), "early_exit", example_inputs=x[:2], exits=3, criterion=criterion)
    model.load_state_dict(dyn.state_dict())
    model.to(device)
    result = calibrate(model, (x, y), max_drop=0.03, method="greedy")
    assert_exact(result, model, x, y, device)
    assert result.cost < 1


def test_budget(digits, device):
    dyn, (x, y) = digits
    result = calibrate(dyn, (x, y), max_cost=0.3)
    assert result.cost <= 0.3
    assert result.risk <= result.bound < 0.05
    assert result.max_drop is None
    both = calibrate(dyn, (x, y), max_drop=0.05, max_cost=0.5)
    assert both.cost <= 0.5
    assert both.bound == 0.05
    before = settings(dyn)
    with pytest.raises(UnreachableTargetError, match="best reachable is max_cost"):
        calibrate(dyn, (x, y), max_drop=0.02, max_cost=0.02, confidence=0.9)
    assert_unchanged(dyn, before)


def test_cost_in_measured_time(untrained):
    dyn, data = untrained
    result = calibrate(dyn, data, max_drop=0.9, confidence=0.9, unit="time")
    assert result.unit == "time"
    assert list(dyn.exit_costs(unit="time").values()) == [
        part.cost for part in (*result.exits, result.final) if part.enabled
    ]
    assert list(dyn.exit_costs(unit="flops").values()) != list(dyn.exit_costs(unit="time").values())
    with pytest.raises(ArgumentError, match="`unit`: found 's'; expected 'flops' or 'time'"):
        dyn.exit_costs(unit="s")


def test_same_seed_same_result(digits):
    dyn, data = digits
    first = calibrate(dyn, data, max_drop=0.03, seed=3)
    assert calibrate(dyn, data, max_drop=0.03, seed=3) == first


def test_other_risks(digits):
    dyn, data = digits
    drop = calibrate(dyn, data, max_drop=0.03, method="greedy")
    differ = calibrate(dyn, data, max_drop=0.03, method="greedy", risk="disagreement")
    assert differ.cost >= drop.cost  # whoever differs where the static model is wrong counts too

    def brier(prediction, targets, final):
        wanted = F.one_hot(targets, prediction.shape[1])
        return (prediction.softmax(1) - wanted).square().sum(1) / 2

    own = calibrate(dyn, data, max_drop=0.15, confidence=0.9, risk=brier)
    assert own.cost < 1
    assert 0 < own.risk <= 0.15 == own.bound


def test_data_may_come_as_a_loader_and_in_any_batches(digits):
    dyn, (x, y) = digits
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=100)
    results = [
        calibrate(dyn, loader, max_drop=0.03),
        calibrate(dyn, dataset, max_drop=0.03, batch_size=100),
        calibrate(dyn, (x.numpy(), y.numpy()), max_drop=0.03, batch_size=100),
    ]
    assert results[0] == results[1] == results[2]


def test_model_is_left_in_its_mode(digits):
    dyn, data = digits
    dyn.train()
    first = next(iter(dyn.children())).eval()
    statistics = {k: v.clone() for k, v in dyn.state_dict().items() if "running" in k}
    modes = [module.training for module in dyn.modules()]
    calibrate(dyn, data, max_drop=0.05)
    assert [module.training for module in dyn.modules()] == modes
    assert not first.training
    assert all(torch.equal(dyn.state_dict()[k], v) for k, v in statistics.items())
    dyn.eval()


def test_dense_predictions(device):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 3, 1)
    )
    x = torch.randn(300, 1, 6, 6)
    y = torch.randint(0, 3, (300, 6, 6))
    y[:, 0] = -100
    y[:5] = -100  # samples without any label
    dyn = dc.dynamize(model, "early_exit", example_inputs=x[:2], exits=1).to(device)
    with pytest.warns(UserWarning, match="leaves out 5 samples without any label"):
        result = calibrate(dyn, (x, y), max_drop=0.3, method="greedy")
    x, y = x[5:], y[5:]
    assert_exact(result, dyn, x, y, device)
    with torch.no_grad():
        trace = dyn.trace(x.to(device))
    labelled = y != -100
    lost = (trace.final.argmax(1).cpu() == y) & (trace.output.argmax(1).cpu() != y) & labelled
    per_sample = lost.sum((1, 2)) / labelled.sum((1, 2))
    assert result.risk == pytest.approx(float(per_sample.mean()), abs=1e-6)
    assert calibrate(dyn, (x, y), max_drop=0.4, confidence=0.9).bound == 0.4


def test_unlabelled_samples_do_not_dilute_the_risk(untrained):
    dyn, (x, y) = untrained
    alone = calibrate(dyn, (x, y), max_cost=0.9, method="greedy")
    padded = torch.cat([y, torch.full((600,), -100)])
    with pytest.warns(UserWarning, match="leaves out 600 samples"):
        beside = calibrate(dyn, (torch.cat([x, x]), padded), max_cost=0.9, method="greedy")
    assert (beside.risk, beside.accuracy, beside.cost) == (alone.risk, alone.accuracy, alone.cost)


def test_regression(device):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 1)
    )
    x = torch.randn(400, 4)
    y = x.sum(1, keepdim=True)
    dyn = dc.dynamize(model, "early_exit", example_inputs=x[:2], exits=1).to(device)
    assert dyn.task == "regression"
    result = calibrate(dyn, (x, y), max_drop=0.2, confidence=0.9, risk=excess_error(scale=10.0))
    assert result.accuracy is None
    assert result.temperatures == {"exit0": 1.0}
    assert result.cost < 1
    greedy = calibrate(dyn, (x, y), max_drop=0.2, method="greedy", risk=excess_error(scale=10.0))
    assert_exact(greedy, dyn, x, y, device)
    with pytest.raises(ArgumentError, match="excess_error"):
        calibrate(dyn, (x, y))
    with pytest.raises(DataError, match=r"`data`: found targets \[64, 4\] for predictions \[64, 1\]"):
        calibrate(dyn, (x, x), max_drop=0.2, risk=excess_error(scale=10.0))
    with pytest.raises(ArgumentError, match="`risk`: found one that stops: .*; expected a loss that is called with"):
        calibrate(dyn, (x, y), risk=lambda prediction: prediction)
    with pytest.raises(ArgumentError, match="`seed`: found -1"):
        calibrate(dyn, (x, y), risk=excess_error(scale=10.0), seed=-1)
    with pytest.raises(ArgumentError, match="`dyn`: found a Sequential; expected a dynamic model"):
        greedy.apply(model)


def test_temperature_is_the_likeliest():
    """Logits that are 2.3 times too large: the grid's answer is the optimiser's, to half a step."""
    optimize = pytest.importorskip("scipy.optimize", reason="needs scipy")
    torch.manual_seed(0)
    honest = 2 * torch.randn(4000, 5)
    labels = torch.distributions.Categorical(logits=honest).sample()
    nll = [negative_log_likelihood(2.3 * honest, labels, t) for t in TEMPERATURES]
    fitted = TEMPERATURES[int(fit_temperatures(torch.stack(nll, 1)[:, None].numpy())[0])]
    best = optimize.minimize_scalar(
        lambda log: float(F.cross_entropy(2.3 * honest / math.exp(log), labels)), bounds=(-2, 3)
    )
    assert fitted == pytest.approx(math.exp(best.x), rel=0.08)
    assert fitted == pytest.approx(2.3, rel=0.1)


def test_result_prints_plots_and_serialises(digits, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.figure", reason="needs matplotlib")
    dyn, data = digits
    result = calibrate(dyn, data, max_drop=0.02, confidence=0.9)
    text = str(result)
    for part in ("exit0", "exit1", "exit2", "final", "risk <= 0.02", "with probability 0.9"):
        assert part in text
    assert f"{result.cost:.3f}" in text
    assert json.loads(json.dumps(result.to_dict()))["cost"] == result.cost
    result.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    axes = matplotlib.Figure().add_subplot()
    assert result.plot(axes) is axes
    chosen = axes.lines[-1]
    assert chosen.get_xdata()[0] == result.cost
    assert chosen.get_ydata()[0] == result.accuracy


def test_apply_to_another_copy_and_its_refusals(digits, untrained):
    dyn, data = digits
    result = calibrate(dyn, data, max_drop=0.05)
    after = settings(dyn)
    for module in dyn.exits.values():
        module.threshold.fill_(0.123)
        module.enabled.fill_(False)
    result.apply(dyn)
    assert_unchanged(dyn, after)
    for change, match in (
        ({"threshold": 1.5}, r"threshold of exit2.*1\.5.*\[0, 1\]"),
        ({"threshold": -0.1}, "threshold of exit2"),
        ({"threshold": math.nan}, "threshold of exit2"),
        ({"temperature": 0.0}, "temperature of exit2"),
    ):
        wrong = dataclasses.replace(result.exits[-1], **change)
        with pytest.raises(ArgumentError, match=match):
            dataclasses.replace(result, exits=(*result.exits[:-1], wrong)).apply(dyn)
        assert_unchanged(dyn, after)
    with pytest.raises(ArgumentError, match="exit0, exit1, exit2"):
        result.apply(untrained[0])


def test_refuses_a_model_without_exits():
    with pytest.raises(ArgumentError, match="without exits"):
        calibrate(nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_drop": 0.0}, ArgumentError, "max_drop"),
        ({"max_drop": "a"}, ArgumentError, "`max_drop`: found 'a'; expected a number"),
        ({"confidence": None}, ArgumentError, "`confidence`: found None; expected a number"),
        ({"device": "foo"}, ArgumentError, "`device`: found 'foo'"),
        ({"max_drop": 1.5}, ArgumentError, "max_drop"),
        ({"max_cost": 0.0}, ArgumentError, "max_cost"),
        ({"confidence": 1.0}, ArgumentError, "confidence"),
        ({"method": "bayes"}, ArgumentError, "ltt, ucb, greedy"),
        ({"unit": "joules"}, ArgumentError, "unit"),
        ({"risk": "regret"}, ArgumentError, "accuracy_drop, disagreement"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"max_drop": 0.001}, CalibrationError, "at least 4278 are needed"),
        ({"max_cost": 1e-6}, UnreachableTargetError, "best reachable is max_cost"),
        ({"risk": lambda p, y, f: torch.zeros(1)}, ArgumentError, "one loss per sample"),
        ({"risk": lambda p, y, f: 2 + p[:, 0].abs()}, ArgumentError, "outside"),
        ({"risk": lambda p, y, f: p[:, 0] * math.nan}, ArgumentError, "NaN"),
        ({"risk": lambda p, y, f: 0.5}, ArgumentError, "float"),
    ],
)
def test_refusals_leave_the_model_as_it_was(untrained, options, error, match):
    dyn, data = untrained
    dyn.train()
    before = settings(dyn)
    with pytest.raises(error, match=match):
        calibrate(dyn, data, **options)
    assert_unchanged(dyn, before)
    assert dyn.training


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, y: (x[:0], y[:0]), "no samples|empty"),
        (lambda x, y: (x * math.nan, y), "NaN"),
        (lambda x, y: (x, torch.full_like(y, -100)), "600 samples without any label"),
        (lambda x, y: (x, y + 1), "labels from 1 to 3"),
        (lambda x, y: (x, y - 1), "labels from -1 to 1"),
        (lambda x, y: (x, y.float()), "integer labels"),
        (lambda x, y: (x, y[:, None]), "shape"),
        (lambda x, y: (x[:-1], y), "length"),
        (lambda x, y: x, "pair"),
    ],
)
def test_refuses_bad_data(untrained, change, match):
    dyn, (x, y) = untrained
    before = settings(dyn)
    with pytest.raises(DataError, match=match):
        calibrate(dyn, change(x, y))
    assert_unchanged(dyn, before)


def test_refuses_a_model_that_gives_nan_and_a_criterion_out_of_range(untrained):
    dyn, data = untrained
    with torch.no_grad():
        next(dyn.exits["exit0"].parameters()).fill_(math.nan)
    with pytest.raises(CalibrationError, match="'exit0' is NaN"):
        calibrate(dyn, data)
    with torch.no_grad():
        next(dyn.exits["exit0"].parameters()).fill_(1.0)
    dyn.exits["exit0"].criterion = lambda logits, earlier: 1 + logits[:, 0].abs()
    with pytest.raises(CalibrationError, match="criterion"):
        calibrate(dyn, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(untrained, dtype):
    dyn, (x, y) = untrained
    dyn.to(dtype)
    result = calibrate(dyn, (x.to(dtype), y), max_drop=0.3, method="greedy")
    assert_exact(result, dyn, x.to(dtype), y, torch.device("cpu"))
