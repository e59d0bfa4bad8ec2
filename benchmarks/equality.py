"""Exported files against the lowered model on real inputs: outputs, and every decision of every row.

Models are trained briefly on real data, and their knobs are set on inputs that are not compared: decisions vary. Each
hangs on a number that two programs round differently: where that number lies within rounding of its
threshold the two may decide differently. Such ties are counted apart, with how near they are.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompile as dc
from benchmarks.cases import torchvision
from benchmarks.deciding import enable, exits, gates, settle
from benchmarks.harness import Report, Table, Target
from benchmarks.recordings import japanese_vowels
from dyncompile.demo.datasets import load
from dyncompile.demo.models import ResNet, VisionTransformer, resnet20
from dyncompile.exporting.checking import running, session
from dyncompile.passes import Pass
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.passes.layer_skip import LayerSkip

ROUNDING = 1e-4
"""How near a confidence or logit may be to its threshold for a decision to count as a tie."""

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output."""

Data = tuple[Tensor, Tensor, Tensor]
"""Inputs and labels to train on, and inputs to compare on."""


class Reader(nn.Module):
    """Classifies sequences `[N, T, D]` by the mean of an LSTM's outputs."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(width, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0].mean(1))  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and real inputs for it.

    Attributes:
        build: Makes the static model.
        passes: What makes it dynamic.
        data: Reads the inputs.
        steps: Of training: of the static model, then of the dynamic one.
    """

    build: Callable[[], nn.Module]
    passes: list[Pass]
    data: Callable[[], Data]
    steps: int = 60

    def trained(self) -> tuple[dc.DynamicModule, Tensor]:
        """The dynamic model, each decision of which says yes to about half of the inputs; and inputs to compare on."""
        torch.manual_seed(0)
        x, y, test = self.data()
        model = self.build()
        _fit(model, lambda i: F.cross_entropy(model(x[i]), y[i]), len(x), self.steps)
        dyn = dc.dynamize(model, self.passes, example_inputs=x[:2])

        def loss(i: Tensor) -> Tensor:
            trace = dyn.trace(x[i])
            return sum((F.cross_entropy(p, y[i]) for p in trace.exits.values()), F.cross_entropy(trace.final, y[i]))

        _fit(dyn, loss, len(x), self.steps)
        enable(dyn.eval())
        settle(dyn, x[:256], 0.5)
        return dyn, test


def _fit(model: nn.Module, loss: Callable[[Tensor], Tensor], size: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(size, (64,), generator=generator)).backward()
        optimizer.step()
    model.eval()


def fashion(*, channels: int = 1, size: int = 28, rows: bool = False, count: int = 1000) -> Data:
    """Fashion-MNIST: images `[N, C, S, S]`, or their rows as the steps of a sequence `[N, 28, 28]`."""
    images = load("fashion-mnist", shape=(1, size, size))
    x, y = (t[:5000] for t in images.train.tensors)
    parts = (x, images.test.tensors[0][:count])
    x, test = (t[:, 0] if rows else t.expand(-1, channels, -1, -1).contiguous() for t in parts)
    return x, y, test


def digits(*, channels: int = 1, size: int = 16, rows: bool = False, count: int = 1000) -> Data:
    """Handwritten digits of scikit-learn, likewise."""
    images = load("digits", shape=(1, size, size))
    x, y = images.calibration.tensors
    parts = (x, torch.cat([images.test.tensors[0], images.train.tensors[0]])[:count])
    x, test = (t[:, 0] if rows else t.expand(-1, channels, -1, -1).contiguous() for t in parts)
    return x, y, test


def vowels() -> Data:
    """JapaneseVowels: all 640 recordings are compared, for there are no more."""
    data = japanese_vowels()
    train, held, test = (split.tensors for split in (data.train, data.validation, data.test))
    return train[0], train[2], torch.cat([test[0], held[0], train[0]])


def _resnet(layers: list[int]) -> nn.Module:
    resnet = torchvision().models.resnet
    model: nn.Module = resnet.ResNet(resnet.BasicBlock, layers, num_classes=10)
    return model


STAGES = EarlyExit(exits=("layer1", "layer2", "layer3"), head="linear")

