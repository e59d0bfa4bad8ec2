"""Which channels belong together: dims of values that can only be narrowed together, and who makes and reads them.

A vertex is a dim of a value. An operation that works on each entry of a dim by itself (a pointwise one, a norm of
channels, a depthwise convolution, a residual addition, pooling) ties that dim of its inputs to that of its output.
A connected component is a group; a convolution or linear layer that mixes its input channels ends one group and
starts another.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.fx import Node

from dyncompile.graph import Graph, is_tensor, spec
from dyncompile.kinds import BATCH_NORMS, CONVOLUTIONS, DROPOUTS, LINEARS, POINTWISE, POOLS, kind_of
from dyncompile.nn.neurons import NeuronMask
from dyncompile.ops import arms_of, is_select

Dim = tuple[Node, int]

aten = torch.ops.aten

_POINTWISE = {
    *(aten.hardswish.default, aten.log_sigmoid.default, aten.dropout.default, aten.rsub.Scalar, aten.rsub.Tensor),
    *(aten.contiguous.default, aten.alias.default, aten.detach.default, aten.to.dtype, aten.to.device),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
}
_PERMUTING = {aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.t.default, aten.numpy_T.default}
_SIZED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_RESHAPING = _SIZED | {
    *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}
_REDUCING = {
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default),
}
_POOLING = {getattr(aten, f"{kind}_pool{n}d").default for kind in ("avg", "max", "adaptive_avg") for n in (1, 2, 3)}
_ALONG = {aten.softmax.int, aten.log_softmax.int, aten.slice.Tensor, aten.narrow.default, aten.flip.default}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that can only be narrowed together.

    Attributes:
        producers: Layers whose output channels they are, in order of execution.
        consumers: Layers whose input channels they are.
        dims: For each value that has them, parameters of the graph included, the dim that they lie in.
        parts: How many equal, contiguous parts every one of these dims can be cut into.
        obstacles: Why they cannot be narrowed; empty if they can.
    """

    producers: tuple[Node, ...]
    consumers: tuple[Node, ...]
    dims: dict[Node, int]
    parts: int
    obstacles: tuple[str, ...]

    def kept(self, node: Node, parts: int) -> int:
        """Entries of a value's channel dim that are left of `parts` parts."""
        return spec(node).shape[self.dims[node]] * parts // self.parts


def channel_groups(graph: Graph) -> list[ChannelGroup]:
    """Find the groups of coupled channels that layers make, in order of their first producer.

    Args:
        graph: Propagated; left as it is.
    """
    ties = _Ties()
    for node in graph.fx.nodes:
        ties.visit(graph, node)
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    groups = [ties.group(dims, order) for dims in nx.connected_components(ties.graph)]
    made = [group for group in groups if group.producers]
    return sorted(made, key=lambda group: order[group.producers[0]])


def sizes_argument(node: Node) -> tuple[int, int] | None:
    """Which argument of an operation lists sizes of its result, and of which dim the first one is; None if none."""
    if node.target in _SIZED or node.target is aten.expand.default:
        return 1, 0
    if node.target is aten.unflatten.int:
        return 2, int(node.args[1]) % _rank(node.args[0])  # type: ignore[arg-type]
    return None


def describe(graph: Graph, node: Node) -> str:
    """A node in words: its layer and the layer's type, or its operation."""
    module = graph.module_of(node)
    if isinstance(module, NeuronMask):
        return "neuron_gate, which has split the layer,"
    if module is not None:
        return f"`{node.target}` ({type(module).__name__})"
    target = node.target
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)
    return f"`{node.name}` ({name})" if node.op == "call_function" else f"`{node.name}`"


