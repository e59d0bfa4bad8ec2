"""The policy gradient of gates, against enumeration; expected cost."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from traces import K, N, several_gates, traced

import dyncompile as dc
from dyncompile.errors import ArgumentError
from dyncompile.training import ExpectedCost, MultiExit, PolicyGradient
from dyncompile.training.gating import gate_probabilities
from dyncompile.training.policy import log_probability


@pytest.fixture
def several():
    return several_gates()


class Net(nn.Module):
    """Two residual branches; convolutions cost something to count."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, K)

    def forward(self, x):
        x = x + self.a(x).relu()
        return self.fc(x + self.b(x).relu())


class Lookup(nn.Module):
    """A policy whose logits are parameters, whatever it reads."""

    def __init__(self, logit):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, x, *_):
        return self.logit.expand(len(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    dyn = dc.dynamize(Net(), "layer_skip", estimator="reinforce", hidden=1, example_inputs=torch.randn(2, 6))
    assert list(dyn.gates) == ["gate0", "gate1"]
    for gate, logit in zip(dyn.gates.values(), (0.7, -0.4), strict=True):
        gate.policy, gate.standardise = Lookup(logit), None
        gate.offset.zero_()
        gate.enabled.fill_(True)
    return dyn.train()


def rewards_of_every_choice(dyn, x, y, reward):
    """For each pair of arms its reward, averaged over the samples."""
    found = {}
    for arms in itertools.product((0.0, 1.0), repeat=2):
        dyn._override = lambda name, value, arms=arms: torch.full_like(value, arms[int(name[-1])])
        trace = dyn.trace(x)
        dyn._override = None
        found[arms] = reward(trace, (trace.final.argmax(1) == y).float()).mean().item()
    return found


def blockdrop(trace, right):
    return right * (1 - trace.cost.detach() ** 2) - (1 - right) * 0.5


@pytest.mark.parametrize("baseline", ["self_critical", "batch"])
def test_the_policy_gradient_is_that_of_the_expected_reward(model, baseline):
    """Against enumeration: one sample many times, so that the mean over the batch is the mean over the draws."""
    count = 40_000
    x = torch.randn(1, 6).expand(count, -1)
    y = model.eval()(x).argmax(1)
    model.train()
    rewards = rewards_of_every_choice(model, x[:1], y[:1], blockdrop)
    assert len({round(r, 4) for r in rewards.values()}) >= 3
    logits = torch.tensor([0.7, -0.4], requires_grad=True)
    p = torch.sigmoid(logits)
    chances = {arms: (p if arms[0] else 1 - p)[0] * (p if arms[1] else 1 - p)[1] for arms in rewards}
    expected = torch.autograd.grad(-sum(chances[arms] * rewards[arms] for arms in rewards), logits)[0]
    PolicyGradient(model=model, gamma=0.5, baseline=baseline)(model.trace(x), y, x).backward()
    found = torch.stack([gate.policy.logit.grad for gate in model.gates.values()])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert expected.abs().min() > 0.02


def test_with_a_target_it_is_the_gradient_of_the_expected_cost(model):
    """All predictions equally right: what is left is the cost's distance to the target."""
    count = 40_000
    x = torch.randn(1, 6).expand(count, -1)
    y = torch.full((count,), -100)
    for target in (0.3, 0.9):
        model.zero_grad()
        PolicyGradient(model=model, gamma=0.0, target=target, strength=3.0)(model.trace(x), y, x).backward()
        found = torch.stack([gate.policy.logit.grad for gate in model.gates.values()])
        logits = torch.tensor([0.7, -0.4], requires_grad=True)
        decisions = {f"gate{i}": torch.sigmoid(logits)[i : i + 1] for i in range(2)}
        cost = model.cost_model().expected(decisions).mean()
        expected = torch.autograd.grad(3 * (cost - target) ** 2, logits)[0]
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)


def test_the_baseline_keeps_the_model_as_it_was(model):
    x, y = torch.randn(16, 6), torch.arange(16) % K
    model.gates["gate1"].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    trace = model.trace(x)
    drawn = torch.get_rng_state()
    PolicyGradient(model=model)(trace, y, x)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(state, drawn)


def test_what_was_not_drawn_is_not_learned(model):
    """A disabled gate's arm is no draw; nor is what a schedule holds open."""

    class Held:
        target = 0.5
        held = frozenset({"gate0"})

    x, y = torch.randn(64, 6), torch.arange(64) % K
    PolicyGradient(model=model, target=Held())(model.trace(x), y, x).backward()
    grads = [gate.policy.logit.grad for gate in model.gates.values()]
    assert grads[0] is None or grads[0] == 0
    assert grads[1] != 0
    model.gates["gate1"].enabled.fill_(False)
    assert PolicyGradient(model=model, target=Held())(model.trace(x), y, x).item() == 0
    assert PolicyGradient(model=model)(model.eval().trace(x), y, x).item() == 0


def test_the_probability_of_a_draw(several):
    names = ["gate0", "level", "block1", "tokens"]
    d = {
        "gate0": (torch.rand(N) < 0.5).float(),
        "level": F.one_hot(torch.randint(3, (N,)), 3).float(),
        "block1": (torch.rand(N) < 0.5).float(),
        "tokens": (torch.rand(N, 5) < 0.5).float(),
    }
    trace = traced({**several.decisions, **d}, several.probabilities, several.owners, several.routes)
    p = {n: q.detach() for n, q in gate_probabilities(several).items()}

    def bernoulli(name):
        return torch.distributions.Bernoulli(probs=p[name]).log_prob(d[name])

    route = torch.distributions.Categorical(probs=p["level"]).log_prob(d["level"].argmax(-1))
    expected = bernoulli("gate0") + route + bernoulli("block1") + bernoulli("tokens").sum(1)
    torch.testing.assert_close(log_probability(trace, names), expected)
    assert log_probability(trace, []) is None


def test_rewards_of_dense_and_floating_targets(model):
    x = torch.randn(4, 6)
    trace = model.trace(x)
    objective = PolicyGradient(model=model, gamma=1.0, baseline="batch")
    dense = torch.zeros(4, 3, K)
    labels = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1], [-100, -100, 0]])
    cost = torch.full((4,), 0.5)
    found = objective._reward(dense, cost, labels)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.75 * 2 / 3 - 1 / 3, -1.0, 0.75]))
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    found = objective._reward(values, cost, torch.zeros(4))
    assert (found.diff() < 0).all()
    assert objective(trace, torch.arange(4)).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "`gamma`: found -1"),
        ({"target": 0}, "`target`: found 0; expected a cost above 0"),
        ({"baseline": "mean"}, "`baseline`: found 'mean'"),
        ({"strength": -1}, "`strength`: found -1"),
        ({"weight": 0}, "`weight`: found 0"),
        ({"model": nn.Linear(2, 2)}, "`model`: found Linear; expected the dynamic model"),
    ],
)
def test_a_policy_gradient_that_means_nothing_is_refused(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        PolicyGradient(**{"model": model, **options})


def test_the_second_run_needs_the_inputs(model):
    with pytest.raises(ArgumentError, match=r"objective\(trace, targets, inputs\)"):
        PolicyGradient(model=model)(model.trace(torch.randn(4, 6)), torch.arange(4))


def test_expected_cost_counts_what_it_is_told(model):
    x, y = torch.randn(16, 6), torch.arange(16) % K
    trace = model.trace(x)
    flops = ExpectedCost(target=0.5)(trace, y)
    assert flops.item() == pytest.approx(ExpectedCost(target=0.5, costs=model.cost_model())(trace, y).item(), rel=1e-5)
    for node in model.graph.fx.nodes:
        node.meta["seconds"] = 1e-3 if "inserted" in node.meta else 2e-3  # as if measured
    seconds = model.cost_model(unit="time")
    found = ExpectedCost(costs=seconds)(trace, y).item()
    assert found == pytest.approx(seconds.expected(trace.decisions).mean().item(), rel=1e-5)
    assert (MultiExit() + ExpectedCost(costs=seconds))(trace, y).isfinite()
