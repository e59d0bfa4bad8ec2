"""A gate: a policy that reads features, how its choice is made differentiable, and a knob for calibration."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.errors import ArgumentError
from dyncompile.nn.estimators import Estimator

OPEN_LOGIT = 2.0
"""Logit that a new policy starts from: open for nine samples of ten, as ConvNet-AIG (arXiv 1711.11503) starts."""


class Gate(nn.Module):
    """Decides what is computed.

    Buffers: `enabled` (bool): a disabled gate is open for every sample, which is how a model is born; in training the
    gradient of an open gate is that of its probability. `bias` (float32) is added to the logits in evaluation, by
    calibration: larger computes more.

    Args:
        policy: Maps features to logits: `[..., D]` for D binary decisions a row (or `[...]` for one), `[..., K]` for a
            route; or to a tuple of the logits and further tensors (the state of a recurrent policy), which the gate
            returns too.
        estimator: How training decides.
        routes: K for a choice of one of K arms, ordered from the cheapest to the full one; 0 for binary decisions.
    """

    enabled: Tensor
    bias: Tensor

    def __init__(self, policy: nn.Module, *, estimator: Estimator, routes: int = 0) -> None:
        super().__init__()
        if routes < 0 or routes == 1:
            raise ArgumentError("routes", found=routes, expected="0 for binary decisions, or at least 2 arms")
        self.policy = policy
        self.estimator = estimator
        self.routes = routes
        self.register_buffer("enabled", torch.tensor(False))
        self.register_buffer("bias", torch.tensor(0.0))

    @property
    def open_arm(self) -> int:
        """The arm that computes everything."""
        return self.routes - 1 if self.routes else 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Keep the bias in float32, to the bit, when the model is cast to another dtype."""
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != before.dtype:
            self.bias = before.to(self.bias.device)
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Decide.

        Returns:
            decision: binary `[...]` as the logits, bool in evaluation, in training in [0, 1] and of the logits' dtype;
            a route `[...]` int64 in evaluation, weights `[..., K]` in training. Then the probability of the logits,
            as they are shaped, and whatever else the policy returned.
        """
        found: Any = self.policy(*inputs)
        logits, *rest = found if isinstance(found, tuple) else (found,)
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
            dearer = torch.linspace(0, 1, self.routes, device=logits.device)
            chosen = (logits.float() + self.bias * dearer).argmax(-1)
            return torch.where(self.enabled, chosen, self.open_arm)
        p = torch.softmax(logits, -1)
        full = F.one_hot(torch.full(p.shape[:-1], self.open_arm, device=p.device), self.routes).to(p.dtype)
        return self._unless_open(logits, full + (p - p.detach()), self.estimator.categorical)

    def _unless_open(self, logits: Tensor, opened: Tensor, estimate: Callable[[Tensor], Tensor]) -> Tensor:
        """The estimate, or in a disabled gate the open arm, exactly, with the gradient of its probability."""
        if torch.compiler.is_compiling():
            return torch.where(self.enabled, estimate(logits), opened)
        # An open gate draws no random numbers, so that the static model's dropout draws the same as without it.
        return estimate(logits) if bool(self.enabled) else opened

    def extra_repr(self) -> str:
        kind = f"routes={self.routes}" if self.routes else "binary"
        return f"{kind}, enabled={bool(self.enabled)}, bias={float(self.bias):.4g}"
