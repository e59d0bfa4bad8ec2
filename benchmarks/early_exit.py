"""What early exits cost where nobody leaves, and what they save where samples do: by the clock.

Run `python -m benchmarks.early_exit`; `--help` lists what can be chosen. One thread, static and dynamic model in the
same run on the same input, in turns; medians and quartiles of the rounds; JSON and Markdown out.

- The static twin is the fastest of the static forms: eager, eager channels-last, `torch.compile(dynamic=False)`, the
  same frozen, and the whole model through the compiler that the lowered model's segments go through.
- Nobody leaves: all exits run and none is sure. Samples leave: decisions are forced. Counted cost: FLOPs, all heads
  on the way included (`dyn.exit_costs`). At batch 1 a run exits or does not, so each case is timed by itself, and a
  stream in which a share of the samples leaves takes their mixture.
- Compile time and memory: sub-processes, empty caches, the static model compiled the same way.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import dyncompile as dc
from benchmarks import harness
from benchmarks.cases import CASES, QUICK, Case
from benchmarks.forms import WHOLE, forms, whole
from benchmarks.harness import Report, Table, Target, Timing, take_turns
from benchmarks.isolated import LOWERED, compile_time, isolated, peak_memory
from benchmarks.peer import compare
from dyncompile.lowering import LoweredModule
from dyncompile.testing import forced

SHARES = (0.25, 0.5, 0.75, 1.0)
NOBODY = {1: 1.05}
ROUNDS = {1: 60, 16: 25, 64: 12}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.early_exit", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["resnet18", "resnet20", "vit"], help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything run?")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("early_exit.json"), help="JSON; Markdown goes beside it")
    parser.add_argument("--skip", nargs="*", default=[], choices=["time", "compile", "memory", "peer"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    harness.keep_memory()
    cases = QUICK if options.quick else {n: c for n, c in CASES.items() if n.startswith(options.model or "")}
    report = Report(
        command=harness.command("early_exit", arguments),
        machine=harness.machine(options.device),
        settings={"models": ", ".join(cases), "rounds": 2 if options.quick else str(ROUNDS)},
    )
    for name, case in cases.items():
        sections = _sections(name, case, quick=options.quick, device=options.device)
        for section, measure in sections.items():
            if section not in options.skip:
                measure(report)
                report.write(options.out)
    print(report.markdown())


def _sections(name: str, case: Case, *, quick: bool, device: str) -> Mapping[str, Callable[[Report], None]]:
    def peer(report: Report) -> None:
        if not isinstance(case.exits, int):
            table, targets = compare(case, rounds=2 if quick else 20, device=device)
            table.title = f"{name}: {table.title}"
            report.tables.append(table)
            report.targets += [t.model_copy(update={"what": f"{name}: {t.what}"}) for t in targets]

    return {
        "time": lambda report: running(report, name, case, quick=quick, device=device),
        "compile": lambda report: compiling(report, name, quick=quick, device=device),
        "memory": lambda report: memory(report, name, case.batch_sizes[-1], quick=quick, device=device),
        "peer": peer,
    }


# --- time ----------------------------------------------------------------------------------------


@torch.no_grad()
def running(report: Report, name: str, case: Case, *, quick: bool, device: str) -> None:
    """Time of a call: static forms, nobody leaving, shares leaving."""
    dyn = case.dynamic(device)
    costs = list(dyn.exit_costs(list(dyn.exits)).values())
    fast = dc.lower(dyn)
    model = case.static(device)
    entire = whole(model, case.inputs(4, device))
    small = whole(case.smaller().eval().to(device), case.inputs(4, device))
    for batch in case.batch_sizes:
        rounds = 2 if quick else ROUNDS[batch]
        x = case.inputs(batch, device)
        static = {**forms(model, compilers=not quick), WHOLE: entire}
        static = contenders(static, x, rounds=2 if quick else 5, device=device)
        calls = {**static, "nobody": fast, "smaller": small}
        streams = {
            f"{_spell(share)} {where}": _leaving(share, len(costs) - 1, spread=where == "spread")
            for share in SHARES
            for where in ("at the first", "spread")
        }
        if batch == 1:
            parts = {f"leaves {i}": torch.tensor([i]) for i in range(len(costs))}
        else:
            parts = {stream: _drawn(shares, batch) for stream, shares in streams.items()}
        calls |= dict.fromkeys(parts, fast)
        times = take_turns(
            {n: partial(call, x) for n, call in calls.items()},
            rounds=rounds,
            repeats=max(1, (4 if quick else 8) // batch),
            device=device,
            within={n: partial(forced, fast, _masks(dyn, left, x)) for n, left in parts.items()},
        )
        _checked(fast, x)

        twin = min(static, key=lambda form: times[form].median)
        dense = "".join(f" Dense: {n}, since {why}." for n, why in fast.plan.dense.items())
        table = Table(
            title=f"{name}, batch {batch}",
            columns=["what runs", "counted cost", "ms", "iqr", "over the twin", "realised over counted"],
            rows=[],
            note=f"Static twin: {twin}. Exits cost {', '.join(f'{c:.3f}' for c in costs)}.{dense}",
        )
        for form in sorted(static, key=lambda form: times[form].median):
            _row(table, f"static, {form}", times[form], times[twin], 1.0)
        _row(table, "smaller static model", times["smaller"], times[twin], None)
        _row(table, "dynamic, nobody leaves", times["nobody"], times[twin], costs[-1])
        over = times["nobody"].over(times[twin])
        report.targets.append(
            Target(
                what=f"{name}, batch {batch}: nobody leaves, time over the static twin",
                found=over.value,
                low=over.low,
                high=over.high,
                bound=NOBODY.get(batch, 1.03),
            )
        )
        for stream, shares in streams.items():
            if batch == 1:
                timing = Timing.mixture([(s, times[f"leaves {i}"]) for i, s in enumerate(shares)])
                counted = sum(s * c for s, c in zip(shares, costs, strict=True))
            else:
                timing = times[stream]
                counted = sum(costs[i] for i in parts[stream].tolist()) / batch
            _row(table, f"dynamic, {stream}", timing, times[twin], counted)
            realised = timing.over(times[twin]).map(partial(realised_saving, counted))
            report.targets.append(
                Target(
                    what=f"{name}, batch {batch}: realised over counted saving, {stream}",
                    found=realised.value,
                    low=realised.low,
                    high=realised.high,
                    bound=0.95,
                    at_least=True,
                )
            )
        report.tables.append(table)


def contenders(
    static: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, *, rounds: int, device: str
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The static forms within a tenth of the fastest: one of them is the twin."""
    times = take_turns({n: partial(call, x) for n, call in static.items()}, rounds=rounds, device=device)
    best = min(times.values(), key=lambda timing: timing.median)
    return {n: f for n, f in static.items() if n == WHOLE or times[n].median <= 1.1 * best.median}


