"""Make a graph functional: in-place operations become ones that return a new value.

Sinking reorders nodes, so a value that another region reads must never change under it. The graph
is rebuilt node by node. Every value is a chain of views of one *memory*; a write folds the new
value back through the chain into the memory's current value, and whoever reads another view of
that memory afterwards takes the view anew.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from dyncompile.capture.canonical import aten, where
from dyncompile.errors import CaptureError


@dataclasses.dataclass(slots=True, eq=False)
class _Memory:
    """What in-place operations write to."""

    value: fx.Node
    state: str | None = None
    version: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class _Alias:
    """A value of the old graph: the views, outermost last, that lead to it from a memory."""

    memory: _Memory
    chain: tuple[fx.Node, ...]
    value: fx.Node
    version: int


def functionalise(graph: fx.Graph, mutating: set[fx.Node], state: Iterable[str]) -> fx.Graph:
    """Rebuild a graph without operations that overwrite their input.

    Args:
        graph: What `copy_graph` made; left as it is.
        mutating: `call_module` nodes whose layer is `inplace=True`; it must be set to False.
        state: Names of the model's parameters and buffers.

    Returns:
        The functional graph.

    Raises:
        CaptureError: A view is overwritten whose base cannot be rebuilt, an operation has no
            functional form, or the model writes to its own buffers.
    """
    return _Functionaliser(mutating, set(state)).run(graph)


class _Functionaliser:
    def __init__(self, mutating: set[fx.Node], state: set[str]) -> None:
        self.mutating = mutating
        self.state = state
        self.graph = fx.Graph()
        self.aliases: dict[fx.Node, _Alias] = {}

    def run(self, graph: fx.Graph) -> fx.Graph:
        for node in graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.read))
            elif node in self.mutating:
                self.write(node, self.graph.node_copy(node, self.read))
            elif _overwrites(node):
                self.write(node, self.functional(node))
            else:
                self.copy(node)
        return self.graph

    def read(self, node: fx.Node) -> fx.Node:
        """The present value of an old node, its view taken anew if the memory changed."""
        alias = self.aliases[node]
        if alias.version != alias.memory.version:
            value = alias.memory.value
            for view in alias.chain:
                value = self.view(view, value)
            alias.value, alias.version = value, alias.memory.version
        return alias.value

    def view(self, view: fx.Node, base: fx.Node) -> fx.Node:
        return self.graph.node_copy(view, lambda n: base if n is view.args[0] else self.read(n))

    def copy(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node, self.read)
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and _shares(node, source):
            of = self.aliases[source]
            self.aliases[node] = _Alias(of.memory, (*of.chain, node), new, of.memory.version)
            return
        owned = node.op == "get_attr" and str(node.target) in self.state
        memory = _Memory(new, str(node.target) if owned else None)
        self.aliases[node] = _Alias(memory, (), new, 0)

    def functional(self, node: fx.Node) -> fx.Node:
        """The value that an in-place operation leaves in its first argument."""
        operation = _functional(node)
        new = self.graph.create_node(
            "call_function",
            operation,
            fx.map_arg(node.args, self.read),
            fx.map_arg(node.kwargs, self.read),
        )
        new.meta = dict(node.meta)
        if node.meta["dtype"] is None or operation is overwrite:
            return new
        cast = self.graph.call_function(aten.to.dtype, (new, node.meta["dtype"]))
        cast.meta = dict(node.meta)
        return cast

    def write(self, node: fx.Node, new: fx.Node) -> None:
        """Let the memory behind a node's first argument hold a new value."""
        alias = self.aliases[node.args[0]]  # type: ignore[index]
        memory = alias.memory
        if memory.state is not None:
            raise CaptureError(
                f"the model writes to its own `{memory.state}` in forward{where(node)}; "
                "a graph keeps no state but that of its layers"
            )
        bases = [memory.value]
        for view in alias.chain[:-1]:
            bases.append(self.view(view, bases[-1]))
        value = new
        for view, base in zip(reversed(alias.chain), reversed(bases), strict=False):
            inverse = _INVERSE_VIEWS.get(view.target)
            if inverse is None:
                raise CaptureError(
                    f"an in-place operation writes through the view `{view.target}`, whose base "
                    f"cannot be rebuilt{where(node)}; write it out of place"
                )
            rest = fx.map_arg(view.args[1:], self.read)
            value = inverse(self.graph, base, value, *rest)
            value.meta = dict(node.meta)
        memory.value = value
        memory.version += 1
        alias.value, alias.version = new, memory.version
        self.aliases[node] = alias


