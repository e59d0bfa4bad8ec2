"""A plan as Python source: a function for each block, with as little between two segments as can be.

A block's function takes its inputs in a list and empties it, as the programs of inductor do, and drops every value
after its last use, so that no caller keeps alive what a segment has read.
"""

import dataclasses
import itertools
import linecache
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dyncompile.demand import decision_name, stands_in
from dyncompile.graph import spec
from dyncompile.lowering.plan import Block, Conditional, Plan, Segment
from dyncompile.lowering.runtime import Run, Segments, choice, gather, is_compiled, merge, within
from dyncompile.ops import arms_of

Program = Callable[[list[Tensor], int, Tensor | None, Run], tuple[Tensor, ...]]
"""Of the inputs, the number of samples, which of the batch they are (None: all), and the run; returns the outputs."""

_names = itertools.count()


def write_program(
    plan: Plan, segments: Segments, fresh: Collection[fx.Node], lent: Mapping[Segment, Collection[fx.Node]]
) -> tuple[Program, str]:
    """Generate the function that runs a plan.

    Args:
        plan: What runs.
        segments: Its segments, callable.
        fresh: Outputs of segments that share memory with nothing else.
        lent: Inputs of segments that outputs may share memory with.

    Returns:
        The function of the plan's root, and the source of all.
    """
    writer = _Writer(segments, fresh, lent)
    root = writer.block(plan.root)
    source = "\n".join(writer.lines)
    name = f"<dyncompile program {next(_names)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), writer.bound)  # noqa: S102 - written here
    return writer.bound[root.name], source


@dataclasses.dataclass(frozen=True)
class _Written:
    """What callers must know of a block's function.

    Attributes:
        name: What it is called.
        taken: Inputs that it writes into: their memory must be the caller's to give away.
        fresh: For each output whether it shares memory with nothing else, inputs that are taken aside.
        layouts: Memory format of the outputs that are known to be dense in one.
    """

    name: str
    taken: set[fx.Node]
    fresh: dict[fx.Node, bool]
    layouts: dict[fx.Node, Any]


class _Writer:
    def __init__(
        self, segments: Segments, fresh: Collection[fx.Node], lent: Mapping[Segment, Collection[fx.Node]]
    ) -> None:
        self.segments = segments
        self.fresh = fresh
        self.lent = lent
        self.lines: list[str] = []
        self.bound: dict[str, Any] = {
            "choice": choice,
            "gather": gather,
            "merge": merge,
            "within": within,
        }
        self.count = itertools.count()

    def block(self, block: Block, layouts: Mapping[fx.Node, Any] | None = None) -> _Written:
        """Write a block's function, behind those that it calls."""
        return _BlockWriter(self, block, dict(layouts or {})).write()

    def bind(self, kind: str, value: object) -> str:
        """A global of the program."""
        name = f"{kind}{next(self.count)}"
        self.bound[name] = value
        return name


