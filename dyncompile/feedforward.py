"""Feed-forward layers of a graph: linear layers, what acts on each neuron alone, and a linear layer that reads them."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import Node

from dyncompile.capture import modes
from dyncompile.capture.check import undisturbed
from dyncompile.errors import ArgumentError
from dyncompile.graph import Graph, is_tensor, spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward:
    """`second(act(first(x)))`, or gated: `second(act(first(x)) * other(x))`.

    Attributes:
        source: x, `[..., D]`.
        firsts: The linear layers that make the hidden neurons; several in a gated layer.
        between: What acts on each neuron alone, in order.
        hidden: The neurons, `[..., H]`.
        second: The linear layer that reads them.
    """

    source: Node
    firsts: tuple[Node, ...]
    between: tuple[Node, ...]
    hidden: Node
    second: Node

    @property
    def neurons(self) -> int:
        """H."""
        return spec(self.hidden).shape[-1]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of them, in order."""
        return (*self.firsts, *self.between, self.second)


def feed_forward_layers(graph: Graph) -> Iterator[FeedForward | tuple[Node, str]]:
    """Every feed-forward layer, in order; and the linear layers that nearly are the second one of one, and why not."""
    for node in graph.fx.nodes:
        if not _linear(graph, node):
            continue
        try:
            found = feed_forward(graph, node)
        except ArgumentError as error:
            yield node, str(error)
        else:
            if found is not None:
                yield found


def feed_forward(graph: Graph, second: Node) -> FeedForward | None:
    """The feed-forward layer whose second layer a node is.

    Returns:
        None where it reads no activations at all.

    Raises:
        ArgumentError: It reads activations, and something stands against splitting their neurons.
    """
    between, firsts = _behind(graph, second)
    if not between or not firsts:
        return None
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    found = FeedForward(
        source=firsts[0].all_input_nodes[0],
        firsts=tuple(sorted(firsts, key=order.__getitem__)),
        between=tuple(sorted(between, key=order.__getitem__)),
        hidden=second.all_input_nodes[0],
        second=second,
    )
    for node in (*firsts, second):
        if not _plain(graph.module_of(node)):
            raise _no(node, "a weight that is computed, or hooks")
        if node.args[0] is not found.source and node is not second:
            raise _no(node, f"another input than `{found.firsts[0]}` has")
    for node in found.nodes[:-1]:
        if spec(node).shape != spec(found.hidden).shape:
            raise _no(node, f"shape {list(spec(node).shape)} beside hidden neurons {list(spec(found.hidden).shape)}")
        stranger = next((user for user in node.users if user not in found.nodes), None)
        if stranger is not None:
            raise _no(node, f"neurons that `{stranger}` reads too")
    return found


def idle_in_evaluation(graph: Graph, node: Node) -> bool:
    """Whether a layer does nothing in evaluation: dropout, or the identity."""
    idle = nn.Identity | nn.modules.dropout._DropoutNd | modes.Dropout
    return isinstance(graph.module_of(node), idle)


def _behind(graph: Graph, second: Node) -> tuple[list[Node], list[Node]]:
    """What acts on each neuron alone between the second layer and the linear layers before it, and those layers.

    Raises:
        ArgumentError: Behind an activation stands what does not act on each neuron alone.
    """
    between: list[Node] = []
    firsts: list[Node] = []
    active = False
    queue, seen = list(second.all_input_nodes), set(second.all_input_nodes)
    while queue:
        node = queue.pop(0)
        if _linear(graph, node):
            firsts.append(node)
            continue
        idle = idle_in_evaluation(graph, node)
        if not idle and not _acts_alone(graph, node):
            if active:
                raise _no(node, "what does not act on each neuron alone")
            return [], []
        active = active or not idle
        between.append(node)
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return (between, firsts) if active else ([], [])


def _no(node: Node, found: str) -> ArgumentError:
    return ArgumentError(f"{node}", found=found, expected="neurons that can be left out one by one")


def _linear(graph: Graph, node: Node) -> bool:
    return isinstance(graph.module_of(node), nn.Linear)


def _plain(module: nn.Module | None) -> bool:
    """A linear layer that computes what its parameters say, and nothing else."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and module._parameters.get("weight") is not None
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _acts_alone(graph: Graph, node: Node) -> bool:
    """Whether an operation maps each entry of its inputs to one of its output, whatever the others are."""
    if not is_tensor(node) or not all(is_tensor(source) for source in node.all_input_nodes):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.pointwise in node.target.tags
    module = graph.module_of(node)
    return module is not None and len(node.args) == 1 and _pointwise(module)


def _pointwise(module: nn.Module) -> bool:
    """Tried out: a layer without state whose output for some entries is that for these entries alone."""
    if any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    few = [4, 1, 2]
    with undisturbed(module), torch.no_grad():
        module.eval()
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        try:
            y, part, row = module(x), module(x[:, few]), module(x[1:2])
        except Exception:  # noqa: BLE001 - whatever a layer raises that wants another shape
            return False
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return False
    return torch.allclose(y[:, few], part) and torch.allclose(y[1:2], row)
