"""Objectives of gates on traces made by hand, against formulas and priors."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from traces import LABELS, K, N, several_gates, traced

from dyncompile.errors import ArgumentError
from dyncompile.nn.gates import SPREAD, Standardise
from dyncompile.training import ActivationRate, BatchShaping, MinimumUsage
from dyncompile.training.gating import activation_rates, arm_shares, gate_probabilities


@pytest.fixture
def several():
    return several_gates()


def test_rates_are_means_and_relative_levels(several):
    rates = activation_rates(several)
    assert list(rates) == ["gate0", "gate1", "level", "block0", "block1", "tokens"]
    assert rates["gate0"].item() == pytest.approx(several.decisions["gate0"].mean().item())
    assert rates["tokens"].item() == pytest.approx(several.decisions["tokens"].mean().item())
    expected = (several.decisions["level"] @ torch.tensor([0.0, 0.5, 1.0])).mean().item()
    assert rates["level"].item() == pytest.approx(expected)
    hard = traced(
        {"a": torch.arange(N) % 3, "b": torch.arange(N) < 2},
        {"a": torch.rand(N, 3), "b": torch.rand(N)},
        {"a": "a", "b": "b"},
        {"a": 3},
    )
    found = {name: rate.item() for name, rate in activation_rates(hard).items()}
    assert found == {"a": pytest.approx(sum(i % 3 for i in range(N)) / 2 / N), "b": pytest.approx(2 / N)}


def test_every_decision_finds_its_probability(several):
    found = gate_probabilities(several)
    assert list(found) == list(activation_rates(several))
    assert torch.equal(found["block1"], several.probabilities["policy"][:, 1])
    assert torch.equal(found["level"], several.probabilities["level"])
    routes = torch.rand(N, 2, 3)
    pair = traced({"r0": routes[:, 0], "r1": routes[:, 1]}, {"p": routes}, {"r0": "p", "r1": "p"}, {"r0": 3, "r1": 3})
    assert torch.equal(gate_probabilities(pair)["r1"], routes[:, 1])
    hard = traced({"r0": torch.zeros(N).long()}, {"p": routes[:, :1]}, {"r0": "p"}, {"r0": 3})
    assert torch.equal(gate_probabilities(hard)["r0"], routes[:, 0])
    single = traced({"block0": torch.ones(N)}, {"policy": torch.rand(N, 1)}, {"block0": "policy"})
    assert torch.equal(gate_probabilities(single)["block0"], single.probabilities["policy"][:, 0])


def test_activation_rate_is_the_formula(several):
    rates = torch.stack(list(activation_rates(several).values()))
    loss = ActivationRate(target=0.3, weight=2.0)(several, LABELS)
    assert loss.item() == pytest.approx(2 * ((rates - 0.3) ** 2).mean().item(), rel=1e-5)
    loss = ActivationRate(target={"gate1": 0.9, "level": 0.2})(several, LABELS)
    expected = ((rates[1] - 0.9) ** 2 + (rates[2] - 0.2) ** 2) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert several.probabilities["gate1"].grad.abs().sum() > 0
    assert several.probabilities["gate0"].grad is None


@pytest.mark.parametrize("rate", [0.05, 0.95])
def test_activation_rate_pushes_to_its_target_from_both_sides(rate):
    p = torch.full((N,), rate, requires_grad=True)
    ActivationRate(target=0.5)(traced({"g": p}, {"g": p}, {"g": "g"}), LABELS).backward()
    assert (p.grad.sign() == math.copysign(1, rate - 0.5)).all()


@pytest.mark.parametrize(("target", "concentration"), [(0.6, 1.0), (0.3, 0.5), (0.5, 4.0)])
def test_batch_shaping_is_the_distance_of_cramer_and_von_mises(target, concentration):
    p = torch.rand(64).requires_grad_()
    trace = traced({"g": p}, {"g": p}, {"g": "g"})
    loss = BatchShaping(target=target, concentration=concentration, weight=3.0)(trace, LABELS)
    prior = stats.beta(target * concentration, (1 - target) * concentration)
    values = np.sort(p.detach().numpy().astype(float))
    expected = ((np.arange(1, 65) / 65 - prior.cdf(values)) ** 2).mean()
    assert loss.item() == pytest.approx(3 * expected, rel=1e-5)
    loss.backward()
    step = 1e-4
    for i in (0, 17, 63):
        nudged = p.detach().double().clone()
        nudged[i] += step
        cdf = prior.cdf(np.sort(nudged.numpy()))
        nudged[i] -= 2 * step
        less = prior.cdf(np.sort(nudged.numpy()))
        even = np.arange(1, 65) / 65
        slope = 3 * (((even - cdf) ** 2).mean() - ((even - less) ** 2).mean()) / (2 * step)
        assert p.grad[i].item() == pytest.approx(slope, rel=2e-2, abs=1e-5)


def test_batch_shaping_is_least_at_the_prior():
    prior = stats.beta(0.6, 0.4)
    quantiles = torch.tensor(prior.ppf(np.arange(1, 257) / 257)).float()
    losses = {}
    for name, p in (
        ("prior", quantiles),
        ("dead", torch.full((256,), 0.01)),
        ("always", torch.full((256,), 0.99)),
        ("undecided", torch.full((256,), 0.6)),
        ("too often", quantiles**0.2),
    ):
        losses[name] = BatchShaping(target=0.6)(traced({"g": p}, {"g": p}, {"g": "g"}), LABELS).item()
    assert losses["prior"] < 1e-6
    assert min(v for k, v in losses.items() if k != "prior") > 0.01


def test_in_an_interval_each_gate_keeps_its_own_rate():
    prior = {mean: torch.tensor(stats.beta(mean, 1 - mean).ppf(np.arange(1, 129) / 129)).float() for mean in (0.3, 0.7)}
    for mean, p in prior.items():
        trace = traced({"g": p}, {"g": p}, {"g": "g"})
        own = BatchShaping(target=(0.1, 0.9))(trace, LABELS).item()
        assert own == pytest.approx(BatchShaping(target=p.mean().item())(trace, LABELS).item())
        assert own < 1e-3
        outside = BatchShaping(target=(0.45, 0.55))(trace, LABELS).item()
        assert outside == pytest.approx(BatchShaping(target=0.45 if mean < 0.5 else 0.55)(trace, LABELS).item())
        assert outside > 5 * own


@pytest.mark.parametrize("start", [-6.0, 6.0])
@pytest.mark.parametrize("routes", [0, 3])
def test_batch_shaping_revives_dead_and_always_open_gates(start, routes):
    """From a gate that hardly depends on its input to one that is open for the share of samples it is told."""
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    gate = nn.Linear(6, routes or 1)
    with torch.no_grad():
        gate.bias.copy_(torch.linspace(-start, start, routes) if routes else torch.tensor([start]))
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(300):
        p = torch.softmax(gate(x), -1) if routes else torch.sigmoid(gate(x)[:, 0])
        trace = traced({"g": p}, {"g": p}, {"g": "g"}, {"g": routes} if routes else {})
        optimizer.zero_grad()
        BatchShaping(target=0.6)(trace, LABELS).backward()
        optimizer.step()
    if routes:
        shares = F.one_hot(p.argmax(-1), 3).float().mean(0)
        torch.testing.assert_close(shares, torch.tensor(arm_shares(3, 0.6)), rtol=0, atol=0.12)
        assert shares.min() > 0.1
    else:
        assert 0.5 < (p > 0.5).float().mean() < 0.7
        assert ((p < 0.2) | (p > 0.8)).float().mean() > 0.5  # decided, one way and the other


def test_minimum_usage_is_the_formula(several):
    parts = []
    for name, p in gate_probabilities(several).items():
        columns = p.detach().reshape(-1, 3).T if name == "level" else [p.detach().flatten(), 1 - p.detach().flatten()]
        for column in columns:
            top = column.sort(descending=True).values[: math.ceil(0.25 * len(column))]
            parts.append((name, (math.log(0.6) - top.log()).clamp(min=0).mean().item()))
    gates = {name for name, _ in parts}
    expected = np.mean([np.mean([v for n, v in parts if n == name]) for name in gates])
    assert MinimumUsage(share=0.25, weight=2.0)(several, LABELS).item() == pytest.approx(2 * expected, rel=1e-5)


def test_minimum_usage_binds_at_the_ends_alone():
    free = torch.tensor([0.9] * 30 + [0.3] * 2, requires_grad=True)
    loss = MinimumUsage(share=0.05)(traced({"g": free}, {"g": free}, {"g": "g"}), LABELS)
    assert loss.item() == 0
    for logit in (-12.0, 12.0):
        leaf = torch.full((32,), logit).add(torch.linspace(-1, 1, 32)).requires_grad_()
        p = torch.sigmoid(leaf)
        MinimumUsage(share=0.05)(traced({"g": p}, {"g": p}, {"g": "g"}), LABELS).backward()
        moved = leaf.grad.nonzero().flatten().tolist()
        assert moved == ([30, 31] if logit < 0 else [0, 1])  # those nearest to the other arm


@pytest.mark.parametrize("start", [-8.0, 8.0])
@pytest.mark.parametrize("routes", [0, 3])
def test_minimum_usage_revives_dead_and_always_open_gates(start, routes):
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    gate = nn.Linear(6, routes or 1)
    with torch.no_grad():
        gate.bias.copy_(torch.linspace(-start, start, routes) if routes else torch.tensor([start]))
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(300):
        p = torch.softmax(gate(x), -1) if routes else torch.sigmoid(gate(x)[:, 0])
        trace = traced({"g": p}, {"g": p}, {"g": "g"}, {"g": routes} if routes else {})
        optimizer.zero_grad()
        MinimumUsage(share=0.1)(trace, LABELS).backward()
        optimizer.step()
    arms = p.argmax(-1) if routes else (p > 0.5).long()
    shares = F.one_hot(arms, routes or 2).float().mean(0)
    assert shares.min() > 0.08


@pytest.mark.parametrize("arms", [2, 3, 4, 8, 32])
def test_shares_of_arms_reach_both_ends(arms):
    for level in np.linspace(0, 1, 101).tolist():
        assert np.array(arm_shares(arms, level)) @ np.linspace(0, 1, arms) == pytest.approx(level, abs=1e-9)


@pytest.mark.parametrize("level", [0.02, 0.3, 0.5, 0.98])
def test_shares_of_arms_have_the_level_and_the_highest_entropy(level):
    shares = np.array(arm_shares(4, level))
    levels = np.linspace(0, 1, 4)
    assert shares.sum() == pytest.approx(1)
    assert shares @ levels == pytest.approx(level, abs=1e-9)
    # Any change that keeps sum and level lowers the entropy.
    for change in (np.array([1, -2, 1, 0]), np.array([0, 1, -2, 1])):
        for sign in (-1, 1):
            other = shares + sign * 1e-3 * level * (1 - level) * change
            assert stats.entropy(other) < stats.entropy(shares)


def test_half_precision_and_empty_rows(device):
    p = torch.rand(N, device=device).bfloat16().requires_grad_()
    trace = traced({"g": p}, {"g": p}, {"g": "g"}, final=torch.zeros(N, K, device=device))
    loss = (ActivationRate(target=0.5) + BatchShaping(target=0.5) + MinimumUsage())(trace, LABELS.to(device))
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad.isfinite().all()
    extreme = torch.tensor([0.0, 1.0] * 4, requires_grad=True)
    BatchShaping()(traced({"g": extreme}, {"g": extreme}, {"g": "g"}), LABELS).backward()
    assert extreme.grad.isfinite().all()


def test_without_gates_there_is_nothing_to_shape():
    trace = traced({}, {}, {}, final=torch.zeros(N, K, requires_grad=True))
    assert (ActivationRate(target=0.5) + BatchShaping() + MinimumUsage())(trace, LABELS).item() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationRate(target=1.2), r"`target`: found 1.2; expected a rate in \[0, 1\]"),
        (lambda: ActivationRate(target=0.5, weight=0), "`weight`: found 0"),
        (lambda: BatchShaping(target={"a": 1.0}), r"`target`: found 1.0; expected a rate in \(0, 1\)"),
        (lambda: BatchShaping(target=(0.9, 0.1)), r"`target`: found \(0.9, 0.1\); expected an interval"),
        (lambda: MinimumUsage(share=0.6), r"`share`: found 0.6; expected a share in \(0, 0.5\]"),
        (lambda: BatchShaping(concentration=0), "`concentration`: found 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_target_for_what_no_gate_decides_is_refused(several):
    with pytest.raises(ArgumentError, match=r"`target`: found \['own'\]; expected decisions of gates, out of"):
        ActivationRate(target={"own": 0.5})(several, LABELS)


def test_gates_that_have_seen_few_batches_standardise_in_evaluation(device):
    torch.manual_seed(0)
    standardise = Standardise(()).to(device)
    batches = 5.0 + 0.01 * torch.randn(3, 64, device=device)
    for logits in batches:
        standardise(logits)
    standardise.eval()
    torch.testing.assert_close(standardise.mean, batches.mean())
    assert float(standardise(batches).std()) == pytest.approx(SPREAD, rel=0.1)
    for _ in range(200):
        standardise.train()(0.01 * torch.randn(64, device=device))
    assert abs(float(standardise.mean)) < 0.01  # what was seen long ago is forgotten


def test_each_part_of_a_gate_counts():
    """Of a gate that decides about four groups two are dead and two always open."""
    p = torch.tensor([0.999, 0.001, 0.999, 0.001]).expand(8, 4).clone().requires_grad_()
    lively = torch.linspace(0.01, 0.99, 32).view(8, 4)
    collapsed = dataclasses.replace(traced({"g": p}, {"g": p}, {"g": "g"}), parts={"g": 4})
    healthy = dataclasses.replace(traced({"g": lively}, {"g": lively}, {"g": "g"}), parts={"g": 4})
    labels = torch.zeros(8, dtype=torch.long)
    for objective, least in ((MinimumUsage(), 2.0), (ActivationRate(target=0.5), 0.24), (BatchShaping(), 0.07)):
        assert objective(collapsed, labels).item() > least > objective(healthy, labels).item()
    MinimumUsage()(collapsed, labels).backward()
    assert (p.grad != 0).any(0).all()
