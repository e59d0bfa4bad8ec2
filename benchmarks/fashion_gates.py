"""Gates on real data: Fashion-MNIST, a ResNet-20 or ViT trained here, converted, fine-tuned to a target cost, tested.

`python -m benchmarks.fashion_gates --strategy layer_skip --out fashion_gates.json` trains the static model (once:
its weights are kept in `--cache`), and for each seed converts it, fine-tunes it to `--target-cost` and measures the
untouched test set: accuracy against the static model, cost counted by the decisions taken, and how often each gate
was open. A seed that was stopped goes on where it was.

Protocol:
- The static model is one of the demo's: trained on 55,000 augmented images; 5,000 are held out, 10,000 are the test
  set, which is looked at once, after training.
- Nothing is chosen by the test set; the last weights are kept, gates decide as they come out of training (no bias).
- Where early_exit is the last of the passes, the gates are fine-tuned first, to `--gate-cost`, and exits are trained
  behind them, everything else as it is; `--together` fine-tunes both in one run instead. `calibrate` on the 5,000 then
  chooses thresholds and biases for `--target-cost`. The loss of accuracy that is allowed is 1.5 points then, else 1.
- All figures are of evaluation: hard decisions, batch norm statistics of the samples that reach each norm.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dyncompile as dc
from benchmarks import harness
from benchmarks.cases import torchvision
from benchmarks.harness import Report, Table, Target
from benchmarks.tasks import trained_once
from dyncompile.demo.datasets import Images, load
from dyncompile.demo.models import ResNet, VisionTransformer
from dyncompile.demo.train import Augmented, Schedule, accuracy, multiplies_in_bfloat16, train, training_layout
from dyncompile.passes.channel_gate import ChannelGate
from dyncompile.training.gating import part_rates

DROP, COMPOSED = 0.01, 0.015
"""Accuracy that gates alone, and gates with exits, may lose."""
NEVER = 0.005
"""A gate is dead below this rate, and always open above 1 minus it."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fashion_gates", description=__doc__.partition("\n")[0])
    parser.add_argument("--strategy", default="layer_skip", help="a pass, or several joined by +")
    parser.add_argument("--granularity", choices=["levels", "channel"], default="levels", help="of channel_gate")
    parser.add_argument("--target-cost", type=float, default=0.6)
    parser.add_argument("--gate-cost", type=float, default=0.65, help="of the gates, where exits bring it further down")
    parser.add_argument("--model", choices=["resnet20", "vit"], default="resnet20")
    parser.add_argument("--width", type=int, help="channels of the first stage (16), or of a token (96)")
    parser.add_argument("--patch", type=int, default=7, help="of a ViT")
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tuning")
    parser.add_argument("--exit-epochs", type=int, default=4, help="of the exits behind trained gates")
    parser.add_argument("--together", action="store_true", help="gates and exits in one fine-tuning")
    parser.add_argument("--static-epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--seed", type=int, action="append", help="only this one; may be given again")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--samples", type=int, help="train on so many, to see whether everything runs")
    parser.add_argument("--cache", type=Path, default=Path("fashion-gates"), help="static weights, stopped runs")
    parser.add_argument("--out", type=Path, default=Path("fashion_gates.json"), help="JSON; Markdown goes beside it")
    options = parser.parse_args(arguments)
    if options.granularity == "channel" and "channel_gate" not in options.strategy.split("+"):
        parser.error("--granularity is of channel_gate, which is not in --strategy")
    options.width = options.width or {"resnet20": 16, "vit": 96}[options.model]
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        torchvision()  # which Lightning imports where it is there, even if it does not fit the installed torch
    images = load(options.data)
    if options.samples:
        images = _shortened(images, options.samples)
    options.cache.mkdir(parents=True, exist_ok=True)
    static = static_model(images, options)
    test, labels = images.test.tensors
    with torch.no_grad():
        reference = accuracy(static, test, labels, batch_size=250)
    report = Report(
        command=harness.command("fashion_gates", arguments),
        machine=harness.machine("cpu"),
        settings={
            "model": f"{_named(options)}, static accuracy {reference:.4f}",
            "data": f"{images.name}: {len(images.train)} to train, {len(images.test)} to test",
            "fine-tuning": f"{options.epochs} epochs, lr {options.lr}, target cost {options.target_cost}",
        },
    )
    found = [one_seed(static, images, options, seed) for seed in options.seed or range(options.seeds)]
    summarise(report, options.strategy, options.target_cost, reference, found)
    report.write(options.out)
    print(report.markdown())


def static_model(images: Images, options: argparse.Namespace) -> nn.Module:
    """The static model, trained, or as it was kept."""
    path = options.cache / f"{_named(options)}.safetensors"
    torch.manual_seed(0)
    channels, size = images.shape[0], images.shape[-1]
    schedule = Schedule(
        epochs=options.static_epochs, batch_size=128, learning_rate=0.1, autocast=multiplies_in_bfloat16()
    )
    if options.model == "vit":
        sizes = {"patch": options.patch, "width": options.width}
        model: nn.Module = VisionTransformer(size, classes=len(images.classes), in_channels=channels, **sizes)
        schedule = dataclasses.replace(
            schedule, learning_rate=2e-3, weight_decay=0.05, optimizer="adamw", autocast=False
        )
    else:
        model = ResNet(20, width=options.width, classes=len(images.classes), in_channels=channels)
    return trained_once(model, path, lambda: train(model, images, schedule, seed=0))


