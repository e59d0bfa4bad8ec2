"""Residual branches that a decision may skip: where they are, what skipping one saves, and how it is done."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch import nn
from torch.fx import Node

from dyncompile.graph import Branch, Graph, is_tensor, spec
from dyncompile.ops import SELECT, decision_of

GRANULARITIES = ("branch", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skippable:
    """What one decision keeps or skips.

    Attributes:
        source: Where it leaves the trunk: what a gate may read.
        add: The addition whose shortcut is passed on where it is skipped.
        shortcut: Which argument of `add` the shortcut is.
        output: The value of a sample that keeps it.
        saved: FLOPs per sample that nothing but `output` needs.
        leak: Name of a value inside that is read outside, if there is one.
    """

    source: Node
    add: Node
    shortcut: int
    output: Node
    saved: float
    leak: str = ""

    @property
    def data(self) -> dict[str, str | int]:
        """Where it is, as plain data."""
        return {"output": self.output.name, "add": self.add.name, "shortcut": self.shortcut}

    def refuse(self, cost: float) -> str:
        """Why a decision of `cost` FLOPs per sample does not pay; empty if it does."""
        if cost < self.saved:
            return ""
        why = f", since `{self.leak}` inside it is read outside too" if self.leak else ""
        return f"the gate costs {cost:.0f} FLOPs and skipping the branch saves {self.saved:.0f}{why}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """A residual branch that no decision may skip, and why."""

    add: Node
    reason: str


def skippable(graph: Graph, *, granularity: str, projection: bool) -> Iterator[Skippable | Fixed]:
    """The residual branches of a graph, in order of execution.

    Args:
        graph: Its nodes, propagated and with their rows marked.
        granularity: "branch": each by itself; "block": the attention and the feed-forward branch of a transformer
            block together, with what normalises them inside the block.
        projection: Also those whose shortcut is itself computed; it is then passed on alone.
    """
    branches = graph.residual_branches
    groups = _blocks(graph, branches) if granularity == "block" else [[branch] for branch in branches]
    first = {group[0].add: group for group in groups}
    for node in graph.fx.nodes:
        if outer := _skipped_by(node):
            yield Fixed(add=node, reason=f"the decision `{outer}` skips it already")
        elif node in first:
            yield _judge(graph, first[node], projection=projection)


def skip(graph: Graph, decision: Node, output: Node, shortcut: Node) -> None:
    """Pass on the shortcut where the decision says no: `select(decision, output, shortcut)`.

    Args:
        graph: Changed in place.
        decision: One value a row of `output`, or one a sample.
        output: Every reader of it will read the select.
        shortcut: Of the same shape.
    """
    dim = spec(output).batch_dim
    with graph.fx.inserting_after(output):
        chosen = graph.fx.call_function(SELECT, (decision, output, shortcut, *([dim] if dim else [])))
    output.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    chosen.meta["path"] = output.meta.get("path", ())
    if output.meta.pop("final", False):
        chosen.meta["final"] = True


def _skipped_by(node: Node) -> str:
    """Name of the decision that passes on a value or, instead, what the value was added to."""
    for user in node.users:
        if user.target is SELECT and user.args[1] is node and user.args[2] in node.all_input_nodes:
            return str(decision_of(user).meta.get("decision", decision_of(user).name))
    return ""


def _judge(graph: Graph, group: list[Branch], *, projection: bool) -> Skippable | Fixed:
    first = group[0]
    output = _end(graph, group)
    value = spec(output)
    if not output.meta["sliceable"] or value.batch_dim is None:
        return Fixed(add=first.add, reason=f"its value {list(value.shape)} has no row for each sample")
    if not (first.identity or projection):
        return Fixed(add=first.add, reason="its shortcut is a projection, and projection=False")
    saved, leak = _savings(graph, first, output)
    return Skippable(
        source=first.source,
        add=first.add,
        shortcut=first.add.args.index(first.shortcut),
        output=output,
        saved=saved,
        leak=leak,
    )


def _savings(graph: Graph, branch: Branch, output: Node) -> tuple[float, str]:
    """FLOPs of what only `output` needs, and the name of a value before it that others need too."""
    inside = {output}
    waiting = set(output.all_input_nodes)
    while waiting:
        node = max(waiting)  # the users of the latest one are all decided
        waiting.remove(node)
        if node is not branch.shortcut and all(user in inside for user in node.users):
            inside.add(node)
            waiting.update(node.all_input_nodes)
    passed = _between(graph, branch.source, branch.shortcut) | {branch.shortcut}
    leaks = sorted(_between(graph, branch.source, output) - inside - passed)
    return sum(graph.flops(node) for node in inside), leaks[-1].name if leaks else ""


def _between(graph: Graph, source: Node, output: Node) -> set[Node]:
    """Nodes of the trunk on paths from a node to one that it dominates, both left out."""
    trunk: nx.DiGraph[Any] = graph.trunk
    found: set[Node] = set()
    queue = [output] if output is not source else []
    while queue:
        before = [n for n in trunk.predecessors(queue.pop()) if n is not source and n not in found]
        found.update(before)
        queue.extend(before)
    return found


# --- transformer blocks --------------------------------------------------------------------------


def _blocks(graph: Graph, branches: list[Branch]) -> list[list[Branch]]:
    """Attention together with the branch that follows it in the same module; every other branch alone."""
    groups: list[list[Branch]] = []
    for branch in branches:
        groups.append([branch])
        if _attends(graph, branch):
            continue
        # Before a feed-forward branch: the block's attention, and a decoder's second one.
        while len(groups) > 1 and all(_attends(graph, other) for other in groups[-2]):
            if not _together(graph, [*groups[-2], *groups[-1]]):
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def _attends(graph: Graph, branch: Branch) -> bool:
    """Whether values of the branch are multiplied with each other: queries with keys, weights with values."""
    between = _between(graph, branch.source, branch.output)
    return any(graph.flops(node) > 0 and len(_features(node)) > 1 for node in between)


def _features(node: Node) -> list[Node]:
    """The floating tensors that a node reads, parameters left out."""
    sources = [source for source in node.all_input_nodes if source.op != "get_attr" and is_tensor(source)]
    return [source for source in sources if spec(source).dtype.is_floating_point]


def _together(graph: Graph, group: list[Branch]) -> bool:
    """Whether branches lie in one module that is more than a list of others, and give what the first one was given."""
    owner = graph.root.get_submodule(_module(group))
    listed = isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return not listed and spec(_end(graph, group)) == spec(group[0].add)


def _module(group: list[Branch]) -> str:
    """Path of the innermost module in which all additions of a group are called; "" for the model itself."""
    paths = [branch.add.meta.get("path", ()) for branch in group]
    shared = [level[0] for level in zip(*paths, strict=False) if len(set(level)) == 1]
    return shared[-1] if shared else ""


def _end(graph: Graph, group: list[Branch]) -> Node:
    """The value that a group's module hands on: its last addition, the norm behind it, or the first's shape again."""
    last = group[-1].add
    path = _module(group)
    chain = [*graph.cut_points, graph.final]
    if len(group) == 1 or not path or last not in chain:
        return last
    later = itertools.takewhile(lambda node: path in node.meta.get("path", ()), chain[chain.index(last) + 1 :])
    joined = {branch.add for branch in graph.residual_branches}
    behind = [node for node in itertools.takewhile(lambda n: n not in joined, later) if is_tensor(node)]
    return [last, *(node for node in behind if spec(node) == spec(group[0].add))][-1]
