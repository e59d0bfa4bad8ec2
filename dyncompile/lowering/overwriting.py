"""Lets activations of eager segments overwrite their input again, as the static model's do."""

import copy
import operator
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

_FRESH = (_ConvNd, _BatchNorm, nn.Linear, nn.GroupNorm, nn.LayerNorm)
"""Layers whose result shares memory with nothing."""
_ADDS = (torch.ops.aten.add.Tensor, operator.add, torch.add)


def overwrite(segment: fx.GraphModule, layers: Collection[str]) -> None:
    """Give activations back their `inplace=True`, where the value is made in the segment and nobody else reads it.

    Capture takes it from them, as passes may add readers of the value before. On the processor a batch of one spends
    some percent of its time on the memory that this saves.

    Args:
        segment: Changed in place; the layers that it shares with the model are not.
        layers: Paths of those that were `inplace=True` in the static model.
    """
    for node in segment.graph.find_nodes(op="call_module"):
        if node.target not in layers or not _owned(segment, node.args[0]):
            continue
        layer = segment.get_submodule(str(node.target))
        if isinstance(layer, _DropoutNd):
            continue  # it reads the mode, which a copy would not follow
        again = copy.copy(layer)
        again.inplace = True  # type: ignore[assignment]
        node.target = f"{node.target}_inplace"
        segment.add_submodule(node.target, again)
    segment.recompile()


def _owned(segment: fx.GraphModule, value: object) -> bool:
    if not isinstance(value, fx.Node) or len(value.users) > 1:
        return False
    if value.op == "call_module":
        return isinstance(segment.get_submodule(str(value.target)), _FRESH)
    return value.target in _ADDS
