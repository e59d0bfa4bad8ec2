"""From demand to a plan: straight-line segments, and conditionals that run an arm on the rows that take it."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator

import torch
import torch.utils._pytree as pytree
from torch import fx

from dyncompile.demand import Demand, Guard, Unit, analyse, stands_in
from dyncompile.errors import LoweringError
from dyncompile.graph import Size, Spec, is_tensor, spec
from dyncompile.lowering.waiting import Waiting
from dyncompile.ops import arms_of, is_select


@dataclasses.dataclass(eq=False)
class Segment:
    """Nodes that run one after the other on all rows of their block.

    Attributes:
        nodes: In order.
        rows: How many rows a sample has in the block.
        inputs: Tensor nodes from outside, the first one batched.
        outputs: Nodes that are read outside.
    """

    nodes: list[fx.Node]
    rows: int = 1
    inputs: list[fx.Node] = dataclasses.field(default_factory=list)
    outputs: list[fx.Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Conditional:
    """Runs each arm on the rows that take it.

    Attributes:
        unit: The selects that it carries out.
        arms: A block for each arm, or None where the arm computes nothing.
    """

    unit: Unit
    arms: list["Block | None"]

    @property
    def selects(self) -> list[fx.Node]:
        """The values that it produces."""
        return self.unit.selects


@dataclasses.dataclass(eq=False)
class Block:
    """Steps under one guard.

    Attributes:
        guard: When the block runs.
        name: The guard in words.
        inputs: Values from outside.
        steps: In order of execution.
        outputs: Values that are read outside.
    """

    guard: Guard
    name: str
    inputs: list[fx.Node]
    steps: list[Segment | Conditional]
    outputs: list[fx.Node]

    @property
    def rows(self) -> int:
        """How many rows a sample has here: those of the decision that leads here."""
        return self.guard[-1][0].rows if self.guard else 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a lowered model runs.

    Attributes:
        graph: The graph, with disabled decisions taken out.
        root: The block that always runs.
        demand: What the plan was made from.
        dense: Decisions whose arms are all run, by name, and why.
    """

    graph: fx.Graph
    root: Block
    demand: Demand
    dense: dict[str, str]

    def blocks(self) -> Iterator[Block]:
        """Every block, outer ones first."""
        queue = [self.root]
        while queue:
            block = queue.pop(0)
            yield block
            for step in block.steps:
                if isinstance(step, Conditional):
                    queue.extend(arm for arm in step.arms if arm is not None)

    def segments(self) -> Iterator[Segment]:
        """Every segment."""
        for block in self.blocks():
            yield from (step for step in block.steps if isinstance(step, Segment))


def make_plan(graph: fx.Graph, *, dense: dict[str, str] | None = None) -> Plan:
    """Plan a graph.

    Args:
        graph: Specialised, propagated, rows marked.
        dense: Decisions to run densely, by name, with the reason.

    Returns:
        The plan; decisions that cannot be carried out lazily are added to `dense` with the reason.
    """
    dense = dict(dense or {})
    free = _shape_only(graph)
    # What a select or the caller takes is made once, by a segment.
    free -= {v for n in graph.nodes if is_select(n) for v in arms_of(n)} | set(graph.output_node().all_input_nodes)
    while True:
        demand = analyse(graph, dense)
        inside = _contents(demand)
        refused = {unit.name: reason for unit in demand.units if (reason := _refuse(unit, inside[unit], free))}
        if not refused:
            break
        dense.update(refused)
    builder = _Builder(graph, demand, free)
    leaves = list(graph.output_node().all_input_nodes)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    nodes = [node for node in graph.nodes if node in demand.guards and node.op != "output"]
    return Plan(graph, builder.block((), nodes, leaves, placeholders), demand, dense)


