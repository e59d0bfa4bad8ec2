"""Lets a convolution add its result to the input that it is added to, in that input's memory.

Inductor does so with a value of the same program, and never with an input of it, which may be the caller's: a residual
branch that is a segment of its own would write its sum elsewhere, which takes oneDNN longer.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def overwrite_inputs(gm: fx.GraphModule, inputs: Collection[fx.Node]) -> set[fx.Node]:
    """Let sums of a convolution and an input take the input's place, where nothing else reads it then.

    Inductor moves what it compiles to where it is first needed, so only what the sum itself needs has certainly run.

    Args:
        gm: A segment whose convolutions are oneDNN's; changed in place.
        inputs: Those of its placeholders that may be written into.

    Returns:
        Those that are.
    """
    found: set[fx.Node] = set()
    if not torch.backends.mkldnn.is_available():
        return found
    for total in gm.graph.find_nodes(op="call_function", target=_aten.add.Tensor):
        if total.kwargs:
            continue
        for added, other in (total.args, total.args[::-1]):
            if not (other in inputs and _convolves(added) and _alike(added, other)):
                continue
            readers = _readers(other, total)
            if added not in readers and readers <= _needs(total):
                with gm.graph.inserting_before(total):
                    place = gm.graph.call_function(_as_if_made_here, (other,))
                place.meta["val"] = other.meta["val"]
                total.replace_input_with(other, place)
                found.add(other)
                break
    gm.recompile()
    return found


def _as_if_made_here(x: Any) -> Any:
    """The same value; to inductor one that is made within the program."""
    return x


_as_if_made_here._inductor_lowering_function = True  # type: ignore[attr-defined]


def _convolves(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.mkldnn._convolution_pointwise.default


def _alike(added: fx.Node, other: fx.Node) -> bool:
    """Whether a sum has the place of an input, and nothing but the sum reads what is added."""
    result, given = added.meta["val"], other.meta["val"]
    return len(added.users) == 1 and bool(result.dtype == given.dtype and result.shape == given.shape)


def _readers(value: fx.Node, total: fx.Node) -> set[fx.Node]:
    """What may read a value's memory, a sum aside: all that is made of it, for inductor makes nothing that it need not.

    A convolution certainly has a result of its own.
    """
    found: set[fx.Node] = set()
    queue = [value]
    while queue:
        for user in queue.pop().users:
            if user is not total and user not in found:
                found.add(user)
                if not _convolves(user):
                    queue.append(user)
    return found


def _needs(node: fx.Node) -> set[fx.Node]:
    """All that a node is computed from."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        sources = [source for source in queue.pop().all_input_nodes if source not in found]
        found.update(sources)
        queue += sources
    return found
