"""A gate: a policy that reads features, how its choice is made differentiable, and a knob for calibration."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.errors import ArgumentError
from dyncompile.nn.estimators import Estimator

OPEN_LOGIT = 2.0
"""What the logits of a new gate lie around: open for about nine samples of ten (as ConvNet-AIG, 1711.11503, starts)."""

SPREAD = 2.0
"""Standard deviation of standardised logits: wide against the noise of sampling, so that training sees much the same
decisions as evaluation takes."""


class Standardise(nn.Module):
    """Logits with mean 0 and standard deviation `SPREAD` over the rows of a batch; in evaluation by running statistics.

    Without it a gate drifts to one side, is open or closed for every sample, and learns nothing more. Running
    statistics are means over the first batches, then moving ones.

    Args:
        shape: The columns that are standardised each by itself: `()` or `(D,)`.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, shape: tuple[int, ...], *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape, self.momentum, self.eps = shape, momentum, eps
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, logits: Tensor, counted: Tensor | None = None) -> Tensor:
        """From logits `[..., *shape]` to float32 of the same shape; only rows that are `counted` (bool) shape them."""
        logits = logits.float()
        mean, variance = self.mean.float(), self.variance.float()
        rows = logits.reshape(-1, *self.shape)
        if self.training and rows.shape[0] > 1:
            if counted is None:
                mean, variance = rows.mean(0), rows.var(0, unbiased=False)
            else:
                weight = counted.reshape(-1, *(1 for _ in self.shape)).float()
                count = weight.sum(0).clamp(min=1)
                mean = (rows * weight).sum(0) / count
                variance = ((rows - mean) ** 2 * weight).sum(0) / count
            with torch.no_grad():
                self.batches.add_(1)
                # Logits start far smaller than 1: were the first value not replaced at once, a gate that has seen few
                # batches would decide alike for all in evaluation.
                step = self.batches.reciprocal().clamp(min=self.momentum).to(self.mean.dtype)
                self.mean.lerp_(mean.to(self.mean.dtype), step)
                self.variance.lerp_(variance.to(self.variance.dtype), step)
        return SPREAD * (logits - mean) * torch.rsqrt(variance + self.eps)


