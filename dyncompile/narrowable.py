"""Which part of a graph has to run again on fewer channels, what stands against that, and what it saves."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from dyncompile.channels import ChannelGroup, describe
from dyncompile.graph import Graph, is_tensor, spec
from dyncompile.kinds import BATCH_NORMS, CONVOLUTIONS, LINEARS, kind_of
from dyncompile.ops import is_select

aten = torch.ops.aten

_SCALING = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """What has to run again to narrow some groups of channels.

    Attributes:
        groups: What is narrowed.
        nodes: The layers that make or read the groups' channels and all that lies between them, in order.
        exits: Those whose values, of full width, are read elsewhere.
    """

    groups: tuple[ChannelGroup, ...]
    nodes: tuple[Node, ...]
    exits: tuple[Node, ...]

    @property
    def source(self) -> Node:
        """What the first layer reads."""
        return self.nodes[0].args[0]  # type: ignore[return-value]

    def width(self, node: Node, parts: Sequence[int]) -> tuple[int, int] | None:
        """Where a value is narrowed, as (dim, entries left), with so many parts of each group kept; None if nowhere."""
        for group, kept in zip(self.groups, parts, strict=True):
            if node in group.dims and kept < group.parts:
                return group.dims[node], group.kept(node, kept)
        return None


def region(graph: Graph, groups: Sequence[ChannelGroup], *, norms: bool) -> Region:
    """Find what has to run again to narrow some groups.

    Args:
        graph: Left as it is.
        groups: Free of obstacles.
        norms: Also the batch norm behind a layer that reads the channels, if it alone reads that layer.
    """
    own = {n for group in groups for n in (*group.dims, *group.consumers) if n.op != "get_attr"}
    if norms:
        for layer in [n for group in groups for n in group.consumers]:
            user = next(iter(layer.users))
            alone = len(layer.users) == 1 and user.op == "call_module"
            if alone and kind_of(graph.module_of(user)) in BATCH_NORMS:
                own.add(user)
    ahead = _reached(graph.fx.nodes, own, lambda n: n.all_input_nodes)
    inside = ahead & _reached(reversed(graph.fx.nodes), own, lambda n: n.users)
    nodes = tuple(n for n in graph.fx.nodes if n in inside)
    exits = tuple(n for n in nodes if any(user not in inside for user in n.users))
    return Region(groups=tuple(groups), nodes=nodes, exits=exits)


def _reached(nodes: Any, start: Collection[Node], step: Any) -> set[Node]:
    found = set(start)
    for node in nodes:
        if any(other in found for other in step(node)):
            found.add(node)
    return found


def obstacle(graph: Graph, found: Region) -> str | None:
    """Why a region cannot run in arms of several widths; None if it can."""
    for group in found.groups:
        if tied := _residual(found, group):
            makers = ", ".join(f"`{layer.target}`" for layer in group.producers)
            return f"its channels lie on a residual stream: {describe(graph, tied)} ties those of {makers}"
    narrowed = {n for group in found.groups for n in group.dims}
    for node in found.nodes:
        module = graph.module_of(node)
        words = describe(graph, node)
        if module is not None and kind_of(module) is None:
            return f"{words}, between the layers that make and read its channels, cannot be run in arms"
        tags = getattr(node.target, "tags", ())
        if is_select(node) or torch.Tag.nondeterministic_seeded in tags or "decision" in node.meta:
            return f"{words}, between the layers that make and read its channels, decides or draws random numbers"
        if node in found.exits and (node in narrowed or not is_tensor(node)):
            return f"{words} is read elsewhere"
    for node in (found.source, *found.exits):
        if not is_tensor(node) or not node.meta["sliceable"] or spec(node).batch_dim is None:
            return f"`{node.name}` has no row for each sample"
    return None


def _residual(found: Region, group: ChannelGroup) -> Node | None:
    """Where what a reader of the channels computes is added to them.

    Where it only scales them (squeeze-and-excitation), each arm computes the scale of its own channels.
    """
    behind: set[Node] = set()
    for node in found.nodes:
        if not any(source in behind for source in node.all_input_nodes):
            if node in group.consumers:
                behind.add(node)
            continue
        behind.add(node)
        others = [s for s in node.all_input_nodes if s in group.dims and s not in behind and s.op != "get_attr"]
        if node in group.dims and others and node.target not in _SCALING:
            return node
    return None


def saved_flops(graph: Graph, found: Region, parts: Sequence[int]) -> float:
    """FLOPs per sample that a narrow copy of a region leaves out."""
    total = 0.0
    for node in found.nodes:
        share = 1.0
        if kind_of(graph.module_of(node)) in (*CONVOLUTIONS, *LINEARS):
            grouped = getattr(graph.module_of(node), "groups", 1) > 1
            for value in (node,) if grouped else (node, node.args[0]):
                cut = found.width(value, parts)  # type: ignore[arg-type]
                share *= 1.0 if cut is None else cut[1] / spec(value).shape[cut[0]]  # type: ignore[arg-type]
        total += graph.flops(node) * (1 - share)
    return total


def flops_of(graph: Graph, found: Region) -> float:
    """FLOPs per sample of the layers of a region that make or read channels of its one group."""
    (group,) = found.groups
    return sum(graph.flops(node) for node in {*group.consumers, *(n for n in found.nodes if n in group.dims)})


def unmasked(graph: Graph, found: Region) -> str | None:
    """Why the channels of a region cannot be left out one by one; None if they can."""
    (group,) = found.groups
    for layer in group.consumers:
        words = describe(graph, layer)
        if layer in group.producers:
            return f"{words} makes the channels from the same channels"
        if spec(layer.args[0]).rows != 1:  # type: ignore[arg-type]
            return f"{words} has several rows for each sample"
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    last = found.nodes[-1]
    for node in found.nodes:
        words, module = describe(graph, node), graph.module_of(node)
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"{words} does not pad with zeros"
        if isinstance(module, nn.LayerNorm) and node in group.dims:
            return f"{words} normalises each channel by the others"
        for user in node.users:
            if order[user] < order[last] and user not in found.nodes:
                return f"{words} is read by {describe(graph, user)} before {describe(graph, last)} runs"
    return None
