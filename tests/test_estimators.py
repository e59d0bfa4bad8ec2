"""Estimators against enumeration: what they draw, and how far the gradient they take is from the true one."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from dyncompile.errors import ArgumentError
from dyncompile.nn import ESTIMATORS, Gate, build_estimator

LOGITS = torch.tensor([0.8, -0.6, 0.3], dtype=torch.float64)
ROUTES = torch.tensor([[0.9, -0.4, 0.2], [-0.3, 0.5, 0.1]], dtype=torch.float64)
DRAWS = 200_000
ALL = pytest.mark.parametrize("kind", ESTIMATORS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


def product(d):
    """Linear in each decision, with interactions, as an expected cost is."""
    return 1.5 * d[..., 0] - 0.7 * d[..., 1] + d[..., 0] * d[..., 1] - 2.0 * d[..., 1] * d[..., 2]


def curved(d):
    return product(d) + 1.3 * (d - 0.35).square().sum(-1)


def by_route(d):
    return product(d[..., 0, :]) + curved(d[..., 1, :]) * (1 + d[..., 0, 2])


def enumerated(f, logits):
    """Gradient of the expectation over binary decisions."""
    leaf = logits.clone().requires_grad_()
    p = torch.sigmoid(leaf)
    total = 0
    for arms in itertools.product((0.0, 1.0), repeat=len(logits)):
        d = torch.tensor(arms, dtype=logits.dtype)
        total = total + f(d) * (d * p + (1 - d) * (1 - p)).prod()
    return torch.autograd.grad(total, leaf)[0]


def enumerated_routes(f, logits):
    leaf = logits.clone().requires_grad_()
    p = torch.softmax(leaf, -1)
    total = 0
    for arms in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        d = F.one_hot(torch.tensor(arms), logits.shape[1]).to(logits.dtype)
        total = total + f(d) * (d * p).sum(-1).prod()
    return torch.autograd.grad(total, leaf)[0]


def estimated(decide, f, logits, draws=DRAWS, *, score=None):
    """Mean of the estimator's gradients and its standard error; with `score` by the log-probability of the draws."""
    leaf = logits.expand(draws, *logits.shape).clone().requires_grad_()
    d = decide(leaf)
    loss = f(d) if score is None else f(d).detach() * score(leaf, d).log().flatten(1).sum(1)
    each = torch.autograd.grad(loss.sum(), leaf)[0]
    return each.mean(0), each.std(0) / math.sqrt(draws)


def assert_unbiased(found, expected):
    mean, error = found
    assert ((mean - expected).abs() < 4.5 * error + 1e-12).all(), (mean, expected, error)


def chance(leaf, d):
    p = torch.sigmoid(leaf)
    return d * p + (1 - d) * (1 - p)


def chance_of_route(leaf, d):
    return (d * torch.softmax(leaf, -1)).sum(-1)


def test_reinforce_is_unbiased_whatever_the_loss():
    estimator = build_estimator("reinforce")
    for f in (product, curved):
        assert_unbiased(estimated(estimator.binary, f, LOGITS, score=chance), enumerated(f, LOGITS))
    found = estimated(estimator.categorical, by_route, ROUTES, score=chance_of_route)
    assert_unbiased(found, enumerated_routes(by_route, ROUTES))


def test_reinforce_lets_no_gradient_pass_the_draw():
    leaf = LOGITS.clone().requires_grad_()
    assert not build_estimator("reinforce").binary(leaf).requires_grad
    assert not build_estimator("reinforce").categorical(leaf).requires_grad


def test_straight_through_is_unbiased_for_losses_linear_in_each_decision():
    estimator = build_estimator("straight_through")
    assert_unbiased(estimated(estimator.binary, product, LOGITS), enumerated(product, LOGITS))

    def linear(d):
        return (d[..., 0, :] * d.new_tensor([1.0, -2.0, 0.5])).sum(-1) * (1 + d[..., 1, 0] - 3 * d[..., 1, 2])

    assert_unbiased(estimated(estimator.categorical, linear, ROUTES), enumerated_routes(linear, ROUTES))


def test_straight_through_is_biased_by_the_curvature_alone():
    """For f = a (d - c)^2 the estimate is 2 a (p - c) p', the truth a (1 - 2 c) p': apart by a (2 p - 1) p'."""
    p = torch.sigmoid(LOGITS)
    bias = 1.3 * (2 * p - 1) * p * (1 - p)
    estimator = build_estimator("straight_through")
    assert_unbiased(estimated(estimator.binary, curved, LOGITS), enumerated(curved, LOGITS) + bias)
    assert bias.abs().max() > 0.05  # it would be seen


