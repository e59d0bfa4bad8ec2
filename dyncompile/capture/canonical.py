"""Bring an exported graph into canonical form: functional, mode-aware, free of guards and of baked devices."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dyncompile.errors import CaptureError

aten = torch.ops.aten

_GUARDS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def copy_graph(exported: fx.GraphModule, constants: dict[str, Tensor], known: set[str]) -> fx.Graph:
    """Copy an export's graph, with flat placeholders and a flat output, to a graph of our own.

    Args:
        exported: `ExportedProgram.module()`.
        constants: Filled with the tensors that export lifted, under the names that the new graph
            uses.
        known: Names of the model's own parameters and buffers.

    Returns:
        A graph that no module owns; its output is a tuple of leaves.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "output":
            leaves = node.args[0]
            graph.output(fx.map_arg(tuple(leaves), lambda n: mapping[n]))
        elif node.op == "call_module" or node.target in _GUARDS:
            continue  # the export's own guard functions
        elif node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            continue  # an argument that is no tensor: its value is baked in
        else:
            new = graph.node_copy(node, lambda n: mapping[n])
            new.meta = {"stack_trace": node.meta.get("stack_trace"), "path": _path(node)}
            if node.op == "get_attr" and node.target not in known:
                name = f"_constants.{str(node.target).replace('.', '_')}"
                constants[name] = _attribute(exported, str(node.target))
                new.target = name
            mapping[node] = new
    return graph


def _path(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules that a node came from, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple(str(path).split("@")[0] for path, _ in stack if path)


def _attribute(module: nn.Module, path: str) -> Tensor:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


# --- in-place operations -------------------------------------------------------------------------

_INVERSE_VIEWS: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: lambda g, base, new, *a: g.call_function(
        aten.slice_scatter.default, (base, new, *a)
    ),
    aten.select.int: lambda g, base, new, *a: g.call_function(
        aten.select_scatter.default, (base, new, *a)
    ),
    aten.diagonal.default: lambda g, base, new, *a: g.call_function(
        aten.diagonal_scatter.default, (base, new, *a)
    ),
    aten.transpose.int: lambda g, base, new, a, b: g.call_function(aten.transpose.int, (new, a, b)),
    aten.t.default: lambda g, base, new: g.call_function(aten.t.default, (new,)),
    aten.permute.default: lambda g, base, new, dims: g.call_function(
        aten.permute.default, (new, [list(dims).index(i) for i in range(len(dims))])
    ),
    aten.unsqueeze.default: lambda g, base, new, dim: g.call_function(aten.squeeze.dim, (new, dim)),
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.squeeze.dim,
            aten.squeeze.default,
        ),
        lambda g, base, new, *a: g.call_function(aten.view_as.default, (new, base)),
    ),
    **dict.fromkeys(
        (aten.alias.default, aten.detach.default, aten.contiguous.default, aten.view_as.default),
        lambda g, base, new, *a: new,
    ),
}


def functionalise(graph: fx.Graph, mutating: set[fx.Node]) -> None:
    """Replace operations that overwrite their input by ones that return a new value.

    Sinking reorders nodes, so a value that another region reads must never change under it. Every
    later reader of the overwritten value, and of what it is a view of, reads the new value instead.

    Args:
        graph: The graph, changed in place.
        mutating: `call_module` nodes whose layer is `inplace=True`.

    Raises:
        CaptureError: A view is overwritten whose base cannot be rebuilt.
    """
    for node in list(graph.nodes):
        if node in mutating:
            _publish(graph, node, node.args[0], node)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            _replace_mutable(graph, node)


def _replace_mutable(graph: fx.Graph, node: fx.Node) -> None:
    schema = node.target._schema
    written = [
        i for i, arg in enumerate(schema.arguments) if arg.alias_info and arg.alias_info.is_write
    ]
    if node.target is aten.batch_norm.default or written != [0]:
        return  # statistics, not activations
    target = node.args[0]
    functional = _functional(node.target)
    if functional is None:
        raise CaptureError(
            f"the in-place operation `{node.target}` has no functional form{where(node)}"
        )
    with graph.inserting_before(node):
        new = graph.call_function(functional, node.args, node.kwargs)
    new.meta["stack_trace"] = node.meta.get("stack_trace")
    node.replace_all_uses_with(new)
    _publish(graph, node, target, new)
    graph.erase_node(node)


