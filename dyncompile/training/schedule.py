"""How gates go from open to their target cost as training goes on."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dyncompile.cost import CostModel
from dyncompile.data import Inputs
from dyncompile.errors import ArgumentError
from dyncompile.module import DynamicModule, decision_owners, decision_routes
from dyncompile.nn import Gate
from dyncompile.nn.estimators import Reinforce
from dyncompile.nn.topk import TopKGate
from dyncompile.training.gating import BatchShaping, MinimumUsage, arm_shares
from dyncompile.training.objectives import Objective
from dyncompile.training.policy import PolicyGradient, full_depth_cost
from dyncompile.values import positive

if TYPE_CHECKING:
    from dyncompile.module import Trace

_STEPS = 101


class GateSchedule:
    """Gates open at first, then annealed to a target cost.

    Up to `warmup` all gates are disabled: open, and learning by the gradient of their probability. Then they are
    enabled, and the cost that is aimed at falls linearly from that of open gates to `target_cost`, reached at
    `settled`; temperatures of estimators follow from `warmup` to the end. Decisions that REINFORCE trains are set free
    from the last to the first on the same stretch, and held open before (the curriculum of BlockDrop, arXiv 1711.08393,
    section 3.3). All of it is a function of the progress alone, so that a run that resumes goes on as if it had not
    stopped.

    `finetune(dyn, ..., target_cost=0.6)` does what follows; for a loop of one's own:

    >>> import dyncompile as dc
    >>> def train(dyn, batches, optimizer, task):
    ...     schedule = GateSchedule(dyn, target_cost=0.6)
    ...     objective = task + schedule.objective
    ...     for step, (x, y) in enumerate(batches):
    ...         schedule.update(step / len(batches))
    ...         with schedule.holding():
    ...             loss = objective(dyn.trace(x), y, x)
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    ...     schedule.update(1.0)

    Attributes:
        target: The cost that is aimed at now.
        rate: How often gates would be open at this cost if all were alike.
        held: Decisions that are held open now.
        objective: The cost's distance to the target, the guard against dead and always-open gates, and for gates that
            are trained by REINFORCE the policy gradient; to be added to an objective of the task.

    Args:
        dyn: A dynamic model with gates.
        target_cost: Expected cost of a sample that no exit lets go, 1.0 = the static model.
        warmup: Share of training in which gates are open.
        settled: Share of training after which the target stays.
        margin: How far below the target training aims, relatively: the task pulls the cost up, and evaluation, which
            draws nothing, may be as far on the other side. In [0, 1).
        cost_weight: Of (cost - target)^2, with the cost averaged over the batch.
        guard_weight: Of `MinimumUsage`; 0 leaves it out.
        shape_weight: Of `BatchShaping`, where each gate keeps its own rate: gates become decided, so that evaluation
            without draws does what training did. 0 leaves it out.

    Raises:
        ArgumentError: The model has no gates, the target cannot be reached, the shares are not in order, or a weight
            is negative.
    """

    def __init__(
        self,
        dyn: DynamicModule,
        *,
        target_cost: float,
        warmup: float = 0.1,
        settled: float = 0.5,
        margin: float = 0.02,
        cost_weight: float = 100.0,
        guard_weight: float = 1.0,
        shape_weight: float = 5.0,
    ) -> None:
        self.dyn = dyn
        self.gates = {name: gate for name, gate in dyn.gates.items() if isinstance(gate, Gate)}
        if not self.gates:
            raise ArgumentError("target_cost", found=f"{target_cost} for a model without gates", expected="None")
        target_cost = positive("target_cost", target_cost)
        if not 0 <= warmup <= settled <= 1:
            raise ArgumentError("warmup", found=(warmup, settled), expected="0 <= warmup <= settled <= 1")
        if not 0 <= margin < 1:
            raise ArgumentError("margin", found=margin, expected="a share in [0, 1)")
        for name, weight in (
            ("cost_weight", cost_weight),
            ("guard_weight", guard_weight),
            ("shape_weight", shape_weight),
        ):
            if not weight >= 0:
                raise ArgumentError(name, found=weight, expected="a weight that is not negative")
        self.target_cost = target_cost
        self._goal = (1 - margin) * target_cost
        self.warmup = warmup
        self.settled = settled
        self.validating = False
        self.progress = 0.0
        self._costs = _costs(dyn)
        self._rates = np.linspace(0, 1, _STEPS)
        self._cost_at = _cost_at(dyn, self._costs, self._rates)
        least, full = float(self._cost_at[0]), float(self._cost_at[-1])
        if full - least < 1e-6:  # nothing to anneal
            if target_cost < full - 1e-3:
                found = f"{target_cost}, where every gate opens a fixed number of parts"
                raise ArgumentError("target_cost", found=found, expected=f"at least {full:.3f}, what a sample costs")
            self._goal = full
        elif not (least < self._goal and target_cost <= full):
            raise ArgumentError(
                "target_cost",
                found=target_cost,
                expected=f"above {least:.3f}, what runs when every gate is closed, and at most {full:.3f}, all open",
            )
        owners = decision_owners(dyn.graph.fx)
        self._drawn = [name for name, owner in owners.items() if self._is_drawn(owner)]
        self.objective: Objective = GateCost(schedule=self, costs=self._costs, weight=cost_weight)
        if guard_weight:
            self.objective += MinimumUsage(weight=guard_weight)
        if shape_weight:
            self.objective += BatchShaping(weight=shape_weight)
        if self._drawn:
            # The cost is seen to without draws.
            self.objective += PolicyGradient(model=dyn, target=self, strength=0.0)

    def _is_drawn(self, owner: str) -> bool:
        return owner in self.gates and isinstance(self.gates[owner].estimator, Reinforce)

    @property
    def target(self) -> float:
        """The cost that is aimed at now; in validation that of the end, so that epochs compare."""
        if self.validating:
            return self._goal
        full = float(self._cost_at[-1])
        return full + self._annealed * (self._goal - full)

    @property
    def rate(self) -> float:
        """How often gates would be open at the target if all were alike, in (0, 1]."""
        return float(np.interp(self.target, self._cost_at, self._rates))

    @property
    def enabled(self) -> bool:
        """Whether the warm-up is over."""
        return self.progress >= self.warmup

    @property
    def held(self) -> frozenset[str]:
        """Decisions that are held open now."""
        free = int(np.ceil(self._annealed * len(self._drawn)))
        return frozenset(self._drawn[: len(self._drawn) - free])

    @property
    def _annealed(self) -> float:
        """Share of the way from open gates to the target."""
        if self.progress <= self.warmup:
            return 0.0
        return min(1.0, (self.progress - self.warmup) / max(self.settled - self.warmup, 1e-9))

    def update(self, progress: float) -> None:
        """Set what the model's gates are at this point of training.

        Args:
            progress: Share of training that is done, in [0, 1]; 1 leaves the gates enabled.
        """
        self.progress = progress
        after = 1.0 if progress >= 1 else max(0.0, progress - self.warmup) / (1 - self.warmup or 1.0)
        for gate in self.gates.values():
            gate.enabled.fill_(self.enabled)
            gate.aim(self.rate)
            gate.bias.zero_()  # of a calibration before
            gate.estimator.anneal(after)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Hold decisions open that are not free yet."""
        held = self.held
        if not held:
            yield
            return
        previous = self.dyn._override

        def override(name: str, value: Tensor) -> Tensor:
            value = previous(name, value) if previous is not None else value
            return _opened(value, self._routes.get(name)) if name in held else value

        self.dyn._override = override
        try:
            yield
        finally:
            self.dyn._override = previous

    @property
    def _routes(self) -> dict[str, int]:
        return decision_routes(self.dyn.graph.fx)