def _overwrites(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _shares(node: fx.Node, source: fx.Node) -> bool:
    mine = node.meta.get("storage")
    return mine is not None and mine == source.meta.get("storage")


def overwrite(target: Tensor, source: Tensor | float, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    """What `target.copy_(source)` or `target.fill_(source)` leaves in `target`."""
    if not isinstance(source, Tensor):
        return torch.full_like(target, source)
    return source.to(target.dtype).expand_as(target)


def _functional(node: fx.Node) -> Callable[..., Any]:
    operation: Any = node.target
    schema = operation._schema
    name = schema.name.removeprefix("aten::")
    written = [i for i, arg in enumerate(schema.arguments) if arg.is_write]
    if name in ("copy_", "fill_"):
        return overwrite
    if name == "zero_":
        return aten.zeros_like.default
    packet = getattr(aten, name.removesuffix("_"), None)
    found = getattr(packet, operation._schema.overload_name or "default", None) if written == [0] else None
    if found is None or found is operation:
        raise CaptureError(f"the in-place operation `{operation}` has no functional form{where(node)}")
    return found  # type: ignore[no-any-return]


def _scatter(operation: Any) -> Callable[..., fx.Node]:
    return lambda graph, base, new, *rest: graph.call_function(operation, (base, new, *rest))


def _again(operation: Any) -> Callable[..., fx.Node]:
    return lambda graph, _, new, *rest: graph.call_function(operation, (new, *rest))


def _reshaped(graph: fx.Graph, base: fx.Node, new: fx.Node, *_: Any) -> fx.Node:
    return graph.call_function(aten.view_as.default, (new, base))


def _permuted(graph: fx.Graph, base: fx.Node, new: fx.Node, dims: list[int]) -> fx.Node:  # noqa: ARG001
    order = [d % len(dims) for d in dims]
    back = [order.index(i) for i in range(len(order))]
    return graph.call_function(aten.permute.default, (new, back))


def _narrowed(graph: fx.Graph, base: fx.Node, new: fx.Node, dim: int, start: int, length: int) -> fx.Node:
    args = (base, new, dim, start, start + length)
    return graph.call_function(aten.slice_scatter.default, args)


_INVERSE_VIEWS: dict[Any, Callable[..., fx.Node]] = {
    aten.slice.Tensor: _scatter(aten.slice_scatter.default),
    aten.select.int: _scatter(aten.select_scatter.default),
    aten.diagonal.default: _scatter(aten.diagonal_scatter.default),
    aten.narrow.default: _narrowed,
    aten.transpose.int: _again(aten.transpose.int),
    aten.swapaxes.default: _again(aten.transpose.int),
    aten.swapdims.default: _again(aten.transpose.int),
    aten.t.default: _again(aten.t.default),
    aten.numpy_T.default: _again(aten.numpy_T.default),
    aten.unsqueeze.default: _again(aten.squeeze.dim),
    aten.permute.default: _permuted,
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
        ),
        _reshaped,
    ),
    **dict.fromkeys(
        (
            aten.alias.default,
            aten.detach.default,
            aten.contiguous.default,
            aten.view_as.default,
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten.lift_fresh_copy.default,
        ),
        lambda _graph, _base, new, *_: new,
    ),
}
