"""Models with feed-forward layers whose neurons are gated, shared by the tests of neuron gate."""

import copy
import functools

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.passes.neuron_gate import NeuronGate


class Encoder(nn.Module):
    """Tokens, with a mask of padding, to classes."""

    def __init__(self, *, batch_first=True, dropout=0.1, activation="relu"):
        super().__init__()
        options = {"batch_first": batch_first, "dropout": dropout, "activation": activation}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, **options) for _ in range(2))
        self.head = nn.Linear(16, 3)
        self.tokens = 1 if batch_first else 0

    def forward(self, x, padding):
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.head(x.mean(self.tokens))


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(12, 32, bias=False), nn.Linear(12, 32, bias=False)
        self.down = nn.Linear(32, 5, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """SwiGLU whose first two projections are one layer."""

    def __init__(self, cut=lambda y: y.chunk(2, -1), *, both=None):
        super().__init__()
        self.cut, self.both = cut, both or nn.Linear(12, 64)
        self.down = nn.Linear(32, 5)

    def forward(self, x):
        gate, up = self.cut(self.both(x))
        return self.down(nn.functional.silu(gate) * up)


class Transposed(nn.Module):
    """GPT-2's layer, as transformers have it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Pixels(nn.Module):
    """A block of a ConvNeXt."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.mix = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.first, self.second = nn.Conv2d(12, 32, 1, bias=bias), nn.Conv2d(32, 12, 1, bias=bias)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = x + self.second(nn.functional.gelu(self.first(self.mix(x))))
        return self.head(x.mean((2, 3)))


def tokens(n):
    padding = torch.zeros(n, 6, dtype=torch.bool)
    padding[::2, 4:] = True
    return torch.randn(n, 6, 16), padding


def sequence(n):
    x, padding = tokens(n)
    return x.transpose(0, 1).contiguous(), padding


def vectors(n):
    return (torch.randn(n, 12),)


def mlp(*between, width=40):
    return nn.Sequential(nn.Linear(12, width), *(between or [nn.ReLU(), nn.Dropout(0.2)]), nn.Linear(width, 5))


MODELS = {
    "encoder": (Encoder, tokens, 2),
    "sequence": (lambda: Encoder(batch_first=False, activation="gelu"), sequence, 2),
    "mlp": (mlp, vectors, 1),
    "gated": (Gated, vectors, 1),
    "packed": (Packed, vectors, 1),
    "images": (lambda: nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6), nn.Flatten(), nn.Linear(72, 3)),
               lambda n: (torch.randn(n, 3, 4, 6),), 1),
    "transposed": (lambda: nn.Sequential(Transposed(8, 40), nn.GELU(), Transposed(40, 6), nn.Flatten()),
                   lambda n: (torch.randn(n, 5, 8),), 1),
    "pixels": (Pixels, lambda n: (torch.randn(n, 12, 5, 4),), 1),
    "unbiased pixels": (lambda: Pixels(bias=False), lambda n: (torch.randn(n, 12, 5, 4),), 1),
    "signals": (lambda: nn.Sequential(nn.Conv1d(8, 32, 1), nn.ReLU(), nn.Conv1d(32, 6, 1), nn.Flatten()),
                lambda n: (torch.randn(n, 8, 5),), 1),
}  # fmt: skip
VARIANTS = [
    (model, options)
    for model in MODELS
    for options in (
        {"per": "sample", "split": "contiguous"},
        {"per": "sample", "split": "cluster"},
        {"per": "token", "split": "contiguous"},
        {"per": "token", "split": "cluster", "top_k": 2},
    )
    if (model, options["per"]) != ("sequence", "token")
    and (model not in ("pixels", "unbiased pixels", "signals") or options.get("top_k") or options["per"] == "sample")
]
VARIANT = pytest.mark.parametrize(("kind", "options"), VARIANTS)


@functools.cache
def conversion(kind, device, options):
    torch.manual_seed(0)
    make, inputs, _ = MODELS[kind]
    model = make().to(device).eval()
    strategy = NeuronGate(**{"groups": 4, "hidden": 4} | dict(options))
    batch_dims = {"x": 1} if kind == "sequence" else None
    return model, dc.dynamize(model, strategy, example_inputs=moved(inputs(2), device), batch_dims=batch_dims)


def converter(device):
    """Gives, by the name of a model, the model, converted, and what makes inputs of it."""

    def convert(kind, **options):
        model, dyn = copy.deepcopy(conversion(kind, device, tuple(options.items())))
        torch.manual_seed(0)
        return model, dyn, lambda n: moved(MODELS[kind][1](n), device)

    return convert


def moved(inputs, device):
    return tuple(t.to(device) for t in inputs)


def decisive(dyn):
    """Gates that are enabled and decide one thing for some samples, another for others."""
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
        with torch.no_grad():
            gate.policy.outer.weight.normal_(std=3)
            gate.offset.zero_()
