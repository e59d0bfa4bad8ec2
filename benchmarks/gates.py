"""What gates save where decisions are forced to given shares: by the clock, beside what is counted.

Run `python -m benchmarks.gates`; `--help` lists what can be chosen. One thread, static and dynamic model in the same
run on the same input, in turns; medians and quartiles of the rounds; JSON and Markdown out.

- The static twin is the fastest of the static forms, as in `benchmarks.early_exit`.
- Shares are of samples, drawn for each gate by itself; at batch 1, where a gate is open or not, they are of gates, and
  the mean over some draws is taken. Groups of neurons are drawn for each row by itself, at every batch size. Counted
  cost: FLOPs of what was drawn, gates included (`dyn.trace`).
- Beside it, what the operators themselves make of it: the static model on the rows that are left, over what rows are
  left. A convolution of few rows takes longer a row; no lowering can save what that loses.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import dyncompile as dc
from benchmarks import harness
from benchmarks.cases import CASES, QUICK, Case
from benchmarks.early_exit import contenders, realised_saving
from benchmarks.forms import WHOLE, forms, whole
from benchmarks.harness import Report, Table, Target, Timing, take_turns
from dyncompile.lowering.lowered import LoweredModule
from dyncompile.module import decision_nodes, decision_owners, decision_routes
from dyncompile.passes import Pass, resolve
from dyncompile.shapes import spec
from dyncompile.testing import Share, forced

KEPT = (0.5, 0.25)
ROUNDS = {1: 60, 16: 25, 64: 12}
DRAWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated:
    """A strategy to measure on a model.

    Attributes:
        model: Name of a case.
        strategy: Name of a pass.
        options: Of the pass.
        bound: Least share of the counted saving that the clock should show.
    """

    model: str
    strategy: str
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    bound: float

    @property
    def name(self) -> str:
        """What stands over its tables."""
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{self.strategy} on {self.model}{options}"

    def make(self) -> Pass:
        """The pass."""
        return resolve(self.strategy, dict(self.options))[0]


GATED = [
    Gated(model="resnet18-112", strategy="layer_skip", bound=0.95),
    Gated(model="resnet18-64", strategy="layer_skip", bound=0.95),
    Gated(model="vit", strategy="layer_skip", bound=0.95),
    Gated(model="resnet18-64", strategy="channel_gate", bound=0.8),
    Gated(model="vit", strategy="neuron_gate", bound=0.8),
    Gated(model="vit", strategy="neuron_gate", options={"per": "token"}, bound=0.8),
]

TINY = [Gated(model="resnet20-tiny", strategy="layer_skip", bound=0.95)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__.partition("\n")[0])
    parser.add_argument("--strategy", choices=sorted({g.strategy for g in GATED}), help="default: all")
    parser.add_argument("--model", choices=sorted({g.model for g in GATED}), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything run?")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("gates.json"), help="JSON; Markdown goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    harness.keep_memory()
    chosen = TINY if options.quick else GATED
    chosen = [g for g in chosen if options.strategy in (None, g.strategy) and options.model in (None, g.model)]
    report = Report(
        command=harness.command("gates", arguments),
        machine=harness.machine(options.device),
        settings={"rounds": 2 if options.quick else str(ROUNDS), "draws at batch 1": str(DRAWS)},
    )
    for gated in chosen:
        running(report, gated, quick=options.quick, device=options.device)
        report.write(options.out)
    print(report.markdown())


@torch.no_grad()
def running(report: Report, gated: Gated, *, quick: bool, device: str) -> None:
    """Time of a call: static forms, everything open, shares open."""
    case = {**CASES, **QUICK}[gated.model]
    model = case.static(device)
    dyn = dc.dynamize(model, gated.make(), example_inputs=case.inputs(2, device)).eval()
    for gate in dyn.gates.values():
        gate.get_buffer("enabled").fill_(True)
    fast = dc.lower(dyn, decline=False)
    entire = whole(model, case.inputs(4, device))
    for batch in case.batch_sizes:
        _batch(report, gated, case, batch, (dyn, fast, model, entire), quick=quick, device=device)


def _batch(
    report: Report,
    gated: Gated,
    case: Case,
    batch: int,
    models: tuple[dc.DynamicModule, LoweredModule, nn.Module, Callable[[Tensor], Tensor]],
    *,
    quick: bool,
    device: str,
) -> None:
    dyn, fast, model, entire = models
    rounds = 2 if quick else ROUNDS[batch]
    x = case.inputs(batch, device)
    static = contenders({**forms(model, compilers=not quick), WHOLE: entire}, x, rounds=min(rounds, 5), device=device)
    draws: dict[str, Mapping[str, Share]] = {"open": _drawn(dyn, 1.0, batch, 0)}
    for kept in KEPT:
        for seed in range(DRAWS if batch == 1 else 1):
            draws[f"{kept} {seed}"] = _drawn(dyn, kept, batch, seed)
    counted = {}
    for name, shares in draws.items():
        with forced(dyn, shares):
            counted[name] = float(dyn.trace(x).cost.mean())
    # The static model on the share of rows that is kept: what a part of a batch costs without any gate.
    parts = {f"part {kept}": partial(entire, x[: round(kept * batch)]) for kept in KEPT if batch > 1}
    times = take_turns(
        {**{n: partial(call, x) for n, call in static.items()}, **parts, **dict.fromkeys(draws, partial(fast, x))},
        rounds=rounds,
        repeats=max(1, (4 if quick else 8) // batch),
        device=device,
        within={n: partial(forced, fast, shares) for n, shares in draws.items()},
    )
    twin = min(static, key=lambda form: times[form].median)
    table = Table(
        title=f"{gated.name}, batch {batch}",
        columns=["what runs", "counted cost", "ms", "iqr", "over the twin", "realised over counted"],
        rows=[],
        note=f"Static twin: {twin}. {len(dyn.gates)} gates.",
    )
    rows: list[tuple[str, Timing, float]] = [(f"static, {n}", times[n], 1.0) for n in static]
    rows.append(("dynamic, all open", times["open"], counted["open"]))
    for kept in KEPT:
        if batch > 1:
            rows.append((f"static, {kept:.0%} of the rows", times[f"part {kept}"], round(kept * batch) / batch))
        names = [name for name in draws if name.startswith(f"{kept} ")]
        timing = Timing.mixture([(1 / len(names), times[name]) for name in names])
        cost = sum(counted[name] for name in names) / len(names)
        rows.append((f"dynamic, {kept:.0%} kept", timing, cost))
        saved = timing.over(times[twin]).map(partial(realised_saving, cost))
        report.targets.append(
            Target(
                what=f"{gated.name}, batch {batch}: realised over counted saving, {kept:.0%} kept",
                found=saved.value,
                low=saved.low,
                high=saved.high,
                bound=gated.bound,
                at_least=True,
            )
        )
    for what, timing, cost in rows:
        over = timing.over(times[twin]).value
        realised = realised_saving(cost, over) if cost < 0.98 else ""
        table.rows.append([what, cost, 1e3 * timing.median, 1e3 * timing.iqr, over, realised])
    report.tables.append(table)


def _drawn(dyn: dc.DynamicModule, kept: float, batch: int, seed: int) -> dict[str, Share]:
    """Decisions in which each gate keeps a share of its rows; at batch 1, of gates of one row a share is kept.

    Drawn ahead, all of them: no call that is timed draws one.
    """
    routes = decision_routes(dyn.graph.fx)
    rows = {name: spec(node).rows for name, node in decision_nodes(dyn.graph.fx).items()}
    names = [n for n, owner in decision_owners(dyn.graph.fx).items() if owner in dyn.gates]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator)
    drawn: dict[str, Share] = {}
    for place, name in zip(order, names, strict=True):
        arms, total = routes.get(name, 0), batch * rows[name]
        shares = torch.tensor(_levels(kept, arms) if arms else [1 - kept, kept])
        # Strata: of all rows, in random order, each arm gets its share; of one row alone, of all gates.
        points = (
            (place + 0.5) / len(names) if total == 1 else (torch.randperm(total, generator=generator) + 0.5) / total
        )
        chosen = torch.bucketize(points.expand(total), shares.cumsum(0)[:-1], right=True)
        drawn[name] = chosen if arms else chosen.bool()
    return drawn


def _levels(kept: float, arms: int) -> list[float]:
    """Shares of equally spaced widths, 1 / arms to 1, whose mean is what is kept: of the two nearest."""
    place = max(kept * arms - 1, 0.0)
    low = min(int(place), arms - 2)
    shares = [0.0] * arms
    shares[low], shares[low + 1] = 1 - (place - low), place - low
    return shares


if __name__ == "__main__":
    harness.told(main)
