"""What the tests of capture share: small models, and a capture that is compared bit for bit."""

import collections
import copy

import torch
from torch import nn

from dyncompile.capture import capture


def run(graph, *inputs, training=False, seed=1):
    graph.root.train(training)
    torch.manual_seed(seed)
    return graph.signature.unflatten(graph.run(inputs))


def assert_captured(model, *args, training=True, **options):
    """Capture, and compare with the model bit for bit on new data, in both modes."""
    inputs = [torch.randn_like(a) if a.is_floating_point() else a for a in args]
    graph = capture(model, args, **options)
    assert graph.mode == ("train" if training else "eval")
    for mode in (False, True) if training else (False,):
        twin = copy.deepcopy(model).train(mode)
        torch.manual_seed(1)
        expected = twin(*(x.clone() for x in inputs))
        actual = run(graph, *inputs, training=mode)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    return graph


def targets(graph):
    return [str(node.target) for node in graph.fx.nodes]


class Lambda(nn.Module):
    """A model of one function over its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def small_cnn():
    return nn.Sequential(
        collections.OrderedDict(
            conv=nn.Conv2d(3, 8, 3, padding=1),
            norm=nn.BatchNorm2d(8),
            act=nn.ReLU(inplace=True),
            drop=nn.Dropout(0.2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(8, 5),
        )
    )
