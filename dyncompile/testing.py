"""What users and our own tests check a conversion with."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.demand import stands_in
from dyncompile.errors import ArgumentError
from dyncompile.lowering.lowered import LoweredModule
from dyncompile.module import DynamicModule, decision_nodes, decision_routes
from dyncompile.nn import Gate
from dyncompile.passes import Pass, resolve
from dyncompile.shapes import spec
from dyncompile.values import whole

if TYPE_CHECKING:
    from dyncompile.checking import Report

Share = float | Sequence[float] | Tensor
Shares = Mapping[str, Share] | Sequence[float]


@contextmanager
def forced(model: DynamicModule | LoweredModule, shares: Shares, *, seed: int = 0) -> Iterator[None]:
    """Replace decisions while the context is open, for benchmarks and what-if questions.

    Args:
        model: A dynamic model or a lowered one.
        shares: For each exit the share of all samples that leave there, for each gate the share that it keeps, for
            each route the shares of its K arms, which sum to 1; or, in input order, a mask `[N]` bool, for a route the
            arms `[N]` int64. Where a sample owns r rows (tokens, frames) shares are of all rows, and a mask or arms are
            `[N, r]`, or `[N]` for all rows of a sample alike. A sequence in place of the mapping gives the exits'
            shares in order. Decisions that are not named are left as they are, but one that says whether all of several
            others are on follows those of them that are forced. Exits and gates must be enabled to be forced in a
            lowered model.
        seed: Which samples are drawn; the same seed draws the same samples for the same batch size.

    Raises:
        ArgumentError: An unknown decision, a share outside [0, 1], exits' shares that sum to more than 1, arms that are
            not those of the route, or a tensor that does not fit the batch.

    Example:
        >>> import dyncompile as dc
        >>> from torch.nn import Linear, ReLU
        >>> layers = [Linear(8, 8), ReLU(), Linear(8, 8), ReLU(), Linear(8, 3)]
        >>> model = torch.nn.Sequential(*layers)
        >>> dyn = dc.dynamize(model.eval(), exits=1)
        >>> dyn.exits["exit0"].enabled.fill_(True)
        tensor(True)
        >>> fast = dc.lower(dyn, backend="eager")
        >>> with forced(fast, {"exit0": 0.5}):
        ...     _ = fast(torch.randn(8, 8))
        >>> fast.last_run
        {'always': 8, 'not exit0': 4}
    """
    dyn = model.dynamic if isinstance(model, LoweredModule) else model
    if not isinstance(dyn, DynamicModule):
        raise ArgumentError("model", found=f"a {type(model).__name__}", expected="a dynamic model or a lowered one")
    whole("seed", seed, least=0)
    kinds = _kinds(dyn)
    wanted = _checked(dyn, shares, kinds)
    draw = _Draw(wanted, kinds, [n for n in dyn.exits if n in wanted], seed)
    if isinstance(model, LoweredModule):
        for name in wanted:
            if name in model._disabled:
                found = f"{name!r}, which was switched off when the model was lowered"
                raise ArgumentError("shares", found=found, expected="exits and gates that are enabled")
            if name in model.plan.dense:
                why = f"{name!r}, which runs densely: {model.plan.dense[name]}"
                raise ArgumentError("shares", found=why, expected="lower(dyn, decline=False)")
        before, model._override = model._override, draw
        try:
            yield
        finally:
            model._override = before
    else:
        outer = dyn._override, dyn._forced
        dyn._override, dyn._forced = (lambda name, value: draw(name, value, None, value.shape[0])), frozenset(wanted)
        try:
            yield
        finally:
            dyn._override, dyn._forced = outer


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Of a decision: its rows a sample, and its arms (0: yes or no)."""

    rows: int
    arms: int


def _kinds(dyn: DynamicModule) -> dict[str, _Kind]:
    routes = decision_routes(dyn.graph.fx)
    found = {name: spec(node).rows for name, node in decision_nodes(dyn.graph.fx).items()}
    return {name: _Kind(found.get(name, 1), routes.get(name, 0)) for name in (*dyn.exits, *found)}


