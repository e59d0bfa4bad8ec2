"""P-values and bounds for the mean of a loss in [0, 1], valid for any number of samples.

Every p-value tests "the expected loss is above `limit`" on independent, identically distributed
losses: when that is true, P(p <= u) <= u for every u. Fixed-sequence testing (Learn then Test,
arXiv 2110.01052) goes through an order of candidates that was fixed without these losses and stops
at the first that fails, so that the chance of letting any bad candidate through is at most `delta`.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from dyncompile.errors import require

Array = NDArray[np.float64]
PValue = Callable[[Array, float, float], float]
"""`p(losses [N], limit, delta)`; only the betting p-value is tuned to `delta`."""


def binomial_p_value(losses: Array, limit: float, delta: float) -> float:  # noqa: ARG001
    """The exact p-value of losses that are 0 or 1: the binomial tail.

    Args:
        losses: Losses, each 0 or 1, `[N]`.
        limit: The risk tested against.
        delta: Not used.

    Returns:
        P(Binomial(N, limit) <= number of losses).
    """
    special = require("scipy.special", extra="all")
    return float(special.bdtr(round(losses.sum()), len(losses), limit))


def hoeffding_bentkus_p_value(losses: Array, limit: float, delta: float) -> float:  # noqa: ARG001
    """The p-value of Hoeffding and Bentkus for losses in [0, 1] (arXiv 2110.01052, proposition 1).

    Args:
        losses: Losses in [0, 1], `[N]`.
        limit: The risk tested against, in (0, 1).
        delta: Not used.

    Returns:
        The smaller of both inequalities' p-values.
    """
    special = require("scipy.special", extra="all")
    count, mean = len(losses), float(losses.mean())
    if mean >= limit:
        return 1.0
    divergence = special.rel_entr(mean, limit) + special.rel_entr(1 - mean, 1 - limit)
    # A sum such as 0.1 + 0.2 must not be rounded up to the next integer.
    errors = math.ceil(round(float(losses.sum()), 9))
    bentkus = math.e * float(special.bdtr(errors, count, limit))
    return min(1.0, math.exp(-count * float(divergence)), bentkus)


def betting_p_value(losses: Array, limit: float, delta: float) -> float:
    """The betting p-value of arXiv 2010.09686, sharp where losses vary little.

    Its inversion is the upper confidence bound of risk-controlling prediction sets (arXiv
    2101.02703, proposition 5) and of risk-controlled early exits (arXiv 2405.20915). The order of
    the losses matters to its power, not to its validity.

    Args:
        losses: Losses in [0, 1] in an order that does not depend on them, `[N]`.
        limit: The risk tested against.
        delta: The level for which the bets are sized.

    Returns:
        One over the largest wealth that the bets against `limit` reach; 1 where the mean of the
        losses is not below `limit`, whatever the bets had won in between.
    """
    if losses.mean() >= limit:
        return 1.0
    steps = np.arange(1, len(losses) + 1)
    mean = (0.5 + losses.cumsum()) / (1 + steps)
    variance = (0.25 + ((losses - mean) ** 2).cumsum()) / (1 + steps)
    before = np.concatenate([[0.25], variance[:-1]])  # a bet may use only what was seen before it
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (len(losses) * before)))
    wealth = np.log1p(bets * (limit - losses)).cumsum()
    return min(1.0, math.exp(-max(0.0, float(wealth.max()))))


def empirical_p_value(losses: Array, limit: float, delta: float) -> float:  # noqa: ARG001
    """No p-value, no guarantee: 0 where the mean of the losses is within the limit, else 1.

    Args:
        losses: Losses, `[N]`.
        limit: The risk compared with.
        delta: Not used.
    """
    return float(losses.mean() > limit)


def upper_bound(p_value: PValue, losses: Array, delta: float) -> float:
    """The smallest limit that `p_value` rejects: with probability `1 - delta` above the risk.

    Args:
        p_value: One of this module's p-values.
        losses: Losses in [0, 1], `[N]`.
        delta: Probability that the bound may fail.

    Returns:
        The bound, in [0, 1], within 1e-9 from above.
    """
    low, high = float(losses.mean()), 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle, delta) <= delta else (middle, high)
    return high


def samples_needed(p_value: PValue, limit: float, delta: float) -> int:
    """The smallest number of samples on which `p_value` can reject at all, with no loss on any.

    Args:
        p_value: One of this module's p-values.
        limit: The risk tested against.
        delta: The level.

    Returns:
        Number of samples.
    """
    high = 1
    while p_value(np.zeros(high), limit, delta) > delta:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        rejects = p_value(np.zeros(middle), limit, delta) <= delta
        low, high = (low, middle) if rejects else (middle, high)
    return high


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """Fixed-sequence testing (arXiv 2110.01052): how many pass before the first that fails.

    Args:
        p_values: P-values in an order fixed without the losses they come from; read lazily.
        delta: Probability that any candidate that passes may be bad.

    Returns:
        Number of candidates that pass.
    """
    passed = 0
    for p_value in p_values:
        if p_value > delta:
            break
        passed += 1
    return passed
