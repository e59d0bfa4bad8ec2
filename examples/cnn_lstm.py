"""A CNN and an LSTM over windows of motion: of a skipped window neither runs: `python examples/cnn_lstm.py`."""

import torch
from aeon.datasets import load_classification
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.data import as_loader

WINDOWS, STEPS = 20, 5


class Motion(nn.Module):
    """Four activities, told by the last state of an LSTM over the features of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv1d(6, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten()
        )
        self.rnn = nn.LSTM(32 * STEPS, 32, batch_first=True)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 4]` of windows `[N, T, 6, STEPS]`."""
        features = self.cnn(x.flatten(0, 1)).unflatten(0, (-1, WINDOWS))
        return self.fc(self.rnn(features)[0].mean(1))  # type: ignore[no-any-return]


def recordings(split: str) -> tuple[Tensor, Tensor]:
    """Ten seconds each of a watch's accelerometer and gyroscope, cut into windows; and what its wearer did."""
    series, labels = load_classification("BasicMotions", split=split)
    x = torch.from_numpy(series).float() / 5
    names = sorted(set(labels))
    return x.unflatten(2, (WINDOWS, STEPS)).transpose(1, 2).contiguous(), torch.tensor([names.index(n) for n in labels])


torch.manual_seed(0)
train, (x, y) = recordings("train"), recordings("test")
model = Motion()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):  # the static model, as you have it
    for batch, labels in as_loader(train, batch_size=8, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()

dyn = dc.dynamize(model, "frame_skip", example_inputs=x[:2])
print(dyn.inspect())
dc.finetune(dyn, train, epochs=60, mode="joint", target_cost=0.5, batch_size=8, lr=3e-3, progress=False)

dyn.eval()
trace = dyn.trace(x)
static = (model.eval()(x).argmax(1) == y).float().mean().item()
dynamic = (trace.output.argmax(1) == y).float().mean().item()
kept = trace.decisions["frames0"]
print(f"static accuracy {static:.3f}; dynamic {dynamic:.3f} with {kept.float().mean().item():.0%} of the windows seen")
print("windows of the first recording:", "".join("#" if window else "." for window in kept[0]))

fast = dc.lower(dyn)
torch.testing.assert_close(fast(x), trace.output, rtol=1e-3, atol=1e-3)
print("ran:", fast.last_run)
