"""The checks of one conversion, from capture to export; what cannot be made after a failure is skipped."""

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from dyncompile.checking.baseline import Snapshot, differences, snapshot
from dyncompile.checking.contracts import (
    exact_at_birth,
    exports,
    gradient_reaches_every_parameter,
    lowered_equals_reference,
    lowered_runs,
    skips_as_planned,
)
from dyncompile.checking.deciding import BATCHES, settle, switch_on
from dyncompile.checking.result import Report, Result, Status
from dyncompile.conversion import begin, rewrite
from dyncompile.errors import DyncompileError, ExportError, InexactError, InvalidExportError, MissingExtraError
from dyncompile.graph import Graph
from dyncompile.lowering import lower
from dyncompile.module import DynamicModule
from dyncompile.passes import Pass
from dyncompile.recipe import Recipe

T = TypeVar("T")

CAPTURES = "captures"
REWRITES = "rewrites"
BIRTH = "exact at birth"
GRADIENT = "gradient reaches every new parameter"
SKIPS = "operations skipped as planned"
EXPORT = "ONNX file equal in onnxruntime"
SITES = "sites as in the baseline"

# Inductor, compiled, rounds as a fusion of operations does.
_SLACK = {"eager": 1.0, "inductor": 10.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is checked, and how thoroughly.

    Attributes:
        batches: Batch sizes at which outputs are compared.
        backends: Of `dyncompile.lower`. Operations can be counted in "eager" alone; "inductor" compiles every segment,
            which takes minutes for a large model.
        export: Whether to write an ONNX file and run it.
    """

    batches: tuple[int, ...] = BATCHES
    backends: tuple[str, ...] = ("eager",)
    export: bool = True

    @property
    def checks(self) -> list[str]:
        """The names of the checks, in order, but that of the baseline."""
        lowered = [name for backend in self.backends for name in (_lowered(backend), *[SKIPS] * (backend == "eager"))]
        return [CAPTURES, REWRITES, BIRTH, GRADIENT, *lowered, *[EXPORT] * self.export]


def _lowered(backend: str) -> str:
    return f"lowered equals reference ({backend})"


class _Skipped(Exception):  # noqa: N818 - no error: a check that cannot be made
    """Why a check was not made."""


def check(
    model: nn.Module,
    strategies: Sequence[Sequence[Pass]],
    *,
    name: str,
    example_inputs: Any = None,
    settings: Settings | None = None,
    started: Callable[[str, str], None] = lambda strategy, check: None,  # noqa: ARG005
    **capture: Any,
) -> Iterator[Report]:
    """Convert a model by one strategy after the other, and check each conversion.

    Args:
        model: The static model; left as it was.
        strategies: For each the passes, in order.
        name: Of the model, in the reports.
        example_inputs: As for `dyncompile.dynamize`.
        settings: What to check.
        started: Called with the strategy and the name of the check that begins.
        capture: Further arguments of `dyncompile.dynamize`.
    """
    settings = settings or Settings()
    captured: tuple[Graph, Recipe] | None = None
    first: Result | None = None
    for passes in strategies:
        report = Report(model=name, strategy=",".join(p.name for p in passes))
        course = _Course(report, settings, started)
        if first is None:
            captured = course.make(CAPTURES, lambda: begin(model, example_inputs=example_inputs, **capture))
            first = report.results[0]
        else:
            report.results.append(first)
        if captured is not None:
            course.convert(_copied(captured), passes)
        course.skip_rest()
        yield report


def _copied(captured: tuple[Graph, Recipe]) -> tuple[Graph, Recipe]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of how it copies the structure of arguments
        return copy.deepcopy(captured)


class _Course:
    """One conversion's way through the checks."""

    def __init__(self, report: Report, settings: Settings, started: Callable[[str, str], None]) -> None:
        self.report, self.settings, self.started = report, settings, started

    def convert(self, captured: tuple[Graph, Recipe], passes: Sequence[Pass]) -> None:
        graph, recipe = captured
        static = DynamicModule(*_copied(captured))
        dyn = self.make(REWRITES, lambda: rewrite(graph, recipe, passes))
        if dyn is None:
            return
        self.contract(BIRTH, lambda: exact_at_birth(static, dyn, self.settings.batches))
        self.contract(GRADIENT, lambda: gradient_reaches_every_parameter(static, dyn))
        self.report.snapshot = snapshot(dyn)
        settle(switch_on(dyn), dyn.examples(max(self.settings.batches)))
        for backend in self.settings.backends:
            self.lowered(dyn, backend)
        if self.settings.export:
            self.contract(EXPORT, lambda: _exports(dyn))

    def lowered(self, dyn: DynamicModule, backend: str) -> None:
        def run() -> Any:
            fast = lower(dyn, backend=backend, decline=False)
            return fast, list(lowered_runs(dyn, fast, self.settings.batches, slack=_SLACK[backend]))

        made = self.make(_lowered(backend), run, lambda found: lowered_equals_reference(found[1]))
        if backend == "eager" and made is not None:
            self.contract(SKIPS, lambda: skips_as_planned(*made))

    def contract(self, name: str, test: Callable[[], str]) -> None:
        """A check that tells what is wrong."""
        self.make(name, test, str)

    def make(self, name: str, action: Callable[[], T], test: Callable[[T], str] = lambda _: "") -> T | None:
        """A check that makes something; None if that fails. `test` tells what is wrong with what was made."""
        self.started(self.report.strategy, name)
        start = time.perf_counter()
        made: T | None = None
        status: Status = "failed"
        try:
            made = action()
            message = test(made)
            status = "failed" if message else "passed"
        except _Skipped as reason:
            status, message = "skipped", str(reason)
        except InexactError as error:
            self.note(name, "passed", "", start)
            name, message = BIRTH, str(error)
        except DyncompileError as error:
            message = str(error)
        except Exception as error:  # noqa: BLE001 - what a pass or a model of others raises can be anything
            message = f"{type(error).__name__}: {error}"
        self.note(name, status, message, start)
        return made

    def note(self, name: str, status: Status, message: str, start: float) -> None:
        seconds = round(time.perf_counter() - start, 3)
        self.report.results.append(Result(check=name, status=status, message=message, seconds=seconds))

    def skip_rest(self) -> None:
        """Every check that was not come to, in its place."""
        made = {result.check: result for result in self.report.results}
        cause = next((result.check for result in self.report.results if result.status == "failed"), "")
        skipped = f"not checked, since `{cause}` failed"
        self.report.results[:] = [
            made.get(name) or Result(check=name, status="skipped", message=skipped) for name in self.settings.checks
        ]


def _exports(dyn: DynamicModule) -> str:
    try:
        exports(dyn)
    except InvalidExportError as error:
        return str(error)
    except (MissingExtraError, ExportError) as error:
        raise _Skipped(str(error)) from error
    return ""


def compare(report: Report, before: Snapshot | None, *, advice: str) -> None:
    """Add to a report whether its sites are those of the baseline.

    Args:
        report: Changed in place.
        before: What the baseline holds for this model and strategy.
        advice: What to do where they are not.
    """
    start = time.perf_counter()
    status: Status = "failed"
    if report.snapshot is None:
        status, message = "skipped", "nothing was rewritten"
    elif before is None:
        message = f"the baseline has no `{report.strategy}` of `{report.model}`: {advice}"
    else:
        found = differences(report.snapshot, before)
        status = "failed" if found else "passed"
        message = "\n".join([*found, advice]) if found else ""
    seconds = round(time.perf_counter() - start, 3)
    report.results.append(Result(check=SITES, status=status, message=message, seconds=seconds))
