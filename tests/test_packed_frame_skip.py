"""Packed sequences whose steps are skipped: what runs, what it costs, and with the rest of the package."""

import copy
import itertools

import pytest
import torch
from packing import HIDDEN, STEPS, WIDTH, Packed, Reader, batch_of, conversion, converted, example
from skipping import enable, kept
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.capture.recurrent import KERNELS
from dyncompile.data import as_loader
from dyncompile.errors import ExportError, PassError
from dyncompile.kernel_costs import FREE, assumed
from dyncompile.nn.gates import Standardise
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.shapes import flop_counter
from dyncompile.testing import forced
from dyncompile.training.gating import BatchShaping, MinimumUsage, activation_rates


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


# --- steps that are skipped ------------------------------------------------------------------------

KINDS = [
    (nn.LSTM, "input", {}),
    (nn.GRU, "input", {"num_layers": 2, "dropout": 0.3, "bidirectional": True}),
    (nn.LSTM, "state", {"num_layers": 2}),
]
EACH = pytest.mark.parametrize(("kind", "reads", "options"), KINDS)


@EACH
def test_exact_at_birth(kind, reads, options, device):
    model, dyn = copy.deepcopy(conversion(kind, tuple(options.items()), reads, device))
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
            with forced(dyn, {"frames0": mask}), forced(fast, {"frames0": mask}), torch.no_grad(), assumed(FREE):
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


@pytest.mark.slow
def test_inductor(device):
    _, dyn = converted(device)
    # Compiled segments have their dtypes, whatever is around: when they are made, and when they are called.
    cast = torch.autocast(device.type, torch.bfloat16)
    with cast:
        fast = dc.lower(dyn)
    for count in (1, 7):
        x, lengths = batch_of(count, device)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, lengths), dyn(x, lengths), rtol=0, atol=1e-5)
        with forced(dyn, {"frames0": 0.4}), forced(fast, {"frames0": 0.4}), torch.no_grad():
            found = fast(x, lengths)
            torch.testing.assert_close(found, dyn(x, lengths), rtol=0, atol=1e-5)
        with forced(fast, {"frames0": 0.4}), torch.no_grad(), cast:
            torch.testing.assert_close(fast(x, lengths), found, rtol=0, atol=0)


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
    with flop_counter() as counter, torch.no_grad(), assumed(FREE):
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


@pytest.mark.slow
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
