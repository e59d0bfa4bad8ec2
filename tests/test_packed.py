"""Packed sequences: what the static model computes over the steps that are there, captured."""

import copy
import itertools
import threading

import pytest
import torch
from packing import HIDDEN, NAMES, STEPS, WIDTH, Packed, batch_of, captured, converted
from torch import nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dyncompile as dc
from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.errors import ArgumentError, CaptureError

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
