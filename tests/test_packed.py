"""Packed sequences: what the static model computes over the steps that are there, captured, skipped and counted."""

import copy
import functools
import itertools
import threading

import pytest
import torch
from skipping import enable, kept
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.capture.recurrent import KERNELS, RecurrentLayer
from dyncompile.data import as_loader
from dyncompile.errors import ArgumentError, CaptureError, ExportError, PassError
from dyncompile.nn.gates import Standardise
from dyncompile.nn.ragged import free_calls
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.shapes import flop_counter
from dyncompile.testing import forced
from dyncompile.training.gating import BatchShaping, MinimumUsage, activation_rates

WIDTH, HIDDEN, STEPS = 6, 8, 7
NAMES = ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence", "unpack_sequence")


class Packed(nn.Module):
    """Packs, reads by a recurrent stack, pads, and looks at the outputs and the final states."""

    def __init__(self, kind=nn.LSTM, *, pack_first=True, sort=False, given=False, total=STEPS, value=0.0, **options):
        super().__init__()
        self.rnn = kind(WIDTH, HIDDEN, **options)
        self.fc = nn.Linear(HIDDEN * (1 + self.rnn.bidirectional), 3)
        self.pack_first, self.sort, self.given, self.total, self.value = pack_first, sort, given, total, value

    def forward(self, x, lengths):
        state = None
        if self.given:
            count = self.rnn.num_layers * (1 + self.rnn.bidirectional)
            h = x[:, 0].mean(1).view(1, -1, 1).expand(count, -1, HIDDEN)
            state = (h, -h) if isinstance(self.rnn, nn.LSTM) else h
        rows = x if self.pack_first else x.transpose(0, 1)
        packed = pack_padded_sequence(rows, lengths.cpu(), batch_first=self.pack_first, enforce_sorted=not self.sort)
        packed, state = self.rnn(packed, state)
        out, again = pad_packed_sequence(packed, True, self.value, self.total)
        states = state if isinstance(state, tuple) else (state,)
        y = self.fc(out.sum(1)) + again.to(x.device).unsqueeze(1)
        return y + sum(s.flip(-1).cumsum(-1).mean((0, 2)) for s in states).unsqueeze(1)


