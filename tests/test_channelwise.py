"""`channel_gate(granularity="channel")`: any of the channels is left out."""

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.errors import ArgumentError
from dyncompile.kernel_costs import KernelCosts, assumed
from dyncompile.passes import Refusal
from dyncompile.passes.channel_gate import ChannelGate
from dyncompile.shapes import flop_counter
from dyncompile.testing import forced


class NormAct(nn.BatchNorm2d):
    """A norm that ends in an activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Block(nn.Module):
    """A convolution, a depthwise one, and squeeze-and-excitation between: all of one group."""

    def __init__(self, width, hidden):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), NormAct(hidden))
        self.spatial = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden))
        self.drop = nn.Dropout(0.1)
        self.project = nn.Sequential(nn.Conv2d(hidden, width, 1), nn.BatchNorm2d(width))

    def forward(self, x):
        return x + self.project(self.drop(self.spatial(self.expand(x)).relu()))


def images():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Block(8, 24),
        Block(8, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def vectors():
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 32), nn.PReLU(32), nn.Linear(32, 4))


MODELS = {"images": (images, (3, 8, 8)), "vectors": (vectors, (12,))}


@pytest.fixture(params=MODELS)
def model(request, device):
    torch.manual_seed(0)
    make, shape = MODELS[request.param]
    return make().to(device), lambda n: torch.randn(n, *shape, device=device)


def convert(model, inputs, **options):
    torch.manual_seed(1)
    dyn = dc.dynamize(
        model, ChannelGate(granularity="channel", worth=0.0, hidden=2, **options), example_inputs=inputs(2)
    )
    for module in dyn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return dyn


def enabled(dyn, inputs):
    """Gates that open for half of the samples: their policies have seen some."""
    for gate in dyn.gates.values():
        gate.aim(0.5)
        gate.standardise.momentum = 1.0
    dyn.train()
    dyn.trace(inputs(256))
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    return dyn.eval()


def test_exact_at_birth(model):
    static, inputs = model
    dyn = convert(static, inputs)
    assert next(iter(dyn.gates)) == "channels0"
    for training in (True, False):
        static.train(training)
        dyn = convert(static, inputs).train(training)
        static.load_state_dict(dyn.static().state_dict())
        x = inputs(5)
        torch.manual_seed(3)
        expected = static(x)
        torch.manual_seed(3)
        assert torch.equal(dyn(x), expected)


@pytest.mark.parametrize("keep", [None, 0.25])
def test_lowered_equals_reference_and_computes_open_channels_only(model, keep):
    static, inputs = model
    dyn = enabled(convert(static, inputs, keep=keep), inputs)
    fast = dc.lower(dyn, backend="eager", decline=False)
    for batch in (1, 2, 7, 33):
        for calls in (0.0, 1e12):  # each sample by itself where open channels differ; all together
            x = inputs(batch)
            costs = KernelCosts(call=calls, unit=1.0, gathered=1.0)
            with torch.no_grad(), flop_counter() as counter, assumed(costs):
                output = fast(x)
            with torch.no_grad():
                trace = dyn.trace(x)
            torch.testing.assert_close(output, trace.output, rtol=1e-5, atol=1e-5)
            expected = float(trace.cost.double().sum()) * dyn.cost_model().static
            if calls and batch > 1:
                assert (
                    expected
                    <= counter.get_total_flops()
                    <= batch * sum(dyn.cost_model().weights) * dyn.cost_model().static
                )
            else:
                assert counter.get_total_flops() == pytest.approx(expected, rel=1e-5)
        for decision in trace.decisions.values():
            kept = decision.view(batch, -1).float().mean(1)
            assert keep is None or torch.allclose(kept, torch.full_like(kept, keep), atol=0.02)


def test_a_closed_channel_does_not_matter(model):
    static, inputs = model
    dyn = convert(static, inputs)
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    x, first = inputs(4), next(iter(dyn.gates))
    shape = dyn.eval().trace(x).decisions[first].view(4, -1).shape
    shut = torch.zeros(shape, dtype=torch.bool, device=x.device)
    shut[:, 1::2] = True
    weight = next(m for m in dyn.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.shape[0] == shape[1])
    for training in (False, True):
        dyn.train(training)
        with torch.no_grad(), forced(dyn, {first: shut.flatten(), **{n: 1.0 for n in dyn.gates if n != first}}):
            found = []
            for row in (0, 1):  # a closed channel, an open one
                kept = weight.weight.clone()
                torch.manual_seed(2)
                before = dyn(x)
                weight.weight[row] += 1
                torch.manual_seed(2)
                found.append(torch.allclose(dyn(x), before, atol=1e-6))
                weight.weight.copy_(kept)
        assert found == [True, False]


def test_gates_learn(model):
    static, inputs = model
    dyn = convert(static, inputs).train()
    for enable in (False, True):
        for gate in dyn.gates.values():
            gate.enabled.fill_(enable)
        dyn.zero_grad()
        trace = dyn.trace(inputs(6))
        (trace.final.square().mean() + trace.cost.mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dyn.gates.parameters())


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: (nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)), (8,), "normalises each channel by the others"),
        (
            lambda: (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 3, 1)),
            (3, 4, 4),
            "works across its channels",
        ),
    ],
)
def test_what_cannot_be_left_out_alone_is_refused(make, shape, reason, device):
    model = nn.Sequential(*make(), nn.Flatten(), nn.LazyLinear(4)).to(device)
    x = torch.randn(2, *shape, device=device)
    model(x)
    found = ChannelGate(granularity="channel", worth=0.0, hidden=1).sites(capture(model, (x,)))
    assert any(isinstance(site, Refusal) and reason in site.reason for site in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "each"}, "`granularity`: found 'each'; expected 'levels' or 'channel'"),
        ({"keep": 0.5}, "`keep`: found 0.5; expected a share"),
        ({"granularity": "channel", "keep": 1.0}, "`keep`: found 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        ChannelGate(**options)
