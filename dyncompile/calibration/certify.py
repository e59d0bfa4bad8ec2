"""Choose thresholds and knobs: design a path on some of the samples, test along it on the others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dyncompile.calibration.knobs import Knobs
from dyncompile.calibration.result import Calibration, ExitSetting, FrontierPoint
from dyncompile.calibration.risk import Array, PValue, fixed_sequence, upper_bound
from dyncompile.calibration.search import CostOf, Levels, ThresholdSpace, front
from dyncompile.calibration.target import Indices, Target
from dyncompile.errors import UnreachableTargetError


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
class Setting:
    """A setting of the gates' knobs, at which the thresholds of exits are free.

    Attributes:
        scores: Scores of all samples.
        cost_of: Cost by exit, for any set of enabled exits, `[E + 1]`, or by sample `[N, E + 1]`.
        temperatures: Temperature of each exit, for the record; None for 1.
        knobs: The bias of each group of gates; empty without gates.
    """

    scores: Scores
    cost_of: CostOf
    temperatures: Sequence[float] | None = None
    knobs: Knobs = ()


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
    """Choose the thresholds of all exits jointly, where no gate decides; see `choose_among`.

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
    setting = Setting(scores=scores, cost_of=cost_of, temperatures=temperatures)
    return choose_among([setting], target, design=design, held_out=held_out, unit=unit, seed=seed)[0]


def choose_among(
    settings: Sequence[Setting],
    target: Target,
    *,
    design: Indices,
    held_out: Indices,
    unit: str = "flops",
    seed: int = 0,
) -> tuple[Calibration, int]:
    """Choose the knobs of all gates and the thresholds of all exits jointly.

    The design samples give a path of candidates, each a knob setting with a threshold vector, from the safest to the
    cheapest. With `max_drop` the held-out samples are tested along it until the first failure, and the cheapest
    candidate that passed is taken: its risk is above `max_drop` with probability at most `1 - confidence` (Learn then
    Test, arXiv 2110.01052; any order will do that was fixed without the held-out samples). With `max_cost` alone the
    safest candidate within the budget is taken.

    Args:
        settings: Knob settings, all on the same samples; in the first, all gates are open, so that with its exits off
            it is the static model.
        target: What is asked for.
        design: Indices of the samples to choose candidates on.
        held_out: Indices of the samples to test them on.
        unit: Unit of the costs, for the record.
        seed: Seed of the split, for the record.

    Returns:
        The calibration, without its gates' settings, and the index of the knob setting it takes.

    Raises:
        UnreachableTargetError: No candidate that saves anything reaches the target.
    """
    what = "exit" if len(settings) == 1 else "exit and no gate" if settings[0].scores.exits else "gate"
    free = "thresholds" if len(settings) == 1 else "thresholds and knobs" if settings[0].scores.exits else "knobs"
    searched = [_Part(setting, design) for setting in settings]
    off = (0, searched[0].space.off)
    static = searched[0]
    means = {off: static.space.means(static.passed, static.losses, [off[1]])[off[1]]}
    for index, part in enumerate(searched):
        means.update({(index, v): found for v, found in part.space.path(part.passed, part.losses).items()})
    path = front(means, off)
    if path[-1] == off:
        raise UnreachableTargetError(f"no {what} saves anything: each costs as much as it spares or is wrong too often")
    parts = [_Part(setting, held_out, part.space) for setting, part in zip(settings, searched, strict=True)]
    trial = _Trial(
        target=target,
        p_value=target.p_value(binary=settings[0].scores.binary),
        costs=np.array([parts[index].outcome(levels)[1].mean() for index, levels in path]),
        losses=lambda place: parts[path[place][0]].outcome(path[place][1])[0],
        free=free,
    )
    if target.max_drop is not None:
        certified = trial.certify(target.max_drop)
        price = float(parts[0].outcome(off[1])[1].mean())
        chosen, bound = trial.cheapest(certified, target.max_drop, price), target.max_drop
    else:
        certified = 0
        chosen, bound = trial.safest([searched[index].outcome(levels)[1] for index, levels in path])
    frontier = tuple(
        FrontierPoint(
            cost=float(trial.costs[place]),
            risk=float(trial.losses(place).mean()),
            accuracy=parts[index].accuracy(levels),
            certified=place < certified and target.method != "greedy",
        )
        for place, (index, levels) in enumerate(path)
    )
    index, levels = path[chosen]
    exits = parts[index].settings(levels)
    calibration = Calibration(
        exits=exits[:-1],
        final=exits[-1],
        cost=frontier[chosen].cost,
        risk=frontier[chosen].risk,
        bound=None if target.method == "greedy" else bound,
        accuracy=frontier[chosen].accuracy,
        static_accuracy=parts[0].accuracy(off[1]),
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
    return calibration, index


class _Part:
    """One knob setting on some of the samples.

    Args:
        setting: The knob setting.
        samples: Their indices.
        space: Where thresholds were searched for; None to search on these samples.
    """

    def __init__(self, setting: Setting, samples: Indices, space: ThresholdSpace | None = None) -> None:
        self.setting = setting
        self.samples = samples
        self.scores = setting.scores
        self._costs = cache(self._costs_of)
        confidence = self.scores.confidence[samples]
        self.space = ThresholdSpace(confidence, self._costs) if space is None else space
        self.passed = self.space.passed(confidence)
        self.losses = self.scores.losses[samples]

    def _costs_of(self, enabled: tuple[bool, ...]) -> Array:
        costs = self.setting.cost_of(enabled)
        return costs if costs.ndim == 1 else costs[self.samples]

    def outcome(self, levels: Levels) -> tuple[Array, Array]:
        """Loss and cost of each sample under a vector of levels, `[N]` each."""
        return self.space.outcome(self.passed, self.losses, levels, self._costs(self.space.enabled(levels)))

    def accuracy(self, levels: Levels) -> float | None:
        """Share of the samples that are right; None where it is not defined."""
        return _accuracy(self.scores, self.samples, self.space.leave(self.passed, levels))

    def settings(self, levels: Levels) -> tuple[ExitSetting, ...]:
        """Every exit's setting, and the end's."""
        leave = self.space.leave(self.passed, levels)
        costs = self._costs(self.space.enabled(levels))
        columns = zip(
            (*self.scores.exits, "final"),
            (*self.space.thresholds(levels), 0.0),
            (*(self.setting.temperatures or [1.0] * len(self.scores.exits)), 1.0),
            (*self.space.enabled(levels), True),
            strict=True,
        )
        return tuple(
            ExitSetting(
                name=name,
                threshold=threshold,
                temperature=temperature,
                enabled=enabled,
                cost=_cost_there(costs, index, leave == index) if enabled else None,
                share=float((leave == index).mean()),
                accuracy=_accuracy(self.scores, self.samples[leave == index], leave[leave == index]),
            )
            for index, (name, threshold, temperature, enabled) in enumerate(columns)
        )


def _cost_there(costs: Array, index: int, here: NDArray[np.bool_]) -> float:
    """Cost of leaving at an exit; where gates decide too, on average over those that do, or if nobody does over all."""
    if costs.ndim == 1:
        return float(costs[index])
    return float(costs[here if here.any() else slice(None), index].mean())


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """The held-out samples on the path: costs `[P]` and, by index on it, losses `[N]`; what is free, in words."""

    target: Target
    p_value: PValue
    costs: Array
    losses: Callable[[int], Array]
    free: str

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
                f"no {self.free} that save anything keep the risk at or below {limit:g} "
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
