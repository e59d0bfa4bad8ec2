"""A plan as instructions: what runs, which memory it may write into, and when a value goes.

Every value is dropped after its last use, so that nobody keeps alive what a segment has read.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from dyncompile.demand import decision_name, stands_in
from dyncompile.graph import spec
from dyncompile.lowering.instructions import Argument, Arm, Call, Code, Drop, Gather, Merge, Part, Share, Split
from dyncompile.lowering.plan import Block, Conditional, Plan, Segment
from dyncompile.lowering.runtime import Segments, is_compiled
from dyncompile.ops import arms_of


def write_program(
    plan: Plan, segments: Segments, fresh: Collection[fx.Node], lent: Mapping[Segment, Collection[fx.Node]]
) -> Code:
    """Write down what runs a plan.

    Args:
        plan: What runs.
        segments: Its segments, callable.
        fresh: Outputs of segments that share memory with nothing else.
        lent: Inputs of segments that outputs may share memory with.

    Returns:
        The code of the plan's root.
    """
    return _Writer(segments, fresh, lent).block(plan.root).code


@dataclasses.dataclass(frozen=True)
class _Written:
    """What callers must know of a block's code.

    Attributes:
        code: What it does.
        taken: Inputs that it writes into: their memory must be the caller's to give away.
        fresh: For each output whether it shares memory with nothing else, inputs that are taken aside.
        layouts: Memory format of the outputs that are known to be dense in one.
    """

    code: Code
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

    def block(self, block: Block, layouts: Mapping[fx.Node, Any] | None = None) -> _Written:
        """Write a block's code, and those that it runs."""
        return _BlockWriter(self, block, dict(layouts or {})).write()


