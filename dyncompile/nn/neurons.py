"""Groups of neurons: a gate that picks k of them, and what switches neurons off in training."""

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

    def __init__(self, policy: nn.Module, *, estimator: Estimator, k: int, decisions: int) -> None:
        super().__init__(policy, estimator=estimator, decisions=decisions)
        if isinstance(estimator, Reinforce):
            raise ArgumentError("estimator", found="'reinforce'", expected="another one with top_k")
        self.k = k

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Decide: `[..., D]` with k ones a row; and how often k draws would take each, `[..., D]`, at most 1."""
        logits = self.settle(self.policy(*inputs))
        return self._decide(logits), (self.k * torch.softmax(logits, -1)).clamp(max=1)

    def _decide(self, logits: Tensor) -> Tensor:
        if not self.training:
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(self.k, -1).indices, True)
            return chosen | ~self.enabled
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


class AllOpen(nn.Module):
    """Whether every group of a row is on: then the layer runs as a whole. In training it always does, masked."""

    def forward(self, decisions: Tensor) -> Tensor:
        """From decisions `[R, G]` to `[R]`."""
        return torch.ones_like(decisions[:, 0]).detach() if self.training else decisions.all(1)


class NeuronMask(nn.Module):
    """Multiplies each neuron with the decision of its group, in training; in evaluation nothing is done.

    Args:
        groups: The neurons of each group.
        batch_dim: The dim of the hidden value that the rows of the decisions lie along.
        channel_dim: The dim that its neurons lie along.
    """

    group_of: Tensor

    def __init__(self, groups: list[list[int]], batch_dim: int, channel_dim: int = -1) -> None:
        super().__init__()
        group_of = torch.empty(sum(map(len, groups)), dtype=torch.int64)
        for g, members in enumerate(groups):
            group_of[members] = g
        self.register_buffer("group_of", group_of, persistent=False)
        self.batch_dim, self.channel_dim = batch_dim, channel_dim

    def forward(self, hidden: Tensor, *decisions: Tensor) -> Tensor:
        """Mask `[..., R, ..., H, ...]` by the decisions of the groups, each `[R]`."""
        if not self.training:
            return hidden
        mask = torch.stack(decisions, -1).index_select(-1, self.group_of)
        shape = [1] * hidden.dim()
        shape[self.batch_dim], shape[self.channel_dim] = mask.shape
        return hidden * mask.view(shape).to(hidden.dtype)
