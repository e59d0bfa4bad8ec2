"""Policies that look at single frames of a sequence."""

import torch
from torch import Tensor, nn

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


class Admission(nn.Module):
    """Which frames enter what lies before a recurrent layer: those whose step happens, and in training all.

    A gate learns from what a skipped frame would have brought, so in training there is something to see.
    """

    def forward(self, decision: Tensor) -> Tensor:
        """`[R]` decisions; in training ones, without a gradient."""
        return torch.ones_like(decision) if self.training else decision
