"""Frame skip: the steps that an agent skips copy the state, and do not run."""

import copy
import functools
import itertools

import pytest
import torch
from skipping import HIDDEN, STEPS, WIDTH, Reader, converted, enable, kept, over_kept_steps, sequences
from torch import nn

import dyncompile as dc
from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.errors import ArgumentError, PassError
from dyncompile.nn import PacedGate, SkippingLayer, build_estimator
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.testing import forced

PROJECTION = "ignore:LSTM with projections is not supported with oneDNN"


# --- what a skipped step means ---------------------------------------------------------------------

LAYERS = [
    (kind, batch_first, bidirectional, options)
    for kind, batch_first, bidirectional in itertools.product((nn.LSTM, nn.GRU, nn.RNN), (True, False), (True, False))
    for options in ({}, {"proj_size": 5}, {"bias": False}, {"nonlinearity": "relu"})
    if ("proj_size" not in options or kind is nn.LSTM) and ("nonlinearity" not in options or kind is nn.RNN)
]


@pytest.mark.filterwarnings(PROJECTION)
@pytest.mark.parametrize(("kind", "batch_first", "bidirectional", "options"), LAYERS)
def test_a_layer_runs_over_the_kept_steps_alone(kind, batch_first, bidirectional, options, device):
    rnn = kind(WIDTH, HIDDEN, batch_first=True, bidirectional=bidirectional, **options).to(device)
    twin = kind(WIDTH, HIDDEN, batch_first=batch_first, bidirectional=bidirectional, **options)
    form = RecurrentLayer(twin)
    layer, weights = SkippingLayer(form), list(rnn.parameters())
    for batch, given in ((1, True), (5, False), (5, True)):
        x, mask = torch.randn(batch, STEPS, WIDTH, device=device), kept(batch, STEPS, device)
        read = x if batch_first else x.transpose(0, 1)
        state = form.initial(read)
        state = tuple(torch.randn_like(s) for s in state) if given else state
        with torch.no_grad():
            expected, finals = over_kept_steps(rnn, x, mask, state)
            for which in (layer, layer.lowered()):
                passed = (state if len(state) > 1 else state[0]) if given else None
                out, *after = which(None, mask.flatten(), read, passed, *weights)
                torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected, rtol=0, atol=1e-5)
                for a, b in zip(after, finals, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", range(1, 31))
def test_compacted_equals_stepwise_at_every_length(length, bidirectional, device):
    rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=bidirectional).to(device)
    weights = list(rnn.parameters())
    for cell_read in (False, True):
        layer = SkippingLayer(RecurrentLayer(rnn), cell_read=cell_read)
        for batch in (1, 2, 7, 33):
            x, mask = torch.randn(batch, length, WIDTH, device=device), kept(batch, length, device, seed=length)
            with torch.no_grad():
                expected = layer(None, mask.flatten(), x, None, *weights)
                found = layer.lowered()(None, mask.flatten(), x, None, *weights)
            assert len(found) >= 2 + cell_read
            for a, b in zip(found, expected, strict=False):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_decisions_in_between_mix_states_and_are_differentiable(device):
    rnn = nn.LSTM(3, 4, batch_first=True).to(device, torch.float64)
    layer, weights = SkippingLayer(RecurrentLayer(rnn)), list(rnn.parameters())
    x = torch.randn(2, 4, 3, device=device, dtype=torch.float64)
    d = torch.rand(8, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, x: layer(None, d, x, None, *weights), (d, x.requires_grad_()))
    h, c = torch.zeros(2, 2, 4, device=device, dtype=torch.float64)
    for t in range(4):
        _, (new_h, new_c) = rnn(x[:, t : t + 1], (h.unsqueeze(0), c.unsqueeze(0)))
        share = d.view(2, 4)[:, t : t + 1]
        h, c = share * new_h[0] + (1 - share) * h, share * new_c[0] + (1 - share) * c
    out, last_h, last_c = layer(None, d, x, None, *weights)
    torch.testing.assert_close((out[:, -1], last_h[0], last_c[0]), (h, h, c), rtol=0, atol=1e-12)