class _BlockWriter:
    """Writes the code of one block.

    Attributes:
        layouts: Memory format of the values that are known to be dense in one.
        owned: Values that nothing else shares memory with: they may be written into once nobody reads them. Inputs are
            taken for such at first.
        origins: Of which inputs a value may be the memory.
        taken: Inputs that the code writes into.
    """

    def __init__(self, writer: _Writer, block: Block, layouts: dict[fx.Node, Any]) -> None:
        self.writer = writer
        self.block = block
        self.steps: list[Call | Share | Drop | Split] = []
        self.layouts = layouts
        # The inputs of the outermost block are the user's.
        self.owned = {n for n in block.inputs if block.guard and spec(n).batch_dim is not None}
        self.origins = {n: {n} for n in self.owned}
        self.taken: set[fx.Node] = set()
        self.registers: dict[fx.Node, int] = {}

    def write(self) -> _Written:
        block = self.block
        dead = _dead_after(block)
        self.places(block.inputs)
        for step, gone in zip(block.steps, dead, strict=True):
            if isinstance(step, Segment):
                self.segment(step, gone)
            else:
                self.conditional(step, gone)
        outputs = self.places(block.outputs)
        return _Written(
            Code(
                name=block.name,
                inputs=len(block.inputs),
                registers=len(self.registers),
                steps=tuple(self.steps),
                outputs=outputs,
            ),
            self.taken,
            {n: n in self.owned and self.origins.get(n, set()) <= self.taken for n in block.outputs},
            {n: self.layouts[n] for n in block.outputs if n in self.layouts},
        )

    def place(self, node: fx.Node) -> int:
        """The register of a value."""
        return self.registers.setdefault(node, len(self.registers))

    def places(self, nodes: Iterable[fx.Node]) -> tuple[int, ...]:
        return tuple(self.place(n) for n in nodes)

    def drop(self, nodes: Iterable[fx.Node]) -> None:
        if registers := self.places(nodes):
            self.steps.append(Drop(registers=registers))

    # --- segments --------------------------------------------------------------------------------

    def segment(self, step: Segment, dead: Collection[fx.Node]) -> None:
        for decision, real in _shared(step):
            rows = spec(decision).rows
            self.steps.append(
                Share(
                    decision=self.place(decision),
                    name=decision_name(decision),
                    rows=rows,
                    finer=rows // self.block.rows,
                    real=None if real is None else self.place(real),
                )
            )
        call = self.writer.segments[step]
        if is_compiled(call):
            arguments = []
            for node, layout, overwritten in zip(step.inputs, call.formats, call.overwrites, strict=True):
                taken = overwritten and self.take(node, dead)
                copied = overwritten and not taken
                # What lies as the segment reads it is handed over as it is.
                kept = not copied and self.layouts.get(node) == layout
                arguments.append(Argument(register=self.place(node), layout=None if kept else layout, copied=copied))
                for output in step.outputs if taken else ():
                    self.origins.setdefault(output, set()).update(self.origins.get(node, ()))
            self.layouts.update(zip(step.outputs, call.output_formats, strict=True))
        else:
            arguments = [Argument(register=self.place(n)) for n in step.inputs]
        self.steps.append(
            Call(
                segment=call,
                arguments=tuple(arguments),
                dead=self.places(n for n in step.inputs if n in dead),
                results=self.places(step.outputs),
            )
        )
        self.owned.update(n for n in step.outputs if n in self.writer.fresh)
        self.owned.difference_update(self.writer.lent[step])
        self.drop(n for n in step.outputs if n in dead)

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
        blocks = [self.writer.block(arm, self.gathered_layouts(arm)) if arm else None for arm in step.arms]
        sources = {s: arms_of(s) for s in step.selects}
        outside = {s: [v for i, v in enumerate(values) if not _inside(step, i, v)] for s, values in sources.items()}
        bases = {s: next(iter(values), None) for s, values in outside.items()}
        read_late = {v for values in outside.values() for v in values}
        gone = [n for n in dead if n not in step.selects]
        decision = self.place(unit.decision)
        arms = tuple(self.arm(step, i, written, bases, dead) for i, written in enumerate(blocks))
        self.steps.append(
            Split(
                decision=decision,
                name=unit.name,
                rows=unit.rows,
                finer=unit.rows // self.block.rows,
                arms=arms,
                dead=self.places(gone),
                ungathered=self.places(n for n in gone if n not in read_late),
                merged=tuple(self.merge(step, select, bases[select], dead) for select in step.selects),
            )
        )
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

    def arm(
        self,
        step: Conditional,
        index: int,
        written: _Written | None,
        bases: Mapping[fx.Node, fx.Node | None],
        dead: Collection[fx.Node],
    ) -> Arm:
        """An arm: all rows take it, and it runs on the values themselves; or some do, which are gathered."""
        block = step.arms[index]
        values = {s: arms_of(s)[index] for s in step.selects}
        inside = list(block.outputs) if block else []
        outside = {v for v in values.values() if v not in inside}
        needed = block.inputs if block else ()
        taken = written.taken if written else set()
        given = []
        for node in needed:
            copied = node in taken and (node in outside or not self.take(node, dead))
            given.append((self.place(node), copied))
        return Arm(
            code=written.code if written else None,
            wanted=block is not None or any(v is not bases[s] for s, v in values.items()),
            moved=tuple((self.place(s), self.place(v)) for s, v in values.items() if v not in inside),
            given=tuple(given),
            results=tuple((self.place(s), inside.index(v)) for s, v in values.items() if v in inside),
            gathered=tuple(self.gather(n, step.unit.rows) for n in needed),
        )

    def gather(self, node: fx.Node, rows: int) -> Gather:
        return Gather(register=self.place(node), dim=_dim(node), entries=spec(node).rows // rows)

    def merge(self, step: Conditional, select: fx.Node, base: fx.Node | None, dead: Collection[fx.Node]) -> Merge:
        """Rows differ: what the arms made of theirs, put together."""
        parts = []
        for index, value in enumerate(arms_of(select)):
            block = step.arms[index]
            if block is not None and value in block.outputs:
                parts.append(Part(arm=index, result=block.outputs.index(value), rows=None))
            elif value is not base:
                parts.append(Part(arm=index, result=None, rows=self.gather(value, step.unit.rows)))
        dim = _dim(select)
        assert dim is not None
        return Merge(
            target=self.place(select),
            base=None if base is None else self.place(base),
            copied=base is not None and not (_alone(base, select, step) and self.take(base, dead)),
            parts=tuple(parts),
            dim=dim,
            entries=spec(select).rows // step.unit.rows,
        )


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