class _Ties:
    """The graph of dims, and what is known of its vertices."""

    def __init__(self) -> None:
        self.graph: nx.Graph[Dim] = nx.Graph()
        self.makers: set[Dim] = set()
        self.readers: dict[Dim, list[Node]] = {}
        self.parts: dict[Dim, int] = {}
        self.obstacles: dict[Dim, list[str]] = {}

    def group(self, dims: set[Dim], order: dict[Node, int]) -> ChannelGroup:
        """A component, read."""
        listed = sorted(dims, key=lambda dim: (order[dim[0]], dim[1]))
        of = dict(listed)
        obstacles = [reason for dim in listed for reason in self.obstacles.get(dim, ())]
        if len(of) < len(listed):
            double = next(node for node, dim in listed if of[node] != dim)
            obstacles.append(f"two dims of `{double.name}` are tied")
        sizes = [self.parts.get((node, dim), spec(node).shape[dim]) for node, dim in listed]
        consumers = {layer for dim in listed for layer in self.readers.get(dim, ())}
        return ChannelGroup(
            producers=tuple(node for node, dim in listed if (node, dim) in self.makers),
            consumers=tuple(sorted(consumers, key=order.__getitem__)),
            dims=of,
            parts=math.gcd(*sizes),
            obstacles=tuple(dict.fromkeys(obstacles)),
        )

    # --- one node --------------------------------------------------------------------------------

    def visit(self, graph: Graph, node: Node) -> None:
        """Tie what a node ties; what it reads or makes in another way is an obstacle."""
        tied: set[Dim] = set()
        if node.op == "output":
            for source in node.all_input_nodes:
                self._block(source, tied, "its channels are an output of the model")
            return
        if is_tensor(node):
            self.graph.add_nodes_from(_dims(node))
            pairs = self._rule(graph, node) if node.op.startswith("call") else ()
            for first, second in pairs:
                if _narrowable(first) and _narrowable(second):
                    self.graph.add_edge(first, second)
                tied |= {first, second}
        words = describe(graph, node)
        reads = [source for source in node.all_input_nodes if is_tensor(source)]
        if node.target is not aten.sym_size.int and node.target is not getattr:
            for source in reads:
                layer = node in self.readers.get((source, _last(graph, node, source)), ())
                mixed = {(source, _last(graph, node, source))} if layer else set()
                self._block(source, tied | mixed, f"{words} works across its channels")
        if is_tensor(node) and node.op != "get_attr":
            self._block(node, tied | self.makers, f"{words} makes its channels, and is no layer that can be narrowed")

    def _block(self, node: Node, but: set[Dim], reason: str) -> None:
        if is_tensor(node):
            for dim in _dims(node):
                if dim not in but:
                    self.obstacles.setdefault(dim, []).append(reason)
                    self.graph.add_node(dim)

    def _rule(self, graph: Graph, node: Node) -> Iterable[tuple[Dim, Dim]]:
        """Pairs of dims that a node ties."""
        module = graph.module_of(node)
        if module is not None:
            return self._layer(node, module) if is_tensor(_first(node)) else ()
        if is_select(node):
            return [pair for arm in arms_of(node) for pair in _same(arm, node)]
        if _is_pointwise(node):
            return [pair for source in node.all_input_nodes if is_tensor(source) for pair in _broadcast(source, node)]
        source = _first(node)
        if not is_tensor(source):
            return ()
        rules: list[tuple[Any, Callable[[Node, Node], Iterable[tuple[Dim, Dim]]]]] = [
            (_PERMUTING, _permuted),
            (_RESHAPING, self._reshaped),
            (_REDUCING, _reduced),
            (_POOLING, lambda a, b: _same(a, b, (0, 1))),
            (_ALONG, _beside),
            ({aten.expand.default}, _broadcast),
        ]
        return next((rule(source, node) for targets, rule in rules if node.target in targets), ())

    def _layer(self, node: Node, module: nn.Module) -> Iterable[tuple[Dim, Dim]]:
        source = _first(node)
        kind = kind_of(module)
        if kind in CONVOLUTIONS:
            assert isinstance(module, nn.modules.conv._ConvNd)
            if module.padding_mode != "zeros" or _rank(node) != len(module.kernel_size) + 2:
                return ()
            if module.groups == 1:
                self.makers.add((node, 1))
                self.readers.setdefault((source, 1), []).append(node)
                return _same(source, node, (0,))
            self.parts[source, 1] = math.gcd(self.parts.get((source, 1), 0), module.groups)
            self.parts[node, 1] = module.groups
            return _same(source, node, (0, 1))
        if kind in LINEARS:
            last = _rank(node) - 1
            self.makers.add((node, last))
            self.readers.setdefault((source, last), []).append(node)
            return _same(source, node, range(last))
        if kind is nn.LayerNorm:
            assert isinstance(module, nn.LayerNorm)
            across = len(module.normalized_shape)
            return _same(source, node, range(_rank(node) - across) if across > 1 else None)
        if kind is nn.GroupNorm:
            assert isinstance(module, nn.GroupNorm)
            self.parts[node, 1] = module.num_groups
            return _same(source, node, (0, 1))
        if kind in (*BATCH_NORMS, *POOLS):
            return _same(source, node, (0, 1))
        return _same(source, node) if kind in (*POINTWISE, *DROPOUTS, nn.PReLU) else ()

    def _reshaped(self, source: Node, node: Node) -> Iterable[tuple[Dim, Dim]]:
        """Of dims that are split or merged the outermost ones are tied: parts of them stay contiguous."""
        pairs = []
        for before, after in _blocks(spec(source).at(_PRIME), spec(node).at(_PRIME)):
            batched = (source, before[0]) if spec(source).batch_dim in before else None
            if batched or not after:
                if batched and len(before) == len(after) == 1:
                    pairs.append(((source, before[0]), (node, after[0])))
                continue
            a, b = (source, before[0]), (node, after[0])
            small, large = sorted((_size(a), _size(b)))
            if large % small == 0:
                for dim in (a, b):
                    self.parts[dim] = math.gcd(self.parts.get(dim, 0), small)
                pairs.append((a, b))
        return pairs