def _leaving(share: float, exits: int, *, spread: bool) -> list[float]:
    """The share of samples that leaves at each exit and, last, at the end."""
    each = [share / exits] * exits if spread else [share, *[0.0] * (exits - 1)]
    return [*each, 1 - share]


def _drawn(shares: list[float], batch: int) -> Tensor:
    """Where each sample leaves `[batch]`, in the shares as nearly as a batch allows, in random order."""
    ends = torch.tensor(shares).cumsum(0).mul(batch).round()
    where = torch.bucketize(torch.arange(batch) + 0.5, ends)
    return where[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def _masks(dyn: dc.DynamicModule, where: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Who leaves at each exit."""
    return {name: (where == i).to(x.device) for i, name in enumerate(dyn.exits)}


def _checked(fast: LoweredModule, x: Tensor) -> None:
    """Nobody leaves by itself."""
    fast(x)
    if set(fast.last_run.values()) != {len(x)}:
        raise RuntimeError(f"samples left where none was to: {fast.last_run}")


def realised_saving(counted: float, over: float) -> float:
    """Saving by the clock over saving by count."""
    return (1 - over) / (1 - counted)


def _row(table: Table, what: str, timing: Timing, twin: Timing, counted: float | None) -> None:
    over = timing.over(twin).value
    realised = "" if counted is None or counted > 0.999 else realised_saving(counted, over)
    shown = "" if counted is None else counted
    table.rows.append([what, shown, 1e3 * timing.median, 1e3 * timing.iqr, over, realised])


def _spell(share: float) -> str:
    return f"{100 * share:.0f} % leave"


# --- compile time and memory ---------------------------------------------------------------------


def compiling(report: Report, name: str, *, quick: bool, device: str) -> None:
    """Seconds to compile, from empty caches."""
    seconds: dict[str, list[float]] = {WHOLE: [], LOWERED: []}
    measure = compile_time if quick else partial(isolated, compile_time)
    for _ in range(1 if quick else 3):
        for form, found in seconds.items():
            found.append(measure(name, form, device)["seconds"])
    static, lowered = (Timing(seconds=found) for found in seconds.values())
    over = lowered.over(static)
    report.tables.append(
        Table(
            title=f"{name}: compile time",
            columns=["what is compiled", "seconds", "iqr"],
            rows=[["static model", static.median, static.iqr], ["lowered model", lowered.median, lowered.iqr]],
        )
    )
    report.targets.append(
        Target(
            what=f"{name}: compile time, lowered over static",
            found=over.value,
            low=over.low,
            high=over.high,
            bound=1.5,
        )
    )


def memory(report: Report, name: str, batch: int, *, quick: bool, device: str) -> None:
    """Peak memory of the static and the lowered model."""
    static, lowered = (isolated(peak_memory, name, form, batch, device, empty=not quick) for form in (WHOLE, LOWERED))
    table = Table(
        title=f"{name}, batch {batch}: peak memory", columns=["what", "static MB", "lowered MB", "ratio"], rows=[]
    )
    for what, base in static.items():
        ratio = lowered[what] / base
        table.rows.append([what, base / 1e6, lowered[what] / 1e6, ratio])
        report.targets.append(Target(what=f"{name}, batch {batch}: peak memory, {what}", found=ratio, bound=1.1))
    report.tables.append(table)


if __name__ == "__main__":
    harness.told(main)
