"""Policies that look at single frames of a sequence."""

import torch
from torch import Tensor, nn

from dyncompile.nn.gates import OPEN_LOGIT


class FramePolicy(nn.Module):
    """Reads each frame alone, and says how much it is wanted.

    Vectors go through two linear layers; feature maps and images `[C, L]`, `[C, H, W]` or `[C, D, H, W]` first through
    two strided convolutions and a mean.

    Args:
        shape: Of one frame.
        hidden: Width between the layers.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.maps = nn.Sequential()
        if sides:
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sides) - 1]
            for width in (channels, hidden):
                self.maps.append(kind(width, hidden, 3, stride=2, padding=1)).append(nn.ReLU())
            channels = hidden
        self.inner = nn.Linear(channels, hidden)
        self.outer = nn.Linear(hidden, 1)
        nn.init.constant_(self.outer.bias, OPEN_LOGIT)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits `[R]` for frames `[R, ...]`."""
        features = self.maps(frames).flatten(2).mean(2) if len(self.maps) else frames
        return self.outer(self.inner(features).relu()).squeeze(-1)  # type: ignore[no-any-return]


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
