"""Everything that a user could pick, on one trained task: accuracy, counted cost, latency, throughput, memory.

`python -m benchmarks fashion-resnet` (or `fashion-vit`, `hapt-lstm`) trains what is not trained yet, and measures.
What was trained is kept in `--cache`, one contestant at a time: a run that was stopped loses one at most.

- Each contestant is run in each of its forms; at each batch size the fastest one counts. The twin, which savings are
  measured against, is the fastest form of the static model.
- Inputs are the first ones of the test set. At batch 1 the latency of each is taken: p50 and p95 are over samples.
- All contestants take turns in one process, on one thread. Compile time and memory: a process for each contestant.
"""

import argparse
import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import torchvision
from benchmarks.contestants import Call, Contestant, Forms, contestants
from benchmarks.contestants.contestant import BATCH
from benchmarks.harness import stream
from benchmarks.isolated import footprint, isolated
from benchmarks.scores import Score, Scoreboard
from benchmarks.tasks import SCALES, TASKS, Run
from dyncompile.demo.train import accuracy
from dyncompile.errors import UnreachableTargetError

ROUNDS = {1: 27, 16: 27, 64: 15, 256: 9}
"""By batch size: the more, the shorter a call is, for the machine is not ours alone."""
STREAM = {1: 100, 16: 4, 64: 3, 256: 1}
QUICK_STREAM = dict.fromkeys(STREAM, 2)
"""Calls of a round, by batch size."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoreboard", description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="fashion-resnet")
    parser.add_argument("--scale", choices=SCALES, default="full", help="how large and how long")
    parser.add_argument("--hapt", type=Path, help="the archive that benchmarks.recordings names, for hapt-lstm")
    parser.add_argument(
        "--only", choices=["training", "time"], help="train and test; or time again all that --out holds"
    )
    parser.add_argument("--contestant", action="append", help="only those whose names contain this")
    parser.add_argument("--rounds", type=int, help=f"at every batch size; default: {ROUNDS}")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks-cache"), help="for what was trained")
    parser.add_argument("--quick", action="store_true", help="digits, eager: does everything run?")
    parser.add_argument("--device", default="cpu", help="only the processor is measured here")
    parser.add_argument("--out", type=Path, help="JSON; default: TASK.json")
    options = parser.parse_args(arguments)
    few = options.rounds or (2 if options.quick else None)
    rounds = dict.fromkeys(ROUNDS, few) if few else ROUNDS
    torch.set_num_threads(1)
    harness.keep_memory()
    # Dynamo counts compilations by code object, whatever the model, and would run what comes later eagerly.
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    with contextlib.suppress(ImportError):
        torchvision()  # which Lightning imports where it is there, even if it does not fit the installed torch
    scale = "quick" if options.quick else options.scale
    run = Run(task=TASKS[options.task], scale=scale, cache=options.cache, archive=options.hapt)
    board = Scoreboard(
        name=options.task,
        title=run.task.title,
        command=harness.command("scoreboard", arguments),
        machine=harness.machine("cpu"),
        settings={
            "scale": f"{scale}: {run.sizes}",
            "data": run.splits.describe,
            "rounds": ", ".join(f"{count} at batch {batch}" for batch, count in rounds.items()),
        },
    )
    out = options.out or Path(f"{options.task}.json")
    known: dict[str, Score] = {}
    if options.only == "time":
        if not out.exists():
            parser.error(f"--only time: there is no {out}; measure everything first")
        if options.contestant:
            parser.error("--only time takes the contestants that --out holds, in turns; leave --contestant out")
        earlier = Scoreboard.model_validate_json(out.read_text(encoding="utf-8"))
        known = {score.name: score for score in earlier.scores}
        board.settings["time"] = f"measured again by {board.command}"
        board.command, board.refused = earlier.command, earlier.refused
    every = contestants(run.task, curves=not options.quick)
    chosen = [c for c in every if (c.name in known if known else _asked_for(c, options.contestant))]
    calls: dict[str, dict[str, Call]] = {}
    for contestant in chosen:
        try:
            compilers = not options.quick and options.only != "training"
            score, forms = tested(contestant, run, compilers=compilers, known=known.get(contestant.name))
        except UnreachableTargetError as error:
            board.refused[contestant.name] = str(error)
            continue
        if score is None:
            compiled = " or is compiled, which --only training is not" if options.only == "training" else ""
            board.refused[contestant.name] = f"it is not installed, does not run here{compiled}"
            continue
        board.scores.append(score)
        calls[score.name] = forms
        print(f"{score.name}: accuracy {score.accuracy:.4f}, counted cost {score.cost:.3f}", flush=True)
    if not known:
        board.write(out)
    if options.only != "training":
        measured(board, run, chosen, calls, rounds, quick=options.quick, kept=None if known else out)
    board.write(out)
    print(board.table().markdown())


def _asked_for(contestant: Contestant, names: list[str] | None) -> bool:
    return not names or any(part in contestant.name for part in names)


@torch.no_grad()
def tested(
    contestant: Contestant, run: Run, *, compilers: bool, known: Score | None
) -> tuple[Score | None, dict[str, Call]]:
    """Train a contestant or take it as it was kept, and look at the test set unless its score is known.

    None if there is no way to run it.
    """
    with torch.enable_grad():
        model = contestant.model(run)
    forms: Forms = contestant.forms(model, run, compilers=compilers)
    if not forms:
        return None, {}
    made = {form: make() for form, make in forms.items()}
    if known is not None:
        return known, made
    inputs, labels = run.splits.test.tensors
    first = next(iter(made.values()))
    return (
        Score(
            name=contestant.name,
            family=contestant.family,
            note=contestant.note,
            accuracy=accuracy(first, inputs, labels, batch_size=1 if contestant.together else BATCH),
            together=accuracy(first, inputs, labels, batch_size=64) if contestant.together else None,
            cost=contestant.cost(model, run),
        ),
        made,
    )


def measured(
    board: Scoreboard,
    run: Run,
    chosen: Sequence[Contestant],
    calls: dict[str, dict[str, Call]],
    rounds: dict[int, int],
    *,
    quick: bool,
    kept: Path | None,
) -> None:
    """Time all contestants in turns and weigh each; `kept` is written on the way.

    None where times are measured again: weights are known then, and all times change places at once.
    """
    for batch, count in (QUICK_STREAM if quick else STREAM).items():
        batches = [part for part in run.splits.test.tensors[0].split(batch) if len(part) == batch][:count]
        if batches:
            fitting = {c.name: calls[c.name] for c in chosen if c.name in calls and batch >= c.smallest}
            timed(board, fitting, batches, rounds=rounds[batch])
        if kept is not None:
            board.write(kept)
    if kept is None:
        return
    for contestant in chosen:
        if contestant.name in calls:
            weigh(board, contestant, run, quick=quick)
            board.write(kept)


def timed(board: Scoreboard, calls: dict[str, dict[str, Call]], batches: list[Tensor], *, rounds: int) -> None:
    """Time every contestant at a batch size, in the form that a first look finds fastest."""
    batch = len(batches[0])
    best: dict[str, str] = {}
    for name, forms in calls.items():
        found = stream(forms, batches[:10], rounds=1 if len(forms) == 1 else 3)
        best[name] = min(found, key=lambda form: found[form].mean.median)
    streams = stream({name: calls[name][form] for name, form in best.items()}, batches, rounds=rounds)
    for score in board.scores:
        if score.name not in streams:
            continue
        taken = streams[score.name]
        score.forms[batch] = best[score.name]
        score.seconds[batch], score.spread[batch] = taken.mean.median, taken.mean.iqr
        if batch == 1:
            score.p50, score.p95 = taken.quantile(0.5), taken.quantile(0.95)


def weigh(board: Scoreboard, contestant: Contestant, run: Run, *, quick: bool) -> None:
    """Compile time and memory of a contestant in a process of its own, in the form that was fastest at batch 64."""
    score = next(s for s in board.scores if s.name == contestant.name)
    form = score.forms.get(64) or score.forms[1]
    place = (run.task.name, run.scale, str(run.cache), None if run.archive is None else str(run.archive))
    measure = footprint if quick else partial(isolated, footprint)
    found = measure(contestant.name, form, place, not quick)
    score.compile, score.memory = found["compile"], found["memory"]


if __name__ == "__main__":
    main()