class _Draw:
    """Decisions for the whole batch, made when the first of a batch is asked for."""

    fixed = True

    def __init__(self, shares: Mapping[str, Share], kinds: Mapping[str, _Kind], exits: list[str], seed: int) -> None:
        self.shares = shares
        self.kinds = kinds
        self.exits = exits
        self.seed = seed
        self.drawn: dict[tuple[str, int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, value: Tensor, index: Tensor | None, total: int) -> Tensor:
        """What a decision is forced to, on the rows and in the dtype of a value."""
        if name not in self.shares:
            return value
        # Asked in every call that is timed: what is looked up is all that is done.
        key = (name, total, value.dtype, value.device)
        drawn = self.drawn.get(key)
        if drawn is None:
            drawn = self._draw(name, total).to(value.device)
            if value.is_floating_point() and self.kinds[name].arms:
                drawn = F.one_hot(drawn, self.kinds[name].arms)
            drawn = self.drawn[key] = drawn.to(value.dtype)
        return drawn if index is None else drawn[index]

    def _draw(self, name: str, total: int) -> Tensor:
        """`[total]`: bool, of a route int64."""
        share, kind = self.shares[name], self.kinds[name]
        if isinstance(share, Tensor):
            return _given(name, share, kind, total)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(total, generator=generator)
        offset = float(torch.rand((), generator=generator))
        start = 0.0
        if name in self.exits:
            # Exits draw disjoint samples: each its own stretch of one order.
            earlier = [self.shares[n] for n in self.exits[: self.exits.index(name)]]
            start = sum(s for s in earlier if isinstance(s, int | float))
        else:
            order = order[torch.randperm(total, generator=generator.manual_seed(self.seed + _stable(name)))]
        drawn = torch.zeros(total, dtype=torch.int64)
        # Arm by arm: stretches of one order; of a yes or no the second arm alone, of a route all but the first.
        for arm, part in ((1, share),) if isinstance(share, int | float) else enumerate(share):
            drawn[order[_cut(start, total, offset) : _cut(start + part, total, offset)]] = arm
            start += part
        return drawn if kind.arms else drawn.bool()


def _given(name: str, share: Tensor, kind: _Kind, total: int) -> Tensor:
    """The user's decisions, one for each row."""
    batch = total // kind.rows
    if share.shape == (batch,):
        share = share.repeat_interleave(kind.rows)
    elif share.shape == (batch, kind.rows):
        share = share.flatten()
    if share.shape != (total,):
        rows = f", or [{batch}, {kind.rows}] of their rows" if kind.rows > 1 else ""
        expected = f"{'arms' if kind.arms else 'a mask'} of [{batch}] samples{rows}"
        raise ArgumentError(f"shares[{name!r}]", found=list(share.shape), expected=expected)
    return share.long() if kind.arms else share.bool()


def _cut(share: float, batch: int, offset: float) -> int:
    """The number of samples that a share is: rounded down after a random offset, so that it is right on average."""
    if share >= 1 - 1e-9:
        return batch
    return min(batch, math.floor(share * batch + offset)) if share > 0 else 0


def _stable(name: str) -> int:
    return sum((i + 1) * byte for i, byte in enumerate(name.encode()))


def _checked(dyn: DynamicModule, shares: Shares, kinds: Mapping[str, _Kind]) -> dict[str, Share]:
    found: Any = shares
    if isinstance(found, str) or not isinstance(found, Mapping | Sequence):
        expected = "a mapping from names, or a sequence of the exits' shares"
        raise ArgumentError("shares", found=repr(shares), expected=expected)
    named = shares.items() if isinstance(shares, Mapping) else zip(dyn.exits, shares, strict=False)
    given: dict[str, Share] = dict(named)
    if not isinstance(shares, Mapping) and len(shares) > len(dyn.exits):
        raise ArgumentError(
            "shares",
            found=f"{len(shares)} shares",
            expected=f"at most {len(dyn.exits)}, one an exit",
        )
    for name, share in given.items():
        if name not in kinds:
            raise ArgumentError("shares", found=repr(name), expected=f"names among {list(kinds)}")
        if name in made_within(dyn):
            found = f"{name!r}, whose agent reads the state that its own decisions make"
            raise ArgumentError("shares", found=found, expected="a decision that is made ahead")
        if why := _unfit(share, kinds[name].arms):
            shown = f"{share.dtype} {list(share.shape)}" if isinstance(share, Tensor) else share
            raise ArgumentError(f"shares[{name!r}]", found=shown, expected=why)
    total = sum(s for n, s in given.items() if n in dyn.exits and isinstance(s, int | float))
    if total > 1 + 1e-9:
        raise ArgumentError("shares", found=f"exits that sum to {total}", expected="at most 1")
    return given


def made_within(dyn: DynamicModule) -> set[str]:
    """Decisions that are made inside of what they control, and cannot be forced."""
    nodes = dyn.graph.fx.nodes
    return {name for n in nodes if (name := stands_in(n)) and isinstance(dyn.graph.module_of(n), Gate)}


def _unfit(share: Any, arms: int) -> str:
    """What would do in place of a share that does not; empty where it does."""
    if isinstance(share, Tensor):
        if not arms:
            return "" if bool(((share == 0) | (share == 1)).all()) else "a mask of bool"
        fits = not share.is_floating_point() and share.dtype != torch.bool
        if fits and share.numel():
            fits = int(share.min()) >= 0 and int(share.max()) < arms
        return "" if fits else f"arms, integers in [0, {arms})"
    if isinstance(share, int | float):
        fits = not arms and 0 <= share <= 1
    elif not isinstance(share, Sequence) or not all(isinstance(part, int | float) for part in share):
        fits = False
    else:
        fits = len(share) == arms and min(share) >= 0 and abs(sum(share) - 1) < 1e-6
    if fits:
        return ""
    return f"the shares of its {arms} arms, which sum to 1, or arms" if arms else "a share in [0, 1] or a mask"


def assert_convertible(
    model: nn.Module | Callable[[], nn.Module],
    strategy: str | Pass | Sequence[str | Pass] = "early_exit",
    *,
    example_inputs: Any = None,
    baseline: str | os.PathLike[str] | None = None,
    name: str | None = None,
    update: bool | None = None,
    batches: Sequence[int] | None = None,
    backends: Sequence[str] = ("eager",),
    export: bool = True,
    **options: Any,
) -> "Report":
    """Assert what `dyncompile check` checks: that a model can be rewritten and that nothing is lost by it.

    Args:
        model: A module, or a callable that makes it.
        strategy: As for `dyncompile.dynamize`.
        example_inputs: As for `dyncompile.dynamize`: two samples or more.
        baseline: JSON file of sites and costs to compare with; made and changed by `pytest --dyncompile-update`.
        name: Of the model in the baseline; default its class or the callable, with the module.
        update: Write the baseline instead of comparing with it; default as the option of pytest says.
        batches: Batch sizes at which outputs are compared; default 1, 2, 7, 33.
        backends: Of `dyncompile.lower`: "eager", "inductor".
        export: Whether to write an ONNX file and run it, where the extra `export` is installed.
        options: Options of the pass, where `strategy` names one.

    Returns:
        What was checked, with seconds, sites and shares of the cost.

    Raises:
        AssertionError: A check failed; the message names each and says why.
        ArgumentError: An argument that does not fit.
        BaselineError: The baseline is missing, malformed or too new.

    Example:
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> model = Sequential(Linear(8, 32), ReLU(), Linear(32, 64), ReLU(), Linear(64, 3))
        >>> assert_convertible(model, "early_exit", exits=1, export=False).passed
        True
    """
    from dyncompile.checking import Baseline, Settings, check, compare
    from dyncompile.checking.deciding import BATCHES
    from pytest_dyncompile import updating

    made = model if isinstance(model, nn.Module) else model()
    passes = resolve(strategy, options)
    settings = Settings(batches=tuple(batches or BATCHES), backends=tuple(backends), export=export)
    label = name or _label(model)
    path = None if baseline is None else Path(baseline)
    update = updating() if update is None else update
    before = None if path is None else Baseline() if update and not path.exists() else Baseline.read(path)
    with _no_compiler_trace():
        [report] = check(made, [passes], name=label, example_inputs=example_inputs, settings=settings)
    if path is not None and before is not None and not update:
        advice = f"if this is meant, run `pytest --dyncompile-update` and commit {path}"
        compare(report, before.find(label, report.strategy), advice=advice)
    failed = "\n".join(f"{result.check}: {result.message}" for result in report.failed)
    if failed:
        raise AssertionError(f"{label} by {report.strategy}\n{failed}")
    if path is not None and before is not None and update and report.snapshot is not None:
        before.updated(label, report.strategy, report.snapshot).write(path)
    return report


@contextmanager
def _no_compiler_trace() -> Iterator[None]:
    """Torch logs each step of its compiler for its own tool; pytest listens, and would show it beside a failure."""
    trace = logging.getLogger("torch.__trace")
    listening = [handler for handler in trace.handlers if type(handler).__module__.startswith("_pytest.")]
    for handler in listening:
        trace.removeHandler(handler)
    try:
        yield
    finally:
        for handler in listening:
            trace.addHandler(handler)


def _label(model: nn.Module | Callable[[], nn.Module]) -> str:
    named: Any = type(model) if isinstance(model, nn.Module) else model
    return f"{named.__module__}:{getattr(named, '__qualname__', type(named).__qualname__)}"


__all__ = ["Share", "Shares", "assert_convertible", "forced"]
