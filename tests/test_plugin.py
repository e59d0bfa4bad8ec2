"""`torch.compile(model, backend="dyncompile")`."""

import contextlib
import copy

import pytest
import torch
import torch._dynamo.backends.inductor
from torch import nn

import dyncompile as dc
from dyncompile.graph import spec
from dyncompile.lowering import LoweredModule, lower


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


@pytest.mark.slow
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


@pytest.fixture
def lowered_runs(monkeypatch):
    """What each call of a lowered model ran."""
    ran = []
    forward = LoweredModule.forward

    def watched(self, *args):
        found = forward(self, *args)
        ran.append(self.last_run)
        return found

    monkeypatch.setattr(LoweredModule, "forward", watched)
    return ran


def test_skips(written, device, lowered_runs):
    with torch.no_grad():
        written[1](images(16, device, taken=0.25))
    assert sorted(lowered_runs[-1].values()) == [4, 4, 12, 16]


def test_what_is_made_of_weights_alone_crosses_no_segment(device, monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wide, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.register_buffer("variance", torch.rand(8) + 0.5)

        def forward(self, x):
            scale = torch.rsqrt(self.variance + 1e-5)
            h = self.first(x) * scale
            h = dc.select(x[:, 0] > 0, h + self.wide(h) * scale, h)
            return self.last(h * scale)

    torch._dynamo.reset()
    lowered = []
    forward = LoweredModule.forward
    monkeypatch.setattr(LoweredModule, "forward", lambda self, *args: (lowered.append(self), forward(self, *args))[1])
    model = Scaled().to(device).eval()
    x = torch.randn(8, 4, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="dyncompile")(x), model(x), rtol=1e-4, atol=1e-5)
    segments = list(lowered[0].plan.segments())
    assert len(segments) == 3
    assert all(spec(node).batch_dim == 0 for segment in segments for node in segment.inputs)


