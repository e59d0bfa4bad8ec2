"""Under which decisions is a node needed? The one analysis that cost, lowering, export and reports read."""

import dataclasses
import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

from dyncompile.graph import spec
from dyncompile.ops import SWITCH, arms_of, decision_of, is_select


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Selects that one decision controls and that can be executed as one conditional.

    Attributes:
        decision: The node that decides.
        selects: The nodes that choose; none depends on another.
        guard: Under which the selects themselves are needed.
    """

    decision: fx.Node
    guard: "Guard"
    selects: list[fx.Node] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """The decision's public name."""
        return decision_name(self.decision)

    @property
    def routed(self) -> bool:
        """Whether the decision is the route of a `switch`."""
        return bool(self.selects) and self.selects[0].target is SWITCH

    @property
    def rows(self) -> int:
        """How many decisions a sample has: 1, or one for each of its tokens or frames."""
        return spec(self.decision).rows

    @property
    def arms(self) -> list[fx.Node]:
        """The arms of the first select."""
        return arms_of(self.selects[0])

    @property
    def last(self) -> int:
        """The last arm."""
        return len(self.arms) - 1 if self.selects else 1

    def __repr__(self) -> str:
        return self.name


Guard = tuple[tuple[Unit, int], ...]
"""Path of (unit, arm) steps; arm 1 of a `select` is `taken`."""


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes that are needed under one guard."""

    guard: Guard
    nodes: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The guard in words: `always`, `not exit0`, `gate3 & not exit1`, `level=2`."""
        return " & ".join(_step(unit, arm) for unit, arm in self.guard) or "always"


@dataclasses.dataclass(frozen=True)
class Demand:
    """The guard of every node of a graph.

    Attributes:
        guards: Guard by node.
        regions: Nodes with the same guard, in order of first execution; parents before children.
        units: Conditionals, in order of execution.
    """

    guards: Mapping[fx.Node, Guard]
    regions: tuple[Region, ...]
    units: tuple[Unit, ...]


def decision_name(node: fx.Node) -> str:
    """The public name of a decision, or of the one that a node does a share of: the exit's or gate's, else its own."""
    return str(node.meta.get("decision") or scaled_by(node) or node.name)


def _step(unit: Unit, arm: int) -> str:
    if unit.routed:
        return f"{unit.name}={arm}"
    return unit.name if arm else f"not {unit.name}"