def _named(options: argparse.Namespace) -> str:
    return f"{options.model}-{options.width}" + (f"-patch{options.patch}" if options.model == "vit" else "")


def one_seed(static: nn.Module, images: Images, options: argparse.Namespace, seed: int) -> dict[str, object]:
    """Convert, fine-tune and test."""
    torch.manual_seed(seed)
    strategy = options.strategy.split("+")
    exits = strategy[-1] == "early_exit"
    first = strategy[:-1] if exits and not options.together else strategy
    target = options.gate_cost if exits else options.target_cost
    passes = [ChannelGate(granularity=options.granularity) if name == "channel_gate" else name for name in first]
    dyn = dc.dynamize(static, passes, example_inputs=images.train.tensors[0][:2])
    start = time.perf_counter()
    kind = "-by-channel" if options.granularity == "channel" else ""
    named = f"{'+'.join(first)}{kind}-{_named(options)}-{target}-{options.epochs}-{seed}"
    dyn = _finetuned(dyn, images, options, named, seed, epochs=options.epochs, mode="joint", target_cost=target)
    if first != strategy:
        # Behind gates that stay as they are.
        dyn = dc.dynamize(dyn, "early_exit")
        for gate in dyn.gates.values():
            gate.requires_grad_(False)
        _finetuned(dyn, images, options, f"exits-{named}", seed, epochs=options.exit_epochs, mode="heads")
    if exits:
        print(dc.calibrate(dyn.eval(), images.calibration, max_cost=options.target_cost, progress=False), flush=True)
    return {"seed": seed, "seconds": time.perf_counter() - start, **tested(dyn.eval(), *images.test.tensors)}


def _finetuned(
    dyn: dc.DynamicModule, images: Images, options: argparse.Namespace, named: str, seed: int, **how: Any
) -> dc.DynamicModule:
    dyn.to(memory_format=training_layout(dyn))  # type: ignore[call-overload]
    result = dc.finetune(
        dyn,
        Augmented(images.train, mirror=images.mirror),
        images.calibration,
        lr=options.lr,
        batch_size=128,
        precision="bf16-mixed" if multiplies_in_bfloat16() and options.model != "vit" else "32-true",
        directory=options.cache / named,
        resume=True,
        seed=seed,
        progress=False,
        accelerator="cpu",
        **how,
    )
    print(result, flush=True)
    return dyn


@torch.no_grad()
def tested(dyn: dc.DynamicModule, inputs: Tensor, labels: Tensor) -> dict[str, object]:
    """Accuracy, counted cost and rates on labelled inputs, with hard decisions."""
    hits, cost = 0, 0.0
    rates: dict[str, float] = {}
    for x, y in zip(inputs.split(250), labels.split(250), strict=True):
        trace = dyn.trace(x)
        hits += int((trace.output.argmax(1) == y).sum())
        cost += float(trace.cost.sum())
        for name, rate in _rates(trace).items():
            rates[name] = rates.get(name, 0.0) + rate * len(y) / len(labels)
    return {"accuracy": hits / len(labels), "cost": cost / len(labels), "rates": rates}


def _rates(trace: dc.Trace) -> dict[str, float]:
    """How often each gate is open; of one that decides about groups of neurons or channels, each of these."""
    found: dict[str, float] = {}
    for name, rates in part_rates(trace).items():
        names = [f"{name}.{part}" for part in range(len(rates))] if name in trace.parts else [name]
        found.update(zip(names, rates.tolist(), strict=True))
    return found


def summarise(report: Report, strategy: str, target: float, reference: float, found: list[dict]) -> None:  # type: ignore[type-arg]
    """A table of the seeds, one of the gates, and the targets."""
    table = Table(
        title=f"{strategy}: test set",
        columns=["seed", "accuracy", "against static, points", "cost", "least used", "most used", "seconds"],
        rows=[],
        note="Cost: FLOPs counted by the decisions taken, 1.0 = the static model; gates included.",
    )
    gates = Table(title=f"{strategy}: share of the test set for which each gate is open", columns=["gate"], rows=[])
    for run in found:
        rates = run["rates"]
        drop = run["accuracy"] - reference
        spread = [min(rates.values()), max(rates.values())]
        table.rows.append([run["seed"], run["accuracy"], 100 * drop, run["cost"], *spread, round(run["seconds"])])
        what = f"{strategy}, seed {run['seed']}"
        report.targets += [
            Target(what=f"{what}: cost", found=run["cost"], bound=target),
            Target(what=f"{what}: accuracy lost", found=-drop, bound=COMPOSED if "early_exit" in strategy else DROP),
            Target(what=f"{what}: no gate never open", found=spread[0], bound=NEVER, at_least=True),
            Target(what=f"{what}: no gate always open", found=spread[1], bound=1 - NEVER),
        ]
    gates.columns += [f"seed {run['seed']}" for run in found]
    gates.rows = [[name, *(run["rates"][name] for run in found)] for name in found[0]["rates"]]
    report.tables += [table, gates]


def _shortened(images: Images, samples: int) -> Images:
    kept = TensorDataset(*(tensor[:samples] for tensor in images.train.tensors))
    return dataclasses.replace(images, train=kept)


if __name__ == "__main__":
    harness.told(main)