_PRIME = 7919
"""A batch size that no product of other sizes is mistaken for."""


def _is_pointwise(node: Node) -> bool:
    target = node.target
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return tagged or target in _POINTWISE


def _first(node: Node) -> Any:
    return node.args[0] if node.args else None


def _rank(node: Node) -> int:
    return len(spec(node).shape)


def _size(dim: Dim) -> int:
    return spec(dim[0]).shape[dim[1]]


def _narrowable(dim: Dim) -> bool:
    return dim[1] != spec(dim[0]).batch_dim and _size(dim) > 1


def _dims(node: Node) -> list[Dim]:
    return [(node, i) for i in range(_rank(node)) if _narrowable((node, i))]


def _last(graph: Graph, layer: Node, source: Node) -> int:
    return 1 if kind_of(graph.module_of(layer)) in CONVOLUTIONS else _rank(source) - 1


def _same(source: Node, node: Node, dims: Iterable[int] | None = None) -> list[tuple[Dim, Dim]]:
    """Dims of equal index, where the sizes are equal or channels are multiplied."""
    if _rank(source) != _rank(node):
        return []
    return [((source, i), (node, i)) for i in (range(_rank(node)) if dims is None else dims)]


def _broadcast(source: Node, node: Node) -> list[tuple[Dim, Dim]]:
    shift = _rank(node) - _rank(source)
    pairs = [((source, i), (node, i + shift)) for i in range(_rank(source))]
    return [(a, b) for a, b in pairs if _size(a) == _size(b)]


def _argument(node: Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def _permuted(source: Node, node: Node) -> list[tuple[Dim, Dim]]:
    rank = _rank(node)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif node.target in (aten.transpose.int, aten.swapaxes.default):
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return [((source, before), (node, after)) for after, before in enumerate(order)]


def _beside(source: Node, node: Node) -> list[tuple[Dim, Dim]]:
    given = _argument(node, 1, 0)
    along = {d % _rank(node) for d in (given if isinstance(given, list | tuple) else [given])}
    return _same(source, node, set(range(_rank(node))) - along)


def _reduced(source: Node, node: Node) -> list[tuple[Dim, Dim]]:
    rank = _rank(source)
    given = _argument(node, 1, None)
    if node.target is aten.linalg_vector_norm.default:
        given = _argument(node, 2, None)
    gone = {d % rank for d in given} if given else set(range(rank))
    left = [d for d in range(rank) if d not in gone]
    after = left if _rank(node) == rank else range(len(left))
    return [((source, a), (node, b)) for a, b in zip(left, after, strict=True)]


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> Iterable[tuple[list[int], list[int]]]:
    """Split two shapes of one element count into the shortest runs of dims with equal products; ones are left out."""
    left = [i for i, size in enumerate(before) if size != 1]
    right = [i for i, size in enumerate(after) if size != 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (have := math.prod(before[i] for i in a)) != (want := math.prod(after[i] for i in b)):
            if have < want:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        yield a, b
