"""Threshold vectors over all exits at once: from the safest to the cheapest.

Thresholds are searched as *levels*: level `l` of an exit is the `l`-th quantile of its confidences,
the level above the last quantile switches the exit off. For a price `w` of one loss (in static
forward passes), coordinate descent minimises `sum(cost + w * loss)`: an exit's best level, given
the others', follows exactly from one histogram. Sweeping `w` walks the trade-off between risk and
cost.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dyncompile.calibration.risk import Array

Levels = tuple[int, ...]
CostOf = Callable[[tuple[bool, ...]], Array]
"""Which exits are enabled -> cost of leaving at each exit and at the end: `[E + 1]`, or by sample `[N, E + 1]`."""

Key = TypeVar("Key", bound=tuple[Any, ...])

_PRICES = 48
_STEPS = 4
_SWEEPS = 6
_ENTRIES = 100_000
"""Samples times vectors that are looked at in one go."""


class ThresholdSpace:
    """The threshold vectors that are considered, and what they do to samples.

    Args:
        confidence: Confidences of the samples that the search may look at, `[N, E]`.
        cost_of: Cost by exit, for any set of enabled exits; of these samples, if by sample.
        resolution: Quantiles per exit.
    """

    def __init__(self, confidence: NDArray[np.float32], cost_of: CostOf, *, resolution: int = 200) -> None:
        self.grids = [_grid(column, resolution) for column in confidence.T]
        self.off: Levels = tuple(len(grid) for grid in self.grids)
        self._cost_of = cache(cost_of)

    def thresholds(self, levels: Levels) -> list[float]:
        """Thresholds of a vector of levels; 1.0 where an exit is off."""
        padded = [np.append(grid, np.float32(1)) for grid in self.grids]
        return [float(grid[level]) for grid, level in zip(padded, levels, strict=True)]

    def enabled(self, levels: Levels) -> tuple[bool, ...]:
        """Which exits are on."""
        return tuple(level < off for level, off in zip(levels, self.off, strict=True))

    def costs(self, levels: Levels) -> Array:
        """Cost of leaving at each exit and at the end, `[E + 1]` or `[N, E + 1]`."""
        return self._cost_of(self.enabled(levels))

    def passed(self, confidence: NDArray[np.float32]) -> NDArray[np.int32]:
        """How many thresholds of its grid each confidence reaches, `[N, E]`.

        An exit fires where that is above its level.
        """
        columns = zip(self.grids, confidence.T, strict=True)
        counts = [np.searchsorted(grid, column, side="right") for grid, column in columns]
        if not counts:
            return np.zeros(confidence.shape, dtype=np.int32)
        return np.asfortranarray(np.stack(counts, axis=1).astype(np.int32))

    def leave(self, passed: NDArray[np.int32], levels: Levels | NDArray[np.int32]) -> NDArray[np.intp]:
        """Index of the exit at which each sample leaves, E for the end: `[N]`, or of vectors `[V, E]`, `[V, N]`."""
        vectors = np.asarray(levels)
        leave = np.full((*vectors.shape[:-1], len(passed)), vectors.shape[-1])
        for index in reversed(range(vectors.shape[-1])):
            np.putmask(leave, passed[:, index] > vectors[..., index, None], index)
        return leave

    def outcome(
        self, passed: NDArray[np.int32], losses: Array, levels: Levels, costs: Array | None = None
    ) -> tuple[Array, Array]:
        """Loss and cost of each sample under a vector of levels, `[N]` each.

        Args:
            passed: What `passed` gave, `[N, E]`.
            losses: Losses by exit and at the end, `[N, E + 1]`.
            levels: The vector.
            costs: `[E + 1]` or `[N, E + 1]`; None where they are those of the samples that are searched.
        """
        leave = self.leave(passed, levels)
        return losses[np.arange(len(leave)), leave], cost_at(self.costs(levels) if costs is None else costs, leave)

    def descend(self, passed: NDArray[np.int32], losses: Array, price: float, start: Levels) -> Levels:
        """Coordinate descent on `sum(cost + price * loss)`, exact in each coordinate.

        Args:
            passed: What `passed` gave, `[N, E]`.
            losses: Losses by exit and at the end, `[N, E + 1]`.
            price: What one loss costs, in static forward passes.
            start: Levels to start from.

        Returns:
            Levels that no change of one exit improves (or those reached after a few sweeps).
        """
        levels = list(start)
        for _ in range(_SWEEPS):
            before = tuple(levels)
            self._sweep(passed, losses, price, levels)
            if tuple(levels) == before:
                break
        return tuple(levels)

    def _sweep(self, passed: NDArray[np.int32], losses: Array, price: float, levels: list[int]) -> None:
        samples, exits = passed.shape
        fires = passed > np.array(levels)
        # 1 where a sample arrives at an exit, else 0.
        arrives = np.ones((samples, exits))
        arrives[:, 1:] = ~np.logical_or.accumulate(fires, axis=1)[:, :-1]
        priced, rows = price * losses, np.arange(samples)
        leave = np.full(samples, exits)
        for index in reversed(range(exits)):
            here, onward = arrives[:, index], priced[rows, leave]
            off = list(levels)
            off[index] = self.off[index]
            on = list(levels)
            on[index] = 0
            costs = self.costs(tuple(on))
            stay = cost_at(costs, leave) + onward
            gain = (costs[..., index] + priced[:, index] - stay) * here
            histogram = np.bincount(passed[:, index], weights=gain, minlength=self.off[index] + 1)
            # totals[l]: everything that passes more than l thresholds leaves here.
            totals = histogram[::-1].cumsum()[::-1][1:] + stay @ here
            best = len(totals) - 1 - int(totals[::-1].argmin())  # the safest of equals
            without = (cost_at(self.costs(tuple(off)), leave) + onward) @ here
            levels[index] = best if totals[best] < without - 1e-9 * samples else self.off[index]
            np.putmask(leave, passed[:, index] > levels[index], index)

    def path(self, passed: NDArray[np.int32], losses: Array) -> dict[Levels, tuple[float, float]]:
        """Threshold vectors from the safest to the cheapest.

        Along it the empirical risk of these samples never falls and their cost always does.

        Args:
            passed: What `passed` gave, `[N, E]`.
            losses: Losses by exit and at the end, `[N, E + 1]`.

        Returns:
            Levels, each with its mean loss and cost; where no exit is as safe as the full depth, all exits off come
            first.
        """
        means = self.means(passed, losses, set(self._candidates(passed, losses)))
        # Coordinate descent finds the corners of the convex hull; fill in between neighbours.
        for fill in (_crossed, _between, _between):
            found = front(means, self.off)
            filled = set(itertools.chain.from_iterable(map(fill, found, found[1:])))
            means |= self.means(passed, losses, filled - set(means))
        return {levels: means[levels] for levels in front(means, self.off)}

    def _candidates(self, passed: NDArray[np.int32], losses: Array) -> Iterator[Levels]:
        prices = np.geomspace(len(passed), 0.05, _PRICES)
        for start, order in ((self.off, prices), ((0,) * len(self.off), prices[::-1])):
            levels = start
            yield levels
            for price in order:
                levels = self.descend(passed, losses, float(price), levels)
                yield levels

    def means(
        self, passed: NDArray[np.int32], losses: Array, vectors: Iterable[Levels]
    ) -> dict[Levels, tuple[float, float]]:
        """Mean loss and cost of the samples that are searched, under each vector of levels."""
        found: dict[Levels, tuple[float, float]] = {}
        at_once = max(_ENTRIES // max(len(passed), 1), 1)
        # Those that enable the same exits have the same costs.
        for enabled, alike in itertools.groupby(sorted(vectors, key=self.enabled), self.enabled):
            some, costs = list(alike), self._cost_of(enabled)
            for start in range(0, len(some), at_once):
                part = some[start : start + at_once]
                leave = self.leave(passed, np.array(part, dtype=np.int32).reshape(len(part), -1))
                loss = losses[np.arange(len(passed)), leave].mean(1)
                pairs = zip(loss.tolist(), cost_at(costs, leave).mean(1).tolist(), strict=True)
                found.update(zip(part, pairs, strict=True))
        return found


def front(means: Mapping[Key, tuple[float, float]], static: Key) -> list[Key]:
    """Candidates by rising risk, each cheaper than all before it and none dearer than the static model.

    Of equal empirical risk the dearest comes first: on other samples it is likely the safest.

    Args:
        means: Mean risk and cost of each candidate on the samples that are searched.
        static: The candidate that saves nothing.
    """
    kept: list[Key] = []
    cheapest, ceiling = np.inf, means[static][1]
    for (_, saving), candidate in sorted(((risk, -cost), v) for v, (risk, cost) in means.items()):
        if -saving < cheapest and (-saving < ceiling or candidate == static):
            kept.append(candidate)
            cheapest = -saving
    return kept


def cost_at(costs: Array, leave: NDArray[np.intp]) -> Array:
    """Cost of each sample by where it leaves, `[..., N]` as `leave`."""
    found: Array = costs[leave] if costs.ndim == 1 else costs[np.arange(leave.shape[-1]), leave]
    return found


def _grid(confidence: NDArray[np.float32], resolution: int) -> NDArray[np.float32]:
    """Thresholds at quantiles of one exit's confidences, ascending.

    Each lies between two values that were seen, so that rounding, which differs from one batch size
    or backend to the next, does not decide about many samples that are equally sure. The lowest is
    0, where everything leaves.
    """
    seen = np.sort(confidence)
    quantiles = seen[np.linspace(0, len(seen) - 1, resolution).astype(int)]
    values = np.unique(quantiles[quantiles > seen[0]])
    below = seen[np.searchsorted(seen, values) - 1]
    return np.unique(np.append((values + below) / 2, np.float32(0)))


def _between(safe: Levels, cheap: Levels) -> Iterator[Levels]:
    """Vectors on the line between two."""
    for step in range(1, _STEPS):
        share = step / _STEPS
        yield tuple(round((1 - share) * a + share * b) for a, b in zip(safe, cheap, strict=True))


def _crossed(safe: Levels, cheap: Levels) -> Iterator[Levels]:
    """Vectors on the line, and either with the level of one exit from the other."""
    yield from _between(safe, cheap)
    for one, other in ((safe, cheap), (cheap, safe)):
        for index, level in enumerate(other):
            yield (*one[:index], level, *one[index + 1 :])