def analyse(graph: fx.Graph, dense: Collection[str] = ()) -> Demand:
    """Find the guard of every node, by walking the graph backwards.

    The guard of a node is the longest common prefix of the guards of its uses; a use as an arm of a select appends
    (select, arm); a use as the decision appends nothing. This is code sinking. The parts of a tuple stay with it.

    Args:
        graph: Nodes in topological order.
        dense: Names of decisions whose selects count as ordinary operations: both arms are always needed.

    Returns:
        The demand; dead nodes are in no region.
    """
    depth = _depths(graph)
    units: dict[tuple[fx.Node, int, Guard], Unit] = {}
    unit_of: dict[fx.Node, Unit] = {}
    guards: dict[fx.Node, Guard] = {}
    parts: dict[fx.Node, list[Guard]] = {}
    members_of: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        uses: list[Guard] = [()] if node.op in ("output", "placeholder", "get_attr") else []
        uses.extend(parts.pop(node, ()))
        for user in node.users:
            if user not in guards:
                continue  # dead, or a part of this tuple
            if user in unit_of:
                uses.extend(_uses_by_select(node, user, guards[user], unit_of[user]))
            else:
                uses.append(guards[user])
        if node.target is operator.getitem:
            whole = node.args[0]
            parts.setdefault(whole, []).extend(uses)
            members_of.setdefault(whole, []).extend((node, *members_of.pop(node, ())))
            continue
        if not uses:
            continue
        guards[node] = guard = _common_prefix(uses)
        guards.update(dict.fromkeys(members_of.pop(node, ()), guard))
        if is_select(node) and not _mixes(node) and decision_name(decision_of(node)) not in dense:
            key = (decision_of(node), depth[node], guard)
            unit = units.setdefault(key, Unit(decision_of(node), guard))
            unit.selects.insert(0, node)
            unit_of[node] = unit
    order = {node: i for i, node in enumerate(graph.nodes)}
    members: dict[Guard, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in guards and node.op not in ("output", "placeholder", "get_attr"):
            members.setdefault(guards[node], []).append(node)
    for guard in list(members):
        for length in range(len(guard)):
            members.setdefault(guard[:length], [])
    regions = sorted(
        (Region(guard, tuple(nodes)) for guard, nodes in members.items()),
        key=lambda region: [(order[u.selects[-1]], -arm) for u, arm in region.guard],
    )
    regions.sort(key=lambda region: order[region.nodes[0]] if region.nodes else -1)
    regions.sort(key=lambda region: len(region.guard))
    ordered = sorted(units.values(), key=lambda unit: order[unit.selects[-1]])
    return Demand(guards, tuple(regions), tuple(ordered))


def _mixes(select: fx.Node) -> bool:
    """Whether a decision in evaluation is floating: it mixes both arms, so both are needed."""
    found = decision_of(select).meta.get("spec")
    return found is not None and bool(found.dtype.is_floating_point)


def _uses_by_select(node: fx.Node, select: fx.Node, guard: Guard, unit: Unit) -> list[Guard]:
    uses = [guard] if decision_of(select) is node else []
    uses.extend((*guard, (unit, i)) for i, arm in enumerate(arms_of(select)) if arm is node)
    return uses


def _common_prefix(guards: list[Guard]) -> Guard:
    shortest = min(guards, key=len)
    others = [guard for guard in guards if guard is not shortest]
    for length, step in enumerate(shortest):
        if any(other[length] != step for other in others):
            return shortest[:length]
    return shortest


def _depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each select, how many selects of the same decision lie before it on one path."""
    selects = [node for node in graph.nodes if is_select(node)]
    depth = dict.fromkeys(selects, 0)
    # Only decisions of several selects can have some before others.
    count = Counter(decision_of(select) for select in selects)
    if all(number == 1 for number in count.values()):
        return depth
    before: dict[fx.Node, dict[fx.Node, int]] = {}
    for node in graph.nodes:
        seen: dict[fx.Node, int] = {}
        for source in node.all_input_nodes:
            for decision, number in before[source].items():
                seen[decision] = max(seen.get(decision, 0), number)
        if node in depth and count[decision_of(node)] > 1:
            decision = decision_of(node)
            depth[node] = seen.get(decision, 0)
            seen = {**seen, decision: depth[node] + 1}
        before[node] = seen
    return depth


def specialise(graph: fx.Graph, fixed: Mapping[str, int]) -> fx.Graph:
    """Copy a graph with some decisions known: their selects collapse to an arm, and what nobody needs is dropped.

    Args:
        graph: Left as it is. The copy is for evaluation: what does something in training only (metadata
            `training_only`) has the value of its first argument.
        fixed: The arm that each known decision takes, by the decision's name.

    Returns:
        The copy; nodes keep their names and metadata.
    """
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph, mapping))
    for node in list(copied.nodes):
        if is_select(node) and decision_name(decision_of(node)) in fixed:
            node.replace_all_uses_with(arms_of(node)[fixed[decision_name(decision_of(node))]])
            copied.erase_node(node)
        elif name := stands_in(node):
            _settle(node, kept=fixed.get(name) == 1)
        elif node.meta.get("training_only"):
            node.replace_all_uses_with(node.args[0])
            copied.erase_node(node)
    sweep(copied)
    return copied


def stands_in(node: fx.Node) -> str:
    """Name of the decision of which a node does a share; empty if it is no such node.

    Some work is not done or left undone as a whole: of a recurrent layer, the steps that a decision `[N * T]` keeps. A
    module that does such a part *stands in* for nodes of the static model. Its first argument is the tuple of their
    values (None for one that nobody reads), which its first results equal, to the bit, where all is kept; the node's
    metadata hold the decision's name (`stands_in`) and the share of its cost that the decision scales (`share`). A
    decision that is known to keep all leaves the static nodes, any other the module without them: lowering asks it
    for the form that skips, `lowered()`.
    """
    return str(node.meta.get("stands_in", ""))


def scaled_by(node: fx.Node) -> str:
    """Name of the decision that scales the work of a node; empty if none does.

    Of a module that stands in for others it is the decision that they share. The user's own recurrent layer on packed
    sequences does the steps that are there, which is a decision of the model itself (metadata `real`).
    """
    return stands_in(node) or str(node.meta.get("real", ""))


def _settle(node: fx.Node, *, kept: bool) -> None:
    """Leave one of a static value and what stands in for it."""
    static: Any = node.args[0]
    if not kept:
        node.args = (None, *node.args[1:])
        return
    for part in list(node.users):
        index = int(part.args[1])  # type: ignore[arg-type]
        if index < len(static):
            part.replace_all_uses_with(static[index])


def sweep(graph: fx.Graph) -> None:
    """Drop every node that nobody reads; inputs stay."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
