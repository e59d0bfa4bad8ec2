"""Models that pack their sequences, shared by the tests of packed sequences."""

import copy
import functools

import torch
from skipping import enable
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.passes.frame_skip import FrameSkip

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
def conversion(kind, options, reads, device):
    torch.manual_seed(0)
    model = Reader(kind, **dict(options)).to(device)
    return model, dc.dynamize(model, FrameSkip(hidden=4, reads=reads), example_inputs=example(device))


def converted(device, kind=nn.LSTM, reads="input", **options):
    """A static model and its dynamic one, in evaluation, the agents on: copies."""
    model, dyn = copy.deepcopy(conversion(kind, tuple(options.items()), reads, device))
    enable(dyn)
    return model.eval(), dyn.eval()