class Gate(nn.Module):
    """Decides what is computed.

    Buffers: `enabled` (bool): a disabled gate is open for every sample, which is how a model is born; in training the
    gradient of an open gate is that of its probability. `offset` (float32) is what the logits lie around, set by `aim`;
    `bias` (float32) is added to them in evaluation, by calibration. Larger computes more.

    The policy's logits are standardised over the batch, so how often a gate is open follows from `offset` and a learned
    `shift`, and what the policy reads decides for which samples.

    Args:
        policy: Maps features to logits: `[..., D]` for D binary decisions a row (or `[...]` for one), `[..., K]` for a
            route; or to a tuple of the logits and further tensors (the state of a recurrent policy), which the gate
            returns too.
        estimator: How training decides.
        routes: K for a choice of one of K arms, ordered from the cheapest to the full one; 0 for binary decisions.
        decisions: D; 0 for one, `[...]`.
        standardise: Leave it out where a batch holds no fair sample of the rows, as the steps of a sequence one by one.
    """

    enabled: Tensor
    bias: Tensor
    offset: Tensor

    alone: ClassVar[bool] = True
    """Whether a decision follows from its own logits and no other's."""

    def __init__(
        self,
        policy: nn.Module,
        *,
        estimator: Estimator,
        routes: int = 0,
        decisions: int = 0,
        standardise: bool = True,
    ) -> None:
        super().__init__()
        if routes < 0 or routes == 1:
            raise ArgumentError("routes", found=routes, expected="0 for binary decisions, or at least 2 arms")
        self.policy = policy
        self.estimator = estimator
        self.routes = routes
        self.register_buffer("enabled", torch.tensor(False))
        self.register_buffer("bias", torch.tensor(0.0))
        self.register_buffer("offset", torch.tensor(OPEN_LOGIT))
        if routes:
            self.aim(0.9)
        columns = tuple(n for n in (decisions, routes) if n)
        self.shift = nn.Parameter(torch.zeros(columns))
        self.standardise = Standardise(columns) if standardise else None

    @property
    def open_arm(self) -> int:
        """The arm that computes everything."""
        return self.routes - 1 if self.routes else 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Keep bias and offset in float32, to the bit, when the model is cast to another dtype."""
        before = {name: self.get_buffer(name) for name in ("bias", "offset")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != exact.dtype:
                self._buffers[name] = exact.to(moved.device)
        return self

    def aim(self, rate: float) -> None:
        """Set `offset` so that the gate, shifts and bias aside, is open at a rate.

        Args:
            rate: Share of rows that a binary decision opens; mean relative level of a route. In [0, 1].
        """
        if self.routes:
            self.offset.fill_(_route_offset(self.routes, round(rate, 2)))
            return
        p = torch.tensor(min(max(rate, 0.02), 0.98), dtype=torch.float64)
        self.offset.fill_(torch.logit(p) if self.standardise is None else SPREAD * torch.special.ndtri(p))

    def settle(self, logits: Tensor, counted: Tensor | None = None) -> Tensor:
        """From what the policy returned to the logits of decisions, before `bias`; same shape and dtype.

        Args:
            logits: Of the policy.
            counted: Which rows are there, bool; None: all.
        """
        found = logits.float() if self.standardise is None else self.standardise(logits, counted)
        return (found + self.shift.float() + self._dearer(self.offset, found)).to(logits.dtype)

    def _dearer(self, amount: Tensor, logits: Tensor) -> Tensor:
        """An amount that favours computing more: to each binary decision, or growing over the arms of a route."""
        return amount * torch.linspace(0, 1, self.routes, device=logits.device) if self.routes else amount

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Decide.

        Returns:
            decision: binary `[...]` as the logits, bool in evaluation, in training in [0, 1] and of the logits' dtype;
            a route `[...]` int64 in evaluation, weights `[..., K]` in training. Then the probability of the logits,
            as they are shaped, and whatever else the policy returned.
        """
        found: Any = self.policy(*inputs)
        logits, *rest = found if isinstance(found, tuple) else (found,)
        logits = self.settle(logits)
        if self.routes:
            return self._route(logits), torch.softmax(logits, -1), *rest
        return self._decide(logits), torch.sigmoid(logits), *rest

    def _decide(self, logits: Tensor) -> Tensor:
        if not self.training:
            return (logits.float() + self.bias > 0) | ~self.enabled
        p = torch.sigmoid(logits)
        return self._unless_open(logits, torch.ones_like(p) + (p - p.detach()), self.estimator.binary)

    def _route(self, logits: Tensor) -> Tensor:
        if not self.training:
            chosen = (logits.float() + self._dearer(self.bias, logits)).argmax(-1)
            return torch.where(self.enabled, chosen, self.open_arm)
        p = torch.softmax(logits, -1)
        full = F.one_hot(torch.full(p.shape[:-1], self.open_arm, device=p.device), self.routes).to(p.dtype)
        return self._unless_open(logits, full + (p - p.detach()), self.estimator.categorical)

    def clear(self, results: Sequence[Tensor], margin: float) -> Tensor | None:
        """Which decisions of evaluation no change of the logits by up to a margin turns.

        Args:
            results: What the gate returned.
            margin: Of logits.

        Returns:
            Bool, as the decision; None where that cannot be told.
        """
        p = results[1]
        if not self.alone or p.dtype.itemsize < 4:
            return None
        if self.routes:
            first, second = (p.log() + self._dearer(self.bias, p)).topk(2, -1).values.unbind(-1)
            return first - second > 2 * margin
        # What rounding a probability does to its logit grows without bound towards 1.
        return (torch.logit(p) + self.bias).abs() > margin + torch.finfo(p.dtype).eps / (1 - p)

    def _unless_open(self, logits: Tensor, opened: Tensor, estimate: Callable[[Tensor], Tensor]) -> Tensor:
        """The estimate, or in a disabled gate the open arm, exactly, with the gradient of its probability."""
        if torch.compiler.is_compiling():
            return torch.where(self.enabled, estimate(logits), opened)
        # An open gate draws no random numbers, so that the static model's dropout draws the same as without it.
        return estimate(logits) if bool(self.enabled) else opened

    def extra_repr(self) -> str:
        kind = f"routes={self.routes}" if self.routes else "binary"
        return f"{kind}, enabled={bool(self.enabled)}, bias={float(self.bias):.4g}"


@functools.lru_cache
def _route_offset(routes: int, rate: float) -> float:
    """The offset at which independent standardised logits choose a mean relative level, by simulation."""
    noise = SPREAD * torch.randn(8192, routes, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(0, 1, routes)
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        found = float(levels[(noise + middle * levels).argmax(-1)].mean())
        low, high = (middle, high) if found < rate else (low, middle)
    return low
