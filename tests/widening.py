"""Models with channels to gate, shared by the tests of channel groups and channel gates."""

import torch
from torch import nn


class Basic(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Bottleneck(nn.Module):
    """A residual block of three convolutions, the middle one in groups."""

    def __init__(self, width=16, inner=8, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding="same", groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        h = self.bn1(self.conv1(x)).relu()
        h = self.bn2(self.conv2(h)).relu()
        return x + self.bn3(self.conv3(h))


class Inverted(nn.Module):
    """An inverted residual with a depthwise convolution and squeeze-and-excitation."""

    def __init__(self, width=8, inner=24):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.pool, self.squeeze, self.excite = nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)
        self.project, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.Hardswish()

    def forward(self, x):
        h = self.act(self.bn2(self.depth(self.act(self.bn1(self.expand(x))))))
        scale = self.excite(self.squeeze(self.pool(h)).relu()).sigmoid()
        return x + self.bn3(self.project(h * scale))


class NormAct(nn.BatchNorm2d):
    """A batch norm that ends in dropout and an activation, with a forward of its own, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class GroupNormAct(nn.GroupNorm):
    """A group norm that ends in an activation."""

    def __init__(self, groups, channels):
        super().__init__(groups, channels)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(super().forward(x))


class Ending(nn.Module):
    """A residual block whose norms end in activations."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), NormAct(width)
        self.conv2, self.gn2 = nn.Conv2d(width, width, 1), GroupNormAct(4, width)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 1), NormAct(width)

    def forward(self, x):
        return x + self.bn3(self.conv3(self.gn2(self.conv2(self.bn1(self.conv1(x))))))


class ConvNeXt(nn.Module):
    """A ConvNeXt block: channels move to the last dim and back."""

    def __init__(self, width=8):
        super().__init__()
        self.depth, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(0.5 * torch.ones(width, 1, 1))

    def forward(self, x):
        h = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(nn.functional.gelu(self.up(h))).permute(0, 3, 1, 2)


class Gated(nn.Module):
    """A gated linear unit: two layers make the channels that a third reads."""

    def __init__(self, width=8, inner=24):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Mixer(nn.Module):
    """An MLP over tokens: its hidden channels lie where the tokens did."""

    def __init__(self, tokens=6, width=8, inner=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(tokens, inner), nn.Linear(inner, tokens)

    def forward(self, x):
        h = self.norm(x).transpose(1, 2)
        return x + self.down(nn.functional.gelu(self.up(h))).transpose(1, 2)


def vision(*blocks, width=8):
    """A stem, blocks and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    )


def plain():
    """Convolutions in a row, group norm, a flattened map before a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.PReLU(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 4, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 5),
    )  # fmt: skip


def mlp():
    """Linear layers with norms between them."""
    return nn.Sequential(
        nn.Linear(12, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 4),
    )


class Pooled(nn.Module):
    """Blocks over tokens `[N, 6, 8]`, averaged."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.blocks(x).mean(1))


class Encoder(nn.Module):
    """A transformer layer, sequence first, with dropout."""

    def __init__(self):
        super().__init__()
        self.layer, self.fc = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.2), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.layer(x.transpose(0, 1)).mean(0))


def images(n):
    return torch.randn(n, 3, 8, 8)


def vectors(n):
    return torch.randn(n, 12)


def tokens(n):
    return torch.randn(n, 6, 8)


# Model, inputs, and for each gate the groups it narrows: their maker, into how many parts they are cut, their readers.
MODELS = {
    "basic": (
        lambda: vision(Basic(), Basic()),
        images,
        [[("1.conv1", 8, ["1.conv2"])], [("2.conv1", 8, ["2.conv2"])]],
    ),
    "bottleneck": (
        lambda: vision(Bottleneck(), width=16),
        images,
        [[("1.conv1", 8, ["1.conv2"]), ("1.conv2", 8, ["1.conv3"])]],
    ),
    "grouped": (lambda: vision(Bottleneck(groups=4), width=16), images, [[("1.conv1", 4, ["1.conv3"])]]),
    "inverted": (
        lambda: vision(Inverted()),
        images,
        [[("1.expand", 24, ["1.squeeze", "1.project"]), ("1.squeeze", 4, ["1.excite"])]],
    ),
    "ending": (
        lambda: vision(Ending()),
        images,
        [[("1.conv1", 8, ["1.conv2"]), ("1.conv2", 4, ["1.conv3"])]],
    ),
    "convnext": (lambda: vision(ConvNeXt()), images, [[("1.up", 32, ["1.down"])]]),
    "plain": (plain, images, [[("0", 4, ["4"]), ("4", 16, ["8"])]]),
    "mlp": (mlp, vectors, [[("0", 32, ["3"]), ("3", 32, ["6"])]]),
    "gated": (lambda: Pooled(Gated()), tokens, [[("blocks.0.gate", 24, ["blocks.0.down"])]]),
    "mixer": (lambda: Pooled(Mixer()), tokens, [[("blocks.0.up", 16, ["blocks.0.down"])]]),
    "encoder": (Encoder, tokens, [[("layer.linear1", 24, ["layer.linear2"])]]),
}


def settled(model):
    """The model, with batch norms that have seen data of another mean and variance than 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()
