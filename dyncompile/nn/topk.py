"""A gate that opens as many arms for every row."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.errors import ArgumentError
from dyncompile.nn.estimators import Estimator, Reinforce
from dyncompile.nn.gates import Gate


class TopKGate(Gate):
    """Opens k of D arms for every row: the router of sparsely gated experts (arXiv 1701.06538).

    Training draws k times, without putting back, by the estimator of one choice of many. A row costs the same as any
    other, so `bias` has no effect.

    Args:
        policy: Maps features to logits `[..., D]`.
        estimator: How one of D is drawn; "reinforce" is refused, since the probability of a set of draws is not the
            product of its members'.
        k: How many, from 1 to D - 1.
        decisions: D.
    """

    alone = False

    def __init__(self, policy: nn.Module, *, estimator: Estimator, k: int, decisions: int) -> None:
        super().__init__(policy, estimator=estimator, decisions=decisions)
        if isinstance(estimator, Reinforce):
            raise ArgumentError("estimator", found="'reinforce'", expected="another one with top_k")
        self.k = k

    @property
    def share(self) -> float:
        """K / D."""
        return self.k / self.shift.shape[0]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Decide: `[..., D]` with k ones a row; and how often k draws would take each, `[..., D]`, at most 1."""
        logits = self.settle(self.policy(*inputs))
        return self._decide(logits), (self.k * torch.softmax(logits, -1)).clamp(max=1)

    def _decide(self, logits: Tensor) -> Tensor:
        if not self.training:
            # Of equal ones the first, whatever runs this: which of them `topk` finds is up to the runtime.
            least = logits.topk(self.k, -1).values[..., -1:]
            above, level = logits > least, (logits == least).long()
            room = self.k - above.long().sum(-1, keepdim=True)
            return above | ((level > 0) & (level.cumsum(-1) <= room)) | ~self.enabled
        p = torch.softmax(logits, -1)
        return self._unless_open(logits, torch.ones_like(p) + (p - p.detach()), self._draw)

    def _draw(self, logits: Tensor) -> Tensor:
        drawn = torch.zeros_like(logits)
        gone = torch.zeros_like(logits, dtype=torch.bool)
        for _ in range(self.k):
            one = self.estimator.categorical(logits.masked_fill(gone, float("-inf")))
            drawn = drawn + one
            gone = gone | F.one_hot(one.argmax(-1), logits.shape[-1]).bool()
        return drawn.clamp(max=1)

    def extra_repr(self) -> str:
        return f"k={self.k}, enabled={bool(self.enabled)}"
