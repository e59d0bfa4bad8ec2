"""Choose thresholds: design a path on some of the samples, test along it on the others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from dyncompile.calibration.result import Calibration, ExitSetting, FrontierPoint
from dyncompile.calibration.risk import (
    Array,
    PValue,
    betting_p_value,
    binomial_p_value,
    empirical_p_value,
    fixed_sequence,
    hoeffding_bentkus_p_value,
    samples_needed,
    upper_bound,
)
from dyncompile.calibration.search import CostOf, Levels, ThresholdSpace
from dyncompile.errors import ArgumentError, CalibrationError, UnreachableTargetError

Indices = NDArray[np.intp]
METHODS = ("ltt", "ucb", "greedy")

_DESIGN_SHARE = 0.3  # a test needs more samples than a search


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What every exit would do with every sample.

    Attributes:
        exits: Names of the exits, E of them, in order of execution.
        confidence: Confidence of each exit, `[N, E]`.
        losses: Loss in [0, 1] of leaving at each exit and at the end, `[N, E + 1]`.
        correct: Share of right labels at each exit and at the end, `[N, E + 1]`; None where it is
            not defined.
        binary: Whether a loss is 0 or 1 by its definition; then its risk is tested exactly.
    """

    exits: tuple[str, ...]
    confidence: NDArray[np.float32]
    losses: Array
    correct: Array | None = None
    binary: bool = False


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