def test_with_gradients_the_dense_reference_runs(written, device):
    model, fast = written
    counters = torch._dynamo.utils.counters["aot_autograd"]
    before = counters["ok"]
    x = images(8, device)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(fast(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["ok"] == before + 1, "inductor compiles it"


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


class Scaled(nn.Module):
    """Reads sequences of any length, and holds Python numbers."""

    def __init__(self):
        super().__init__()
        self.arm, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale, self.threshold = 0.37, 0.1

    def forward(self, x):
        h = x.mean(1) * self.scale
        return self.head(dc.select(x[:, 0, 0] > self.threshold, h + self.arm(h).relu(), h))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_and_numbers_that_dynamo_leaves_open(device, lowered_runs, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Scaled().to(device).eval()
    fast = torch.compile(model, backend="dyncompile", dynamic=dynamic)
    with torch.no_grad():
        for batch, length in ((5, 4), (8, 4), (8, 6), (3, 7), (6, 7), (8, 4)):
            x = torch.randn(batch, length, 8, device=device)
            x[:, 0, 0] = 0.0
            x[:2, 0, 0] = 1.0
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
            assert sorted(lowered_runs.pop().values()) == [2, batch]
        model.scale = 0.7
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert lowered_runs.pop()
    found = torch.autograd.grad(fast(x).sum(), model.head.weight)
    torch.testing.assert_close(found, torch.autograd.grad(model(x).sum(), model.head.weight), rtol=1e-4, atol=1e-5)
    assert not lowered_runs


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_sizes_than_dynamo_recompiles_for_are_computed_densely(device, lowered_runs):
    torch._dynamo.reset()
    model = Scaled().to(device).eval()
    fast = torch.compile(model, backend="dyncompile", dynamic=True)
    with torch.no_grad():
        for length, word in ((4, None), (5, None), (6, "for 2 combinations of sizes"), (4, None)):
            x = torch.randn(3, length, 8, device=device)
            with pytest.warns(UserWarning, match=word) if word else contextlib.nullcontext():
                found = fast(x)
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
            assert bool(lowered_runs) is not bool(word)
            lowered_runs.clear()


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


class Gated(nn.Module):
    """A layer that some samples take."""

    def __init__(self):
        super().__init__()
        self.arm = nn.Linear(4, 4)

    def forward(self, x):
        return dc.select(x[:, 0] > 0, self.arm(x), x)


@pytest.fixture
def uncompiled(monkeypatch):
    """Segments run as they are: what is asked here does not hang on who compiles them."""
    monkeypatch.setattr("dyncompile.lowering.lower", lambda dyn, **_: lower(dyn, backend="eager"))


def test_modules_of_one_class_keep_their_own_weights(device, lowered_runs, uncompiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    models = [Gated().to(device).eval() for _ in range(3)]
    call = torch.compile(lambda model, x: model(x), backend="dyncompile", fullgraph=True)
    x = torch.randn(6, 4, device=device)
    with torch.no_grad():
        for model in models * 2:
            torch.testing.assert_close(call(model, x), model(x))
        models[0].arm.weight = nn.Parameter(models[0].arm.weight * 2)
        models[1].arm.weight.data = models[1].arm.weight * 2
        for model in models:
            torch.testing.assert_close(call(model, x), model(x))
    assert len(lowered_runs) == 9, "all of them skip"


class Doubles(Gated):
    def forward(self, x):
        x.mul_(2)
        return super().forward(x)


class Counts(Gated):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Normalises(Gated):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        return super().forward(nn.functional.batch_norm(x, self.mean, self.variance, training=True))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (Doubles, "it writes to `l_x_`"),
        (Counts, "it writes to `l_self_buffers_calls_`"),
        (Normalises, "it writes to `l_self_buffers_mean_`"),
    ],
)
def test_what_a_graph_writes_is_written_once(device, make, word):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().to(device)
    reference = copy.deepcopy(model)
    x = torch.randn(6, 4, device=device)
    y = x.clone()
    with torch.no_grad():
        with pytest.warns(UserWarning, match=word):
            found = torch.compile(model, backend="dyncompile")(x)
        torch.testing.assert_close(found, reference(y))
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_random_numbers_are_drawn_anew_by_every_call(device):
    torch._dynamo.reset()

    def dropped(x):
        return dc.select(torch.rand(x.shape[0], device=x.device) > 0.5, x + 1, x)

    x = torch.zeros(64, 1, device=device)
    fast = torch.compile(dropped, backend="dyncompile")
    with torch.no_grad(), pytest.warns(UserWarning, match="it draws random numbers"):
        first, second = fast(x), fast(x)
    assert not torch.equal(first, second)


def test_decisions_that_mix_and_outputs_that_are_integers(device, lowered_runs, uncompiled):
    torch._dynamo.reset()

    def mixes(x):
        z = (x * 9).long()
        return dc.select(x[:, 0].sigmoid(), z.float(), x).long(), dc.select(x[:, 1] > 0, z * 2, z)

    x = torch.randn(6, 4, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mixes, backend="dyncompile")(x), mixes(x))
    assert lowered_runs[0]["always"] == 6
    assert len(lowered_runs[0]) == 2


def test_an_empty_batch_first(device, lowered_runs, uncompiled):
    torch._dynamo.reset()
    model = Gated().to(device).eval()
    fast = torch.compile(model, backend="dyncompile")
    with torch.no_grad():
        for n in (0, 3):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(fast(x), model(x))
    assert len(lowered_runs) == 1


@pytest.mark.parametrize("wrong", [{"mode": "fastest"}, {"options": {"speed": 9}}])
def test_modes_and_options_are_inductors(device, wrong):
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=r"mode=fastest|option speed"):
        torch.compile(Gated().to(device).eval(), backend="dyncompile", **wrong)(torch.randn(3, 4, device=device))


def test_settings_reach_every_segment(device, monkeypatch):
    torch._dynamo.reset()
    seen = []
    compiled = torch._inductor.compile_fx.compile_fx_inner

    def watched(*args, **kwargs):
        seen.append((torch._inductor.config.epilogue_fusion, torch._inductor.config.max_autotune))
        return compiled(*args, **kwargs)

    monkeypatch.setattr("dyncompile.lowering.inductor.compile_fx_inner", watched)
    model = Gated().to(device).eval()
    x = torch.randn(3, 4, device=device)
    fast = torch.compile(model, backend="dyncompile", options={"epilogue_fusion": False})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert set(seen) == {(False, False)}


class Reshapes(nn.Module):
    """Reads the batch size off its input, as models do; dynamo writes it into the graph as a number."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.arm = nn.Linear(4, 4)

    def forward(self, x):
        n = x.shape[0]
        x = torch.cat((self.token.expand(n, -1, -1), x.view(n, 2, 4)), 1)
        h = x.reshape(n * 3, 4)
        h = dc.select(h[:, 0] > 0, self.arm(h), h) + torch.zeros(n * 3, 1, device=x.device)
        return h.view(n, 12)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_graph_that_holds_its_batch_size_skips(device, lowered_runs, uncompiled, batch, capfd):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Reshapes().to(device).eval()
    fast = torch.compile(model, backend="dyncompile", dynamic=False)
    x = torch.randn(batch, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert lowered_runs[0]["always"] == batch
    assert 0 < sum(lowered_runs[0].values()) - batch < 3 * batch
    assert capfd.readouterr().err == ""
