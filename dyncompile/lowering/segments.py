"""A segment of a plan as a module of its own."""

import operator

import torch
from torch import fx, nn

from dyncompile.demand import stands_in
from dyncompile.graph import Size, Spec, spec
from dyncompile.lowering.plan import Segment


def segment_module(segment: Segment, root: nn.Module) -> fx.GraphModule:
    """A segment as a module of its own: parameters shared with `root`, batch sizes read off its own inputs.

    Args:
        segment: What to run.
        root: Owner of the modules and parameters.

    Returns:
        A module called with the segment's inputs; returns a tuple of its outputs. What stands in for the static
        model's nodes has the form that skips.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in segment.inputs:
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta.update(node.meta)
    anchor = segment.inputs[0]

    def value(node: fx.Node) -> fx.Node:
        if node not in mapping:
            mapping[node] = make(node)
        return mapping[node]

    def make(node: fx.Node) -> fx.Node:
        size = node.meta.get("spec")
        if isinstance(size, Size):
            return _local_size(graph, mapping[anchor], spec(anchor), size, segment.rows)
        if node.target is getattr:
            return graph.call_function(getattr, (mapping[anchor], node.args[1]))
        for source in node.all_input_nodes:
            value(source)
        return graph.node_copy(node, lambda n: mapping[n])

    for node in segment.nodes:
        value(node)
    graph.output(tuple(mapping[node] for node in segment.outputs))
    module = fx.GraphModule(root, graph, class_name="Segment")
    for node in segment.nodes:
        if stands_in(node):
            path = str(node.target)
            module.set_submodule(path, module.get_submodule(path).lowered())  # type: ignore[operator]
    return module


def live(module: fx.GraphModule, root: nn.Module) -> fx.GraphModule:
    """Let a segment look parameters and modules up in `root` in every call: whatever takes their place is seen.

    Args:
        module: What `segment_module` made; changed in place.
        root: As there.
    """
    module._parameters, module._buffers = root._parameters, root._buffers
    standing = {str(n.target).partition(".")[0] for n in module.graph.nodes if stands_in(n)}
    for name in module._modules.keys() - standing:
        module._modules[name] = root._modules[name]
    return module


def _local_size(graph: fx.Graph, tensor: fx.Node, found: Spec, size: Size, rows: int) -> fx.Node:
    """`slope * batch + offset`, with the batch read off a tensor that holds `rows` rows a sample."""
    result = graph.call_function(torch.ops.aten.sym_size.int, (tensor, found.batch_dim))
    for function, operand, neutral in (
        (operator.floordiv, found.rows // rows, 1),
        (operator.mul, size.slope // rows, 1),
        (operator.add, size.offset, 0),
    ):
        if operand != neutral:
            result = graph.call_function(function, (result, operand))
    return result
