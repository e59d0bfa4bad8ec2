"""P-values and bounds against exact enumeration, scipy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from dyncompile.calibration.risk import (
    betting_p_value,
    binomial_p_value,
    empirical_p_value,
    fixed_sequence,
    hoeffding_bentkus_p_value,
    samples_needed,
    upper_bound,
)

P_VALUES = [binomial_p_value, hoeffding_bentkus_p_value, betting_p_value]


def losses_with(errors: int, samples: int) -> np.ndarray:
    losses = np.zeros(samples)
    losses[:errors] = 1
    return losses


@pytest.mark.parametrize(("samples", "limit"), [(40, 0.1), (300, 0.01), (1000, 0.05)])
def test_binomial_p_value_is_the_binomial_tail(samples, limit):
    for errors in (0, 1, 3, 20, samples):
        expected = stats.binom.cdf(errors, samples, limit)
        assert binomial_p_value(losses_with(errors, samples), limit, 0.05) == pytest.approx(expected)


def test_hoeffding_bentkus_is_the_smaller_of_both_inequalities():
    losses, limit = np.full(200, 0.03), 0.1
    kullback_leibler = stats.entropy([0.03, 0.97], [limit, 1 - limit])
    hoeffding = math.exp(-200 * kullback_leibler)
    bentkus = math.e * stats.binom.cdf(6, 200, limit)  # 200 * 0.03 is 6, not 7
    assert bentkus < hoeffding
    assert hoeffding_bentkus_p_value(losses, limit, 0.05) == pytest.approx(bentkus)
    # Without a loss Hoeffding's inequality is exact and Bentkus' loses a factor of e.
    assert hoeffding_bentkus_p_value(np.zeros(50), limit, 0.05) == pytest.approx(0.9**50)


@pytest.mark.parametrize("p_value", [binomial_p_value, hoeffding_bentkus_p_value])
@pytest.mark.parametrize(("samples", "risk"), [(30, 0.1), (300, 0.02)])
def test_p_values_are_super_uniform_by_enumeration(p_value, samples, risk):
    """P(p <= u) <= u for every u, exactly, at the border of the null hypothesis and inside it."""
    values = np.array([p_value(losses_with(k, samples), risk, 0.05) for k in range(samples + 1)])
    for truth in (risk, 1.5 * risk):
        chances = stats.binom.pmf(np.arange(samples + 1), samples, truth)
        for level in np.unique(values):
            assert chances[values <= level].sum() <= level + 1e-12


@pytest.mark.parametrize("p_value", [hoeffding_bentkus_p_value, betting_p_value])
@pytest.mark.parametrize("law", ["bernoulli", "beta", "mixed"])
def test_p_values_are_super_uniform_by_simulation(p_value, law):
    generator = np.random.default_rng(0)
    draws, samples, risk = 3000, 150, 0.1
    losses = {
        "bernoulli": generator.binomial(1, risk, (draws, samples)).astype(float),
        "beta": generator.beta(0.2, 1.8, (draws, samples)),
        "mixed": generator.binomial(1, 2 * risk, (draws, samples)) * generator.uniform(size=(draws, samples)),
    }[law]
    values = np.array([p_value(row, risk, 0.1) for row in losses])
    for level in (0.02, 0.1, 0.3):
        # The share of rejections is binomial with at most this chance.
        assert stats.binom.sf((values <= level).sum() - 1, draws, level) > 1e-3


@pytest.mark.parametrize("p_value", P_VALUES)
def test_p_values_have_power_and_fall_with_the_limit(p_value):
    losses = losses_with(10, 2000)[np.random.default_rng(0).permutation(2000)]
    values = [p_value(losses, limit, 0.05) for limit in (0.004, 0.006, 0.008, 0.012, 0.05)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.05 > values[-2]


def test_betting_never_certifies_what_the_losses_contradict():
    # Bets won on the first half would certify a risk that all of the losses together exceed.
    losses = np.concatenate([np.zeros(500), np.ones(100)])
    assert betting_p_value(losses, 0.1, 0.05) == 1.0
    assert betting_p_value(losses[:500], 0.1, 0.05) < 1e-6


def test_upper_bound_is_clopper_pearson_for_binary_losses():
    for errors in (0, 3, 40, 500):
        bound = upper_bound(binomial_p_value, losses_with(errors, 500), 0.05)
        expected = stats.beta.ppf(0.95, errors + 1, 500 - errors) if errors < 500 else 1.0
        assert bound == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("p_value", P_VALUES)
def test_upper_bound_covers_the_risk(p_value):
    generator = np.random.default_rng(1)
    draws, delta, risk = 500, 0.1, 0.07
    missed = sum(
        upper_bound(p_value, generator.binomial(1, risk, 200).astype(float), delta) < risk for _ in range(draws)
    )
    assert stats.binom.sf(missed - 1, draws, delta) > 1e-3


def test_betting_is_sharper_than_hoeffding_bentkus_where_losses_vary_little():
    losses = np.random.default_rng(0).normal(0.1, 0.01, 500).clip(0, 1)
    betting = upper_bound(betting_p_value, losses, 0.05)
    assert losses.mean() < betting < upper_bound(hoeffding_bentkus_p_value, losses, 0.05) - 0.005


@pytest.mark.parametrize("p_value", P_VALUES)
@pytest.mark.parametrize(("limit", "delta"), [(0.01, 0.05), (0.05, 0.1), (0.3, 0.01)])
def test_samples_needed(p_value, limit, delta):
    needed = samples_needed(p_value, limit, delta)
    assert p_value(np.zeros(needed), limit, delta) <= delta
    assert p_value(np.zeros(needed - 1), limit, delta) > delta
    if p_value is not betting_p_value:
        assert needed == math.ceil(math.log(delta) / math.log(1 - limit))


def test_fixed_sequence_stops_at_the_first_failure_and_reads_no_further():
    read = []

    def values():
        for value in (0.01, 0.05, 0.06, 0.0):
            read.append(value)
            yield value

    assert fixed_sequence(values(), 0.05) == 2
    assert read == [0.01, 0.05, 0.06]


def test_fixed_sequence_holds_the_family_wise_error():
    """Of candidates whose risks rise past the limit, one above it passes with chance delta at most."""
    generator = np.random.default_rng(0)
    risks, limit, delta, draws = np.linspace(0.01, 0.1, 20), 0.05, 0.1, 1000
    wrong = 0
    for _ in range(draws):
        values = [stats.binom.cdf(generator.binomial(400, risk), 400, limit) for risk in risks]
        passed = fixed_sequence(values, delta)
        wrong += passed > 0 and risks[passed - 1] > limit
    assert stats.binom.sf(wrong - 1, draws, delta) > 1e-3


def test_empirical_p_value_compares_means():
    assert empirical_p_value(losses_with(5, 100), 0.05, 0.1) == 0.0
    assert empirical_p_value(losses_with(6, 100), 0.05, 0.1) == 1.0
