"""The layout in which static models are trained."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from dyncompile.demo.train import training_layout

# Weight gradients, in a process of its own, for it dies where oneDNN writes behind its buffer.
STEPS = """
import torch
from torch import nn
from dyncompile.demo.train import training_layout
torch.set_num_threads(1)
for narrow in (1, 3, 4, 6):
    model = nn.Sequential(nn.Conv2d(narrow, 8, 1, stride=2, bias=False))
    layout = training_layout(model)
    model.to(memory_format=layout)
    kept = []
    for _ in range(30):
        model(torch.randn(128, narrow, 28, 28).to(memory_format=layout)).sum().backward()
        kept.append([torch.empty(narrow * 8 + size) for size in range(20)])
"""


@pytest.mark.parametrize(
    ("layer", "layout"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(64, 64, 1, stride=2, groups=8), torch.contiguous_format),
        (nn.Conv2d(4, 8, 3, stride=2), torch.channels_last),
        (nn.Conv2d(4, 8, 1), torch.channels_last),
        (nn.Conv2d(16, 8, 1, stride=2), torch.channels_last),
    ],
)
def test_narrow_strided_projections_are_not_trained_channels_last(layer, layout):
    assert training_layout(nn.Sequential(layer)) == layout


def test_narrow_strided_projections_can_be_trained():
    subprocess.run([sys.executable, "-c", STEPS], check=True, timeout=120)