@pytest.mark.parametrize(
    ("decide", "f", "truth"),
    [
        ("binary", curved, enumerated(curved, LOGITS)),
        ("categorical", by_route, enumerated_routes(by_route, ROUTES)),
    ],
)
def test_the_bias_of_soft_gumbel_goes_with_the_temperature(decide, f, truth):
    logits = LOGITS if decide == "binary" else ROUTES
    apart = []
    for temperature in (2.0, 0.5, 0.05):
        torch.manual_seed(0)
        estimator = build_estimator("gumbel", start=temperature, end=temperature, hard=False)
        mean, error = estimated(getattr(estimator, decide), f, logits, 4 * DRAWS)
        apart.append((mean - truth).norm().item())
    assert apart[0] > 1.5 * apart[1] > 3 * apart[2]
    assert ((mean - truth).abs() < 4.5 * error + 0.02).all()
    assert apart[0] > 5 * error.norm().item()


@pytest.mark.parametrize("kind", ["gumbel", "straight_through", "semantic_hashing"])
def test_estimates_point_where_the_truth_does(kind):
    """Monotone losses: whatever the bias, no estimate has the wrong sign, and routes point within 15 degrees."""
    estimator = build_estimator(kind)

    def f(d):
        return 2 * d[..., 0] - d[..., 1] + 0.5 * d[..., 2] + d[..., 0] * d[..., 2]

    mean, error = estimated(estimator.binary, f, LOGITS)
    truth = enumerated(f, LOGITS)
    assert (mean.sign() == truth.sign()).all()
    assert (mean.abs() > 5 * error).all()
    values = torch.tensor([[1.0, 0.0, -1.0], [0.3, -0.5, 2.0]], dtype=torch.float64)
    mean, _ = estimated(estimator.categorical, lambda d: (d * values).sum((-1, -2)), ROUTES)
    truth = enumerated_routes(lambda d: (d * values).sum((-1, -2)), ROUTES)
    assert (F.cosine_similarity(mean, truth, dim=1) > 0.97).all()


def test_semantic_hashing_has_the_gradient_of_its_noisy_saturating_sigmoid():
    """Integrated over the noise; the truth is a fifth to a third larger or smaller, which is its bias."""
    noise = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = torch.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi) * (noise[1] - noise[0])
    leaf = LOGITS.clone().requires_grad_()
    soft = (1.2 * torch.sigmoid(leaf[:, None] + noise) - 0.1).clamp(0, 1)
    expected = torch.autograd.grad((soft * density).sum(), leaf)[0]
    found = estimated(build_estimator("semantic_hashing").binary, lambda d: d.sum(-1), LOGITS)
    assert_unbiased(found, expected)
    truth = enumerated(lambda d: d.sum(-1), LOGITS)
    assert ((expected / truth - 1).abs() < 0.35).all()


def test_semantic_hashing_of_two_arms_is_the_binary_one():
    """Without noise, whose sum over two logits is larger: the values of the soft half, the gradients of both."""
    estimator = build_estimator("semantic_hashing", noise=0.0)
    leaf = LOGITS.expand(20, -1).clone().requires_grad_()
    many = estimator.categorical(torch.stack([torch.zeros_like(leaf), leaf], -1))[..., 1]
    one = estimator.binary(leaf)
    torch.testing.assert_close(*(torch.autograd.grad(d.sum(), leaf, retain_graph=True)[0] for d in (many, one)))
    assert {round(v, 6) for v in many.flatten().tolist()} == {round(v, 6) for v in one.flatten().tolist()}


@ALL
def test_frequencies_are_the_probabilities(kind):
    """Gumbel, straight-through and REINFORCE draw exactly; semantic hashing draws by the noisy logits' sign."""
    estimator = build_estimator(kind, **({"start": 0.1} if kind == "gumbel" else {}))
    binary = estimator.binary(LOGITS.expand(DRAWS, -1)).round()
    routes = estimator.categorical(ROUTES.expand(DRAWS, -1, -1))
    expected = torch.sigmoid(LOGITS)
    if kind == "semantic_hashing":
        expected = torch.special.ndtr(LOGITS)
    torch.testing.assert_close(binary.mean(0), expected, rtol=0, atol=5e-3)
    if kind != "semantic_hashing":
        torch.testing.assert_close(routes.mean(0), torch.softmax(ROUTES, -1), rtol=0, atol=5e-3)


