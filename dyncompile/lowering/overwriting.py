"""Lets a convolution add its result to the input that it is added to, in that input's memory.

Inductor does so with a value of the same program, and never with an input of it, which may be the caller's: a residual
branch that is a segment of its own would write its sum elsewhere, which takes oneDNN a tenth to a fifth longer.
"""

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_convolution = torch.ops.mkldnn._convolution_pointwise.default


def overwritten(x: Any) -> Any:
    """The same value; to inductor one that is made within the program."""
    return x


overwritten._inductor_lowering_function = True  # type: ignore[attr-defined]


def overwrite_inputs(gm: fx.GraphModule) -> list[bool]:
    """Let sums of a convolution and an input take the input's place, where nothing reads it afterwards.

    Args:
        gm: A segment whose convolutions are oneDNN's; changed in place.

    Returns:
        For each input whether it is written into.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: set[fx.Node] = set()
    for node in gm.graph.find_nodes(op="call_function", target=_aten.add.Tensor):
        if node.kwargs:
            continue
        for added, other in (node.args, node.args[::-1]):
            if not _matches(added, other):
                continue
            readers = _readers(other, node)
            if added not in readers and all(order[reader] < order[node] for reader in readers):
                with gm.graph.inserting_before(node):
                    place = gm.graph.call_function(overwritten, (other,))
                place.meta["val"] = other.meta["val"]
                node.replace_input_with(other, place)
                found.add(other)
                break
    gm.recompile()
    return [node in found for node in gm.graph.find_nodes(op="placeholder")]


def _matches(added: Any, other: Any) -> bool:
    """Whether a sum is of a convolution that nothing else reads and an input of its shape."""
    if not (isinstance(added, fx.Node) and isinstance(other, fx.Node)) or other.op != "placeholder":
        return False
    if added.target is not _convolution or len(added.users) > 1:
        return False
    result, given = added.meta["val"], other.meta["val"]
    return bool(result.dtype == given.dtype and result.shape == given.shape)


def _readers(value: fx.Node, total: fx.Node) -> set[fx.Node]:
    """All that may read a value's memory: inductor looks through everything but a convolution, the sum itself aside."""
    found: set[fx.Node] = set()
    queue = [value]
    while queue:
        for user in queue.pop().users:
            if user is not total and user not in found:
                found.add(user)
                if user.target is not _convolution:
                    queue.append(user)
    return found


__all__ = ["overwrite_inputs"]
