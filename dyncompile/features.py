"""What an inserted module reads at a node: its shape as a `Feature`, the mask of its tokens, how the model pools."""

import torch
from torch import nn
from torch.fx import Node

from dyncompile.errors import ArgumentError
from dyncompile.graph import Graph, Spec, is_tensor, spec
from dyncompile.nn.heads import Feature

POOLS = ("auto", "mean", "cls", "last")


def feature(graph: Graph, node: Node, *, mask: Node | None, pool: str) -> Feature:
    """Describe a node's value to the module that will read it.

    Args:
        graph: The node's graph.
        node: What is read.
        mask: What `token_mask` found, if the module is given it.
        pool: "mean", "cls", "last", or "auto": as the model itself pools.

    Raises:
        ArgumentError: The value has no channels beside the batch.
    """
    value = spec(node)
    channels = channel_dim(graph, node)
    if channels == value.batch_dim or value.batch_dim is None:
        raise ArgumentError("features", found=f"{list(value.shape)}", expected="channels beside the batch")
    return Feature(
        shape=value.shape,
        batch_dim=value.batch_dim,
        channel_dim=channels,
        pool=pooling(graph, node) if pool == "auto" else pool,
        masked=mask is not None,
        padding=mask is not None and is_padding(mask),
    )


def channel_dim(graph: Graph, node: Node) -> int:
    """Which dim of a feature holds its channels: 1 for convolutional layouts, the last for tokens and `NHWC`."""
    rank = len(spec(node).shape)
    if rank <= 3:
        return rank - 1 if rank != 3 or not _convolutional(graph, node) else 1
    return 1 if _convolutional(graph, node) else rank - 1


def _convolutional(graph: Graph, node: Node) -> bool:
    """Whether the nearest layer that tells, behind or else ahead of a node, keeps channels in dim 1."""
    width = spec(node).shape
    for step in (lambda n: n.all_input_nodes, lambda n: list(n.users)):
        queue, seen = [node], {node}
        while queue:
            current = queue.pop(0)
            module = graph.module_of(current)
            if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
                return True
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.RNNBase | nn.Embedding):
                return False
            for other in step(current):
                same = isinstance(other.meta.get("spec"), Spec) and len(spec(other).shape) == len(width)
                if other not in seen and same:
                    seen.add(other)
                    queue.append(other)
    return len(width) >= 4


def token_mask(graph: Graph, node: Node) -> Node | None:
    """The input that marks the tokens of a value: integers or booleans `[N, L]` named like a mask.

    One named like padding marks what to leave out.
    """
    value = spec(node)
    if len(value.shape) != 3 or value.batch_dim is None:
        return None
    rest = {0, 1, 2} - {value.batch_dim, channel_dim(graph, node)}
    tokens = tuple(value.shape[dim] for dim in (value.batch_dim, *rest))
    for source in graph.placeholders:
        named = "mask" in source.name or "pad" in source.name
        if named and is_tensor(source) and spec(source).batch_dim == 0 and spec(source).shape == tokens:
            return None if spec(source).dtype.is_floating_point else source
    return None


def is_padding(mask: Node) -> bool:
    """Whether a mask marks what to leave out, by its name."""
    return "pad" in mask.name


def pooling(graph: Graph, node: Node) -> str:
    """How the model itself turns tokens or steps into one vector: read off the operation nearest to its output."""
    value = spec(node)
    if len(value.shape) != 3:
        return "mean"
    steps = 0 if value.batch_dim == 1 else 1
    aten = torch.ops.aten
    for other in reversed(graph.fx.nodes):
        if other not in graph.trunk:
            continue
        if other.target is aten.index.Tensor and len(other.args[1]) == 2:
            return "last"
        if other.target is aten.select.int and len(spec(other.args[0]).shape) == 3:
            _, dim, index = other.args
            if dim == steps:
                return "cls" if index == 0 else "last"
    return "mean"


def class_dim(target: Spec) -> int:
    """Dim of the classes in a prediction: 1 for `[N, K]` and `[N, K, H, W]`, the last for `[N, L, K]`."""
    return 2 if len(target.shape) == 3 else 1
