"""Residual branches that a decision may skip: where they are, what skipping one saves, and how it is done."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch.fx import Node

from dyncompile.graph import Branch, Graph, spec
from dyncompile.ops import SELECT, decision_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skippable:
    """What one decision keeps or skips.

    Attributes:
        source: Where it leaves the trunk: what a gate may read.
        add: The addition whose shortcut is passed on where it is skipped.
        shortcut: Which argument of `add` the shortcut is.
        output: The value of a sample that keeps it; every reader of it will read the select.
        saved: FLOPs per sample that nothing but this value needs.
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
        """What `skip` needs, as plain data."""
        return {"output": self.output.name, "add": self.add.name, "shortcut": self.shortcut}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """A residual branch that no decision may skip, and why."""

    add: Node
    reason: str


def skippable(graph: Graph, *, projection: bool) -> Iterator[Skippable | Fixed]:
    """The residual branches of a graph, in order of execution.

    Args:
        graph: Its nodes, propagated and with their rows marked.
        projection: Also those whose shortcut is itself computed; it is then passed on alone.
    """
    branches = {branch.add: branch for branch in graph.residual_branches}
    for node in graph.fx.nodes:
        if node in branches:
            yield _judge(graph, branches[node], projection=projection)
        elif outer := _skipped_by(node):
            yield Fixed(add=node, reason=f"the decision `{outer}` skips it already")


def _judge(graph: Graph, branch: Branch, *, projection: bool) -> Skippable | Fixed:
    value = spec(branch.add)
    if not branch.add.meta["sliceable"] or value.batch_dim is None:
        return Fixed(add=branch.add, reason=f"its value {list(value.shape)} has no row for each sample")
    if not (branch.identity or projection):
        return Fixed(add=branch.add, reason="its shortcut is a projection, and projection=False")
    saved, leak = _savings(graph, branch.source, branch.output, branch.shortcut)
    return Skippable(
        source=branch.source,
        add=branch.add,
        shortcut=branch.add.args.index(branch.shortcut),
        output=branch.add,
        saved=saved,
        leak=leak,
    )


def _savings(graph: Graph, source: Node, output: Node, shortcut: Node) -> tuple[float, str]:
    """FLOPs of what only `output` needs, and the name of a value before it that others need too."""
    inside = {output}
    trunk: nx.DiGraph[Any] = graph.trunk
    passed = nx.ancestors(trunk, shortcut) | {shortcut}
    for node in reversed(graph.fx.nodes):
        if node.users and node not in passed and all(user in inside for user in node.users):
            inside.add(node)
    between = nx.descendants(trunk, source) & nx.ancestors(trunk, output)
    leaks = [node.name for node in graph.fx.nodes if node in between and node not in inside | passed]
    return sum(graph.flops(node) for node in inside), (leaks or [""])[-1]


def _skipped_by(node: Node) -> str:
    """Name of the decision that passes on a value or, instead, what the value was added to."""
    for user in node.users:
        if user.target is SELECT and user.args[1] is node and user.args[2] in node.all_input_nodes:
            return str(decision_of(user).meta.get("decision", decision_of(user).name))
    return ""


def skip(graph: Graph, decision: Node, output: Node, shortcut: Node) -> Node:
    """Pass on the shortcut where the decision says no: `select(decision, output, shortcut)`.

    Args:
        graph: Changed in place.
        decision: One value a row of `output`.
        output: Every reader of it reads the select.
        shortcut: Of the same shape.

    Returns:
        The select.
    """
    dim = spec(output).batch_dim
    with graph.fx.inserting_after(output):
        chosen = graph.fx.call_function(SELECT, (decision, output, shortcut, *([dim] if dim else [])))
    output.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    chosen.meta["path"] = output.meta.get("path", ())
    if output.meta.pop("final", False):
        chosen.meta["final"] = True
    return chosen
