"""What gates are trained for: how often they are open, and how decided; guards against dead and always-open ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betainc, betaln, softmax
from torch import Tensor

from dyncompile.data import Inputs
from dyncompile.errors import ArgumentError
from dyncompile.training.losses import widen
from dyncompile.training.objectives import Objective

if TYPE_CHECKING:
    from dyncompile.module import Trace


@runtime_checkable
class Aim(Protocol):
    """What moves as training goes on: `GateSchedule`."""

    @property
    def rate(self) -> float:
        """How often gates are to be open at present, in (0, 1]."""


Rates = float | Mapping[str, float] | Aim


def gate_decisions(trace: "Trace") -> list[str]:
    """Names of the decisions that gates make, in order of execution."""
    return [name for name, owner in trace.owners.items() if owner in trace.probabilities and name in trace.decisions]


def activation(trace: "Trace", name: str) -> Tensor:
    """How far a decision is open, `[N]` or `[N, r]` in [0, 1]: of a route the relative level of its arm.

    Arm k of K has level k / (K - 1), or its expectation in training; differentiable there.
    """
    decision = trace.decisions[name]
    if name not in trace.routes:
        return widen(decision) if decision.is_floating_point() else decision.float()
    if not decision.is_floating_point():
        return decision / (trace.routes[name] - 1)
    return _level(widen(decision), routed=True)


def _level(p: Tensor, routed: bool) -> Tensor:
    """The expected relative level of weights `[..., K]` of a route; else what it is given."""
    return p @ torch.linspace(0, 1, p.shape[-1], device=p.device) if routed else p


def activation_rates(trace: "Trace") -> dict[str, Tensor]:
    """Mean activation of each gate's decision over a batch, scalars in [0, 1]; see `activation`."""
    return {name: rates.mean() for name, rates in part_rates(trace).items()}


def part_rates(trace: "Trace") -> dict[str, Tensor]:
    """The same for each of the K parts that a decision holds one for: `[K]`, of others `[1]`."""
    return {name: by_part(trace, name, activation(trace, name)).mean(0) for name in gate_decisions(trace)}


def there(trace: "Trace", name: str, values: Tensor) -> Tensor:
    """What there is of values `[N, ...]` for each row of a decision: of packed sequences the steps that they have."""
    return values[trace.decisions[trace.within[name]]] if name in trace.within else values


def by_part(trace: "Trace", name: str, values: Tensor) -> Tensor:
    """What there is of values of a decision as `[M, K]`: a column for each of its K parts, or one."""
    return there(trace, name, values).reshape(-1, trace.parts.get(name, 1))


def gate_probabilities(trace: "Trace") -> dict[str, Tensor]:
    """The probability behind each gate's decision: `[N]` or `[N, r]` that it is open, for a route `[..., K]`.

    A gate that makes D decisions gives their probabilities in its last dim (the one before K for routes), in the order
    in which the decisions are carried out.
    """
    found: dict[str, Tensor] = {}
    taken: dict[str, int] = {}
    for name in gate_decisions(trace):
        owner, decision = trace.owners[name], trace.decisions[name]
        p = widen(trace.probabilities[owner])
        routed = name in trace.routes
        own = decision.dim() + (routed and not decision.is_floating_point())
        column = taken[owner] = taken.get(owner, -1) + 1
        found[name] = p if p.dim() == own else p.select(-2 if routed else -1, column)
    return found


