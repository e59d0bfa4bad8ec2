"""REINFORCE: gates learn from the reward of what they drew."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dyncompile.cost import CostModel
from dyncompile.data import IGNORE_INDEX, Inputs, call
from dyncompile.errors import ArgumentError
from dyncompile.module import DynamicModule
from dyncompile.nn import Gate
from dyncompile.training.gating import gate_decisions, gate_probabilities
from dyncompile.training.losses import class_dim, sample_errors, widen
from dyncompile.training.objectives import Objective

if TYPE_CHECKING:
    from dyncompile.module import Trace

Baseline = Literal["self_critical", "batch"]


@runtime_checkable
class CostAim(Protocol):
    """What moves as training goes on: `GateSchedule`."""

    @property
    def target(self) -> float:
        """The expected cost that is aimed at."""

    @property
    def held(self) -> frozenset[str]:
        """Decisions that are held open, whatever was drawn."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Objective):
    """Gates learn from the reward of the decisions that they drew (BlockDrop, arXiv 1711.08393).

    `-weight * mean_n (R_n - b_n) log p(d_n)`, with d_n what the enabled gates drew for sample n; differentiable in
    their probabilities alone. The reward is BlockDrop's, `1 - cost^2` where the prediction is right and `-gamma` where
    it is wrong; with a target cost t it is `1 - 2 s (mean(cost) - t) cost` and `-gamma - 2 s (mean(cost) - t) cost`,
    whose expected gradient is that of `s (mean(cost) - t)^2`, which pushes back on both sides. For dense predictions
    the two are mixed by the share of right positions, in regression by `exp(-e / mean(e))` of the sample's squared
    error e.

    Args:
        model: The model that is traced; not copied.
        gamma: What a wrong prediction costs, not negative.
        target: Expected cost to aim at, 1.0 = the static model; or what moves it, a `GateSchedule`. None: as BlockDrop.
        strength: s, not negative; 0 where another objective sees to the cost.
        baseline: b_n. "self_critical": the reward of the likeliest decisions, from a second run of the model in
            evaluation mode (BlockDrop; Rennie et al., arXiv 1612.00563). "batch": the mean reward of the batch's other
            samples, without a second run. Both leave the gradient unbiased and keep no state, so that a run that
            resumes needs none.
        weight: Factor, above 0.
        ignore_index: Integer targets of this value are not counted.

    Raises:
        ArgumentError: A value is out of its range.
    """

    model: DynamicModule
    gamma: float = 1.0
    target: "float | CostAim | None" = None
    strength: float = 10.0
    baseline: Baseline = "self_critical"
    weight: float = 1.0
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if not isinstance(self.model, DynamicModule):
            raise ArgumentError("model", found=type(self.model).__name__, expected="the dynamic model that is trained")
        if not self.gamma >= 0:
            raise ArgumentError("gamma", found=self.gamma, expected="a number that is not negative")
        if isinstance(self.target, int | float) and not self.target > 0:
            raise ArgumentError("target", found=self.target, expected="a cost above 0")
        if self.baseline not in ("self_critical", "batch"):
            raise ArgumentError("baseline", found=repr(self.baseline), expected='"self_critical" or "batch"')
        if not self.weight > 0:
            raise ArgumentError("weight", found=self.weight, expected="a number above 0")
        if not self.strength >= 0:
            raise ArgumentError("strength", found=self.strength, expected="a number that is not negative")

    def parts(self, trace: "Trace", targets: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """See `Objective.parts`; 0 in evaluation, where nothing is drawn."""
        drawn = log_probability(trace, self._drawn(trace)) if self.model.training else None
        if drawn is None:
            return {"policy": trace.final.new_zeros((), dtype=torch.float32)}
        costs = self.model.cost_model()
        cost = full_depth_cost(costs, trace).detach()
        reward = self._reward(trace.final, cost, targets)
        if self.baseline == "batch":
            count = len(reward)
            base = (reward.sum() - reward) / max(count - 1, 1)
        else:
            if inputs is None:
                raise ArgumentError(
                    "inputs", found=None, expected="those of the batch: objective(trace, targets, inputs)"
                )
            with evaluating(self.model), torch.no_grad():
                likeliest = call(self.model.trace, inputs)
            base = self._reward(likeliest.final, full_depth_cost(costs, likeliest), targets, aside=cost)
        advantage = reward - base
        return {"policy": -self.weight * (advantage * drawn).mean()}

    def _drawn(self, trace: "Trace") -> list[str]:
        """Decisions that were drawn: of gates that are enabled and in training, and not held open."""
        held = self.target.held if isinstance(self.target, CostAim) else frozenset()
        names = []
        for name in gate_decisions(trace):
            gate = self.model.gates[trace.owners[name]]
            if isinstance(gate, Gate) and gate.training and bool(gate.enabled) and name not in held:
                names.append(name)
        return names

    def _reward(self, prediction: Tensor, cost: Tensor, targets: Tensor, aside: Tensor | None = None) -> Tensor:
        """`[N]`; the slope of the cost is that of the batch that was drawn, `aside`."""
        right = _right(prediction.detach(), targets, self.ignore_index)
        if self.target is None:
            return right * (1 - cost**2) - (1 - right) * self.gamma
        target = self.target.target if isinstance(self.target, CostAim) else self.target
        slope = 2 * self.strength * ((cost if aside is None else aside).mean() - target)
        return right - (1 - right) * self.gamma - slope * cost


def log_probability(trace: "Trace", names: list[str]) -> Tensor | None:
    """Of what some decisions drew, `[N]`, summed over decisions and rows; None without decisions."""
    probabilities = gate_probabilities(trace)
    total = []
    for name in names:
        d, p = widen(trace.decisions[name]).detach(), probabilities[name]
        chance = (d * p).sum(-1) if name in trace.routes else d * p + (1 - d) * (1 - p)
        total.append(
            chance.clamp(min=1e-6).log().flatten(1).sum(1) if chance.dim() > 1 else chance.clamp(min=1e-6).log()
        )
    return torch.stack(total).sum(0) if total else None


def full_depth_cost(costs: CostModel, trace: "Trace", *, expected: bool = False) -> Tensor:
    """Cost `[N]` of samples that no exit lets go, 1.0 = the static model.

    Args:
        costs: Of the model in training, with every exit and gate.
        trace: In training or evaluation.
        expected: By the probabilities of gates instead of what was drawn from them: the mean of the same, without its
            noise.
    """
    decisions = {n: torch.zeros_like(d) if n in trace.exits else d for n, d in trace.decisions.items()}
    if expected:
        decisions |= gate_probabilities(trace)
    cost = costs.expected(decisions)
    return cost.to(trace.final.device).expand(trace.cost.shape)


def _right(prediction: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """How right each sample's prediction is, `[N]` in [0, 1]."""
    if targets.is_floating_point():
        error = sample_errors(prediction, targets)
        return torch.exp(-error / error.mean().clamp(min=1e-12))
    hit = (prediction.argmax(class_dim(prediction, targets)) == targets) & (targets != ignore_index)
    counted = (targets != ignore_index).reshape(len(targets), -1).sum(1)
    return hit.reshape(len(targets), -1).sum(1) / counted.clamp(min=1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module's mode is afterwards what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