@dataclass(frozen=True, kw_only=True)
class GateCost(Objective):
    """`weight * (mean(cost) - target)^2` of what samples cost that no exit lets go; the schedule moves the target.

    In training the cost is the expected one, by the probabilities of enabled gates: it is differentiable whatever the
    estimator, and has no noise of draws; in evaluation it is that of the decisions.

    Args:
        schedule: Whose target it is.
        costs: Of the model in training.
        weight: Factor.
    """

    schedule: GateSchedule
    costs: CostModel
    weight: float

    def parts(
        self,
        trace: "Trace",
        targets: Tensor,  # noqa: ARG002
        inputs: Inputs | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        cost = full_depth_cost(self.costs, trace, expected=self.schedule.dyn.training and self.schedule.enabled).mean()
        return {"sparsity/cost": self.weight * (cost - self.schedule.target) ** 2}


def _opened(value: Tensor, arms: int | None) -> Tensor:
    """A decision with the arm that computes everything in place of its own."""
    if arms is None:
        return torch.ones_like(value)
    if not value.is_floating_point():
        return torch.full_like(value, arms - 1)
    last = torch.full(value.shape[:-1], arms - 1, device=value.device)
    return F.one_hot(last, arms).to(value.dtype)


def _costs(dyn: DynamicModule) -> CostModel:
    """The cost model with every gate and exit, whatever is enabled now."""
    training = dyn.training
    dyn.training = True
    try:
        return dyn.cost_model()
    finally:
        dyn.training = training


def _cost_at(
    dyn: DynamicModule, costs: CostModel, rates: "np.ndarray[tuple[int], np.dtype[np.float64]]"
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Expected cost where every gate is open at the same rate, but for those that open a fixed number of parts."""
    routes = decision_routes(dyn.graph.fx)
    alike = torch.from_numpy(rates).float()
    decisions = {}
    for name, owner in decision_owners(dyn.graph.fx).items():
        if owner in dyn.exits:
            decisions[name] = torch.zeros_like(alike)
        elif name in routes:
            decisions[name] = torch.tensor([arm_shares(routes[name], rate) for rate in rates.tolist()])
        elif owner in dyn.gates:
            gate = dyn.gates[owner]
            decisions[name] = torch.full_like(alike, gate.share) if isinstance(gate, TopKGate) else alike
        else:
            decisions[name] = torch.ones_like(alike)
    return costs.expected(decisions).double().numpy()
