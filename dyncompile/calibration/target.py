"""What is asked of a calibration, and the samples that it takes to be held to that."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from dyncompile.calibration.risk import (
    PValue,
    betting_p_value,
    binomial_p_value,
    empirical_p_value,
    hoeffding_bentkus_p_value,
    samples_needed,
)
from dyncompile.errors import ArgumentError, CalibrationError

Indices = NDArray[np.intp]
METHODS = ("ltt", "ucb", "greedy")

_DESIGN_SHARE = 0.3  # a test needs more samples than a search


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked for.

    Attributes:
        max_drop: Largest risk, in (0, 1).
        max_cost: Largest expected cost, above 0.
        confidence: Probability with which the risk is held, in (0, 1).
        method: "ltt", "ucb" or "greedy".

    Raises:
        ArgumentError: A value is out of range.
    """

    max_drop: float | None = None
    max_cost: float | None = None
    confidence: float = 0.95
    method: str = "ltt"

    def __post_init__(self) -> None:
        if self.max_drop is None and self.max_cost is None:
            raise ArgumentError("max_drop", found="no target", expected="`max_drop` or `max_cost`")
        for name in ("max_drop", "max_cost", "confidence"):
            value = getattr(self, name)
            if not isinstance(value, Real) and (value is not None or name == "confidence"):
                raise ArgumentError(name, found=repr(value), expected="a number")
        if self.max_drop is not None and not 0 < self.max_drop < 1:
            raise ArgumentError("max_drop", found=self.max_drop, expected="between 0 and 1, both excluded")
        if self.max_cost is not None and not self.max_cost > 0:
            raise ArgumentError("max_cost", found=self.max_cost, expected="above 0 (1.0 = the static model)")
        if not 0 < self.confidence < 1:
            raise ArgumentError("confidence", found=self.confidence, expected="between 0 and 1, both excluded")
        if self.method not in METHODS:
            raise ArgumentError("method", found=repr(self.method), expected=", ".join(METHODS))

    @property
    def delta(self) -> float:
        """Probability with which the guarantee may fail."""
        return 1 - self.confidence

    def p_value(self, *, binary: bool) -> PValue:
        """The p-value of the method."""
        exact = binomial_p_value if binary else hoeffding_bentkus_p_value
        return {"ltt": exact, "ucb": betting_p_value, "greedy": empirical_p_value}[self.method]


def split(
    samples: int, target: Target, *, binary: bool, seed: int, seen: Sequence[int] | Indices = (), among: int = 0
) -> tuple[Indices, Indices]:
    """Divide the samples at random into those to design on and those held out.

    "greedy" uses all for both.

    Args:
        samples: Number of samples N.
        target: What is asked for.
        binary: Whether a loss is 0 or 1 by its definition.
        seed: Seed of the order.
        seen: Samples that are designed on already: `designed(among)` of them, drawn at random.
        among: From the first how many samples those were drawn.

    Returns:
        Indices of both parts, each in random order.

    Raises:
        CalibrationError: Too few are held out for any thresholds to pass.
    """
    order = np.random.default_rng(seed).permutation(samples)
    if target.method == "greedy":
        return order, order
    needed = 2
    if target.max_drop is not None:
        needed = samples_needed(target.p_value(binary=binary), target.max_drop, target.delta)
    if samples - designed(samples) < needed or not designed(samples):
        total = next(n for n in count(max(4, needed)) if n - designed(n) >= needed)
        raise CalibrationError(
            f"{samples} samples are too few to bound a risk of {target.max_drop or 1:g} with "
            f"probability {target.confidence:g}: at least {total} are needed, "
            f"{designed(total)} to choose candidates on and {total - designed(total)} to test "
            "them on, and more to save much. Give more data, a larger max_drop, a lower "
            "confidence, or method='greedy', which guarantees nothing"
        )
    # Every sample is as likely to be designed on as any other, the first ones too.
    later = order[order >= among]
    chosen = np.zeros(samples, dtype=bool)
    chosen[np.asarray(seen, dtype=np.intp)] = True
    chosen[later[: designed(samples) - len(seen)]] = True
    return order[chosen[order]], order[~chosen[order]]


def designed(samples: int) -> int:
    """How many of so many samples are designed on."""
    return int(_DESIGN_SHARE * samples)
