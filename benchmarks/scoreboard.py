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
from dyncompile.errors import ArgumentError, ExportError, UnreachableTargetError

ROUNDS = {1: 27, 16: 27, 64: 15, 256: 9}
"""By batch size: the more, the shorter a call is, for the machine is not ours alone."""
STREAM = {1: 100, 16: 4, 64: 3, 256: 1}
QUICK_STREAM = dict.fromkeys(STREAM, 2)
"""Calls of a round, by batch size."""
CLOSE = 0.3
"""A form that a first look finds slower than the fastest by more than this share is timed no further."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoreboard", description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="fashion-resnet")
    parser.add_argument("--scale", choices=SCALES, default="full", help="how large and how long")
    parser.add_argument("--hapt", type=Path, help="the archive that benchmarks.recordings names, for hapt-lstm")
    parser.add_argument(
        "--only", choices=["training", "time"], help="train and test; or time again all that --out holds"
    )
    parser.add_argument(
        "--contestant",
        action="append",
        help="only those whose names contain this; a board that --out holds keeps the others, and all are timed again",
    )
    parser.add_argument("--rounds", type=int, help=f"at every batch size; default: {ROUNDS}")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks-cache"), help="for what was trained")
    parser.add_argument("--quick", action="store_true", help="digits, eager: does everything run?")
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="for a GPU there is benchmarks.large")
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
            "test samples": str(len(run.splits.test)),
            "rounds": ", ".join(f"{count} at batch {batch}" for batch, count in rounds.items()),
        },
    )
    out = options.out or Path(f"{options.task}.json")
    every = contestants(run.task, curves=not options.quick)
    asked = [c for c in every if _asked_for(c, options.contestant)] if options.only != "time" else []
    earlier = None
    try:
        if options.only == "time" and options.contestant:
            raise ArgumentError(
                "--contestant", found="--only time", expected="one of both: all that --out holds is timed"
            )
        if options.contestant and not asked:
            raise ArgumentError(
                "--contestant", found=options.contestant, expected=f"parts of {[c.name for c in every]}"
            )
        if options.only == "time" or (options.contestant and out.exists()):
            earlier = held(out, board, every)
    except ArgumentError as error:
        parser.error(str(error))
    known: dict[str, Score] = {}
    if earlier is not None:
        names = {c.name for c in asked}
        known = {score.name: score.untimed() for score in earlier.scores if score.name not in names}
        board.refused = {name: why for name, why in earlier.refused.items() if name not in names}
        board.settings["before"] = "; ".join(filter(None, (earlier.settings.get("before"), earlier.command)))
    chosen = [c for c in every if c.name in known or c in asked]
    calls: dict[str, dict[str, Call]] = {}
    for contestant in chosen:
        try:
            compilers = not options.quick and options.only != "training"
            score, forms = tested(contestant, run, compilers=compilers, known=known.get(contestant.name))
        except (UnreachableTargetError, ExportError) as error:
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
        measured(board, run, chosen, calls, rounds, quick=options.quick, out=out, again=bool(known))
    board.write(out)
    print(board.table().markdown())


def held(out: Path, board: Scoreboard, every: Sequence[Contestant]) -> Scoreboard:
    """The board that a file holds, to measure on with what it has.

    Raises:
        ArgumentError: There is none, or it is of another task, scale or data, or of contestants that there are no more.
    """
    if not out.exists():
        raise ArgumentError("--only time", found=f"no {out}", expected="a file; measure everything first")
    earlier = Scoreboard.model_validate_json(out.read_text(encoding="utf-8"))
    for what, found, wanted in (
        ("task", earlier.name, board.name),
        *((what, earlier.settings.get(what), board.settings[what]) for what in ("scale", "data")),
    ):
        if found != wanted:
            raise ArgumentError("--out", found=f"a board of the {what} {found!r}", expected=repr(wanted))
    if gone := sorted({score.name for score in earlier.scores} - {contestant.name for contestant in every}):
        raise ArgumentError("--out", found=f"{gone}", expected="contestants that there are")
    return earlier


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
    out: Path,
    again: bool,
) -> None:
    """Time all contestants in turns, then weigh those that are not weighed in the form that is fastest.

    `again`: the file holds other times; all change places at once.
    """
    for batch, count in (QUICK_STREAM if quick else STREAM).items():
        batches = [part for part in run.splits.test.tensors[0].split(batch) if len(part) == batch][:count]
        if batches:
            fitting = {c.name: calls[c.name] for c in chosen if c.name in calls and batch >= c.smallest}
            timed(board, fitting, batches, rounds=rounds[batch])
        if not again:
            board.write(out)
    for contestant in chosen:
        if contestant.name in calls:
            weigh(board, contestant, run, quick=quick)
            board.write(out)


def timed(board: Scoreboard, calls: dict[str, dict[str, Call]], batches: list[Tensor], *, rounds: int) -> None:
    """Time every contestant at a batch size, in each form that may be its fastest; that one counts."""
    batch = len(batches[0])
    close: dict[tuple[str, str], Call] = {}
    for name, forms in calls.items():
        found = {} if len(forms) == 1 else stream(forms, batches[:10], rounds=3)
        best = min((taken.mean.median for taken in found.values()), default=0.0)
        close |= {
            (name, form): call
            for form, call in forms.items()
            if form not in found or found[form].mean.median <= (1 + CLOSE) * best
        }
    streams = stream(close, batches, rounds=rounds)
    for score in board.scores:
        taken = {form: found for (name, form), found in streams.items() if name == score.name}
        if not taken:
            continue
        form = min(taken, key=lambda form: taken[form].mean.median)
        fastest = taken[form]
        score.forms[batch] = form
        score.seconds[batch], score.spread[batch] = fastest.mean.median, fastest.mean.iqr
        if batch == 1:
            score.p50, score.p95 = fastest.quantile(0.5), fastest.quantile(0.95)


def weigh(board: Scoreboard, contestant: Contestant, run: Run, *, quick: bool) -> None:
    """Compile time and memory of a contestant in a process of its own, in the form that was fastest at batch 64."""
    score = next(s for s in board.scores if s.name == contestant.name)
    form = score.forms.get(64) or score.forms[1]
    if score.weighed == form:
        return
    place = (run.task.name, run.scale, str(run.cache), None if run.archive is None else str(run.archive))
    measure = footprint if quick else partial(isolated, footprint)
    found = measure(contestant.name, form, place, not quick)
    score.compile, score.memory, score.weighed = found["compile"], found["memory"], form


if __name__ == "__main__":
    harness.told(main)
