"""Policies that look at single frames of a sequence, and how they share out the steps that are kept."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.capture.cells import inside
from dyncompile.nn.estimators import Estimator
from dyncompile.nn.gates import Gate
from dyncompile.nn.heads import Feature
from dyncompile.nn.policies import ConvolutionalPolicy, last_layer


class FramePolicy(nn.Module):
    """Reads each frame alone, and says how much it is wanted.

    Vectors go through two layers; feature maps and images `[C, L]`, `[C, H, W]` or `[C, D, H, W]` through a small
    convolutional network.

    Args:
        shape: Of one frame.
        hidden: Width of the first layer.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        if len(shape) > 1:
            feature = Feature(shape=(1, *shape), batch_dim=0, channel_dim=1)
            self.layers: nn.Module = ConvolutionalPolicy(feature, hidden, 1)
        else:
            self.layers = nn.Sequential(nn.Linear(shape[0], hidden), nn.ReLU(), last_layer(hidden, 1))

    def forward(self, frames: Tensor) -> Tensor:
        """Logits `[R]` for frames `[R, ...]`."""
        return self.layers(frames).squeeze(-1)  # type: ignore[no-any-return]


class SequencePolicy(nn.Module):
    """`FramePolicy` for the steps of sequences.

    Args:
        width: D.
        hidden: Width between the layers.
        batch_first: Whether sequences are `[N, T, D]`, else `[T, N, D]`.
    """

    def __init__(self, width: int, hidden: int, *, batch_first: bool) -> None:
        super().__init__()
        self.frame = FramePolicy((width,), hidden)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N * T]`, the steps of a sample next to each other."""
        rows = x if self.batch_first else x.transpose(0, 1)
        return self.frame(rows.flatten(0, 1))  # type: ignore[no-any-return]


class PacedGate(Gate):
    """Decides for the steps of sequences ahead; in evaluation it keeps as many steps as training does on average.

    Probabilities add up along a sequence, and a step is kept where the sum passes the next whole number (rounded; Skip
    RNN, arXiv 1708.06834, accumulates likewise). Where a sequence looks the same all along, a decision step by step
    would keep all of it or nothing; this keeps every third step at a probability of 1/3. At 0 and 1 both agree.

    Args:
        policy: Maps features to logits `[N * T]`, the steps of a sample next to each other.
        estimator: How training decides.
        steps: T.
    """

    alone = False

    def __init__(self, policy: nn.Module, *, estimator: Estimator, steps: int) -> None:
        super().__init__(policy, estimator=estimator)
        self.steps = steps

    def forward(self, features: Tensor, real: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Decide.

        Args:
            features: What the policy reads.
            real: `[N * T]` bool, of packed sequences the steps that are there; None: all. No other is kept, has a
                probability above 0, or has a part in the statistics of the logits.

        Returns:
            Decision and probability, `[N * T]` each.
        """
        if real is None:
            return super().forward(features)
        logits = self.settle(self.policy(features), real)
        return inside(self._decide(logits), real), inside(torch.sigmoid(logits), real)

    def _decide(self, logits: Tensor) -> Tensor:
        if self.training:
            return super()._decide(logits)
        # In float64, so that a sum along a long sequence rounds alike however it is computed.
        p = torch.sigmoid(logits.float() + self.bias).double().view(-1, self.steps)
        passed = (p.cumsum(1) + 0.5).floor()
        kept = passed - F.pad(passed[:, :-1], (1, 0)) > 0
        return kept.flatten() | ~self.enabled

    def extra_repr(self) -> str:
        return f"steps={self.steps}, {super().extra_repr()}"


class Admission(nn.Module):
    """Which frames enter what lies before a recurrent layer: those whose step happens, and in training all.

    A gate learns from what a skipped frame would have brought, so in training there is something to see.
    """

    def forward(self, decision: Tensor) -> Tensor:
        """`[R]` decisions; in training ones, without a gradient."""
        return torch.ones_like(decision) if self.training else decision
