"""Fair timing on a machine whose load drifts: calls take turns, and are compared round by round.

`torch.utils.benchmark` times one statement to the end before it starts the next, so a ratio of two of its
measurements holds the drift between them; that is all that it would be needed for, so it is not used.
"""

import ctypes
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import BaseModel, computed_field
from torch import Tensor

from dyncompile.data import find_device
from dyncompile.errors import DyncompileError

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


class Timing(BaseModel):
    """Seconds a call, one entry a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles, seconds."""
        low, high = quartiles(self.seconds)
        return high - low

    def over(self, other: Self) -> "Ratio":
        """This timing over another of the same rounds: ratio of the medians, quartiles of the rounds' own ratios."""
        low, high = quartiles([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])
        return Ratio(value=self.median / other.median, low=low, high=high)

    @classmethod
    def mixture(cls, parts: Sequence[tuple[float, Self]]) -> Self:
        """What a stream of calls takes of which each share is timed by itself."""
        rounds = zip(*(timing.seconds for _, timing in parts), strict=True)
        shares = [share for share, _ in parts]
        return cls(seconds=[sum(s * t for s, t in zip(shares, turn, strict=True)) for turn in rounds])


class Stream(BaseModel):
    """Seconds of each call on a stream of inputs: a list a round, an entry an input."""

    seconds: list[list[float]]

    @property
    def mean(self) -> Timing:
        """Seconds a call, the mean over the inputs of each round."""
        return Timing(seconds=[statistics.fmean(turn) for turn in self.seconds])

    def quantile(self, share: float) -> float:
        """Seconds within which a share of the inputs is done; of each input the median of its rounds counts."""
        each: list[float] = sorted(statistics.median(found) for found in zip(*self.seconds, strict=True))
        return each[min(int(share * len(each)), len(each) - 1)]


class Ratio(BaseModel):
    """A ratio of two timings with the quartiles of its rounds."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> "Ratio":
        """A monotonic function of the ratio."""
        low, high = sorted((function(self.low), function(self.high)))
        return Ratio(value=function(self.value), low=low, high=high)


class Target(BaseModel):
    """What was to be shown, and what was found."""

    what: str
    found: float
    low: float | None = None
    high: float | None = None
    bound: float
    at_least: bool = False

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the figure keeps to its bound."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    @computed_field  # type: ignore[prop-decorator]
    @property
    def margin(self) -> float:
        """Distance from the bound, relative to it; negative where it is missed."""
        distance = (self.found - self.bound) / self.bound
        return distance if self.at_least else -distance


_LONG = 100
"""Rows above which a table is folded."""


class Table(BaseModel):
    """Rows to read."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown; a long one is folded."""
        rows = [self.columns, ["---"] * len(self.columns), *([_text(v) for v in r] for r in self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        if len(self.rows) > _LONG:
            lines = [f"<details><summary>{len(self.rows)} rows</summary>", "", *lines, "", "</details>"]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


class Report(BaseModel):
    """All that a benchmark found."""

    command: str
    machine: dict[str, str]
    settings: dict[str, str | int | list[int]]
    tables: list[Table] = []
    targets: list[Target] = []

    def outcome(self) -> Table:
        """Targets, met or missed, and by how much."""
        rows: list[list[str | int | float]] = []
        for t in self.targets:
            spread = "" if t.low is None else f"{t.low:.3f} to {t.high:.3f}"
            bound = f"{'>=' if t.at_least else '<='} {t.bound:g}"
            verdict = "pass" if t.passed else "miss"
            rows.append([t.what, bound, t.found, spread, verdict, f"{100 * t.margin:+.1f} %"])
        columns = ["target", "bound", "found", "quartiles", "verdict", "margin"]
        return Table(title="Targets", columns=columns, rows=rows)

    def markdown(self) -> str:
        """The whole report in Markdown."""
        facts = {**self.machine, **{k: str(v) for k, v in self.settings.items()}}
        head = [f"`{self.command}`", "", *(f"- {key}: {value}" for key, value in facts.items())]
        return "\n".join(head) + "\n\n" + "\n\n".join(t.markdown() for t in [*self.tables, self.outcome()])

    def write(self, path: Path) -> None:
        """Write JSON, and Markdown beside it."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown() + "\n", encoding="utf-8")


@torch.no_grad()
def take_turns(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    repeats: int = 1,
    device: str = "cpu",
    within: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time calls in rounds, every call once a round, in an order drawn anew.

    Before its time is taken a call runs once, so that its weights and its code are in the caches as in a stream of
    such calls; a first round, in which compilers may run, is not counted.

    Args:
        calls: What to time, by name.
        rounds: How many to count.
        repeats: Calls in a row whose mean is the round's figure.
        device: Where the work is done; waited for where it is not the processor.
        within: Contexts that a call is made in, by name; to open one is not timed.
        clock: Seconds; `time.process_time` leaves out what other programs take, where all work is the processor's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names, contexts = list(calls), within or {}
    order = random.Random(0)
    for turn in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            call = calls[name]
            with contexts.get(name, nullcontext)():
                call()
                synchronize(device)
                start = clock()
                for _ in range(repeats):
                    call()
                synchronize(device)
                end = clock()
            if turn:
                seconds[name].append((end - start) / repeats)
    return {name: Timing(seconds=found) for name, found in seconds.items()}


@torch.no_grad()
def stream(
    calls: Mapping[Key, Callable[[Tensor], object]], inputs: Sequence[Tensor], *, rounds: int, device: str = "cpu"
) -> dict[Key, Stream]:
    """Time calls on a stream of inputs in rounds, every call once a round over all inputs, in an order drawn anew.

    Args:
        calls: What to time, by name.
        inputs: One after the other; what a call does may hang on them.
        rounds: How many to count; one before them, in which compilers may run, is not.
        device: Where the work is done; waited for where it is not the processor.
    """
    seconds: dict[Key, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    order = random.Random(0)
    for turn in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            call, taken = calls[name], []
            call(inputs[-1])
            for x in inputs:
                synchronize(device)
                start = time.perf_counter()
                call(x)
                synchronize(device)
                taken.append(time.perf_counter() - start)
            if turn:
                seconds[name].append(taken)
    return {name: Stream(seconds=found) for name, found in seconds.items()}


def keep_memory() -> None:
    """Let the C library keep what is freed, as the allocators made for inference do (jemalloc, tcmalloc).

    With glibc's defaults it depends on the heap's history whether a call gets its memory back from the system page by
    page: on the machine that this was written on that moved the time of a call by up to a third, for static and
    dynamic models alike.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_MAX, 0)):
            set_option(option, value)


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, method="inclusive")
    return low, high


def command(name: str, arguments: Sequence[str] | None) -> str:
    """The command line that a benchmark was started with; None: the process's own. Of absolute paths the names."""
    words = sys.argv[1:] if arguments is None else arguments
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return f"python -m benchmarks.{name} {shlex.join(shown)}".strip()


def told(main: Callable[[], None]) -> None:
    """Run a benchmark from the command line: a mistake is told in a line."""
    try:
        main()
    except DyncompileError as error:
        sys.exit(f"error: {error}")


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on, and how busy it was when they were."""
    find_device(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "processor": f"{models[0] if models else platform.processor()}, {len(models)} cores, 1 thread used",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "load before": f"{os.getloadavg()[0]:.1f} processes on average over the last minute",
    }
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