FULL = {
    "resnet18, 3 exits": Case(
        build=lambda: _resnet([2, 2, 2, 2]), passes=[STAGES], data=lambda: fashion(channels=3, size=32)
    ),
    "resnet20, gates and exits": Case(
        build=lambda: resnet20(in_channels=1), passes=[LayerSkip(), EarlyExit(head="linear")], data=fashion
    ),
    "vit, layer_skip": Case(build=VisionTransformer, passes=[LayerSkip()], data=fashion),
    "lstm, frame_skip": Case(build=lambda: Reader(28, 64), passes=[FrameSkip()], data=lambda: fashion(rows=True)),
    "lstm, frame_skip, vowels": Case(build=lambda: Reader(12, 64), passes=[FrameSkip()], data=vowels),
}
QUICK = {
    "resnet10, 3 exits": Case(
        build=lambda: _resnet([1, 1, 1, 1]), passes=[STAGES], data=lambda: digits(channels=3, count=200), steps=8
    ),
    "resnet20, gates and exits": Case(
        build=lambda: ResNet(20, width=4, in_channels=1),
        passes=[LayerSkip(), EarlyExit(exits=2, head="linear")],
        data=lambda: digits(count=200),
        steps=8,
    ),
    "vit, layer_skip": Case(
        build=lambda: VisionTransformer(16, width=32, depth=3),
        passes=[LayerSkip()],
        data=lambda: digits(count=200),
        steps=8,
    ),
    "lstm, frame_skip": Case(
        build=lambda: Reader(16, 16), passes=[FrameSkip()], data=lambda: digits(rows=True, count=200), steps=8
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What a program gives for inputs.

    Attributes:
        output: `[N, K]`.
        decisions: For each decision `[N, rows]` int64, -1 where nobody asked.
    """

    output: Tensor
    decisions: dict[str, Tensor]


@torch.no_grad()
def lowered(fast: dc.lowering.LoweredModule, x: Tensor, batch: int) -> Answers:
    """What the lowered model gives and decides, batch by batch."""
    asked: dict[str, Tensor] = {}

    def watch(name: str, value: Tensor, index: Tensor | None, count: int) -> Tensor:
        rows = asked.setdefault(name, torch.full((count,), -1))
        rows[slice(None) if index is None else index] = value.long()
        return value

    outputs, decisions = [], []
    before, fast._override = fast._override, watch
    try:
        for part in x.split(batch):
            outputs.append(fast(part))
            decisions.append({name: rows.view(len(part), -1) for name, rows in asked.items()})
            asked.clear()
    finally:
        fast._override = before
    # An arm that no row of a batch takes asks nobody.
    names = {name: rows.shape[1] for found in decisions for name, rows in found.items()}
    whole = {
        name: torch.cat([d.get(name, torch.full((len(o), w), -1)) for d, o in zip(decisions, outputs, strict=True)])
        for name, w in names.items()
    }
    return Answers(output=torch.cat(outputs), decisions=whole)


def exported(path: Path, x: Tensor, batch: int) -> Answers:
    """What an exported file gives and decides."""
    loaded = session(path)
    run, name = running(loaded), loaded.get_inputs()[0].name
    found = [{n: torch.from_numpy(v) for n, v in run({name: part.numpy()}).items()} for part in x.split(batch)]
    whole = {n: torch.cat([part[n] for part in found]) for n in found[0]}
    decisions = {
        n.removeprefix("decisions."): v.view(len(x), -1) for n, v in whole.items() if n.startswith("decisions.")
    }
    return Answers(output=whole["output"], decisions=decisions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How two programs differ.

    Attributes:
        ties: Samples the first decision of which to differ is within rounding of its threshold.
        wrong: Samples that decide differently without being ties.
        nearest: Of decisions that differ, the largest distance from the threshold.
        off: Largest difference of outputs relative to the largest output, over samples that decide alike.
    """

    ties: int
    wrong: int
    nearest: float
    off: float


def difference(one: Answers, other: Answers, margins: dict[str, Tensor]) -> Difference:
    """Compare two programs.

    Args:
        one: The file's answers.
        other: The lowered model's.
        margins: For each decision, in the order in which they are made, `[N, rows]`: how far the number that it hangs
            on is from the threshold.
    """
    undecided = torch.ones(len(one.output), dtype=torch.bool)
    ties = wrong = 0
    nearest = 0.0
    for name, margin in margins.items():
        unequal = one.decisions[name] != other.decisions[name]
        found = unequal.any(1) & undecided
        # What is decided behind it differs because of it.
        undecided &= ~found
        distance = torch.where(unequal, margin, 0.0).max(1).values[found]
        ties += int((distance <= ROUNDING).sum())
        wrong += int((distance > ROUNDING).sum())
        nearest = max(nearest, float(distance.max())) if len(distance) else nearest
    distances = ((one.output - other.output).abs() / other.output.abs().max())[undecided]
    return Difference(ties=ties, wrong=wrong, nearest=nearest, off=float(distances.max()) if distances.numel() else 0.0)


@torch.no_grad()
def margins(dyn: dc.DynamicModule, x: Tensor) -> dict[str, Tensor]:
    """How far each decision is from its threshold, `[N, rows]`: of a confidence, or of a logit."""
    found: dict[str, Tensor] = {}
    trace = dyn.trace(x)
    for name in trace.decisions:
        if name in trace.confidence:
            found[name] = (trace.confidence[name].double() - exits(dyn)[name].threshold.double()).abs()
        else:
            logits = torch.logit(trace.probabilities[name].double())
            found[name] = (logits + gates(dyn)[name].bias.double()).abs()
    return {name: value.view(len(x), -1) for name, value in found.items()}


def compare(
    report: Report, cases: dict[str, Case], folder: Path, *, backend: str = "inductor", batch: int = 100
) -> None:
    """Add a table, and targets for each case.

    `routing="sample"` is asked in batches, `routing="batch"` one input after the other.
    """
    columns = ["model", "inputs", "decisions", "yes", "routing", "ties", "nearest", "wrong", "outputs off by"]
    table = Table(title="Files against the lowered model, real inputs", columns=columns, rows=[])
    for name, case in cases.items():
        dyn, x = case.trained()
        expected = lowered(dc.lower(dyn, backend=backend, decline=False), x, batch)
        made = torch.cat([d.flatten() for d in expected.decisions.values()])
        made = made[made >= 0]
        order = margins(dyn, x)
        for routing, size in (("sample", batch), ("batch", 1)):
            path = dc.export(dyn, folder / "model.onnx", routing=routing, decisions=True)
            found = difference(exported(path, x, size), expected, order)
            yes = float(made.float().mean())
            row: list[Any] = [name, len(x), len(made), yes, routing, found.ties]
            table.rows.append([*row, f"{found.nearest:.1e}", found.wrong, f"{found.off:.1e}"])
            what = f"{name}, {routing}, {len(x)} real inputs"
            alike = 1 - found.wrong / len(x)
            report.targets.append(Target(what=f"{what}: decided alike", found=alike, bound=1, at_least=True))
            report.targets.append(Target(what=f"{what}: outputs off by", found=found.off, bound=TOLERANCE))
    report.tables.append(table)
