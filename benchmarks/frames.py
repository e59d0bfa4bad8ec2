"""Frame skip on real recordings: what it costs in accuracy, and what it saves by the clock.

`python -m benchmarks.frames --out frames.json` trains an LSTM on spoken vowels (package `aeon`) and, with
`--hapt ARCHIVE` (`benchmarks.recordings`), on the movements of people that it was not trained on; converts it,
fine-tunes it to a target and looks at the test set once. `--only time` measures the clock instead: keep the core quiet.

- Accuracy: the test set, hard decisions. Steps: of those inside the recordings; what is padded counts for nobody.
- Beside it, the static model that is simply given every other step: what skipping is worth without an agent.
- Time: the lowered model with decisions forced to a share of the steps, over torch's own LSTM, one thread, in turns;
  the counted saving is FLOPs of what was kept, the agent included.
"""

import argparse
import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dyncompile as dc
from benchmarks import harness
from benchmarks.cases import torchvision
from benchmarks.early_exit import realised_saving
from benchmarks.harness import Report, Table, Target, take_turns
from benchmarks.recordings import Recordings, at_length, hapt, japanese_vowels
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.testing import forced

DROP = 0.01
HALF = 0.5
NEVER = 0.005
KEPT = (0.5, 0.25)
SIZES = {"small": (6, 64, 128), "large": (64, 256, 128)}
QUICK_SIZES = {"tiny": (6, 16, 16)}
"""Width of a step, width of the LSTM, steps."""

ROUNDS = {1: 60, 16: 25, 64: 12}


