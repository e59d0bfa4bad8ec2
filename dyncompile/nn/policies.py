"""Policies: what a gate decides by. Each gives logits of what to compute."""

from collections.abc import Callable

from torch import Tensor, nn

from dyncompile.errors import ArgumentError
from dyncompile.nn.heads import Feature, Pool


class FeedForwardPolicy(nn.Module):
    """Pool, normalise, two layers (the feed-forward gate of SkipNet, arXiv 1711.09485, and ConvNet-AIG, 1711.11503).

    Args:
        feature: What it reads.
        hidden: Width between the layers.
        outputs: Logits per row, `[N, outputs]`; 0 for one, `[N]`.
    """

    def __init__(self, feature: Feature, hidden: int, outputs: int = 0) -> None:
        super().__init__()
        self.pool = Pool(feature)
        self.norm = _norm(feature.channels)
        self.inner = nn.Linear(feature.channels, hidden)
        self.outer = last_layer(hidden, outputs)
        self.squeeze = outputs == 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for features and, where they have one, their mask `[N, L]`."""
        logits = self.outer(self.inner(self.norm(self.pool(x, mask))).relu())
        return logits.squeeze(-1) if self.squeeze else logits  # type: ignore[no-any-return]


class RecurrentCore(nn.Module):
    """What the gates of a recurrent policy share: an LSTM cell that runs from gate to gate, and the layer after it.

    Args:
        hidden: Width of what goes in and of the state.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(hidden, hidden)
        self.outer = last_layer(hidden)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logit `[N]` and next state for what a gate saw, `[N, hidden]`."""
        h, c = self.cell(x, state)
        return self.outer(h).squeeze(-1), h, c


class RecurrentPolicy(nn.Module):
    """One gate of a recurrent policy (SkipNet, arXiv 1711.09485): its own projection into the shared core.

    Args:
        feature: What it reads.
        core: Shared with the other gates.
    """

    def __init__(self, feature: Feature, core: RecurrentCore) -> None:
        super().__init__()
        self.pool = Pool(feature)
        self.norm = _norm(feature.channels)
        self.project = nn.Linear(feature.channels, core.cell.input_size)
        self.core = core
        self.masked = feature.masked

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and state.

        Args:
            x: Features.
            rest: Their mask `[N, L]` where they have one, then `h` and `c` of the gate before, `[N, hidden]`;
                the first gate has none.

        Returns:
            Logits `[N]`, then `h` and `c`.
        """
        mask, state = (rest[0], rest[1:]) if self.masked else (None, rest)
        seen = self.project(self.norm(self.pool(x, mask)))
        return self.core(seen, (state[0], state[1]) if state else None)  # type: ignore[no-any-return]


class ConvolutionalPolicy(nn.Module):
    """A small strided convolutional network over a model's input (as the policy network of BlockDrop, 1711.08393).

    A first layer leaves at most about 16 positions along each dim, two more halve them, then mean and projection.

    Args:
        feature: What it reads: `[N, C, ...]` in any order of dims, with one to three dims to convolve over.
        width: Channels of the first layer; the next two have two and four times as many.
        outputs: Logits per sample, `[N, outputs]`.
    """

    def __init__(self, feature: Feature, width: int, outputs: int) -> None:
        super().__init__()
        self.dims = (feature.batch_dim, feature.channel_dim)
        sizes = [size for dim, size in enumerate(feature.shape) if dim not in self.dims]
        if not 1 <= len(sizes) <= 3:
            raise ArgumentError(
                "features", found=f"{list(feature.shape)}", expected="one to three dims to convolve over"
            )
        convolution: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
        stride = tuple(max(2, size // 16) for size in sizes)
        kernel = tuple(max(3, step) for step in stride)
        padding = tuple(1 if k > s else 0 for k, s in zip(kernel, stride, strict=True))
        self.layers = nn.Sequential(
            convolution(feature.channels, width, kernel, stride, padding),
            nn.GroupNorm(1, width),
            nn.ReLU(),
            convolution(width, 2 * width, 3, 2, 1),
            nn.GroupNorm(1, 2 * width),
            nn.ReLU(),
            convolution(2 * width, 4 * width, 3, 2, 1),
            nn.GroupNorm(1, 4 * width),
            nn.ReLU(),
        )
        self.outer = last_layer(4 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for an input of the shape that the feature tells."""
        return self.outer(self.layers(x.movedim(self.dims, (0, 1))).flatten(2).mean(-1))  # type: ignore[no-any-return]


def _norm(channels: int) -> nn.Module:
    """Over the channels of a row where that leaves something to see: one would be 0, of two only their order stays."""
    return nn.LayerNorm(channels) if channels > 2 else nn.Identity()


def last_layer(width: int, outputs: int = 0) -> nn.Linear:
    """The last layer of a policy: `outputs` logits, or 0 for one; a gate shifts them, so it has no bias."""
    return nn.Linear(width, max(outputs, 1), bias=False)