def _functional(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    name = op._schema.name.removeprefix("aten::")
    special = {"zero_": aten.zeros_like.default, "copy_": overwrite, "fill_": overwrite}
    if name in special:
        return special[name]
    packet = getattr(aten, name.removesuffix("_"), None)
    overload = getattr(packet, op._overloadname, None) if packet else None
    return overload  # type: ignore[no-any-return]


def overwrite(target: Tensor, source: Tensor | float, non_blocking: bool = False) -> Tensor:
    """What `target.copy_(source)` or `target.fill_(source)` leaves in `target`."""
    if not isinstance(source, Tensor):
        return torch.full_like(target, source)
    return source.to(target.dtype).expand_as(target)


def _publish(graph: fx.Graph, after: fx.Node, old: Any, new: fx.Node) -> None:
    """Make every node after `after` that reads `old`, or what `old` is a view of, read the new value."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    start = position[after]
    cursor = new
    while isinstance(old, fx.Node):
        base = old.args[0] if _is_view(old) else None
        _reread(graph, old, cursor, position, start)
        for sibling in list(old.users):
            if _is_view(sibling) and sibling is not cursor and position.get(sibling, -1) < start:
                _refresh_view(graph, sibling, cursor, after, position, start)
        if base is None:
            return
        if not any(position.get(user, -1) > start for user in _readers(base, old)):
            return
        inverse = _INVERSE_VIEWS.get(old.target)
        if inverse is None:
            raise CaptureError(
                f"an in-place operation writes through the view `{old.target}`, whose base cannot be "
                f"rebuilt{where(after)}; write it out of place"
            )
        with graph.inserting_after(cursor):
            cursor = inverse(graph, base, cursor, *old.args[1:])
        old = base


def _readers(base: Any, view: fx.Node) -> Iterable[fx.Node]:
    """Nodes that read `base`, directly or through another view of it, and what `base` itself is a view of."""
    seen: set[fx.Node] = set()
    queue = [base]
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        yield from node.users
        queue.extend(user for user in node.users if _is_view(user) and user is not view)
        if _is_view(node):
            queue.append(node.args[0])


def _reread(
    graph: fx.Graph, old: fx.Node, new: fx.Node, position: dict[fx.Node, int], start: int
) -> None:
    for user in list(old.users):
        if user is not new and position.get(user, -1) > start:
            user.replace_input_with(old, new)


def _refresh_view(
    graph: fx.Graph,
    view: fx.Node,
    base: fx.Node,
    after: fx.Node,
    position: dict[fx.Node, int],
    start: int,
) -> None:
    """A view taken before the write shows the new value to whoever reads it afterwards."""
    if not any(position.get(user, -1) > start for user in _readers(view, view)):
        return
    with graph.inserting_after(base):
        fresh = graph.node_copy(view, lambda n: base if n is view.args[0] else n)
    _reread(graph, view, fresh, position, start)
    for deeper in list(view.users):
        if _is_view(deeper) and position.get(deeper, -1) < start:
            _refresh_view(graph, deeper, fresh, after, position, start)


def _is_view(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    first = node.target._schema.arguments[:1]
    if node.target in (aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints):
        return True
    aliased = bool(returns and first and returns[0].alias_info and first[0].alias_info)
    return aliased and not node.target._schema.is_mutable


# --- operations whose training flag export froze -------------------------------------------------


class Dropout(nn.Module):
    """A functional dropout that follows the module's mode; its probability is an argument."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor, p: float) -> Tensor:
        return self.operation(x, p, True) if self.training else x


class Attention(nn.Module):
    """`scaled_dot_product_attention` with dropout in training mode only."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            self.dropout if self.training else 0.0,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


class BatchNorm(nn.Module):
    """A functional batch norm that uses the batch's statistics in training mode only."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn: bool,
    ) -> Tensor:
        training = self.training or mean is None
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)


_DROPOUTS = {
    aten.dropout.default: torch.dropout,
    aten.feature_dropout.default: torch.feature_dropout,
    aten.alpha_dropout.default: torch.alpha_dropout,
    aten.feature_alpha_dropout.default: torch.feature_alpha_dropout,
}


def follow_mode(graph: fx.Graph) -> dict[str, nn.Module]:
    """Wrap what reads a training flag that export made constant, so that `train()` and `eval()` reach it.

    Args:
        graph: A graph exported in training mode, changed in place.

    Returns:
        The parameterless modules to add to the root, by path.
    """
    added: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.target in _DROPOUTS and node.args[2]:
            module: nn.Module = Dropout(_DROPOUTS[node.target])
            args = node.args[:2]
            kwargs: dict[str, Any] = {}
        elif node.target is aten.scaled_dot_product_attention.default and _dropout_of(node) > 0:
            module = Attention(_dropout_of(node))
            args = (*node.args[:4], *node.args[5:])
            kwargs = {k: v for k, v in node.kwargs.items() if k != "dropout_p"}
            if "attn_mask" in kwargs:
                kwargs["mask"] = kwargs.pop("attn_mask")
        elif node.target is aten.batch_norm.default and node.args[5]:
            module, args, kwargs = BatchNorm(), node.args, {}
        else:
            continue
        path = f"_modes.{len(added)}"
        added[path] = module
        with graph.inserting_before(node):
            new = graph.create_node("call_module", path, args, kwargs)
        new.meta["stack_trace"] = node.meta.get("stack_trace")
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return added


def _dropout_of(node: fx.Node) -> float:
    return float(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))


# --- clean-up ------------------------------------------------------------------------------------


def unbake_devices(graph: fx.Graph, seen: torch.device) -> None:
    """Put tensors on the device of the input, not on the one that the export saw.

    Args:
        graph: The graph, changed in place.
        seen: The device of the example inputs.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        device = graph.call_function(getattr, (placeholders[0], "device"))

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value == seen else value

    for node in graph.nodes:
        if node.op == "call_function" and node is not device:
            node.args = pytree.tree_map(swap, node.args)
            node.kwargs = pytree.tree_map(swap, node.kwargs)
    if not device.users:
        graph.erase_node(device)


_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}


def drop_noops(graph: fx.Graph, metadata: dict[fx.Node, tuple[Any, ...]]) -> None:
    """Remove casts that change neither dtype nor device, and whatever nobody reads.

    Args:
        graph: The graph, changed in place.
        metadata: dtype and shape of tensor-valued nodes.
    """
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.target in _CASTS and isinstance(source, fx.Node):
            if metadata.get(node) is not None and metadata.get(node) == metadata.get(source):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def where(node: fx.Node) -> str:
    """The line of the model's code that made a node, as the end of a sentence; empty if it is not known."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not files:
        return ""
    last = files[-1]
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f", at {lines[last]}: `{code}`"
