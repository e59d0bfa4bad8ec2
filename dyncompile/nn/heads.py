"""Heads that map the features at a cut point to the model's kind of output."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncompile.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """What a head reads.

    Attributes:
        shape: Sizes for a batch of one.
        batch_dim: Where the samples are.
        channel_dim: Where the channels are.
        pool: How the other dims become one vector: `mean`, `cls` (first token) or `last` (last
            token or step).
        masked: A mask `[N, L]` of the tokens follows as a further input.
        padding: The mask marks padding instead of tokens to keep.
    """

    shape: tuple[int, ...]
    batch_dim: int
    channel_dim: int
    pool: str = "mean"
    masked: bool = False
    padding: bool = False

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[self.channel_dim]

    @property
    def spatial(self) -> bool:
        """Whether it is a feature map `[N, C, H, W]`."""
        return len(self.shape) == 4 and self.channel_dim == 1 and self.batch_dim == 0


class Pool(nn.Module):
    """Features of one cut point to one vector a sample, `[N, C]`."""

    def __init__(self, feature: Feature) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool `x`, of the shape the feature tells, over the tokens that a mask `[N, L]` keeps."""
        f = self.feature
        if x.dim() > 2 and mask is None and f.pool == "mean":
            pooled = x.mean([i for i in range(x.dim()) if i not in (f.batch_dim, f.channel_dim)])
            return pooled if f.batch_dim < f.channel_dim else pooled.t()
        x = x.movedim((f.batch_dim, f.channel_dim), (0, -1))
        if x.dim() == 2:
            return x
        x = x.flatten(1, -2)
        if f.pool == "cls":
            return x[:, 0]
        if mask is None:
            return x[:, -1]
        keep = ((mask == 0) if f.padding else (mask != 0)).to(x.dtype)
        if f.pool == "last":
            position = torch.arange(keep.shape[1], device=x.device, dtype=x.dtype) * keep
            index = position.argmax(1)[:, None, None].expand(-1, 1, x.shape[-1])
            return x.gather(1, index)[:, 0]
        return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)


class VectorHead(nn.Module):
    """Pool every feature, concatenate, normalise, project: `[N, K]`.

    A mixer (a small convolution) precedes the pooling of the last feature. With `learned` a second projection gives
    the logit of a learned confidence.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        classes: int,
        *,
        mixer: nn.Module | None,
        squeeze: bool,
        learned: bool,
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(Pool(feature) for feature in features)
        self.mixer = mixer
        self.masked = [feature.masked for feature in features]
        width = sum(feature.channels for feature in features)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, classes)
        self.certainty = nn.Linear(width, 1) if learned else None
        self.squeeze = squeeze

    def forward(self, *inputs: Tensor) -> Any:
        """Predict from each feature, followed by its mask where it has one."""
        queue = list(inputs)
        pooled = []
        for i, (pool, masked) in enumerate(zip(self.pools, self.masked, strict=True)):
            x = queue.pop(0)
            mask = queue.pop(0) if masked else None
            if self.mixer is not None and i == len(self.pools) - 1:
                x = self.mixer(x)
            pooled.append(pool(x, mask))
        vector = self.norm(torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0])
        prediction = self.project(vector)
        prediction = prediction.squeeze(1) if self.squeeze else prediction
        return prediction if self.certainty is None else (prediction, self.certainty(vector).squeeze(1))


class TokenHead(nn.Module):
    """A prediction for every token: `[N, L, D]` to `[N, L, K]`.

    With `learned` the logits of confidences `[N, L]` too.
    """

    def __init__(self, feature: Feature, classes: int, *, learned: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature.channels)
        self.project = nn.Linear(feature.channels, classes)
        self.certainty = nn.Linear(feature.channels, 1) if learned else None

    def forward(self, x: Tensor) -> Any:
        """Predict for every token."""
        x = self.norm(x)
        prediction = self.project(x)
        return prediction if self.certainty is None else (prediction, self.certainty(x).squeeze(2))


class DenseHead(nn.Module):
    """A prediction for every pixel: `[N, C, h, w]` to `[N, K, H, W]`, interpolated.

    With `learned` the logit of a confidence `[N]` too.
    """

    def __init__(
        self, feature: Feature, classes: int, size: tuple[int, int], *, mixer: nn.Module | None, learned: bool
    ) -> None:
        super().__init__()
        # A mixer ends in a norm. Without any, features of deep residual layers are too large to learn from.
        self.mixer = nn.BatchNorm2d(feature.channels) if mixer is None else mixer
        self.project = nn.Conv2d(feature.channels, classes, 1)
        self.certainty = nn.Conv2d(feature.channels, 1, 1) if learned else None
        self.size = size
        self.last = feature.channel_dim != 1

    def forward(self, x: Tensor) -> Any:
        """Predict for every pixel."""
        x = self.mixer(x.movedim(-1, 1) if self.last else x)
        prediction = nn.functional.interpolate(self.project(x), self.size, mode="bilinear", align_corners=False)
        return prediction if self.certainty is None else (prediction, self.certainty(x).flatten(1).mean(1))


class ConvMixer(nn.Module):
    """The small convolution of a `conv` head: 3x3, batch norm, ReLU; stride 2 where the map is large."""

    def __init__(self, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        stride = 2 if min(size) >= 8 else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=_groups(channels), bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours."""
        return self.norm(self.conv(x)).relu()  # type: ignore[no-any-return]


def _groups(channels: int) -> int:
    """Groups that keep the head small: about 16 channels each."""
    return math.gcd(channels, max(channels // 16, 1))


def build_head(
    kind: str,
    features: Sequence[Feature],
    output: tuple[int, ...],
    class_dim: int,
    *,
    learned: bool = False,
) -> nn.Module:
    """Build a head for an output shape.

    Args:
        kind: `linear` (pool, norm, linear) or `conv` (a small convolution before it).
        features: What it reads; only the last is used for token and pixel outputs.
        output: The prediction's sizes for a batch of one: `(1, K)`, `(1,)`, `(1, L, K)` or `(1, K,
            H, W)`.
        class_dim: Which of them are the classes.
        learned: Also predict the logit of a confidence.

    Returns:
        The head; called with each feature, followed by its mask where it has one.

    Raises:
        ArgumentError: No head of that kind for these shapes.
    """
    last = features[-1]
    if kind not in ("linear", "conv"):
        raise ArgumentError("head", found=repr(kind), expected="'linear', 'conv' or 'clone'")
    mixer = ConvMixer(last.channels, last.shape[2:]) if kind == "conv" and last.spatial else None
    if kind == "conv" and mixer is None:
        raise ArgumentError("head", found=f"'conv' on features {list(last.shape)}", expected="features [N, C, H, W]")
    if len(output) <= 2:
        classes = output[1] if len(output) == 2 else 1
        return VectorHead(features, classes, mixer=mixer, squeeze=len(output) == 1, learned=learned)
    if len(output) == 3 and len(last.shape) == 3 and last.shape[1] == output[1] and last.channel_dim == 2:
        return TokenHead(last, output[2], learned=learned)
    if len(output) == 4 and class_dim == 1 and len(last.shape) == 4:
        return DenseHead(last, output[1], (output[2], output[3]), mixer=mixer, learned=learned)
    raise ArgumentError(
        "head",
        found=f"features {list(last.shape)} and output {list(output)}",
        expected="tokens to tokens or pixels to pixels",
    )