def split(samples: int, target: Target, *, binary: bool, seed: int) -> tuple[Indices, Indices]:
    """Divide the samples at random into those to design on and those held out.

    "greedy" uses all for both.

    Args:
        samples: Number of samples N.
        target: What is asked for.
        binary: Whether a loss is 0 or 1 by its definition.
        seed: Seed of the order.

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
    if samples - _designed(samples) < needed or not _designed(samples):
        total = next(n for n in count(max(4, needed)) if n - _designed(n) >= needed)
        raise CalibrationError(
            f"{samples} samples are too few to bound a risk of {target.max_drop or 1:g} with "
            f"probability {target.confidence:g}: at least {total} are needed, "
            f"{_designed(total)} to choose candidates on and {total - _designed(total)} to test "
            "them on, and more to save much. Give more data, a larger max_drop, a lower "
            "confidence, or method='greedy', which guarantees nothing"
        )
    design, held_out = np.split(order, [_designed(samples)])
    return design, held_out


def _designed(samples: int) -> int:
    return int(_DESIGN_SHARE * samples)


def choose(
    scores: Scores,
    cost_of: CostOf,
    target: Target,
    *,
    design: Indices,
    held_out: Indices,
    temperatures: Sequence[float] | None = None,
    unit: str = "flops",
    seed: int = 0,
) -> Calibration:
    """Choose the thresholds of all exits jointly.

    The design samples give a path of threshold vectors from the safest to the cheapest. With
    `max_drop` the held-out samples are tested along it until the first failure, and the cheapest
    vector that passed is taken: its risk is above `max_drop` with probability at most
    `1 - confidence` (Learn then Test, arXiv 2110.01052). With `max_cost` alone the safest vector
    within the budget is taken.

    Args:
        scores: Scores of all samples.
        cost_of: Cost by exit, for any set of enabled exits.
        target: What is asked for.
        design: Indices of the samples to choose candidates on.
        held_out: Indices of the samples to test them on.
        temperatures: Temperature of each exit, for the record; None for 1.
        unit: Unit of the costs, for the record.
        seed: Seed of the split, for the record.

    Raises:
        UnreachableTargetError: No thresholds that save anything reach the target.
    """
    seen, unseen = scores.confidence[design], scores.confidence[held_out]
    space = ThresholdSpace(seen, cost_of)
    reached, losses = space.passed(seen), scores.losses[design]
    path = space.path(reached, losses)
    static = float(space.costs(space.off)[-1])
    if path[-1] == space.off:
        raise UnreachableTargetError("no exit saves anything: each costs as much as it spares or is wrong too often")
    passed = space.passed(unseen)
    trial = _Trial(
        target=target,
        p_value=target.p_value(binary=scores.binary),
        costs=np.array([space.outcome(passed, scores.losses[held_out], v)[1].mean() for v in path]),
        losses=lambda index: space.outcome(passed, scores.losses[held_out], path[index])[0],
    )
    if target.max_drop is not None:
        certified = trial.certify(target.max_drop)
        chosen, bound = trial.cheapest(certified, target.max_drop, static), target.max_drop
    else:
        certified = 0
        designed = [space.outcome(reached, losses, levels)[1] for levels in path]
        chosen, bound = trial.safest(designed)
    frontier = tuple(
        FrontierPoint(
            cost=float(trial.costs[index]),
            risk=float(trial.losses(index).mean()),
            accuracy=_accuracy(scores, held_out, space.leave(passed, levels)),
            certified=index < certified and target.method != "greedy",
        )
        for index, levels in enumerate(path)
    )
    exits = _settings(scores, space, path[chosen], held_out, temperatures)
    return Calibration(
        exits=exits[:-1],
        final=exits[-1],
        cost=frontier[chosen].cost,
        risk=frontier[chosen].risk,
        bound=None if target.method == "greedy" else bound,
        accuracy=frontier[chosen].accuracy,
        static_accuracy=_accuracy(scores, held_out, np.full(len(held_out), len(scores.exits))),
        frontier=frontier,
        method=target.method,
        unit=unit,
        max_drop=target.max_drop,
        max_cost=target.max_cost,
        confidence=target.confidence,
        design_samples=len(design),
        held_out_samples=len(held_out),
        seed=seed,
    )


def _settings(
    scores: Scores,
    space: ThresholdSpace,
    levels: Levels,
    samples: Indices,
    temperatures: Sequence[float] | None,
) -> tuple[ExitSetting, ...]:
    """Every exit's setting, and the end's."""
    leave = space.leave(space.passed(scores.confidence[samples]), levels)
    columns = zip(
        (*scores.exits, "final"),
        (*space.thresholds(levels), 0.0),
        (*(temperatures or [1.0] * len(scores.exits)), 1.0),
        (*space.enabled(levels), True),
        space.costs(levels),
        strict=True,
    )
    return tuple(
        ExitSetting(
            name=name,
            threshold=threshold,
            temperature=temperature,
            enabled=enabled,
            cost=float(cost) if enabled else None,
            share=float((leave == index).mean()),
            accuracy=_accuracy(scores, samples[leave == index], leave[leave == index]),
        )
        for index, (name, threshold, temperature, enabled, cost) in enumerate(columns)
    )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """The held-out samples on the path: costs `[P]` and, by index on it, losses `[N]`."""

    target: Target
    p_value: PValue
    costs: Array
    losses: Callable[[int], Array]

    def certify(self, limit: float) -> int:
        """How many vectors of the path, from its start, have a risk of at most `limit`."""
        delta = self.target.delta
        p_values = (self.p_value(self.losses(i), limit, delta) for i in range(len(self.costs)))
        return fixed_sequence(p_values, delta)

    def cheapest(self, certified: int, limit: float, static: float) -> int:
        """The cheapest certified vector."""
        saves = np.flatnonzero(self.costs < static)
        if not (saves < certified).any():
            # The test would have had to pass everything up to the first vector that saves anything.
            up_to = range(int(saves[0]) + 1) if len(saves) else range(len(self.costs))
            bounds = [upper_bound(self.p_value, self.losses(i), self.target.delta) for i in up_to]
            raise UnreachableTargetError(
                f"no thresholds that save anything keep the risk at or below {limit:g} "
                f"{self._terms()}; the best reachable is max_drop={_up(max(bounds))} at a "
                f"cost of {self.costs[up_to[-1]]:.3f}"
            )
        chosen = int(self.costs[:certified].argmin())
        budget = self.target.max_cost
        if budget is not None and self.costs[chosen] > budget:
            raise UnreachableTargetError(
                f"an expected cost of at most {budget:g} cannot be had with a risk of at most "
                f"{limit:g} {self._terms()}; the best reachable is "
                f"max_cost={_up(self.costs[chosen])}"
            )
        return chosen

    def safest(self, designed: list[Array]) -> tuple[int, float]:
        """The safest vector whose expected cost is within `max_cost`, and the bound of its risk.

        The held-out samples bound the risk, so they may choose only among few vectors, for all of
        which the bound is made to hold at once.

        Args:
            designed: Costs of the design samples by vector, P of `[N]`.
        """
        budget = self.target.max_cost or 0.0
        costs = np.array([cost.mean() for cost in designed])
        if costs.min() > budget or self.costs.min() > budget:
            raise UnreachableTargetError(
                f"an expected cost of at most {budget:g} cannot be had; the best reachable is "
                f"max_cost={_up(max(costs.min(), self.costs.min()))}"
            )
        last = len(costs) - 1
        first = int((costs <= budget).argmax())
        counts = len(designed[first]), len(self.losses(first))
        error = designed[first].std() * np.sqrt(sum(1 / count for count in counts))
        within = (np.flatnonzero(costs <= budget - k * error) for k in (0, 1, 2, 4))
        rungs = sorted({last, *(int(hits[0]) for hits in within if len(hits))})
        chosen = next(rung for rung in rungs if self.costs[rung] <= budget or rung == last)
        delta = self.target.delta / len(rungs)
        return chosen, upper_bound(self.p_value, self.losses(chosen), delta)

    def _terms(self) -> str:
        if self.target.method == "greedy":
            return "on these samples"
        samples = len(self.losses(0))
        return f"with probability {self.target.confidence:g} on {samples} held-out samples"


def _up(value: float) -> float:
    """Rounded up, so that what a message calls reachable is."""
    return math.ceil(value * 1e4) / 1e4


def _accuracy(scores: Scores, samples: Indices, leave: Indices) -> float | None:
    if scores.correct is None or not len(samples):
        return None
    return float(scores.correct[samples, leave].mean())