class _BlockWriter:
    """Writes one function.

    Attributes:
        layouts: Memory format of the values that are known to be dense in one.
        owned: Values that nothing else shares memory with: they may be written into once nobody reads them. Inputs are
            taken for such at first.
        origins: Of which inputs a value may be the memory.
        taken: Inputs that the function writes into.
    """

    def __init__(self, writer: _Writer, block: Block, layouts: dict[fx.Node, Any]) -> None:
        self.writer = writer
        self.block = block
        self.lines: list[str] = []
        self.depth = 1
        self.layouts = layouts
        # The inputs of the outermost block are the user's.
        self.owned = {n for n in block.inputs if block.guard and spec(n).batch_dim is not None}
        self.origins = {n: {n} for n in self.owned}
        self.taken: set[fx.Node] = set()
        self.variables: dict[fx.Node, str] = {}

    def write(self) -> _Written:
        block = self.block
        dead = _dead_after(block)
        given = [self.variable(n) for n in block.inputs]
        if given:
            self.line(f"{_tuple(given)} = values")
        self.line("values.clear()")
        self.line(f"run.rows[{block.name!r}] = run.rows.get({block.name!r}, 0) + count")
        for step, gone in zip(block.steps, dead, strict=True):
            if isinstance(step, Segment):
                self.segment(step, gone)
            else:
                self.conditional(step, gone)
        self.line(f"return {_tuple([self.variable(n) for n in block.outputs])}")
        name = f"block{next(self.writer.count)}"
        self.writer.lines += [f"def {name}(values, count, index, run):", *self.lines]
        return _Written(
            name,
            self.taken,
            {n: n in self.owned and self.origins.get(n, set()) <= self.taken for n in block.outputs},
            {n: self.layouts[n] for n in block.outputs if n in self.layouts},
        )

    def line(self, text: str) -> None:
        self.lines.append(" " * self.depth + text)

    def variable(self, node: fx.Node) -> str:
        return self.variables.setdefault(node, f"v{len(self.variables)}")

    def drop(self, nodes: Iterable[fx.Node]) -> None:
        names = [self.variable(n) for n in nodes]
        if names:
            self.line(" = ".join(names) + " = None")

    # --- segments --------------------------------------------------------------------------------

    def segment(self, step: Segment, dead: Collection[fx.Node]) -> None:
        for decision, real in _shared(step):
            self.share(decision, real)
        call = self.writer.segments[step]
        if is_compiled(call):
            serving, serve = self.writer.bind("programs", call.serving), self.writer.bind("serve", call.serve)
            run = f"({serving}.get(count) or {serve}(count))(a)"
            arguments = ["count"]
            for node, layout, overwritten in zip(step.inputs, call.formats, call.overwrites, strict=True):
                taken = overwritten and self.take(node, dead)
                arguments.append(self.argument(node, layout, copied=overwritten and not taken))
                for output in step.outputs if taken else ():
                    self.origins.setdefault(output, set()).update(self.origins.get(node, ()))
            self.layouts.update(zip(step.outputs, call.output_formats, strict=True))
        else:
            run = f"{self.writer.bind('segment', call)}(*a)"
            arguments = [self.variable(n) for n in step.inputs]
        self.line(f"a = [{', '.join(arguments)}]")
        self.drop(n for n in step.inputs if n in dead)
        self.line(f"{_tuple([self.variable(n) for n in step.outputs])} = {run}")
        self.owned.update(n for n in step.outputs if n in self.writer.fresh)
        self.owned.difference_update(self.writer.lent[step])
        self.drop(n for n in step.outputs if n in dead)

    def share(self, decision: fx.Node, real: fx.Node | None) -> None:
        """Replace a decision of which a segment does a share, and note how much that is."""
        name, rows = decision_name(decision), spec(decision).rows
        value = self.variable(decision)
        where = f"within(index, {rows // self.block.rows})"
        self.line("if run.override is not None:")
        self.line(f" {value} = run.override({name!r}, {value}, {where}, run.batch * {rows})")
        if real is not None:
            self.line(f" {value} = {value} & {self.variable(real)}")
        self.line(f"run.rows[{name!r}] = int({value}.count_nonzero())")

    def argument(self, node: fx.Node, layout: Any, *, copied: bool) -> str:
        """A value, or a copy of it, in the memory format that a compiled segment reads."""
        name = self.variable(node)
        if not copied and self.layouts.get(node) == layout:
            return name
        return f"{name}.{'clone' if copied else 'contiguous'}(memory_format={self.writer.bind('layout', layout)})"

    def take(self, node: fx.Node, dead: Collection[fx.Node]) -> bool:
        """Take a value's memory to write into, if nobody else reads it; whether it was taken."""
        if node not in self.owned or node not in dead:
            return False
        self.taken |= self.origins.get(node, set())
        return True

    # --- conditionals ----------------------------------------------------------------------------

    def conditional(self, step: Conditional, dead: Collection[fx.Node]) -> None:
        """Split the rows, run each arm on those that take it, put the results together."""
        unit = step.unit
        finer = unit.rows // self.block.rows
        blocks = [self.writer.block(arm, self.gathered_layouts(arm)) if arm else None for arm in step.arms]
        sources = {s: arms_of(s) for s in step.selects}
        bases = {
            s: next((v for i, v in enumerate(arms) if not _inside(step, i, v)), None) for s, arms in sources.items()
        }
        wanted = tuple(
            arm is not None or any(sources[s][i] is not bases[s] for s in step.selects)
            for i, arm in enumerate(step.arms)
        )
        self.line(f"d = {self.variable(unit.decision)}")
        self.line("if run.override is not None:")
        where = "index" if finer == 1 else f"within(index, {finer})"
        self.line(f" d = run.override({unit.name!r}, d, {where}, run.batch * {unit.rows})")
        self.line("n = count" if finer == 1 else f"n = count * {finer}")
        arms = len(step.arms)
        self.line(f"arm, rows = (int(d.item()), ()) if n == 1 else choice(d, {arms}, {wanted})")
        self.line("d = None")
        for i in range(arms):
            self.line(f"{'if' if i == 0 else 'elif'} arm == {i}:")
            self.depth += 1
            self.whole(step, i, blocks[i], dead, where)
            self.depth -= 1
        self.line("else:")
        self.depth += 1
        self.mixed(step, blocks, bases, dead, where)
        self.depth -= 1
        for select in step.selects:
            found = {self.layout_of(v, blocks[i]) for i, v in enumerate(sources[select])}
            if len(found) == 1 and None not in found:
                self.layouts[select] = found.pop()
            fresh = all(
                written.fresh[v] if (written := blocks[i]) and v in written.fresh else v in self.owned and v in dead
                for i, v in enumerate(sources[select])
            )
            if fresh and all(_alone(v, select, step) for v in sources[select]):
                self.owned.add(select)
            self.origins[select] = set().union(*(self.origins_of(v, blocks[i]) for i, v in enumerate(sources[select])))
        # A select may be an arm itself, or what a block returns a view of an input of its own.
        self.owned.difference_update(v for arms in sources.values() for v in arms if v not in dead)
        for arm, written in zip(step.arms, blocks, strict=True):
            if arm and written and not all(written.fresh.values()):
                self.owned.difference_update(arm.inputs)
        self.drop(n for n in step.selects if n in dead)

    def gathered_layouts(self, block: Block) -> dict[fx.Node, Any]:
        """Layouts of a block's inputs: rows are gathered as they lie, or made row-major."""
        return {
            n: self.layouts[n]
            for n in block.inputs
            if n in self.layouts
            and (spec(n).batch_dim is None or self.layouts[n] == torch.contiguous_format or _by_rows(n, block))
        }

    def origins_of(self, value: fx.Node, written: _Written | None) -> set[fx.Node]:
        inner = written.taken if written and value in written.fresh else {value}
        return set().union(*(self.origins.get(n, set()) for n in inner))

    def layout_of(self, value: fx.Node, written: _Written | None) -> Any:
        return written.layouts.get(value) if written and value in written.fresh else self.layouts.get(value)

    def whole(
        self, step: Conditional, arm: int, written: _Written | None, dead: Collection[fx.Node], where: str
    ) -> None:
        """Every row takes one arm: run it on the values themselves, copy nothing."""
        block = step.arms[arm]
        values = {s: arms_of(s)[arm] for s in step.selects}
        inside = set(block.outputs) if block else set()
        for select, value in values.items():
            if value not in inside:
                self.line(f"{self.variable(select)} = {self.variable(value)}")
        if block and written:
            outside = {v for v in values.values() if v not in inside}
            given = []
            for node in block.inputs:
                keeps = node in written.taken and (node in outside or not self.take(node, dead))
                given.append(self.variable(node) + (".clone()" if keeps else ""))
            self.line(f"a = [{', '.join(given)}]")
        self.drop(n for n in dead if n not in values)
        if block and written:
            self.line(f"r = {written.name}(a, n, {where}, run)")
            for select, value in values.items():
                if value in inside:
                    self.line(f"{self.variable(select)} = r[{block.outputs.index(value)}]")
            self.line("a = r = None")

    def mixed(
        self,
        step: Conditional,
        blocks: list[_Written | None],
        bases: dict[fx.Node, fx.Node | None],
        dead: Collection[fx.Node],
        where: str,
    ) -> None:
        """Rows differ: gather those of each arm, run it, and put the results together."""
        rows = step.unit.rows
        for i, (arm, written) in enumerate(zip(step.arms, blocks, strict=True)):
            if arm is None or written is None:
                continue
            self.line(f"i{i} = run.padded(rows[{i}])" if rows == 1 else f"i{i} = rows[{i}]")
            self.line(f"c{i} = i{i}.shape[0]")
            gathers = [f"gather({self.variable(n)}, i{i}, {_dim(n)}, {spec(n).rows // rows})" for n in arm.inputs]
            self.line(f"a{i} = [{', '.join(gathers)}] if c{i} else None")
        outer = {v for s in step.selects for j, v in enumerate(arms_of(s)) if not _inside(step, j, v)}
        self.drop(n for n in dead if n not in outer and n not in step.selects)
        for i, written in enumerate(blocks):
            if written is not None:
                inner = f"i{i} if {where} is None or run.override is None else ({where})[i{i}]"
                self.line(f"r{i} = {written.name}(a{i}, c{i}, {inner}, run) if c{i} else None")
        for select in step.selects:
            base = bases[select]
            parts = []
            for j, value in enumerate(arms_of(select)):
                arm = step.arms[j]
                if arm is not None and value in arm.outputs:
                    parts.append(f"(rows[{j}], r{j}[{arm.outputs.index(value)}]) if c{j} else None")
                elif value is not base:
                    found = f"{_dim(value)}, {spec(value).rows // rows}"
                    parts.append(f"(rows[{j}], gather({self.variable(value)}, rows[{j}], {found}))")
            start = "None"
            if base is not None:
                start = self.variable(base)
                if not (_alone(base, select, step) and self.take(base, dead)):
                    start += ".clone()"
            dim, entries = _dim(select), spec(select).rows // rows
            self.line(f"p = [q for q in [{', '.join(parts)}] if q]")
            self.line(f"{self.variable(select)} = merge({start}, p, {dim}, {entries}, n)")
        self.drop(n for n in dead if n not in step.selects)
        self.line("p = r = a = rows = None")
        for i, written in enumerate(blocks):
            if written is not None:
                self.line(f"i{i} = a{i} = r{i} = None")


