"""A small model whose gates decide as if trained, and data, for tests of calibration."""

import torch
from torch import nn

import dyncompile as dc


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.layers(x)


class Network(nn.Module):
    """Residual blocks on vectors."""

    def __init__(self, blocks=4, width=16, classes=3):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)))


def gated(strategy="layer_skip", *, enabled=True, seed=0, **options):
    """A model whose gates were switched on as if trained, and data."""
    torch.manual_seed(seed)
    dyn = dc.dynamize(Network(), strategy, example_inputs=torch.zeros(2, 8), **options)
    for gate in dyn.gates.values():
        for parameter in gate.parameters():  # untrained gates decide alike for all
            with torch.no_grad():
                parameter.add_(0.5 * torch.randn_like(parameter))
        gate.offset.fill_(0.0)
        gate.enabled.fill_(enabled)
    return dyn.eval(), (torch.randn(600, 8), torch.randint(0, 3, (600,)))


def settings_of(dyn):
    return {name: buffer.clone() for name, buffer in dyn.state_dict().items()}


def assert_unchanged(dyn, before):
    assert all(torch.equal(value, before[name]) for name, value in dyn.state_dict().items())
