"""What passes insert where each part of a layer has a decision: the gate, and what stands in for the layer."""

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from dyncompile.graph import Graph
from dyncompile.nn import Gate

_aten = torch.ops.aten


def decide(graph: Graph, name: str, gate: Gate, inputs: Sequence[Node]) -> Node:
    """Insert a gate that makes K decisions a row.

    Args:
        graph: Changed in place.
        name: Of the gate, and of its decision.
        gate: Gives decisions and probabilities, `[R, K]` both.
        inputs: What it reads.

    Returns:
        The decision, `[R * K]`: the parts of a row next to each other.
    """
    parts = graph.insert(f"gates.{name}", gate, inputs, ("", ""))
    flat = [parts[-1]]
    for tap, part in zip(("decision", "probability"), parts, strict=True):
        with graph.fx.inserting_after(flat[-1]):
            flat.append(graph.fx.call_function(_aten.reshape.default, (part, [-1])))
        flat[-1].meta.update(owner=name, tap=(tap, name))
    decision = flat[1]
    decision.meta.update(decision=name, parts=gate.shift.shape[0])
    return decision


def stand_in(
    graph: Graph,
    name: str,
    module: torch.nn.Module,
    layers: Sequence[Node],
    results: Sequence[Node],
    arguments: Sequence[Node | str],
    *,
    flops: float,
) -> None:
    """Let a module stand in for layers of which a decision runs a share; see `dyncompile.demand.stands_in`.

    Args:
        graph: Changed in place.
        name: Of the decision.
        module: Takes the tuple of the layers' results, then the arguments; returns a tuple like the first.
        layers: In order.
        results: Those that are read elsewhere.
        arguments: Nodes, and paths of parameters and buffers; the decision first.
        flops: What the layers cost.
    """
    path = f"_modes.{name}"
    graph.add_module(path, module.to(graph.inputs[0].device))
    readers = {node: [user for user in node.users if user not in layers] for node in results}
    with graph.fx.inserting_before(layers[-1].next):
        given = [graph.fx.get_attr(a) if isinstance(a, str) else a for a in arguments]
        call = graph.fx.create_node("call_module", path, (tuple(results), *given), name=name)
        parts = [graph.fx.call_function(operator.getitem, (call, i)) for i in range(len(results))]
    for node, part in zip(results, parts, strict=True):
        part.meta["path"] = node.meta.get("path", ())
        if node.meta.pop("final", False):
            part.meta["final"] = True
        for reader in readers[node]:
            reader.replace_input_with(node, part)
    graph.invalidate()
    graph.propagate()
    call.meta.update(stands_in=name, owner=name, share=flops / graph.flops(call))