class Classifier(nn.Module):
    """An LSTM over a padded sequence; its output at the last step is classified."""

    def __init__(self, width: int, hidden: int, classes: int, layers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Logits `[N, K]` of sequences `[N, T, D]` with lengths `[N]`."""
        return self.fc(at_length(self.rnn(x)[0], lengths))  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frames", description=__doc__.partition("\n")[0])
    parser.add_argument("--hapt", type=Path, help="the archive; without it, spoken vowels alone")
    parser.add_argument("--only", choices=["accuracy", "time"], help="default: both")
    parser.add_argument("--reads", choices=["input", "state"], default="input", help="what the agent reads")
    parser.add_argument("--target-cost", type=float, help="default: by data set")
    parser.add_argument("--epochs", type=int, help="of fine-tuning; default: by data set")
    parser.add_argument("--static-epochs", type=int, help="default: by data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="little of everything: does it run?")
    parser.add_argument("--out", type=Path, default=Path("frames.json"), help="JSON; Markdown goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        torchvision()  # which Lightning imports where it is there, even if it does not fit the installed torch
    report = Report(
        command=harness.command("frames", arguments),
        machine=harness.machine("cpu"),
        settings={"the agent reads": options.reads},
    )
    if options.only != "time":
        # Vowels are padded to the longest, and what is padded is skipped first: 0.3 of all steps is half of their own.
        learned(report, japanese_vowels(), options, static_epochs=60, epochs=80, hidden=64, target=0.3)
        if options.hapt is not None:
            learned(report, hapt(options.hapt), options, static_epochs=12, epochs=16, hidden=64, target=0.45)
        report.write(options.out)
    if options.only != "accuracy":
        harness.keep_memory()
        for name, sizes in (QUICK_SIZES if options.quick else SIZES).items():
            timed(report, name, *sizes, quick=options.quick)
            report.write(options.out)
    print(report.markdown())


# --- accuracy ----------------------------------------------------------------------------------------


def learned(
    report: Report,
    data: Recordings,
    options: argparse.Namespace,
    *,
    static_epochs: int,
    epochs: int,
    hidden: int,
    target: float,
) -> None:
    """Train the static model, convert it, fine-tune and test: once a seed."""
    target = options.target_cost or target
    epochs = 2 if options.quick else options.epochs or epochs
    static_epochs = 2 if options.quick else options.static_epochs or static_epochs
    table = Table(
        title=f"{data.name}: {len(data.test)} test recordings",
        columns=["seed", "static accuracy", "dynamic", "points", "steps updated", "cost", "static, every other step"],
        rows=[],
        note=f"LSTM of {hidden} units; {len(data.train)} recordings to train; tuned to {target} in {epochs} epochs.",
    )
    for seed in range(1 if options.quick else options.seeds):
        torch.manual_seed(seed)
        x, lengths, labels = data.test.tensors
        model = Classifier(x.shape[2], hidden, data.classes)
        fit(model, data.train, static_epochs)
        dyn = dc.dynamize(model, FrameSkip(reads=options.reads), example_inputs=(x[:2], lengths[:2]))
        result = dc.finetune(
            dyn,
            data.train,
            data.validation,
            epochs=epochs,
            mode="joint",
            target_cost=target,
            batch_size=64 if len(data.train) > 1000 else 32,
            seed=seed,
            progress=False,
            accelerator="cpu",
        )
        print(result, flush=True)
        static, dynamic, kept, cost = measured(model.eval(), dyn.eval(), data.test)
        halved = float((model(x[:, ::2], (lengths + 1) // 2).argmax(1) == labels).float().mean())
        table.rows.append([seed, static, dynamic, 100 * (dynamic - static), kept, cost, halved])
        what = f"{data.name}, seed {seed}"
        report.targets += [
            Target(what=f"{what}: steps updated", found=kept, bound=HALF),
            Target(what=f"{what}: accuracy lost", found=static - dynamic, bound=DROP),
            Target(what=f"{what}: agent not dead", found=kept, bound=NEVER, at_least=True),
        ]
    report.tables.append(table)


def fit(model: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Train a static classifier, the learning rate falling along half a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(64):
            x, lengths, labels = (t[batch] for t in data.tensors)
            optimizer.zero_grad()
            F.cross_entropy(model(x, lengths), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()


@torch.no_grad()
def measured(model: nn.Module, dyn: dc.DynamicModule, data: TensorDataset) -> tuple[float, float, float, float]:
    """Accuracy of the static and the dynamic model; share of the recordings' own steps that ran; counted cost."""
    hits, static, ran, steps, cost = 0, 0, 0, 0, 0.0
    for part in torch.arange(len(data)).split(250):
        x, lengths, labels = (t[part] for t in data.tensors)
        trace = dyn.trace(x, lengths)
        inside = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
        hits += int((trace.output.argmax(1) == labels).sum())
        static += int((model(x, lengths).argmax(1) == labels).sum())
        ran += int((trace.decisions["frames0"] & inside).sum())
        steps += int(inside.sum())
        cost += float(trace.cost.sum())
    return static / len(data), hits / len(data), ran / steps, cost / len(data)


# --- time --------------------------------------------------------------------------------------------


@torch.no_grad()
def timed(report: Report, name: str, width: int, hidden: int, steps: int, *, quick: bool) -> None:
    """Time of a call: torch's own LSTM, everything kept, shares kept."""
    torch.manual_seed(0)
    model = Classifier(width, hidden, 10).eval()
    example = torch.randn(2, steps, width), torch.full((2,), steps)
    dyn = dc.dynamize(model, FrameSkip(), example_inputs=example).eval()
    dyn.gates["frames0"].get_buffer("enabled").fill_(True)
    fast = dc.lower(dyn, decline=False)
    for batch, rounds in ROUNDS.items():
        x, lengths = torch.randn(batch, steps, width), torch.full((batch,), steps)
        masks = {"all kept": torch.ones(batch, steps, dtype=torch.bool)}
        for kept in KEPT:
            masks[f"{kept:.0%} kept, of each sample"] = spread(batch, steps, kept, each=True)
            masks[f"{kept:.0%} kept, of the batch"] = spread(batch, steps, kept, each=False)
        counted = {}
        for what, mask in masks.items():
            with forced(dyn, {"frames0": mask}):
                counted[what] = float(dyn.trace(x, lengths).cost.mean())
        times = take_turns(
            {"static": partial(model, x, lengths), **dict.fromkeys(masks, partial(fast, x, lengths))},
            rounds=2 if quick else rounds,
            repeats=max(1, 8 // batch),
            within={what: partial(forced, fast, {"frames0": mask}) for what, mask in masks.items()},
        )
        table = Table(
            title=f"LSTM {name}, batch {batch}",
            columns=["what runs", "counted cost", "ms", "iqr", "over static", "realised over counted"],
            rows=[["static", 1.0, 1e3 * times["static"].median, 1e3 * times["static"].iqr, 1.0, ""]],
            note=f"{steps} steps of {width} channels, {hidden} units.",
        )
        for what, cost in counted.items():
            over = times[what].over(times["static"])
            realised = realised_saving(cost, over.value) if cost < 0.98 else ""
            table.rows.append([what, cost, 1e3 * times[what].median, 1e3 * times[what].iqr, over.value, realised])
            if cost < 0.98:
                saved = over.map(partial(realised_saving, cost))
                report.targets.append(
                    Target(
                        what=f"LSTM {name}, batch {batch}: realised over counted saving, {what}",
                        found=saved.value,
                        low=saved.low,
                        high=saved.high,
                        bound=0.8,
                        at_least=True,
                    )
                )
        report.tables.append(table)


def spread(batch: int, steps: int, kept: float, *, each: bool) -> Tensor:
    """A mask `[batch, steps]` that keeps a share of the steps of each sample, or of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    if each:
        order = torch.rand(batch, steps, generator=generator).argsort(1)
        return order < round(kept * steps)
    order = torch.rand(batch * steps, generator=generator).argsort()
    return (order < round(kept * batch * steps)).view(batch, steps)


if __name__ == "__main__":
    harness.told(main)
