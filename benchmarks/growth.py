"""How conversion, lowering and what a call costs beyond its operations grow with depth and with the number of exits.

Run `python -m benchmarks growth`, or `python -m benchmarks.growth --help`.

- Models: a stack of residual blocks (norm, linear, ReLU, linear), 10 to 1,000 of them with a gate each; and one of 72
  blocks with 1 to 64 exits. All decisions are forced to run everything, so that every conditional is passed.
- On a processor all times are its own (`time.process_time`), which other programs on the machine disturb less than they
  do the clock. Lowering is with `backend="eager"`: nothing is compiled.
- Overhead: the time of a call of the lowered model at batch 1, less that of the same layers, heads and gates called one
  after the other by a function without any decision, over the number of decisions. With `--compiled` also of compiled
  segments, less that of the same compiled segments run one after the other by a program without any decision.
- Exponent: of the power law through the last two sizes; 1 is linear.
"""

import argparse
import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import dyncompile as dc
from benchmarks import harness
from benchmarks.harness import Report, Table, Target, take_turns
from dyncompile.demand import decision_name
from dyncompile.graph import program
from dyncompile.lowering import LoweredModule
from dyncompile.lowering.instructions import Argument, Call, Code, Program
from dyncompile.lowering.runtime import Run
from dyncompile.ops import arms_of, decision_of, is_select

DEPTHS = (10, 30, 100, 300, 1000)
EXITS = (1, 2, 4, 8, 16, 32, 64)
BLOCKS = 72
"""Depth of the model that has exits."""
COMPILED = (10, 30)
WIDTH = 32
OVERHEAD = 30e-6
"""Seconds that a conditional may take beyond its operations."""
LOWERING = 60.0
"""Seconds that 1,000 blocks may take to lower."""
EXPONENT = 1.15