class Reader(nn.Module):
    """Reads the last states of a packed stack, behind which a classifier has some layers."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(WIDTH, HIDDEN, batch_first=True, **options)
        self.fc = nn.Sequential(nn.Linear(HIDDEN, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        state = self.rnn(packed)[1]
        return self.fc((state[0] if isinstance(state, tuple) else state)[-1])


def batch_of(count, device, *, ordered=False, seed=0):
    """`[N, T, D]` whose padding is not zero, and lengths of 1 to T."""
    generator = torch.Generator().manual_seed(seed + count)
    lengths = torch.randint(1, STEPS + 1, (count,), generator=generator)
    lengths = lengths.sort(descending=True).values if ordered else lengths
    return torch.randn(count, STEPS, WIDTH, generator=generator).to(device), lengths.to(device)


def example(device):
    return torch.randn(3, STEPS, WIDTH, device=device), torch.tensor([STEPS, 5, 2], device=device)


def captured(model, device, inputs=None):
    return capture(model.to(device), example(device) if inputs is None else inputs)


@functools.cache
def _converted(kind, options, reads, device):
    torch.manual_seed(0)
    model = Reader(kind, **dict(options)).to(device)
    return model, dc.dynamize(model, FrameSkip(hidden=4, reads=reads), example_inputs=example(device))


def converted(device, kind=nn.LSTM, reads="input", **options):
    """A static model and its dynamic one, in evaluation, the agents on: copies."""
    model, dyn = copy.deepcopy(_converted(kind, tuple(options.items()), reads, device))
    enable(dyn)
    return model.eval(), dyn.eval()


@pytest.fixture
def calls(monkeypatch):
    """Steps of samples in every call of a recurrent kernel."""
    found = []

    def counted(kernel):
        def run(x, *args):
            found.append(x.shape[:-1].numel())
            return kernel(x, *args)

        return run

    for name, kernel in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, counted(kernel))
    return found


# --- capture ---------------------------------------------------------------------------------------

FORMS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.4, "given": True}),
    (nn.LSTM, {"num_layers": 2, "sort": True, "dropout": 0.4, "batch_first": True, "pack_first": False}),
    (nn.LSTM, {"bidirectional": True, "total": STEPS + 2, "value": -3.0, "batch_first": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "sort": True, "dropout": 0.4}),
    (nn.GRU, {"given": True, "pack_first": False, "batch_first": True}),
    (nn.RNN, {"bidirectional": True, "bias": False, "given": True}),
]


@pytest.mark.parametrize(("kind", "options"), FORMS)
def test_a_capture_is_the_model_to_the_bit(kind, options, device):
    model = Packed(kind, **options).to(device)
    graph = captured(model, device)
    assert graph.mode == "train"
    for training, count in itertools.product((False, True), (1, 2, 7)):
        model.train(training)
        graph.root.train(training)
        inputs = batch_of(count, device, ordered=not model.sort)
        torch.manual_seed(0)
        expected = model(*inputs)
        torch.manual_seed(0)
        found = graph.run(inputs)[0]
        # Where a sequence is laid out anew, sums over it run in another order.
        anew = not model.pack_first or model.total != STEPS
        assert torch.allclose(found, expected, rtol=0, atol=1e-5) if anew else torch.equal(found, expected)


def test_samples_need_no_order_where_the_model_asks_for_one(device):
    model = Packed(sort=False).to(device).eval()
    graph = captured(model, device)
    graph.root.eval()
    x, lengths = batch_of(7, device)
    order = lengths.argsort(descending=True)
    with pytest.raises(RuntimeError, match="sorted in decreasing order"):
        model(x, lengths)
    torch.testing.assert_close(graph.run((x, lengths))[0][order], model(x[order], lengths[order]))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_where_lengths_cannot_be_looked_at_a_layer_runs_step_by_step(kind, bidirectional, device, monkeypatch):
    graph = captured(Packed(kind, bidirectional=bidirectional), device)
    layer = next(m for n in graph.fx.nodes if isinstance(m := graph.module_of(n), RecurrentLayer))
    weights = list(graph.root.rnn.parameters())
    x, lengths = batch_of(7, device)
    real = (torch.arange(STEPS, device=device) < lengths.unsqueeze(1)).flatten()
    expected = layer(x, None, *weights, real=real)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for a, b in zip(layer(x, None, *weights, real=real), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


class Ends(nn.Module):
    """Looks at padded outputs without a `total_length`, in several ways."""

    def __init__(self, look):
        super().__init__()
        self.rnn, self.fc, self.look = nn.GRU(WIDTH, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 3), look

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.fc(self.look(out, lengths))


LAST = Ends(lambda out, lengths: out[torch.arange(out.shape[0], device=out.device), lengths - 1])


def test_what_does_not_hang_on_the_padding_needs_no_total_length(device):
    model = copy.deepcopy(LAST).to(device)
    graph = captured(model, device)
    inputs = batch_of(7, device)
    torch.testing.assert_close(graph.run(inputs)[0], model(*inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "look",
    [
        lambda out, lengths: out,
        lambda out, lengths: out.mean(1),
        lambda out, lengths: out * (torch.arange(STEPS, device=out.device) < lengths.unsqueeze(1)).unsqueeze(-1),
    ],
)
def test_what_hangs_on_the_longest_of_a_batch_is_refused(look, device):
    with pytest.raises(CaptureError, match=r"changes with that; .*total_length=x\.shape\[1\]"):
        captured(Ends(look), device)


def test_samples_of_full_length_say_nothing_of_padding(device):
    inputs = torch.randn(3, STEPS, WIDTH, device=device), torch.full((3,), STEPS, device=device)
    with pytest.raises(CaptureError, match="every sample of example_inputs is of full length"):
        captured(copy.deepcopy(LAST), device, inputs)
    captured(Packed(), device, inputs)


class Masked(nn.Module):
    """Finds the lengths by itself."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x, mask):
        packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1][0][-1]


