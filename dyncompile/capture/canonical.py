"""Bring an exported graph into canonical form: flat, free of guards, contexts and baked devices."""

import functools
import itertools
import operator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

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

    Regions under `torch.no_grad` are inlined, their results detached.

    Args:
        exported: `ExportedProgram.module()`.
        constants: Filled with the tensors that export lifted, under the names that the new graph
            uses.
        known: Names of the model's own parameters and buffers.

    Returns:
        A graph that no module owns; its output is a tuple of leaves. Each node's `meta` has
        `stack_trace`, `path` (of the modules it came from, outermost first), `dtype`, and
        `storage`, which is equal for values that share memory.

    Raises:
        CaptureError: The model enters `torch.autocast`, or branches on data.
    """
    graph = fx.Graph()
    graph.output(tuple(_copy_nodes(exported, graph, {}, constants, known)))
    return graph


def _copy_nodes(
    module: fx.GraphModule,
    graph: fx.Graph,
    mapping: dict[fx.Node, Any],
    constants: dict[str, Tensor],
    known: set[str],
) -> Any:
    """Copy the nodes of a module that may be nested in another; return its output."""
    regions: dict[fx.Node, fx.GraphModule] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: mapping[n])
        if node.op == "call_module" or node.target in _GUARDS or node in mapping:
            continue  # the export's own guards, or an input of a nested region
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            continue  # an argument that is no tensor: its value is baked in
        if isinstance(node.target, HigherOrderOperator):
            mapping[node] = _inline(node, regions, graph, mapping, constants, known)
        elif node.target is operator.getitem and isinstance(mapping[node.args[0]], tuple | list):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        elif node.op == "get_attr" and isinstance(_attribute(module, node.target), fx.GraphModule):
            regions[node] = _attribute(module, node.target)
        else:
            new = graph.node_copy(node, lambda n: mapping[n])
            new.meta = _provenance(node)
            if node.op == "get_attr" and node.target not in known:
                name = f"_constants.{str(node.target).replace('.', '_')}"
                constants[name] = _attribute(module, node.target)
                new.target = name
            mapping[node] = new
    return None


def _inline(
    node: fx.Node,
    regions: dict[fx.Node, fx.GraphModule],
    graph: fx.Graph,
    mapping: dict[fx.Node, Any],
    constants: dict[str, Tensor],
    known: set[str],
) -> Any:
    """Inline a region that export made for a context manager."""
    name = node.target.name()  # type: ignore[union-attr]
    grad, autocast = name == "wrap_with_set_grad_enabled", name == "wrap_with_autocast"
    if not grad and not (autocast and node.args[2] is False):
        advice = "cast outside of it" if autocast else "data-dependent control flow is not supported"
        raise CaptureError(f"the model uses `{name}`{where(node)}; {advice}")
    start = next(i for i, arg in enumerate(node.args) if arg in regions)
    region = regions[node.args[start]]  # type: ignore[index]
    inputs = [n for n in region.graph.nodes if n.op == "placeholder"]
    values = [mapping[n] for n in node.args[start + 1 :]]  # type: ignore[index]
    inner = dict(zip(inputs, values, strict=True))
    outputs = _copy_nodes(region, graph, inner, constants, known)
    if not grad or node.args[0] is True:
        return outputs
    return pytree.tree_map_only(fx.Node, lambda n: _detached(graph, n), outputs)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = graph.call_function(aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new


def _provenance(node: fx.Node) -> dict[str, Any]:
    stack = (node.meta.get("nn_module_stack") or {}).values()
    value = node.meta.get("val")
    return {
        "stack_trace": node.meta.get("stack_trace"),
        "path": tuple(str(path).split("@")[0] for path, _ in stack if path),
        "dtype": getattr(value, "dtype", None),
        "storage": storage(value),
    }


def storage(value: Any) -> int | None:
    """Identity of the memory behind a tensor, or behind the first of several."""
    leaves = pytree.tree_leaves(value)
    if not leaves or not isinstance(leaves[0], Tensor):
        return None
    return int(leaves[0].untyped_storage()._cdata)


def _attribute(module: Any, path: Any) -> Any:
    return functools.reduce(getattr, str(path).split("."), module)


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


def drop_noops(graph: fx.Graph) -> None:
    """Remove casts that change neither dtype nor device, and whatever nobody reads.

    Args:
        graph: The graph with its shapes propagated, changed in place.
    """
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.target in _CASTS and isinstance(source, fx.Node):
            found = node.meta.get("spec")
            if found is not None and found == source.meta.get("spec"):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


# --- where a node came from ----------------------------------------------------------------------

_PACKAGES = tuple(str(path) for path in (Path(torch.__file__).parent, Path(__file__).resolve().parents[1]))


def foreign(filename: str) -> bool:
    """Whether a file of code is neither torch's nor our own: the user's, or a model library's."""
    return not filename.startswith((*_PACKAGES, "<"))


def where(node: fx.Node) -> str:
    """The line of the model's code that made a node, as the end of a sentence; empty if unknown."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [
        (place.split('"')[1], place, code) for place, code in itertools.pairwise(lines) if place.startswith('File "')
    ]
    own = [frame for frame in frames if foreign(frame[0])] or frames
    return f", at {own[-1][1]}: `{own[-1][2]}`" if own else ""