def _shared(step: Segment) -> list[tuple[fx.Node, Any]]:
    """The decisions made ahead of which a segment does a share; of packed sequences with the steps that are there."""
    calls = {stands_in(node): node for node in step.nodes}
    found = [node for node in step.inputs if "decision" in node.meta and decision_name(node) in calls]
    return [(node, calls[decision_name(node)].kwargs.get("real")) for node in found]


def _inside(step: Conditional, arm: int, value: fx.Node) -> bool:
    block = step.arms[arm]
    return block is not None and value in block.outputs


def _alone(value: fx.Node, select: fx.Node, step: Conditional) -> bool:
    """Whether no other select of a conditional may become the same value."""
    return not any(value in arms_of(other) for other in step.selects if other is not select)


def _by_rows(node: fx.Node, block: Block) -> bool:
    """Whether rows of a channels-last value are gathered as they lie."""
    found = spec(node)
    return found.batch_dim == 0 and found.rows == block.rows and len(found.shape) == 4


def _dim(node: fx.Node) -> int | None:
    return spec(node).batch_dim


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)},)" if names else "()"


def _dead_after(block: Block) -> list[set[fx.Node]]:
    """For each step, the values that nobody reads after it."""
    needed = set(block.outputs)
    known = set(block.inputs)
    known.update(n for step in block.steps for n in _produced(step))
    found: list[set[fx.Node]] = []
    for step in reversed(block.steps):
        reads = {n for n in _read(step) if n in known}
        found.append({n for n in {*reads, *_produced(step)} if n not in needed})
        needed |= reads
    return found[::-1]


def _produced(step: Segment | Conditional) -> list[fx.Node]:
    return step.outputs if isinstance(step, Segment) else step.selects


def _read(step: Segment | Conditional) -> list[fx.Node]:
    if isinstance(step, Segment):
        return step.inputs
    values = [step.unit.decision]
    for arm in step.arms:
        values.extend(arm.inputs if arm else ())
    values.extend(v for select in step.selects for v in arms_of(select))
    return values