def test_lengths_from_a_mask(device):
    x, lengths = batch_of(7, device)
    mask = torch.arange(STEPS, device=device) < lengths.unsqueeze(1)
    model = Masked().to(device)
    graph = captured(model, device, (x[:3], mask[:3]))
    assert torch.equal(graph.run((x, mask))[0], model(x, mask))


class Odd(nn.Module):
    """Treats packed sequences as no graph can."""

    def __init__(self, how, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.how = kind(WIDTH, HIDDEN, batch_first=True), how
        if how == "hook":
            self.rnn.register_forward_hook(lambda *_: None)

    def forward(self, x, lengths):
        if self.how == "list":
            lengths = lengths.tolist()
        if self.how == "pack_sequence":
            packed = rnn.pack_sequence([row[: int(n)] for row, n in zip(x, lengths, strict=True)], enforce_sorted=False)
        else:
            packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        if self.how == "data":
            packed = packed._replace(data=packed.data.relu())
        out, (h, _) = self.rnn(packed)
        if self.how == "unpack_sequence":
            return rnn.unpack_sequence(out)[0]
        return h[-1]


class Own(nn.LSTM):
    """Someone's own layer."""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Odd("list"), r"gets its lengths as a list, .*`lengths\.cpu\(\)` in place of `lengths\.tolist\(\)`"),
        (Odd("data"), r"the model reads `data` of a packed sequence, .* pad it first, with pad_packed_sequence"),
        (Odd("pack_sequence"), r"pack_sequence takes a list with one tensor a sample, .*use pack_padded_sequence"),
        (Odd("unpack_sequence"), r"unpack_sequence returns tensors whose sizes depend on the data; use pad_packed"),
        (
            Odd("hook"),
            r"`rnn` reads a packed sequence, .* \(LSTM, with hooks or without\); give it the padded sequence",
        ),
        (Odd("", Own), r"`rnn` reads a packed sequence, .* is not torch's own layer alone \(Own, "),
    ],
)
def test_refusals(model, reason):
    codes = [getattr(rnn, name).__code__ for name in NAMES]
    with pytest.raises(CaptureError, match=reason):
        captured(model, "cpu")
    assert [getattr(rnn, name).__code__ for name in NAMES] == codes


@pytest.mark.parametrize("lengths", [(0, 3), (3, STEPS + 1)])
def test_lengths_that_torch_refuses_are_refused(lengths, device):
    _, dyn = converted(device)
    x = torch.randn(2, STEPS, WIDTH, device=device)
    for run in (dyn, dyn.trace, dc.lower(dyn, "eager")):
        with pytest.raises(ArgumentError, match=f"`lengths`: found from {lengths[0]} to {lengths[1]}; expected from 1"):
            run(x, torch.tensor(lengths))


def test_functions_are_given_back_and_other_threads_keep_theirs(device):
    codes = [getattr(rnn, name).__code__ for name in NAMES]
    elsewhere = []

    class Watching(Packed):
        def forward(self, x, lengths):
            def pack():
                elsewhere.append(
                    pack_padded_sequence(torch.ones(2, 3, 1), [3, 1], batch_first=True).batch_sizes.tolist()
                )

            if type(x) is torch.Tensor:
                thread = threading.Thread(target=pack)
                thread.start()
                thread.join()
                elsewhere.append(pack_padded_sequence.__code__ in codes)
            return super().forward(x, lengths)

    graph = captured(Watching(), device)
    assert [2, 1, 1] in elsewhere
    assert False in elsewhere, "the functions were taken over"
    assert [getattr(rnn, name).__code__ for name in NAMES] == codes
    x, lengths = batch_of(4, device)
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    assert type(packed) is rnn.PackedSequence
    assert torch.equal(pad_packed_sequence(packed, batch_first=True)[1], lengths.cpu())
    assert len(list(graph.root.parameters())) == 6