class Block(nn.Module):
    """A residual block on vectors `[N, C]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        branch: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + branch


def stack(depth: int) -> nn.Module:
    """So many blocks, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH) for _ in range(depth)), nn.Linear(WIDTH, 10)).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--exits", type=int, nargs="+", default=EXITS)
    parser.add_argument("--compiled", type=int, nargs="*", default=COMPILED, help="depths to measure compiled as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("growth.json"), help="JSON; Markdown goes beside it")
    options = parser.parse_args(arguments)
    depths, exits, compiled, rounds = options.depths, options.exits, options.compiled, options.rounds
    if options.quick:
        depths, exits, compiled, rounds = (2, 8), (1, 2), (), 3
    torch.set_num_threads(1)
    harness.keep_memory()
    report = Report(
        command=harness.command("growth", arguments),
        machine=harness.machine(options.device),
        settings={"rounds": rounds, "width": WIDTH, "blocks of the model with exits": BLOCKS},
    )
    measured = partial(measure, rounds=rounds, device=options.device)
    measured(2, "layer_skip", {})  # what a process pays once: loading the compiler's parts, first calls of kernels
    gated = Table(title="Growth over depth", columns=["residual blocks", *_COLUMNS], rows=[], note=_NOTE)
    report.tables.append(gated)
    for depth in depths:
        gated.rows.append([depth, *measured(depth, "layer_skip", {})])
        report.write(options.out)
    left = Table(title="Growth over exits", columns=["exits", *_COLUMNS], rows=[], note=_NOTE)
    report.tables.append(left)
    for count in exits:
        blocks = 8 if options.quick else BLOCKS
        left.rows.append([count, *measured(blocks, "early_exit", {"exits": places(blocks, count)})])
        report.write(options.out)
    if compiled:
        table = Table(
            title="Overhead of compiled segments",
            columns=["residual blocks", "conditionals", "call, us", "segments alone, us", "overhead, us a conditional"],
            rows=[[depth, *_compiled(depth, rounds=rounds, device=options.device)] for depth in compiled],
            note="Batch 1, every conditional passed; the same compiled segments one after the other beside it.",
        )
        report.tables.append(table)
    report.targets += _targets(gated, "residual blocks with gates") + _targets(left, "exits")
    if compiled:
        worst = max(float(row[-1]) for row in report.tables[-1].rows)
        what = "compiled: overhead of a conditional at batch 1, us"
        report.targets.append(Target(what=what, found=worst, bound=1e6 * OVERHEAD))
    report.write(options.out)
    print(report.markdown())


_COLUMNS = ["conditionals", "convert, s", "lower, s", "call, us", "operations alone, us", "overhead, us a conditional"]
_NOTE = "A call: batch 1, eager, every conditional passed."


def places(blocks: int, count: int) -> list[str]:
    """Blocks after which exits are, evenly spread; behind the last two an exit saves less than it costs."""
    return [str(round((i + 1) * (blocks - 2) / (count + 1))) for i in range(count)]


def _targets(table: Table, what: str) -> list[Target]:
    """Close to linear, quick enough, and cheap enough a conditional."""
    found = []
    for column in ("convert, s", "lower, s"):
        place = table.columns.index(column)
        points = [(float(row[0]), float(row[place])) for row in table.rows]
        name = column.partition(",")[0]
        found.append(Target(what=f"{what}: exponent of {name}", found=exponent(points), bound=EXPONENT))
    lower = table.columns.index("lower, s")
    found.append(
        Target(what=f"{what}: seconds to lower the largest", found=float(table.rows[-1][lower]), bound=LOWERING)
    )
    # Of the largest: what a call costs once, whatever it holds, is then a small part.
    overhead = float(table.rows[-1][-1])
    found.append(Target(what=f"{what}: overhead of a conditional at batch 1, us", found=overhead, bound=1e6 * OVERHEAD))
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Of the power law through the last two (size, seconds).

    >>> exponent([(1.0, 1.0), (10.0, 2.0), (100.0, 20.0)])
    1.0
    """
    (small, before), (large, after) = points[-2:]
    return math.log(after / before) / math.log(large / small)


@torch.no_grad()
def measure(depth: int, strategy: str, options: dict[str, Any], *, rounds: int, device: str) -> list[float]:
    """Convert, lower and call one model.

    Returns:
        Conditionals; seconds to convert, and to lower; microseconds of a call, of its operations alone, and of the
        difference for each conditional.
    """
    model = stack(depth).to(device)
    x = torch.randn(1, WIDTH, device=device)
    gc.collect()
    start = time.process_time()
    dyn = dc.dynamize(model, strategy, example_inputs=torch.randn(2, WIDTH, device=device), **options).eval()
    converted = time.process_time() - start
    pass_all(dyn)
    start = time.process_time()
    fast = dc.lower(dyn, "eager")
    lowered = time.process_time() - start
    count = len(fast.plan.demand.units)
    torch.testing.assert_close(fast(x), dyn(x))
    call, alone = _timed(fast, partial(operations(dyn), dyn, x), x, rounds=rounds, device=device)
    return [count, converted, lowered, 1e6 * call, 1e6 * alone, 1e6 * (call - alone) / count]


def operations(dyn: dc.DynamicModule) -> Callable[..., Any]:
    """One function that calls all layers, heads and gates of a dynamic model and makes no use of the decisions."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(dyn.graph.fx, mapping)
    graph.output((output, tuple(mapping[node] for node in dyn.graph.fx.nodes if "decision" in node.meta)))
    for node in list(graph.nodes):
        if is_select(node):
            # An exit that nobody takes, a gate that is open.
            node.replace_all_uses_with(arms_of(node)[0 if decision_name(decision_of(node)) in dyn.exits else 1])
            graph.erase_node(node)
    return program(graph)


def pass_all(dyn: dc.DynamicModule) -> None:
    """Enable every exit and gate, with thresholds and biases at which everything runs.

    Nothing is forced, since that would itself take time.
    """
    for module in (*dyn.gates.values(), *dyn.exits.values()):
        module.get_buffer("enabled").fill_(True)
    for module in dyn.exits.values():
        module.get_buffer("threshold").fill_(1.0)
    for module in dyn.gates.values():
        module.get_buffer("bias").fill_(1e4)


def _timed(
    fast: LoweredModule, alone: Callable[[], object], x: Tensor, *, rounds: int, device: str
) -> tuple[float, float]:
    """Seconds of a call, and of what it is compared with: of each the shortest round, since they are subtracted."""
    repeats = max(1, 200 // max(len(fast.plan.demand.units), 1))
    clock = time.process_time if device == "cpu" else time.perf_counter
    calls: dict[str, Callable[[], object]] = {"call": partial(fast, x), "alone": alone}
    times = take_turns(calls, rounds=rounds, repeats=repeats, device=device, clock=clock)
    return min(times["call"].seconds), min(times["alone"].seconds)


def _straight(
    fast: LoweredModule, segments: Sequence[tuple[Callable[..., object], list[Tensor], int]]
) -> tuple[Program, list[Tensor]]:
    """What runs segments one after the other, each on values of its own, with nothing to decide; and those values."""
    given = [value for _, values, _ in segments for value in values]
    places = itertools.count()
    read = [tuple(Argument(register=next(places)) for _ in values) for _, values, _ in segments]
    steps = [
        Call(segment=call, arguments=arguments, dead=(), results=tuple(next(places) for _ in range(outputs)))
        for (call, _, outputs), arguments in zip(segments, read, strict=True)
    ]
    code = Code(name="alone", inputs=len(given), registers=next(places), steps=tuple(steps), outputs=())
    return fast.carry_out(code), given


@torch.no_grad()
def _compiled(depth: int, *, rounds: int, device: str) -> list[float]:
    """Conditionals; microseconds of a call, of its segments alone, and of the difference for each conditional."""
    dyn = dc.dynamize(stack(depth).to(device), "layer_skip", example_inputs=torch.randn(2, WIDTH, device=device)).eval()
    pass_all(dyn)
    fast = dc.lower(dyn, decline=False)
    values = fast.examples(1)
    segments = [(fast.segments[s], [values[n] for n in s.inputs], len(s.outputs)) for s in fast.plan.segments()]
    program, given = _straight(fast, segments)

    def alone() -> None:
        program(list(given), 1, None, Run(1))

    call, bare = _timed(fast, alone, torch.randn(1, WIDTH, device=device), rounds=rounds, device=device)
    count = len(fast.plan.demand.units)
    return [count, 1e6 * call, 1e6 * bare, 1e6 * (call - bare) / count]


if __name__ == "__main__":
    harness.told(main)
