"""An LSTM that skips steps of spoken vowels: `python examples/frame_skip.py` (aeon ships the recordings)."""

import torch
from aeon.datasets import load_classification
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.data import as_loader


class Speaker(nn.Module):
    """Nine speakers, told by the mean of an LSTM's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 64, batch_first=True)
        self.fc = nn.Linear(64, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0].mean(1))  # type: ignore[no-any-return]


def recordings(split: str) -> tuple[Tensor, Tensor]:
    """Recordings of 7 to 29 steps, padded to `[N, 29, 12]`, and who speaks."""
    series, labels = load_classification("JapaneseVowels", split=split)
    x = torch.zeros(len(series), 29, 12)
    for row, steps in zip(x, series, strict=True):
        row[: steps.shape[1]] = torch.from_numpy(steps.T)
    return x, torch.tensor([int(label) - 1 for label in labels])


torch.manual_seed(0)
train, (x, y) = recordings("train"), recordings("test")
model = Speaker()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(60):  # the static model, as you have it
    for batch, labels in as_loader(train, batch_size=32, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()

dyn = dc.dynamize(model, "frame_skip", example_inputs=x[:2])
dc.finetune(dyn, train, epochs=40, mode="joint", target_cost=0.5, batch_size=32, lr=5e-3, progress=False)

dyn.eval()
trace = dyn.trace(x)
static = (model.eval()(x).argmax(1) == y).float().mean().item()
dynamic = (trace.output.argmax(1) == y).float().mean().item()
kept = trace.decisions["frames0"]
print(f"static accuracy {static:.3f}; dynamic {dynamic:.3f} with {kept.float().mean().item():.0%} of the steps updated")
print("steps of the first recording:", "".join("#" if step else "." for step in kept[0]))

fast = dc.lower(dyn)
torch.testing.assert_close(fast(x), trace.output, rtol=1e-3, atol=1e-3)
print("ran:", fast.last_run)
