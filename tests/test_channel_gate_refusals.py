"""What channel gates refuse, and why: layers that cannot be narrowed or are not worth it, and options."""

import pytest
import torch
import widening
from torch import nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.errors import ArgumentError, PassError
from dyncompile.passes import Refusal
from dyncompile.passes.channel_gate import ChannelGate


@pytest.mark.parametrize(
    ("make", "inputs", "reason"),
    [
        (
            lambda: widening.vision(widening.Basic()),
            widening.images,
            "_0: its channels lie on a residual stream: `add` (add) ties those of `0`, `1.conv2`",
        ),
        (widening.plain, widening.images, "_8: `width0` narrows `8` and saves more"),
        (widening.plain, widening.images, "_11: its channels are an output of the model"),
        (
            lambda: nn.Sequential(nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 4)),
            widening.vectors,
            "_0: 2 parts are too few",
        ),
        (
            lambda: nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 4)),
            widening.vectors,
            "_0: a gate costs 448 FLOPs and the narrowest level saves 64",
        ),
        (
            lambda: nn.Sequential(nn.Linear(12, 32), nn.Softmax(1), nn.Linear(32, 4)),
            widening.vectors,
            "_0: `1` (Softmax) works across its channels",
        ),
    ],
)
def test_refusals(make, inputs, reason, device):
    graph = capture(make().to(device).eval(), (inputs(2).to(device),))
    found = list(ChannelGate(worth=0.0).sites(graph))
    refused = [f"{place.node}: {place.reason}" for place in found if isinstance(place, Refusal)]
    assert any(text.startswith(reason) for text in refused), refused


def test_a_gate_must_be_worth_it(device):
    model = nn.Sequential(
        nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 800), nn.Tanh(), nn.Flatten(), nn.Linear(800, 800)
    )
    options = {"levels": (0.5, 1.0), "chain": 1, "hidden": 1}
    with pytest.raises(PassError, match="the narrowest level saves 50 % of the model"):
        dc.dynamize(
            model.to(device), ChannelGate(worth=0.6, **options), example_inputs=torch.randn(2, 12, device=device)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (0.5, 0.25, 1.0)}, r"`levels`: found \(0.5, 0.25, 1.0\); expected at least two ascending shares"),
        ({"levels": (0.5,)}, "`levels`"),
        ({"levels": 4}, "`levels`: found 4"),
        ({"levels": (0.0, 1.0)}, "`levels`"),
        ({"chain": 0}, "`chain`: found 0; expected a whole number, at least 1"),
        ({"levels": (0.5, "1")}, "`levels`: found '1'; expected a number"),
        ({"worth": "a"}, "`worth`: found 'a'"),
        ({"granularity": "channel", "keep": "half"}, "`keep`: found 'half'"),
        ({"norm": "private"}, "`norm`: found 'private'"),
        ({"worth": 1.0}, "`worth`: found 1.0"),
        ({"hidden": True}, "`hidden`: found True"),
        ({"granularity": "channel", "levels": (0.5, 1.0)}, r"`levels`: found \(0.5, 1.0\) with granularity='channel'"),
        ({"granularity": "channel", "chain": 1}, "`chain`: found 1 with granularity='channel'; expected granularity="),
        ({"pool": "max"}, "`pool`: found 'max'"),
        ({"estimator": "none"}, "`estimator`: found 'none'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        ChannelGate(**options)