# --- steps that are skipped ------------------------------------------------------------------------

KINDS = [
    (nn.LSTM, "input", {}),
    (nn.GRU, "input", {"num_layers": 2, "dropout": 0.3, "bidirectional": True}),
    (nn.LSTM, "state", {"num_layers": 2}),
]
EACH = pytest.mark.parametrize(("kind", "reads", "options"), KINDS)


@EACH
def test_exact_at_birth(kind, reads, options, device):
    model, dyn = copy.deepcopy(_converted(kind, tuple(options.items()), reads, device))
    for training, count in itertools.product((False, True), (1, 7)):
        inputs = batch_of(count, device)
        torch.manual_seed(0)
        expected = model.train(training)(*inputs)
        torch.manual_seed(0)
        assert torch.equal(dyn.train(training)(*inputs), expected)
    dyn.train()(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dyn.gates.parameters())
    assert all(p.grad is not None for p in dyn.parameters())


@EACH
def test_lowered_equals_reference_and_static_where_all_is_kept(kind, reads, options, device, calls):
    model, dyn = converted(device, kind, reads, **options)
    fast = dc.lower(dyn, "eager")
    layers, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
    for count in (1, 2, 7):
        x, lengths = batch_of(count, device)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, lengths), dyn(x, lengths), rtol=0, atol=1e-5)
        if reads == "state":
            continue
        real = torch.arange(STEPS, device=device) < lengths.unsqueeze(1)
        for mask in (kept(count, STEPS, device), 0.5, 0.0, 1.0):
            with forced(dyn, {"frames0": mask}), forced(fast, {"frames0": mask}), torch.no_grad(), free_calls():
                trace = dyn.trace(x, lengths)
                calls.clear()
                torch.testing.assert_close(fast(x, lengths), trace.output, rtol=0, atol=1e-5)
                assert not (trace.decisions["frames0"] & ~real).any()
                ran = int(trace.decisions["frames0"].sum())
                # Where all is kept one call runs both directions.
                assert sum(calls) == layers * ran * (1 if ran == lengths.sum() else directions)
                assert fast.last_run["frames0"] == ran
        with torch.no_grad(), forced(fast, {"frames0": 1.0}):
            assert torch.equal(fast(x, lengths), model(x, lengths))


def test_a_layer_runs_over_the_kept_steps_alone(device):
    """The outputs are zero behind each sample's last step, and the states are those after its last kept one."""
    model = Packed(nn.GRU, sort=True, bidirectional=True).to(device).eval()
    dyn = dc.dynamize(model, FrameSkip(hidden=4), example_inputs=example(device)).eval()
    enable(dyn)
    fast = dc.lower(dyn, "eager")
    x, lengths = batch_of(5, device)
    mask = kept(5, STEPS, device)
    real = torch.arange(STEPS, device=device) < lengths.unsqueeze(1)
    mine = nn.GRU(WIDTH, HIDDEN, batch_first=True, bidirectional=True).to(device)
    mine.load_state_dict(model.rnn.state_dict())
    outs, states = [], []
    for n in range(5):
        steps = (mask & real)[n].nonzero().view(-1)
        found, h = mine(x[n : n + 1, steps]) if len(steps) else (None, torch.zeros(2, 1, HIDDEN, device=device))
        total = torch.zeros(2, HIDDEN, device=device)
        for t in range(int(lengths[n])):
            before, after = int((steps <= t).sum()), int((steps < t).sum())
            if before:
                total[0] += found[0, before - 1, :HIDDEN]
            if after < len(steps):
                total[1] += found[0, after, HIDDEN:]
        outs.append(total.flatten())
        states.append(h[:, 0])
    y = model.fc(torch.stack(outs)) + lengths.unsqueeze(1)
    y = y + torch.stack(states, 1).flip(-1).cumsum(-1).mean((0, 2)).unsqueeze(1)
    for which in (dyn, fast):
        with torch.no_grad(), forced(which, {"frames0": mask}):
            torch.testing.assert_close(which(x, lengths), y, rtol=0, atol=1e-5)