class _Builder:
    def __init__(self, graph: fx.Graph, demand: Demand, free: set[fx.Node]) -> None:
        self.demand = demand
        self.free = free
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.names = {region.guard: region.name for region in demand.regions}
        self.units: dict[Guard, list[Unit]] = {}
        for unit in demand.units:
            self.units.setdefault(unit.guard, []).append(unit)

    def block(
        self,
        guard: Guard,
        nodes: list[fx.Node],
        wanted: list[fx.Node],
        given: list[fx.Node] | None = None,
    ) -> Block:
        """Schedule the nodes under a guard.

        Args:
            guard: The block's guard.
            nodes: Those with this guard or a longer one.
            wanted: Values to deliver.
            given: The block's inputs; None finds them.
        """
        inside = set(nodes)
        if given is None:
            given = self._sorted(source for node in nodes for source in self.reads(node) if source not in inside)
        units = [u for u in self.units.get(guard, ()) if u.selects[0] in inside]
        owner: dict[fx.Node, Unit] = {}
        for unit in units:
            owner.update(dict.fromkeys(unit.selects, unit))
        depth = len(guard)
        own: list[fx.Node] = []
        nested: dict[Unit, list[fx.Node]] = {unit: [] for unit in units}
        for node in nodes:
            if node in self.free or node.op in ("placeholder", "get_attr"):
                continue
            path = self.demand.guards[node]
            if len(path) > depth:
                owner[node] = path[depth][0]
                nested[path[depth][0]].append(node)
            elif node not in owner:
                own.append(node)
        steps = self._schedule(own, units, nested, guard, set(given))
        self._connect(steps, wanted)
        return Block(guard, self._name(guard), given, steps, wanted)

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """Data a node reads, through shape-only values and parameters, which every segment makes for itself."""
        return [s for s in node.all_input_nodes if s.op != "get_attr" and s not in self.free]

    def _schedule(
        self,
        own: list[fx.Node],
        units: list[Unit],
        nested: dict[Unit, list[fx.Node]],
        guard: Guard,
        ready: set[fx.Node],
    ) -> list[Segment | Conditional]:
        """Run as many nodes as possible between two conditionals."""
        nodes = Waiting(own, self.reads, ready)
        conditionals = Waiting(units, lambda unit: self._needs({*nested[unit], *unit.selects}), ready)
        steps: list[Segment | Conditional] = []
        while len(nodes) or len(conditionals):
            run: list[fx.Node] = []
            while (node := nodes.take(functools.partial(_joins, run=run))) is not None:
                run.append(node)
                nodes.deliver(node)
                conditionals.deliver(node)
            if run:
                steps.append(Segment(run, guard[-1][0].rows if guard else 1))
            unit = conditionals.take()
            if unit is not None:
                steps.append(Conditional(unit, self._arms(unit, nested[unit], guard)))
                for select in unit.selects:
                    nodes.deliver(select)
                    conditionals.deliver(select)
            elif not run:
                raise LoweringError(f"the selects of {[u.name for u in units]} wait for each other")
        return steps

    def _needs(self, nodes: set[fx.Node]) -> set[fx.Node]:
        """What some nodes read that is not among them."""
        return {source for node in nodes for source in self.reads(node) if source not in nodes}

    def _arms(self, unit: Unit, nodes: list[fx.Node], guard: Guard) -> list[Block | None]:
        arms: list[Block | None] = []
        for index in range(len(arms_of(unit.selects[0]))):
            path = (*guard, (unit, index))
            inside = [n for n in nodes if self.demand.guards[n][len(guard)] == path[-1]]
            values = [arms_of(select)[index] for select in unit.selects]
            there = set(inside)
            wanted = list(dict.fromkeys(v for v in values if v in there))
            arms.append(self.block(path, inside, wanted) if inside else None)
        return arms

    def _connect(self, steps: list[Segment | Conditional], wanted: list[fx.Node]) -> None:
        """Find what each segment reads and delivers."""
        later: set[fx.Node] = set(wanted)
        for step in reversed(steps):
            if isinstance(step, Segment):
                inside = set(step.nodes)
                step.outputs = [node for node in step.nodes if node in later]
                step.inputs = self._sorted(s for n in step.nodes for s in self.reads(n) if s not in inside)
                later.update(step.inputs)
            else:
                later.add(step.unit.decision)
                for arm in step.arms:
                    later.update(arm.inputs if arm else ())
                later.update(v for select in step.selects for v in arms_of(select))

    def _sorted(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Unique, batched ones first, then in graph order."""
        return sorted(set(nodes), key=lambda n: (not _batched(n), self.order[n]))

    def _name(self, guard: Guard) -> str:
        return self.names.get(guard, " & ".join(f"{u.name}={a}" for u, a in guard) or "always")


def _joins(node: fx.Node, run: list[fx.Node]) -> bool:
    """Whether a node may go into a segment; what does a share of a decision is one by itself, with its parts."""
    if not run:
        return True
    if stands_in(run[0]):
        return node.target is operator.getitem and node.args[0] is run[0]
    return not stands_in(node)


def _batched(node: fx.Node) -> bool:
    return is_tensor(node) and spec(node).batch_dim is not None


def _shape_only(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on no data: sizes, devices, and tensors made from sizes and weights alone, such as positions.

    Compiled, what is made of weights is folded into them; as the output of another segment it would be an input.
    """
    free: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_select(node):
            continue
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        found = node.meta.get("spec")
        data = [s for s in node.all_input_nodes if s not in free and s.op != "get_attr"]
        if isinstance(found, Size) or node.target is getattr or not data:
            free.add(node)
    return free


def _contents(demand: Demand) -> dict[Unit, set[fx.Node]]:
    """The nodes that each conditional may leave out."""
    found: dict[Unit, set[fx.Node]] = {unit: set() for unit in demand.units}
    for node, guard in demand.guards.items():
        for unit, _ in guard:
            found[unit].add(node)
    return found


def _refuse(unit: Unit, inside: set[fx.Node], free: set[fx.Node]) -> str | None:
    """Why a conditional cannot run on a part of the rows, given the nodes that it may leave out; None if it can."""
    decision = unit.decision
    if not is_tensor(decision) or len(spec(decision).shape) != 1 or spec(decision).batch_dim != 0:
        return "its decision is not one value a sample, nor one a row in a single dim"
    if unit.guard and unit.rows % unit.guard[-1][0].rows:
        outer = unit.guard[-1][0]
        return f"it decides for {unit.rows} rows a sample, inside a region that `{outer.name}` splits into {outer.rows}"
    for select in unit.selects:
        if not _batched(select) or not _splits(select, unit.rows):
            return f"`{select.name}` has no row for each sample" + (" and decision" if unit.rows > 1 else "")
    for node in inside:
        if reason := _impure(node):
            return reason
        if unit.rows > 1 and not _splits(node, unit.rows):
            return f"`{node.name}` mixes the rows of a sample"
        for source in node.all_input_nodes:
            if source in inside or source.op == "get_attr":
                continue
            if source in free:
                size = source.meta.get("spec")
                if isinstance(size, Size) and size.slope % unit.rows:
                    return f"`{source.name}`, a size that it needs, is not a multiple of its rows"
                continue
            if isinstance(source.meta.get("spec"), Spec) and _splits(source, unit.rows):
                continue
            return f"`{source.name}`, which it needs, has no row for each sample"
    return None


def _splits(node: fx.Node, rows: int) -> bool:
    """Whether a value can be taken apart into so many rows a sample."""
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("spec")) if isinstance(leaf, Spec)]
    divisible = all(leaf.batch_dim is None or leaf.rows % rows == 0 for leaf in leaves)
    return divisible and bool(node.meta.get("sliceable", False))


def _impure(node: fx.Node) -> str | None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags and not _is_inactive_dropout(node):
            return f"`{node.name}` draws random numbers"
        if target._schema.is_mutable:
            return f"`{node.name}` overwrites its input"
    return None


def _is_inactive_dropout(node: fx.Node) -> bool:
    return "dropout" in str(node.target) or "scaled_dot_product" in str(node.target)
