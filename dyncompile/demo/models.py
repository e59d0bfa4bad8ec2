"""The static models of the demo: residual networks and a vision transformer for small images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.errors import ArgumentError


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut: `[N, C, H, W]` -> `[N, K, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the two convolutions to the shortcut."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network for CIFAR (arXiv 1512.03385, section 4.2).

    Three stages of blocks at widths w, 2w and 4w; projection shortcuts where the width changes.

    Args:
        depth: Number of weighted layers, 6n + 2: 8, 14, 20, 32, 44, 56, ...
        width: Channels of the first stage; 16 in the paper.
        classes: Number of classes.
        in_channels: Channels of the input images.

    Shapes:
        `[N, in_channels, H, W]` -> logits `[N, classes]`, any H, W >= 4.

    Raises:
        ArgumentError: The depth is not 6n + 2, or a size is not positive.
    """

    def __init__(self, depth: int = 20, *, width: int = 16, classes: int = 10, in_channels: int = 3) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ArgumentError("depth", found=depth, expected="6n + 2 with n >= 1, such as 20")
        for name, value in (("width", width), ("classes", classes), ("in_channels", in_channels)):
            if value < 1:
                raise ArgumentError(name, found=value, expected="at least 1")
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for index in range(depth // 6):
                stride = 2 if stage and not index else 1
                blocks.append(Block(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of images `[N, in_channels, H, W]`."""
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def resnet20(*, width: int = 16, classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20 for small images (arXiv 1512.03385, section 4.2)."""
    return ResNet(20, width=width, classes=classes, in_channels=in_channels)


class VisionTransformer(nn.Module):
    """A small vision transformer (arXiv 2010.11929): patches, pre-norm encoder layers, the mean of the tokens.

    Args:
        size: Height and width of the images, a multiple of `patch`.
        patch: Height and width of a patch.
        width: Channels of a token, a multiple of `heads`.
        depth: Number of encoder layers.
        heads: Of attention.
        classes: Number of classes.
        in_channels: Channels of the input images.

    Shapes:
        `[N, in_channels, size, size]` -> logits `[N, classes]`.

    Raises:
        ArgumentError: A size is no multiple of what it must be one of.
    """

    def __init__(
        self,
        size: int = 28,
        *,
        patch: int = 4,
        width: int = 96,
        depth: int = 6,
        heads: int = 4,
        classes: int = 10,
        in_channels: int = 1,
    ) -> None:
        for name, value, of in (("size", size, patch), ("width", width, heads)):
            if value % of:
                raise ArgumentError(name, found=value, expected=f"a multiple of {of}")
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.position = nn.Parameter(torch.empty(1, (size // patch) ** 2, width).normal_(std=0.02))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of images `[N, in_channels, size, size]`."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.fc(self.norm(x.mean(1)))
        return logits
