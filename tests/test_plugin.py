"""`torch.compile(model, backend="dyncompile")`."""

import pytest
import torch
import torch._dynamo.backends.inductor
from torch import nn

import dyncompile as dc


class Written(nn.Module):
    """Written by hand: a convolution of one channel, a select and a switch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.wide = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        self.small, self.large = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.conv(x).relu().mean((2, 3))
        h = dc.select(x[:, 0, 0, 0] > 0, h + self.wide(h), h)
        return self.head(dc.switch((x[:, 0, 0, 1] > 0).long(), self.small(h), self.large(h)))


@pytest.fixture
def written(device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Written().to(device).eval()
    return model, torch.compile(model, backend="dyncompile")


def images(n, device, taken=0.5):
    x = torch.randn(n, 1, 6, 6, device=device)
    x[:, 0, 0, :2] = -1
    x[: round(n * taken), 0, 0, :2] = 1
    return x


def test_equal_at_every_batch_size_and_after_the_weights_change(written, device):
    model, fast = written
    with torch.no_grad():
        for n in (5, 8, 1, 33):
            x = images(n, device)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        model.head.weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_skips(written, device, monkeypatch):
    ran = []
    forward = dc.lowering.LoweredModule.forward

    def watched(self, *args):
        found = forward(self, *args)
        ran.append(self.last_run)
        return found

    monkeypatch.setattr(dc.lowering.LoweredModule, "forward", watched)
    with torch.no_grad():
        written[1](images(16, device, taken=0.25))
    assert sorted(ran[-1].values()) == [4, 4, 12, 16]


def test_with_gradients_the_dense_reference_runs(written, device):
    model, fast = written
    x = images(8, device)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(fast(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_converted_model(device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    )
    x = torch.randn(9, 1, 6, 6, device=device)
    dyn = dc.dynamize(model.to(device), "early_exit", exits=1, example_inputs=x[:2]).eval()
    dyn.exits.exit0.enabled.fill_(True)
    with torch.no_grad():
        dyn.exits.exit0.threshold.fill_(dyn.trace(x).confidence["exit0"].median())
        found = torch.compile(dyn, backend="dyncompile")(x)
    torch.testing.assert_close(found, dyn(x), rtol=1e-4, atol=1e-5)


def test_samples_that_are_mixed_are_computed_densely_with_a_word(device):
    torch._dynamo.reset()

    def mixes(x):
        return dc.select(x[:, 0] > 0, x - x.mean(0), x)

    x = torch.randn(6, 3, device=device)
    with torch.no_grad(), pytest.warns(UserWarning, match="backend 'dyncompile' compiles densely"):
        found = torch.compile(mixes, backend="dyncompile")(x)
    torch.testing.assert_close(found, mixes(x))


def test_without_a_select_it_is_inductor(device, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("dyncompile.plugin._Skipping", None)  # calling it would be an error
    called = []
    inductor = torch._dynamo.backends.inductor.inductor
    monkeypatch.setattr("torch._dynamo.backends.inductor.inductor", lambda *a: called.append(a) or inductor(*a))
    model = nn.Linear(4, 2).to(device)
    x = torch.randn(3, 4, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="dyncompile")(x), model(x))
    assert len(called) == 1