def test_inductor(device):
    _, dyn = converted(device)
    fast = dc.lower(dyn)
    for count in (1, 7):
        x, lengths = batch_of(count, device)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, lengths), dyn(x, lengths), rtol=0, atol=1e-5)
        with forced(dyn, {"frames0": 0.4}), forced(fast, {"frames0": 0.4}), torch.no_grad():
            torch.testing.assert_close(fast(x, lengths), dyn(x, lengths), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reads", ["input", "state"])
def test_padding_is_neither_read_nor_counted(reads, device):
    """What lies behind the last step changes no output, no decision, no cost and no statistic of the gate."""
    _, dyn = converted(device, reads=reads)
    x, lengths = batch_of(7, device)
    real = torch.arange(STEPS, device=device) < lengths.unsqueeze(1)
    other = torch.where(real.unsqueeze(-1), x, 100.0)
    for training in (True, False):
        traces = []
        for given in (x, other):
            mine = copy.deepcopy(dyn).train(training)
            torch.manual_seed(0)
            trace = mine.trace(given, lengths)
            assert torch.equal(trace.decisions["steps0"], real)
            assert not trace.decisions["frames0"][~real].any()
            assert not trace.probabilities["frames0"][~real].any()
            rates = activation_rates(trace)
            shape = [part(trace, lengths).item() for part in (BatchShaping(), MinimumUsage())]
            assert list(rates) == ["frames0"]
            torch.testing.assert_close(rates["frames0"], trace.decisions["frames0"].float()[real].mean())
            traces.append((trace.output, trace.cost, trace.probabilities["frames0"], torch.tensor(shape)))
        torch.testing.assert_close(traces[0], traces[1], rtol=1e-4, atol=1e-6)


def test_statistics_of_rows_that_count(device):
    counted = torch.tensor([True, False, True, True], device=device)
    logits = torch.tensor([1.0, 50.0, 2.0, 6.0], device=device)
    of_all, of_some = Standardise(()).to(device).train(), Standardise(()).to(device).train()
    torch.testing.assert_close(of_some(logits, counted)[counted], of_all(logits[counted]))
    torch.testing.assert_close((of_some.mean, of_some.variance), (of_all.mean, of_all.variance))


# --- cost ------------------------------------------------------------------------------------------


def test_cost_is_relative_to_the_static_model_on_the_sample(device):
    model, dyn = converted(device)
    x, lengths = batch_of(5, device)
    real = torch.arange(STEPS, device=device) < lengths.unsqueeze(1)
    mask = kept(5, STEPS, device)
    rest = 2 * (HIDDEN * 32 + 32 * 32 + 32 * 3)
    step, agent = 2 * 4 * HIDDEN * (WIDTH + HIDDEN), STEPS * 2 * 4 * (WIDTH + 1)
    for training in (False, True):
        dyn.train(training)
        for forced_to, ran in ((mask, (mask & real).sum(1)), (1.0, lengths), (0.0, 0 * lengths)):
            with forced(dyn, {"frames0": forced_to}):
                cost = dyn.trace(x, lengths).cost
            torch.testing.assert_close(cost, (ran * step + rest + agent) / (lengths * step + rest))
    dyn.eval()
    fast = dc.lower(dyn, "eager")
    trace = dyn.trace(x, lengths)
    with flop_counter() as counter, torch.no_grad(), free_calls():
        fast(x, lengths)
    with FlopCounterMode(display=False) as static, torch.no_grad():
        model(x, lengths)
    assert static.get_total_flops() == int(lengths.sum()) * step + 5 * rest
    costs = dyn.cost_model()
    torch.testing.assert_close(
        float(costs.work(trace.decisions).sum()) * costs.static, float(counter.get_total_flops())
    )
    assert "steps0" in dc.dynamize(model, EarlyExit(exits=1), example_inputs=example(device)).inspect()


# --- with the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_frames", [False, True])
def test_early_exit_behind_a_packed_layer(with_frames, device):
    model = Reader(num_layers=2).to(device).eval()
    passes = [EarlyExit(exits=1)] + ([FrameSkip(hidden=4)] if with_frames else [])
    dyn = dc.dynamize(model, passes, example_inputs=example(device)).eval()
    x, lengths = batch_of(7, device)
    torch.testing.assert_close(dyn.trace(x, lengths).cost, torch.ones(7, device=device))
    enable(dyn)
    dyn.exits["exit0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager", decline=False)
    shares = {"exit0": 0.5} | ({"frames0": 0.5} if with_frames else {})
    for count in (1, 2, 7):
        for chosen in ({}, shares):
            with torch.no_grad(), forced(dyn, chosen), forced(fast, chosen):
                inputs = batch_of(count, device)
                torch.testing.assert_close(fast(*inputs), dyn(*inputs), rtol=0, atol=1e-5)


class Video(nn.Module):
    """Features of each frame by a convolutional backbone, then a packed LSTM over them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.rnn, self.fc = nn.LSTM(16, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 3)

    def forward(self, x, lengths):
        features = self.backbone(x.flatten(0, 1)).view(*x.shape[:2], -1)
        packed = pack_padded_sequence(features, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.fc(self.rnn(packed)[1][0][-1])


def test_frames_of_the_padding_do_not_enter_the_backbone(device):
    model = Video().to(device).eval()
    inputs = torch.randn(3, 5, 3, 8, 8, device=device), torch.tensor([5, 3, 1], device=device)
    dyn = dc.dynamize(model, FrameSkip(hidden=4), example_inputs=inputs).eval()
    assert dyn.recipe.steps[0].sites[0]["data"]["features"]
    for training in (False, True):
        assert torch.equal(dyn.train(training)(*inputs), model.train(training)(*inputs))
    dyn.eval()
    enable(dyn)
    fast = dc.lower(dyn, "eager", decline=False)
    assert not fast.plan.dense
    policy = dyn.gates["frames0"].policy
    with FlopCounterMode(display=False) as agent, torch.no_grad():
        policy(inputs[0].flatten(0, 1))
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool, device=device)
    convolution = torch.ops.aten.convolution
    with torch.no_grad(), FlopCounterMode(display=False) as own:
        fast(*inputs)
    with torch.no_grad(), forced(dyn, {"frames0": mask}), forced(fast, {"frames0": mask}):
        torch.testing.assert_close(fast(*inputs), dyn(*inputs), rtol=0, atol=1e-5)
    counted = own.get_flop_counts()["Global"][convolution] - agent.get_flop_counts()["Global"][convolution]
    assert counted == 2 * 64 * 9 * (3 * 8 + 8 * 16) * int(dyn.trace(*inputs).decisions["frames0"].sum())


def test_a_stack_behind_a_stack_reads_its_states(device):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.rnn = nn.LSTM(WIDTH, HIDDEN), nn.LSTM(HIDDEN, HIDDEN)
            self.fc = nn.Linear(HIDDEN, 3)

        def forward(self, x, lengths):
            packed, state = self.encoder(pack_padded_sequence(x, lengths.cpu(), True, False))
            out, _ = pad_packed_sequence(self.rnn(packed, state)[0], True, total_length=x.shape[1])
            return self.fc(out.sum(1))

    model = Pair().to(device).eval()
    dyn = dc.dynamize(model, FrameSkip(hidden=4), example_inputs=example(device)).eval()
    inputs = batch_of(7, device)
    assert torch.equal(dyn(*inputs), model(*inputs))
    assert list(dyn.trace(*inputs).decisions) == ["steps0", "frames0", "frames1"]
    enable(dyn)
    fast = dc.lower(dyn, "eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), dyn(*inputs), rtol=0, atol=1e-5)


def test_batches_that_the_model_sorts_itself_have_no_sequence_for_each_sample(device):
    class Sorting(Reader):
        def forward(self, x, lengths):
            lengths, order = lengths.sort(descending=True, stable=True)
            h = self.rnn(pack_padded_sequence(x[order], lengths.cpu(), batch_first=True))[1][0][-1]
            return self.fc(h[order.argsort()])

    with pytest.raises(PassError, match="has not one sequence for each sample"):
        dc.dynamize(Sorting().to(device), FrameSkip(hidden=4), example_inputs=example(device))


def test_saved_and_loaded(device, tmp_path):
    model, dyn = converted(device)
    dc.save(dyn, tmp_path)
    inputs = batch_of(7, device)
    assert torch.equal(dc.load(tmp_path, model).eval()(*inputs), dyn(*inputs))


class Speaker(nn.Module):
    """Nine speakers, told by the last state of a packed LSTM."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(12, 32, batch_first=True), nn.Linear(32, 9)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.fc(self.rnn(packed)[1][0][-1])


def test_spoken_vowels(device, needs):
    aeon = needs("aeon.datasets")
    parts = []
    for split in ("train", "test"):
        series, labels = aeon.load_classification("JapaneseVowels", split=split)
        x = rnn.pad_sequence([torch.from_numpy(s.T).float() for s in series], batch_first=True, padding_value=9.0)
        x = F.pad(x, (0, 0, 0, 29 - x.shape[1]), value=9.0)
        lengths = torch.tensor([s.shape[1] for s in series])
        parts.append(((x, lengths), torch.tensor([int(label) - 1 for label in labels])))
    train, ((x, lengths), y) = parts
    torch.manual_seed(0)
    model = Speaker().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        for (batch, steps), labels in as_loader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.to(device), steps), labels.to(device)).backward()
            optimizer.step()
    dyn = dc.dynamize(model, "frame_skip", example_inputs=(x[:3].to(device), lengths[:3]))
    dc.finetune(dyn, train, epochs=6, mode="joint", target_cost=0.6, batch_size=32, lr=5e-3, progress=False)
    dyn.eval()
    x, y = x.to(device), y.to(device)
    fast = dc.lower(dyn, "eager")
    with torch.no_grad():
        trace = dyn.trace(x, lengths)
        torch.testing.assert_close(fast(x, lengths), trace.output, rtol=1e-4, atol=1e-4)
        static = (model.eval()(x, lengths).argmax(1) == y).float().mean()
    ran = trace.decisions["frames0"].sum() / lengths.sum()
    accuracy = (trace.output.argmax(1) == y).float().mean()
    assert fast.last_run["frames0"] == trace.decisions["frames0"].sum()
    assert ran < 0.65
    assert static > 0.8
    assert accuracy > static - 0.1
    costs = dc.calibrate(dyn, ((x, lengths), y), max_drop=0.3, progress=False).evidence.costs
    with torch.no_grad():
        assert costs.mean() == pytest.approx(float(dyn.trace(x, lengths).cost.mean()), abs=0.05)


def test_exported(device, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    _, dyn = converted(device)
    dc.export(dyn, tmp_path / "packed.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "packed.onnx"))
    for count in (1, 7):
        inputs = batch_of(count, "cpu")
        names = [given.name for given in session.get_inputs()]
        found = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))[0]
        with torch.no_grad():
            expected = dyn.cpu()(*inputs)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
    _, dyn = converted(device, reads="state", num_layers=2)
    with pytest.raises(
        ExportError, match=r"`frames0` is decided by an agent that reads the state, on packed sequences"
    ):
        dc.export(dyn, tmp_path / "state.onnx")