def test_a_whole_sample_is_exact_with_the_gradient_of_the_formula(device):
    rnn = nn.GRU(3, 4, batch_first=True).to(device)
    layer, weights = SkippingLayer(RecurrentLayer(rnn)), list(rnn.parameters())
    x = torch.randn(2, 4, 3, device=device)
    static = tuple(2 * s for s in rnn(x))  # wrong on purpose: only the first sample may show it
    d = torch.ones(8, device=device)
    d[5] = 0
    d.requires_grad_()
    out, h = layer(static, d, x, None, *weights)
    plain, plain_h = layer(None, d, x, None, *weights)
    assert torch.equal(out[0], static[0][0])
    assert torch.equal(h[:, 0], static[1][:, 0])
    assert torch.equal(out[1], plain[1])
    for stood, formula in ((out, plain), (h, plain_h)):
        a, b = (torch.autograd.grad(v.square().sum(), d, retain_graph=True)[0] for v in (stood, formula))
        assert a[:4].abs().min() > 0
        torch.testing.assert_close(a[4:], b[4:])


# --- conversion ------------------------------------------------------------------------------------

STACKS = {
    "lstm": {"kind": nn.LSTM, "batch_first": True},
    "gru": {"kind": nn.GRU},
    "rnn": {"kind": nn.RNN, "batch_first": True, "given": True},
    "stack": {"kind": nn.LSTM, "num_layers": 3, "dropout": 0.3, "batch_first": True},
    "both ways": {"kind": nn.GRU, "num_layers": 2, "bidirectional": True, "dropout": 0.2},
    "projected": {"kind": nn.LSTM, "proj_size": 5, "num_layers": 2, "batch_first": True, "given": True},
    "output alone": {"kind": nn.LSTM, "batch_first": True, "reads": ("last", "all")},
}
SITES = pytest.mark.parametrize(
    ("stack", "reads"), [(s, r) for s in STACKS for r in ("input", "state") if (s, r) != ("both ways", "state")]
)


@functools.cache
def _converted(stack, reads, device):
    torch.manual_seed(0)
    model = Reader(**STACKS[stack])
    return model, converted(model, device, reads=reads)


@pytest.fixture
def of_stack(device):
    """The static and the dynamic model of a stack: copies, for conversion takes seconds."""
    return lambda stack, reads: copy.deepcopy(_converted(stack, reads, device))


@pytest.mark.filterwarnings(PROJECTION)
@SITES
def test_exact_at_birth_for_every_stack(stack, reads, of_stack, device):
    model, dyn = of_stack(stack, reads)
    for training, batch in itertools.product((False, True), (1, 2, 7, 33)):
        model.train(training)
        dyn.train(training)
        x = sequences(batch, model, device)
        torch.manual_seed(batch)
        expected = model(x)
        torch.manual_seed(batch)
        assert torch.equal(dyn(x), expected)


@pytest.mark.filterwarnings(PROJECTION)
@SITES
def test_a_gate_that_is_off_learns_from_the_task(stack, reads, of_stack, device):
    model, dyn = of_stack(stack, reads)
    dyn.train()(sequences(4, model, device)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dyn.gates.parameters())
    assert all(p.grad is not None for p in dyn.parameters())


@pytest.mark.filterwarnings(PROJECTION)
@SITES
def test_lowered_equals_reference(stack, reads, of_stack, device):
    model, dyn = of_stack(stack, reads)
    enable(dyn)
    fast = dc.lower(dyn, "eager")
    shares = []
    for batch in (1, 2, 7, 33):
        x = sequences(batch, model, device)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), dyn(x), rtol=0, atol=1e-5)
        shares.append(dyn.trace(x).decisions["frames0"].float().mean())
        if reads == "state":
            continue
        for mask in (kept(batch, STEPS, device), 0.5, 0.0, 1.0):
            with forced(dyn, {"frames0": mask}), forced(fast, {"frames0": mask}), torch.no_grad():
                torch.testing.assert_close(fast(x), dyn(x), rtol=0, atol=1e-5)
                ran = fast.last_run["frames0"]
            assert isinstance(mask, float) or ran == mask.sum()
    assert 0 < torch.stack(shares).mean() < 1


