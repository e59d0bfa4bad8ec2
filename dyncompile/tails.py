"""A copy of the model's own tail, to serve as the head of an exit."""

import copy
from typing import Any

from torch import Tensor, fx, nn

from dyncompile.demand import sweep
from dyncompile.errors import ArgumentError
from dyncompile.graph import Graph, attribute, is_tensor, spec
from dyncompile.placement import prefixes

_LARGEST = 0.5


def tail_start(graph: Graph, node: fx.Node) -> fx.Node:
    """Where the model's tail starts for features like those of `node`.

    Behind the last computation that yields their shape, and before what only normalises or masks it.

    Raises:
        ArgumentError: There is none behind `node`, or the tail is most of the model.
    """
    depth = {cut: round(share, 6) for cut, share in prefixes(graph).items()}
    alike = [c for c in graph.cut_points if is_tensor(c) and spec(c) == spec(node)]
    if not alike or depth[alike[-1]] <= depth[node]:
        raise ArgumentError(
            "head",
            found=f"'clone' at features {list(spec(node).shape)}",
            expected="a later cut point of that shape, which the model's tail reads",
        )
    start = next(cut for cut in alike if depth[cut] == depth[alike[-1]])
    if tail_flops(graph, start) > _LARGEST * graph.total_flops:
        raise ArgumentError(
            "head",
            found="'clone' of a tail that is over half of the model",
            expected="a later cut point, or head='linear'",
        )
    return start


def tail_flops(graph: Graph, start: fx.Node) -> float:
    """FLOPs per sample of what runs between `start` and the prediction."""
    return sum(graph.flops(node) for node in _between(graph, start))


def tail_inputs(graph: Graph, start: fx.Node) -> list[fx.Node]:
    """The model's own inputs that its tail reads beside `start`: masks, and whatever gives sizes."""
    return [node for node in _between(graph, start) if node.op == "placeholder"]


def clone_tail(graph: Graph, start: fx.Node) -> fx.GraphModule:
    """Copy what follows `start`, with its own copies of the modules.

    Args:
        graph: Left as it is.
        start: What `tail_start` returned.

    Returns:
        A module of `start`'s value and then of `tail_inputs`.
    """
    copied = fx.Graph()
    mapping = {start: copied.placeholder("x")}
    for node in tail_inputs(graph, start):
        mapping[node] = copied.placeholder(node.name)
    root = nn.Module()
    memo: dict[int, Any] = {}  # one for all, so that what is shared in the tail stays shared
    for node in _between(graph, start):
        if node not in mapping:
            mapping[node] = copied.node_copy(node, lambda n: mapping[n])
            if node.op in ("call_module", "get_attr"):
                value = attribute(graph.root, str(node.target))
                _adopt(root, str(node.target), copy.deepcopy(value, memo))
    copied.output(mapping[graph.final])
    sweep(copied)
    return fx.GraphModule(root, copied)


def _between(graph: Graph, start: fx.Node) -> list[fx.Node]:
    """What the prediction needs, `start` given; in order, without `start`."""
    found: set[fx.Node] = {start}
    queue = [graph.final]
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue.extend(node.all_input_nodes)
    return [node for node in graph.fx.nodes if node in found and node is not start]


def _adopt(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value, persistent=not path.startswith("_constants."))
