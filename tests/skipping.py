"""Models over sequences whose steps are skipped, shared by the tests of frame skip."""

import torch
from torch import nn

import dyncompile as dc
from dyncompile.passes.frame_skip import FrameSkip

WIDTH, HIDDEN, STEPS = 6, 8, 7


class Reader(nn.Module):
    """Reads a sequence by a recurrent stack, and gives what it is told to of the results."""

    def __init__(self, kind=nn.LSTM, *, reads=("last", "h", "c"), given=False, **options):
        super().__init__()
        self.rnn = kind(WIDTH, HIDDEN, **options)
        self.reads, self.given = reads, given
        directions = 1 + self.rnn.bidirectional
        self.size = self.rnn.proj_size or HIDDEN
        self.fc = nn.Linear(directions * self.size, 3)

    def forward(self, x):
        state = None
        if self.given:
            batch = x.shape[0 if self.rnn.batch_first else 1]
            count = self.rnn.num_layers * (1 + self.rnn.bidirectional)
            h = torch.linspace(-1, 1, self.size, device=x.device).expand(count, batch, -1)
            c = torch.linspace(-1, 1, HIDDEN, device=x.device).expand(count, batch, -1)
            state = (h, c) if isinstance(self.rnn, nn.LSTM) else h
        out, state = self.rnn(x, state)
        h, c = state if isinstance(state, tuple) else (state, state)
        y = self.fc(out[:, -1] if self.rnn.batch_first else out[-1])
        if "all" in self.reads:
            y = y + self.fc(out).sum(1 if self.rnn.batch_first else 0)
        if "h" in self.reads:
            y = y + h.sum((0, 2)).unsqueeze(1)
        return y + c.sum((0, 2)).unsqueeze(1) if "c" in self.reads else y


class Video(nn.Module):
    """Features of each frame by a convolutional backbone, then an LSTM over them."""

    def __init__(self, variant="plain", steps=5):
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.rnn = nn.LSTM(16, HIDDEN, batch_first=variant != "steps first")
        self.fc = nn.Linear(HIDDEN, 3)
        self.variant = variant

    def forward(self, x):
        n, t = x.shape[:2]
        if self.variant == "stacked":
            sequence = torch.stack([self.backbone(x[:, i]) for i in range(t)], 1)
            return self.fc(self.rnn(sequence)[0][:, -1])
        if self.variant == "transposed":
            sequence = self.backbone(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (t, n)).transpose(0, 1)
            return self.fc(self.rnn(sequence)[0][:, -1])
        features = self.backbone(x.flatten(0, 1))
        if self.variant == "centred":
            mean = features.view(n, t, -1).mean(1, keepdim=True)
            features = features - mean.expand(-1, t, -1).reshape(n * t, -1)
        sequence = features.view(n, t, -1)
        if self.variant == "steps first":
            return self.fc(self.rnn(sequence.transpose(0, 1))[0][-1])
        y = self.fc(self.rnn(sequence)[0][:, -1])
        return y + features.view(n, t, -1).sum((1, 2)).unsqueeze(1) if self.variant == "read twice" else y


def sequences(batch, model, device, steps=STEPS):
    shape = (batch, steps, WIDTH) if model.rnn.batch_first else (steps, batch, WIDTH)
    return torch.randn(shape, device=device)


def converted(model, device, *, example=None, **options):
    model = model.to(device).eval()
    x = sequences(3, model, device) if example is None else example
    dims = {} if model.rnn.batch_first or x.dim() == 5 else {"batch_dims": {"x": 1}}
    options.setdefault("hidden", 4)
    return dc.dynamize(model, FrameSkip(**options), example_inputs=x, **dims).eval()


def enable(dyn):
    """Switch the agents on, and make them undecided: some steps are kept, others not."""
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
        gate.bias.copy_(-gate.offset)
        layers = [layer for layer in gate.policy.modules() if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            if layers[0].bias is not None:
                layers[0].bias.fill_(1.0)  # no unit of the agent is dead
            layers[-1].weight.sub_(layers[-1].weight.mean())


def kept(batch, steps, device, seed=0):
    """A mask `[N, T]` of which rows keep none, all, or any number of steps."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, steps, generator=generator) < torch.rand(batch, 1, generator=generator)
    if batch > 2:
        mask[0], mask[1] = False, True
    return mask.to(device)


def over_kept_steps(rnn, x, mask, state):
    """What a recurrent layer of torch computes over each sample's kept steps alone, spread over all steps.

    One layer; `x` `[N, T, D]`, a state of `[directions, N, ...]` each.
    """
    outs, finals = [], []
    directions = 1 + rnn.bidirectional
    for n in range(len(x)):
        given = [s[:, n : n + 1] for s in state]
        steps = mask[n].nonzero().view(-1)
        if len(steps):
            found, final = rnn(x[n : n + 1, steps], tuple(given) if len(given) > 1 else given[0])
            final = final if isinstance(final, tuple) else (final,)
            ways = found[0].unflatten(1, (directions, -1))
        rows = []
        for t in range(x.shape[1]):
            before, after = (steps <= t).sum(), (steps < t).sum()
            row = [ways[before - 1, 0] if before else given[0][0, 0]]
            if directions == 2:
                row.append(ways[after, 1] if after < len(steps) else given[0][1, 0])
            rows.append(torch.cat(row))
        outs.append(torch.stack(rows))
        finals.append([f[:, 0] for f in (final if len(steps) else given)])
    return torch.stack(outs), [torch.stack(parts, 1) for parts in zip(*finals, strict=True)]