@ALL
@DTYPES
def test_decisions_are_in_range_and_of_the_logits_dtype(kind, dtype, device):
    estimator = build_estimator(kind).to(device)
    extremes = torch.tensor([-60000.0, -90.0, -1.0, 0.0, 1.0, 90.0, 60000.0], device=device).to(dtype)
    logits = torch.cat([extremes, torch.randn(40_000, device=device).to(dtype)]).requires_grad_()
    d = estimator.binary(logits)
    assert (d.dtype, d.shape) == (dtype, logits.shape)
    assert ((d >= 0) & (d <= 1)).all()
    assert d[0] == 0
    assert d[6] == 1
    many = torch.randn(8_000, 15, device=device).to(dtype)
    many[0], many[1, 3], many[2, 3] = 0, 60000.0, -60000.0
    many.requires_grad_()
    r = estimator.categorical(many)
    assert (r.dtype, r.shape) == (dtype, many.shape)
    assert (r >= 0).all()
    torch.testing.assert_close(r.sum(-1).float(), torch.ones(8_000, device=device), rtol=0, atol=2e-2)
    assert r[1, 3] == 1
    assert r[2, 3] == 0
    if kind != "reinforce":
        (d.sum() + (r * torch.arange(15, device=device)).sum()).backward()
        assert logits.grad.isfinite().all()
        assert many.grad.isfinite().all()


@DTYPES
@pytest.mark.parametrize("kind", ["gumbel", "straight_through", "reinforce"])
def test_hard_decisions_are_exactly_zero_or_one(kind, dtype, device):
    estimator = build_estimator(kind).to(device)
    d = estimator.binary(torch.randn(10_000, device=device).to(dtype).requires_grad_())
    r = estimator.categorical(torch.randn(10_000, 5, device=device).to(dtype).requires_grad_())
    assert ((d == 0) | (d == 1)).all()
    assert ((r == 0) | (r == 1)).all()
    assert (r.sum(-1) == 1).all()
    assert 0.4 < d.float().mean() < 0.6


def test_half_of_semantic_hashing_is_discrete():
    d = build_estimator("semantic_hashing").binary(torch.zeros(20_000))
    # The saturating sigmoid itself ends at 0 or 1 beyond +-log 11, which noise of deviation 1 reaches in 1.6 %.
    share = ((d == 0) | (d == 1)).float().mean().item()
    assert share == pytest.approx(0.508, abs=0.015)


@DTYPES
def test_coarse_numbers_have_no_outliers(dtype):
    """bfloat16 draws 0 once in 256 times; its logarithm must not close a gate that is open with certainty."""
    for kind in ESTIMATORS:
        assert build_estimator(kind).binary(torch.full((100_000,), 20.0).to(dtype)).min() == 1, kind


@ALL
def test_the_seed_decides_the_draws(kind):
    estimator = build_estimator(kind)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append((estimator.binary(LOGITS.expand(50, -1)), estimator.categorical(ROUTES.expand(50, -1, -1))))
    for a, b, c in zip(*drawn, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@ALL
def test_no_samples_are_no_error(kind):
    estimator = build_estimator(kind)
    assert estimator.binary(torch.zeros(0, 3)).shape == (0, 3)
    assert estimator.categorical(torch.zeros(0, 3)).shape == (0, 3)


def test_the_temperature_follows_the_schedule_and_is_saved():
    estimator = build_estimator("gumbel", start=2.0, end=0.5)
    found = []
    for progress in (0.0, 0.5, 1.0):
        estimator.anneal(progress)
        found.append(float(estimator.temperature))
    assert found == pytest.approx([2.0, 1.0, 0.5])
    other = build_estimator("gumbel")
    other.load_state_dict(estimator.state_dict())
    assert float(other.temperature) == 0.5
    # Lower temperatures push soft samples to the ends.
    between = []
    for progress in (0.0, 1.0):
        soft = build_estimator("gumbel", start=2.0, end=0.1, hard=False)
        soft.anneal(progress)
        d = soft.binary(torch.zeros(10_000))
        between.append(((d > 0.05) & (d < 0.95)).float().mean().item())
    assert between[0] > 3 * between[1]


@ALL
@pytest.mark.parametrize("routes", [0, 3])
def test_any_gate_takes_any_estimator(kind, routes, device):
    gate = Gate(torch.nn.Linear(4, routes or 2), estimator=build_estimator(kind), routes=routes).to(device)
    gate.enabled.fill_(True)
    decision, probability = gate.train()(torch.randn(6, 4, device=device))
    assert decision.shape == probability.shape == (6, routes or 2)
    assert ((decision >= 0) & (decision <= 1)).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gumble", {}, r"`estimator`: found 'gumble'; expected one of \['gumbel', 'reinforce'"),
        ("gumbel", {"start": 0}, "`start`: found 0; expected a temperature above 0"),
        ("gumbel", {"end": -1.0}, "`end`: found -1.0"),
        ("semantic_hashing", {"noise": -1.0}, "`noise`: found -1.0; expected a standard deviation"),
    ],
)
def test_options_that_mean_nothing_are_refused(kind, options, message):
    with pytest.raises(ArgumentError, match=message):
        build_estimator(kind, **options)
