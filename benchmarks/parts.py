"""The parts of the scoreboard by name: what each measures, and how it is started."""

import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.tasks import TASKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is common to all parts.

    Attributes:
        quick: Little of everything: does it run?
        device: "cpu" or "cuda".
        out: Folder for JSON.
        cache: Folder for what was trained.
        scale: Of the tasks that contestants are trained on.
        hapt: Archive of recordings of people; None leaves out what needs it.
    """

    quick: bool = False
    device: str = "cpu"
    out: Path = Path("benchmarks/results")
    cache: Path = Path("benchmarks-cache")
    scale: str = "full"
    hapt: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the scoreboard.

    Attributes:
        module: That has its `main(arguments)`.
        summary: One line.
        arguments: Of `main`, given the options, besides `--out`.
        long: Takes longest, and so starts first where parts run at once.
    """

    module: str
    summary: str
    arguments: Callable[[Options], list[str]]
    long: bool = False

    def run(self, name: str, options: Options) -> Path:
        """Measure, and return the JSON file."""
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{name}.json"
        main = importlib.import_module(self.module).main
        main([*self.arguments(options), "--out", str(path)])
        return path


def _common(options: Options, *, device: bool = True) -> list[str]:
    chosen = ["--device", options.device] if device else []
    return [*(["--quick"] if options.quick else []), *chosen]


def _recordings(options: Options) -> list[str]:
    return ["--hapt", str(options.hapt)] if options.hapt is not None else []


def _fashion_gates(options: Options) -> list[str]:
    cache = ["--cache", str(options.cache / "fashion-gates")]
    if not options.quick:
        return cache
    tiny = {"data": "digits", "samples": 256, "epochs": 1, "static-epochs": 1, "seeds": 1, "width": 4}
    return [*cache, *(word for name, value in tiny.items() for word in (f"--{name}", str(value)))]


def _scoreboard(task: str, quick: Sequence[str] = ()) -> Part:
    """A task; `quick` takes only contestants whose names contain one of these, by default all."""

    def arguments(options: Options) -> list[str]:
        where = ["--task", task, "--cache", str(options.cache), "--scale", options.scale]
        some = [word for name in (quick if options.quick else ()) for word in ("--contestant", name)]
        return [*where, *some, *_common(options), *_recordings(options)]

    summary = f"{TASKS[task].title}: static models, peers and dyncompile, trained on one task"
    return Part(module="benchmarks.scoreboard", summary=summary, arguments=arguments)


PARTS = {
    "growth": Part(
        module="benchmarks.growth",
        summary="conversion, lowering and overhead of a call over depth and number of exits",
        arguments=_common,
    ),
    "fashion-resnet": _scoreboard("fashion-resnet"),
    "fashion-vit": _scoreboard("fashion-vit", quick=("static, eager", "quantised", "by hand", "neuron gate")),
    "hapt-lstm": _scoreboard("hapt-lstm"),
    "large": Part(
        module="benchmarks.large",
        summary="resnet50 and vit_b_16 with forced decisions, also in bfloat16 and on a GPU",
        arguments=_common,
    ),
    "early_exit": Part(
        module="benchmarks.early_exit",
        summary="what exits cost and save with forced decisions; compile time, memory, a peer",
        arguments=_common,
        long=True,
    ),
    "gates": Part(module="benchmarks.gates", summary="what gates save with forced decisions", arguments=_common),
    "fashion_gates": Part(
        module="benchmarks.fashion_gates",
        summary="gates fine-tuned to a cost on Fashion-MNIST: accuracy, cost, rates",
        arguments=_fashion_gates,
    ),
    "frames": Part(
        module="benchmarks.frames",
        summary="frame skip on recordings: accuracy, and time with forced decisions",
        arguments=lambda options: [*_common(options, device=False), *_recordings(options)],
    ),
    "export": Part(
        module="benchmarks.export",
        summary="exported files in onnxruntime, by the batch, the sample and the stage",
        arguments=lambda options: _common(options, device=False),
    ),
}


def run(name: str, options: Options) -> None:
    """Measure a part, and say on stderr how long that took."""
    start = time.perf_counter()
    PARTS[name].run(name, options)
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def run_together(names: list[str], options: Options) -> None:
    """Run parts in processes of their own, on all processors; what each prints comes when it ends."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawned, max_tasks_per_child=1) as pool:
        running = [pool.submit(_printed, name, options) for name in sorted(names, key=lambda n: not PARTS[n].long)]
        try:
            for done in as_completed(running):
                print(done.result(), flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _printed(name: str, options: Options) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(name, options)
    return out.getvalue()