@dataclass(frozen=True, kw_only=True)
class ActivationRate(Objective):
    """Each gate is open as often as it is told: `weight * mean_g (rate_g - target_g)^2`.

    `rate_g` is the mean activation over the batch (ConvNet-AIG, arXiv 1711.11503, which sums over the gates; the mean
    keeps the weight apart from their number). Of a route it is the expected relative level, k / (K - 1) for arm k. Each
    part of a gate that decides about several (groups of neurons, channels) counts for itself.

    Args:
        target: The rate, for all gates or by the names of decisions (those left out are free), in [0, 1]; or what
            moves it, a `GateSchedule`.
        weight: Factor, above 0.

    Raises:
        ArgumentError: A target is outside [0, 1] or given for a decision that no gate makes; weight is not above 0.
    """

    target: Rates
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_rates(self.target)
        _check_positive(weight=self.weight)

    def parts(
        self,
        trace: "Trace",
        targets: Tensor,  # noqa: ARG002
        inputs: Inputs | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        rates = part_rates(trace)
        apart = [((rates[name] - target) ** 2).mean() for name, target in _aimed(self.target, list(rates)).items()]
        return {"sparsity/rate": self.weight * _mean(apart, trace)}


@dataclass(frozen=True, kw_only=True)
class BatchShaping(Objective):
    """The probabilities of each gate follow a prior over the batch (arXiv 1907.06627).

    `weight * mean_g sum_i (i / (N + 1) - F_g(p_(i)))^2 / N`, the Cramer-von-Mises distance of the sorted probabilities
    of gate g in the batch to a Beta distribution with the CDF F_g. With a concentration below 2 that is low in the
    middle, so gates come to be open for some samples and closed for others, and a dead or an always-open gate is far
    from it. The mean of the prior is a target rate; or, with an interval, the gate's own mean probability brought into
    it: then gates differ as the task and the cost want, and none is dead or always open. The arms of a route have a
    prior each, whose means are the distribution of highest entropy with the mean level of the target.

    Args:
        target: Mean of the prior, how often a gate is open: as in `ActivationRate`, inside (0, 1); or an interval.
        concentration: a + b of Beta(a, b), above 0; 1 is the paper's.
        weight: Factor, above 0.

    Raises:
        ArgumentError: A target is outside (0, 1) or given for a decision that no gate makes; concentration or weight
            are not above 0.
    """

    target: Rates | tuple[float, float] = (0.15, 0.85)
    concentration: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.target, tuple):
            low, high = self.target
            if not 0 < low <= high < 1:
                raise ArgumentError("target", found=self.target, expected="an interval (low, high) inside (0, 1)")
        else:
            _check_rates(self.target, inside=True)
        _check_positive(weight=self.weight, concentration=self.concentration)

    def parts(
        self,
        trace: "Trace",
        targets: Tensor,  # noqa: ARG002
        inputs: Inputs | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        probabilities = gate_probabilities(trace)
        apart = []
        for name, rates in self._means(trace, probabilities).items():
            # The prior of an aim at 1 would be a point.
            bounded = [min(max(rate, 0.01), 0.99) for rate in rates]
            if name in trace.routes:
                p = there(trace, name, probabilities[name]).flatten(0, -2)
                apart.append(self._distance(p, arm_shares(trace.routes[name], bounded[0])))
            else:
                apart.append(self._distance(by_part(trace, name, probabilities[name]), bounded))
        return {"sparsity/shape": self.weight * _mean(apart, trace)}

    def _means(self, trace: "Trace", probabilities: dict[str, Tensor]) -> dict[str, list[float]]:
        """The means of the priors of each decision's parts."""
        if not isinstance(self.target, tuple):
            aimed = _aimed(self.target, list(probabilities))
            return {name: [rate] * trace.parts.get(name, 1) for name, rate in aimed.items()}
        low, high = self.target
        levels = {n: _level(p.detach(), n in trace.routes) for n, p in probabilities.items()}
        return {n: by_part(trace, n, p).mean(0).clamp(low, high).tolist() for n, p in levels.items()}

    def _distance(self, p: Tensor, means: list[float]) -> Tensor:
        """Of `[M, C]` probabilities to the priors of their columns, averaged."""
        ordered = p.sort(0).values.clamp(1e-6, 1 - 1e-6)
        mean = torch.tensor(means, dtype=torch.float64)
        cdf: Tensor = _BetaCDF.apply(  # type: ignore[no-untyped-call]
            ordered, mean * self.concentration, (1 - mean) * self.concentration
        )
        count = len(ordered)
        even = torch.arange(1, count + 1, device=p.device) / (count + 1)
        return ((even[:, None] - cdf) ** 2).mean()


@dataclass(frozen=True, kw_only=True)
class MinimumUsage(Objective):
    """Every gate, or part that it decides about, is open for some samples and closed for others: binds at the ends.

    `weight * mean_g mean_k mean_{n in top} relu(log 0.6 - log p_k(n))`, where p_k is the probability of arm k of gate g
    (open, closed; the arms of a route) and top are the samples of the batch, a share of them, for which it is highest:
    those that the gate itself would choose. Where their probability is above 0.6, so that evaluation takes the arm,
    nothing is left to pay; the gradient does not vanish as p_k goes to 0, so that a gate comes back from either end.

    Args:
        share: Of a batch that is to take each arm, in (0, 0.5].
        weight: Factor, above 0.

    Raises:
        ArgumentError: The share is outside (0, 0.5], or weight is not above 0.
    """

    share: float = 0.05
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ArgumentError("share", found=self.share, expected="a share in (0, 0.5]")
        _check_positive(weight=self.weight)

    def parts(
        self,
        trace: "Trace",
        targets: Tensor,  # noqa: ARG002
        inputs: Inputs | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        short = []
        for name, all_rows in gate_probabilities(trace).items():
            if name in trace.routes:
                arms = there(trace, name, all_rows).flatten(0, -2)
            else:
                p = by_part(trace, name, all_rows)
                arms = torch.stack([p, 1 - p], -1)
            top = arms.topk(math.ceil(self.share * len(arms)), 0).values
            short.append((math.log(0.6) - top.clamp(min=1e-12).log()).relu().mean())
        return {"sparsity/usage": self.weight * _mean(short, trace)}


def arm_shares(arms: int, level: float) -> list[float]:
    """How often each arm of a route is taken at a mean relative level, by the distribution of highest entropy.

    Args:
        arms: K.
        level: In [0, 1].

    >>> [round(share, 3) for share in arm_shares(3, 0.5)]
    [0.333, 0.333, 0.333]
    >>> [round(share, 3) for share in arm_shares(2, 0.7)]
    [0.3, 0.7]
    >>> arm_shares(3, 0.0)
    [1.0, 0.0, 0.0]
    """
    levels = np.linspace(0, 1, arms)
    if level in (0, 1):
        return [float(at == level) for at in levels]
    # The distribution of highest entropy with a given mean is exponential in the level.
    slope = brentq(lambda slope: float(softmax(slope * levels) @ levels) - level, -1e3, 1e3)
    return [float(share) for share in softmax(slope * levels)]


class _BetaCDF(torch.autograd.Function):
    """The regularised incomplete beta function I_p(a, b); differentiable in p."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Of p `[M, C]` in (0, 1), with a and b `[C]` float64 on the CPU."""
        ctx.save_for_backward(p, a, b)
        found = betainc(a.numpy(), b.numpy(), p.detach().double().cpu().numpy())
        return torch.from_numpy(found).to(p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The density."""
        p, a, b = ctx.saved_tensors
        scale = torch.from_numpy(np.atleast_1d(betaln(a.numpy(), b.numpy()))).to(p)
        a, b = a.to(p), b.to(p)
        return gradients[0] * torch.exp((a - 1) * p.log() + (b - 1) * torch.log1p(-p) - scale), None, None


def _mean(values: list[Tensor], trace: "Trace") -> Tensor:
    """0 for a model without gates."""
    return torch.stack(values).mean() if values else trace.final.new_zeros((), dtype=torch.float32)


def _aimed(target: Rates, names: list[str]) -> dict[str, float]:
    """The target of each decision that has one."""
    if isinstance(target, Mapping):
        if unknown := [name for name in target if name not in names]:
            raise ArgumentError("target", found=unknown, expected=f"decisions of gates, out of {names}")
        return dict(target)
    return dict.fromkeys(names, target.rate if isinstance(target, Aim) else target)


def _check_rates(target: Rates, *, inside: bool = False) -> None:
    if isinstance(target, Aim):
        return
    for rate in target.values() if isinstance(target, Mapping) else [target]:
        fits = 0 < rate < 1 if inside else 0 <= rate <= 1
        if not fits:
            raise ArgumentError("target", found=rate, expected=f"a rate in {'(0, 1)' if inside else '[0, 1]'}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ArgumentError(name, found=value, expected="a number above 0")
