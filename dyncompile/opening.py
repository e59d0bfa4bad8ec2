"""Make the batch size of a graph dynamic that was traced at one batch size and holds it as a number."""

from typing import Any

import torch
from torch import fx

_SHAPED = {"view", "reshape", torch.reshape}
"""Give another shape to what is there."""

_GROWN = {"expand", "repeat", "new_zeros", "new_ones", "new_full", "new_empty", torch.broadcast_to}
"""Give a size to what need not have it."""

_MADE = {torch.zeros, torch.ones, torch.full, torch.empty}


def with_batch_open(module: fx.GraphModule, batch: int) -> fx.GraphModule:
    """A copy that reads the batch size off its first input, where `module` holds it as the first of several sizes.

    A guess: `x.view(9, -1)` at batch 9 becomes `x.view(x.size(0), -1)`, and `x.view(18, -1)` has two rows a sample. At
    this batch size both compute the same; whether they do at others, capture has to prove.

    Args:
        module: As dynamo traces it, where the shapes are static.
        batch: The size of dim 0 of its first input.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node in inputs:
        mapping[node] = graph.node_copy(node)
    size = graph.call_method("size", (mapping[inputs[0]], 0))
    of_data = set(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        mapping[node] = made = graph.node_copy(node, mapping.__getitem__)
        if not of_data.isdisjoint(node.all_input_nodes):
            of_data.add(node)
        if node.target in _GROWN or node.target in _MADE or (node.target in _SHAPED and node.args[0] in of_data):
            with graph.inserting_before(made):
                made.args = _opened(graph, made.args, 0 if node.target in _MADE else 1, size, batch)
    return fx.GraphModule(module, graph)


def _opened(graph: fx.Graph, args: tuple[Any, ...], place: int, size: fx.Node, batch: int) -> tuple[Any, ...]:
    """Arguments whose first size, at `place`, is read off the input."""
    if len(args) <= place:
        return args
    given = args[place]
    first, *others = given if isinstance(given, list | tuple) else (given,)
    if not isinstance(first, int) or first < 1 or first % batch:
        return args
    rows = size if first == batch else graph.call_method("__mul__", (size, first // batch))
    if isinstance(given, list | tuple):
        return (*args[:place], (rows, *others), *args[place + 1 :])
    return (*args[:place], rows, *args[place + 1 :])


__all__ = ["with_batch_open"]
