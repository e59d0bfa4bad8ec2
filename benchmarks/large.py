"""Large models with forced decisions: resnet50 and vit_b_16 at batch 1, 32 and 256, in float32 and bfloat16.

`python -m benchmarks large --device cuda`. Weights are random and decisions forced: what is measured is the mechanism.
On a GPU the static forms are eager, inductor and inductor with CUDA graphs; the lowered model runs its segments from
inductor, and with CUDA graphs, its parts filled up to buckets. On a processor: eager, inductor, inductor frozen.

Half of the samples leave at the first of three exits; or each gate is open for half of the samples. At batch 1, where a
sample leaves or does not, both are timed and their mixture is taken.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dyncompile as dc
from benchmarks import harness
from benchmarks.cases import torchvision
from benchmarks.early_exit import realised_saving
from benchmarks.forms import WHOLE, whole
from benchmarks.harness import Report, Table, Timing, take_turns
from dyncompile.lowering import LoweredModule
from dyncompile.testing import forced

MODELS = ("resnet50", "vit_b_16")
BATCHES = (1, 32, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STRATEGIES = ("early_exit", "layer_skip")
SHARE = 0.5
Call = Callable[[Tensor], Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="tiny stand-ins of the same kinds: does everything run?")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("large.json"), help="JSON; Markdown goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    harness.keep_memory()
    torch._dynamo.config.recompile_limit = 10_000
    batches = (1, 4) if options.quick else options.batch
    rounds = 2 if options.quick else options.rounds
    report = Report(
        command=harness.command("large", arguments),
        machine=harness.machine(options.device),
        settings={"rounds": rounds, "weights": "random", "decisions": f"forced, {SHARE:.0%}"},
    )
    for name in options.model:
        for dtype in options.dtype:
            for strategy in STRATEGIES:
                table = compare(
                    name, strategy, DTYPES[dtype], batches, rounds=rounds, device=options.device, tiny=options.quick
                )
                table.title = f"{name}, {dtype}, {strategy}"
                report.tables.append(table)
                report.write(options.out)
    print(report.markdown())


def build(name: str, *, tiny: bool) -> tuple[nn.Module, int]:
    """A model and the side of its images; tiny: another of the same kind, for a machine where that one takes long."""
    models = torchvision().models
    torch.manual_seed(0)
    if not tiny:
        return getattr(models, name)().eval(), 224
    if name == "resnet50":
        return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=8).eval(), 32
    sizes = {"num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    return models.VisionTransformer(image_size=32, patch_size=16, **sizes).eval(), 32


@torch.no_grad()
def compare(
    name: str,
    strategy: str,
    dtype: torch.dtype,
    batches: Sequence[int],
    *,
    rounds: int,
    device: str,
    tiny: bool,
) -> Table:
    """Time the static forms and the lowered ones at each batch size."""
    model, pixels = build(name, tiny=tiny)
    model.to(device, dtype)
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        return torch.randn(count, 3, pixels, pixels, generator=generator).to(device, dtype)

    dyn = dc.dynamize(model, strategy, example_inputs=images(2)).eval()
    for module in (*dyn.exits.values(), *dyn.gates.values()):
        module.get_buffer("enabled").fill_(True)
    for exit_ in dyn.exits.values():
        exit_.get_buffer("threshold").fill_(1.0)
    static = static_forms(model, images(2), device, compilers=not tiny)
    dynamic = lowered_forms(dyn, batches, device, compilers=not tiny)
    table = Table(
        title="",
        columns=["batch", "what runs", "counted cost", "ms", "iqr", "over the twin", "realised over counted"],
        rows=[],
        note=f"{len(dyn.exits)} exits, {len(dyn.gates)} gates.",
    )
    for batch in batches:
        _batch(table, dyn, static, dynamic, images(batch), rounds=rounds, device=device)
    return table


def static_forms(model: nn.Module, x: Tensor, device: str, *, compilers: bool) -> dict[str, Call]:
    """The ways to run the static model on a device."""
    found: dict[str, Call] = {"eager": model}
    if compilers:
        found[WHOLE] = whole(model, x)
        found["inductor"] = torch.compile(model, dynamic=False)
        if device == "cpu":
            found["inductor frozen"] = torch.compile(model, dynamic=False, options={"freezing": True})
        else:
            found["inductor, CUDA graphs"] = torch.compile(model, dynamic=False, mode="reduce-overhead")
    return found


def lowered_forms(
    dyn: dc.DynamicModule, batches: Sequence[int], device: str, *, compilers: bool
) -> dict[str, LoweredModule]:
    """The ways to run the dynamic model on a device."""
    if not compilers:
        return {"lowered, eager": dc.lower(dyn, "eager", decline=False)}
    found = {"lowered, inductor": dc.lower(dyn, decline=False)}
    if device != "cpu":
        # Parts of a batch come in every size; a graph is recorded for each bucket.
        buckets = sorted({2**i for i in range(max(batches).bit_length())} | set(batches))
        found["lowered, CUDA graphs"] = dc.lower(dyn, decline=False, buckets=buckets, cudagraphs=True)
    return found


def _batch(
    table: Table,
    dyn: dc.DynamicModule,
    static: dict[str, Call],
    dynamic: dict[str, LoweredModule],
    x: Tensor,
    *,
    rounds: int,
    device: str,
) -> None:
    """Rows of one batch size."""
    first = next(iter(dyn.exits), None)
    batch = len(x)
    # At batch 1 a decision is one of two; their mixture is what a stream takes.
    shares = (0.0, 1.0) if batch == 1 else (SHARE,)
    parts = {}
    for form, fast in dynamic.items():
        for share in shares:
            chosen = {first: share} if first else dict.fromkeys(dyn.gates, share)
            parts[f"{form} {share}"] = (fast, chosen)
    costs = []
    for share in shares:
        with forced(dyn, {first: share} if first else dict.fromkeys(dyn.gates, share)):
            costs.append(float(dyn.trace(x).cost.float().mean()))
    times = take_turns(
        {**{n: partial(call, x) for n, call in static.items()}, **{n: partial(f, x) for n, (f, _) in parts.items()}},
        rounds=rounds,
        repeats=max(1, 8 // batch),
        device=device,
        within={n: partial(forced, f, chosen) for n, (f, chosen) in parts.items()},
    )
    twin = min(static, key=lambda form: times[form].median)
    rows: list[tuple[str, float, Timing]] = [(f"static, {n}", 1.0, times[n]) for n in static]
    for form in dynamic:
        timing = Timing.mixture([(1 / len(shares), times[f"{form} {share}"]) for share in shares])
        rows.append((form, sum(costs) / len(costs), timing))
    for what, cost, timing in rows:
        over = timing.over(times[twin]).value
        realised = realised_saving(cost, over) if cost < 0.98 else ""
        table.rows.append([batch, what, cost, 1e3 * timing.median, 1e3 * timing.iqr, over, realised])


if __name__ == "__main__":
    harness.told(main)