def test_the_layers_of_a_stack_skip_the_same_steps(device):
    model = Reader(num_layers=2, batch_first=True)
    dyn = converted(model, device)
    assert list(dyn.gates) == ["frames0"]
    below, above = nn.LSTM(WIDTH, HIDDEN, batch_first=True), nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
    for layer, number in ((below, 0), (above, 1)):
        layer.load_state_dict({f"{n[:-1]}0": p for n, p in model.rnn.state_dict().items() if n.endswith(str(number))})
    x, mask = sequences(5, model, "cpu"), kept(5, STEPS, "cpu")
    zeros = [torch.zeros(1, 5, HIDDEN)] * 2
    with torch.no_grad(), forced(dyn.cpu(), {"frames0": mask}):
        first, (h, c) = over_kept_steps(below, x, mask, zeros)
        second, (h2, c2) = over_kept_steps(above, first, mask, zeros)
        y = dyn.fc(second[:, -1]) + sum(s.sum((0, 2)) for s in (h, h2, c, c2)).unsqueeze(1)
        torch.testing.assert_close(dyn(x), y, rtol=0, atol=1e-5)


def test_inductor_runs_what_is_skipped_by_torch(device):
    model = Reader(batch_first=True)
    dyn = converted(model, device)
    enable(dyn)
    fast = dc.lower(dyn)
    for batch in (1, 4):
        x = sequences(batch, model, device)
        with forced(dyn, {"frames0": 0.4}), forced(fast, {"frames0": 0.4}), torch.no_grad():
            torch.testing.assert_close(fast(x), dyn(x), rtol=0, atol=1e-5)


def test_a_gate_that_is_off_leaves_the_static_layer(device):
    model = Reader(num_layers=2, batch_first=True)
    dyn = converted(model, device)
    fast = dc.lower(dyn, "eager")
    assert not [n for n in fast.plan.graph.nodes if "inserted" in n.meta]
    assert float(dyn.trace(sequences(2, model, device)).cost.max()) == 1
    enable(dyn)
    graph = fast.relower().plan.graph
    static = [n for n in graph.nodes if isinstance(dyn.graph.module_of(n), RecurrentLayer | nn.LSTM)]
    assert not static, "the static layer does not run beside what stands in for it"


