"""Moves an activation behind a select into the arm that needs it, so that it fuses with what the arm computes."""

import torch
from torch import fx, nn

from dyncompile.ops import SELECT

_aten = torch.ops.aten
_RELUS = (_aten.relu.default, torch.relu, nn.functional.relu)
_KEEP_SIGN = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Dropout, nn.Identity)


def absorb_activations(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite `relu(select(d, a, b))`, where b is not negative, to `select(d, relu(a), b)`: the same to the bit.

    A residual network adds, then rectifies: behind a gate the rectifier would be a pass over memory of its own for
    every sample, those that skip the branch included.

    Args:
        graph: Changed in place.
        root: Owns the modules that the nodes name.
    """
    known: set[fx.Node] = set()
    for node in list(graph.nodes):
        if _never_negative(node, root, known):
            known.add(node)
        if not _is_relu(node, root):
            continue
        chosen = node.all_input_nodes[0]
        if chosen.target is not SELECT or len(chosen.users) > 1:
            continue
        decision, taken, otherwise, *dim = chosen.args
        if taken is otherwise or otherwise not in known:
            continue
        with graph.inserting_before(chosen):
            rectified = graph.create_node(node.op, node.target, (taken,))
        rectified.meta.update(node.meta)
        with graph.inserting_before(node):
            select = graph.call_function(SELECT, (decision, rectified, otherwise, *dim))
        select.meta.update(chosen.meta)
        known.update((rectified, select))
        node.replace_all_uses_with(select)
        graph.erase_node(node)
        graph.erase_node(chosen)


def _is_relu(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))) is nn.ReLU
    return node.op == "call_function" and node.target in _RELUS


def _never_negative(node: fx.Node, root: nn.Module, known: set[fx.Node]) -> bool:
    """Whether a value has no negative entry, given which of those before it have none."""
    if node.target is SELECT:
        return all(arm in known for arm in node.args[1:3])
    if node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), _KEEP_SIGN):
        return node.all_input_nodes[0] in known
    return _is_relu(node, root)