def test_states_passed_from_layer_to_layer(device):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True), nn.LSTM(WIDTH, HIDDEN, batch_first=True)
            self.fc = nn.Linear(HIDDEN, 3)

        def forward(self, x):
            _, state = self.encoder(x)
            return self.fc(self.rnn(x, state)[0][:, -1])

    model = Pair()
    dyn = converted(model, device)
    x = sequences(5, model, device)
    assert torch.equal(dyn(x), model(x))
    enable(dyn)
    fast = dc.lower(dyn, "eager")
    masks = {"frames0": kept(5, STEPS, device), "frames1": kept(5, STEPS, device, seed=1)}
    zeros = [torch.zeros(1, 5, HIDDEN, device=device)] * 2
    with torch.no_grad(), forced(dyn, masks), forced(fast, masks):
        _, state = over_kept_steps(model.encoder, x, masks["frames0"], zeros)
        out, _ = over_kept_steps(model.rnn, x, masks["frames1"], state)
        torch.testing.assert_close(dyn(x), model.fc(out[:, -1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(fast(x), dyn(x), rtol=0, atol=1e-5)


# --- refusals --------------------------------------------------------------------------------------


class Own(nn.LSTM):
    """Someone's own layer."""


class Whole(nn.Module):
    """One sequence whose steps are the samples."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(WIDTH, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 3)

    def forward(self, x):
        return self.fc(self.rnn(x.transpose(0, 1).reshape(-1, 1, WIDTH))[0].view(-1, x.shape[0], HIDDEN)[-1])


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Reader(bidirectional=True, batch_first=True), {"reads": "state"}, "cannot decide for two directions at once"),
        (Reader(batch_first=True), {"hidden": 80}, "an agent costs 7840 FLOPs, and what it controls 6272"),
        (Reader(Own, batch_first=True), {}, r"Own, whose steps may not be those of torch's own layers"),
        (Whole(), {}, r"its input \[7, 1, 6\] has not one sequence for each sample"),
        (nn.Sequential(nn.Flatten(), nn.Linear(42, 3)), {}, "the graph offers none"),
    ],
)
def test_refusals(model, options, reason, device):
    options = {"hidden": 4, **options}
    with pytest.raises(PassError, match=reason):
        dc.dynamize(model.to(device), FrameSkip(**options), example_inputs=torch.randn(3, STEPS, WIDTH, device=device))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reads": "output"}, "`reads`: found 'output'; expected 'input' or 'state'"),
        ({"hidden": 0}, "`hidden`: found 0; expected a width >= 1"),
        ({"estimator": "none"}, "`estimator`: found 'none'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        FrameSkip(**options)


def test_padded_sequences_of_any_length(device):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(WIDTH, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 3)

        def forward(self, x, lengths):
            out, _ = self.rnn(x)
            return self.fc(out[torch.arange(x.shape[0], device=x.device), lengths - 1])

    lengths = torch.tensor([1, 2, 7, 3, 5], device=device)
    x = torch.randn(5, STEPS, WIDTH, device=device)
    model = Padded().to(device).eval()
    dyn = dc.dynamize(model, FrameSkip(hidden=4), example_inputs=(x, lengths)).eval()
    assert torch.equal(dyn(x, lengths), model(x, lengths))
    enable(dyn)
    fast = dc.lower(dyn, "eager")
    mask = kept(5, STEPS, device)
    with torch.no_grad(), forced(dyn, {"frames0": mask}), forced(fast, {"frames0": mask}):
        out, _ = over_kept_steps(model.rnn, x, mask, [torch.zeros(1, 5, HIDDEN, device=device)] * 2)
        expected = model.fc(out[torch.arange(5), lengths - 1])
        torch.testing.assert_close(dyn(x, lengths), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(fast(x, lengths), expected, rtol=0, atol=1e-5)


def test_decisions_that_depend_on_the_state_are_not_forced(device):
    dyn = converted(Reader(batch_first=True), device, reads="state")
    with pytest.raises(ArgumentError, match="whose agent reads the state that its own decisions make"):
        forced(dyn, {"frames0": 0.5}).__enter__()


class Rate(nn.Module):
    """Logits at which every step of a sample is kept with the probability that the sample asks for."""

    def forward(self, rates):
        return torch.logit(rates).repeat_interleave(12)


def test_evaluation_keeps_as_many_steps_as_training_on_average(device):
    gate = PacedGate(Rate(), estimator=build_estimator("gumbel"), steps=12).to(device).eval()
    gate.standardise = None
    gate.enabled.fill_(True)
    gate.offset.zero_()
    rates = torch.tensor([0.0, 0.03, 0.25, 1 / 3, 0.9, 1.0], device=device)
    kept = gate(rates)[0].view(6, 12)
    assert kept.sum(1).tolist() == [0, 0, 3, 4, 11, 12]
    assert kept[3].nonzero().flatten().tolist() == [1, 4, 7, 10]
    gate.bias.fill_(50.0)
    assert gate(rates[1:])[0].all()
    gate.enabled.fill_(False)
    assert gate(rates)[0].all()


# --- with other passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["input", "state"])
@pytest.mark.parametrize("first", ["frame_skip", "early_exit"])
def test_with_early_exit(first, reads, device):
    model = Reader(num_layers=3, batch_first=True, reads=("last",)).to(device).eval()
    passes = [FrameSkip(reads=reads, hidden=4), dc.passes.early_exit.EarlyExit(exits=1)]
    x = sequences(33, model, device)
    dyn = dc.dynamize(model, passes if first == "frame_skip" else passes[::-1], example_inputs=x[:3]).eval()
    for training in (False, True):
        assert torch.equal(dyn.train(training)(x), model.train(training)(x))
    dyn.eval()
    enable(dyn)
    dyn.exits["exit0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager", decline=False)
    shares = {"exit0": 0.5} | ({"frames0": 0.5} if reads == "input" else {})
    for batch in (1, 2, 7, 33):
        with torch.no_grad(), forced(dyn, shares), forced(fast, shares):
            torch.testing.assert_close(fast(x[:batch]), dyn(x[:batch]), rtol=0, atol=1e-5)
    trace = dyn.trace(x)
    assert trace.cost.shape == (33,)
    assert trace.decisions["frames0"].shape == (33, STEPS)


def test_saved_and_loaded(device, tmp_path):
    model = Reader(num_layers=2, batch_first=True)
    dyn = converted(model, device)
    enable(dyn)
    dc.save(dyn, tmp_path)
    twin = dc.load(tmp_path, model)
    x = sequences(7, model, device)
    assert torch.equal(twin.eval()(x), dyn(x))
