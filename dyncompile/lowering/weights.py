"""Weights of a segment that is compiled: memory of their own, and the layout that kernels read."""

import copy
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.constant_folding import replace_node_with_constant
from torch.utils._python_dispatch import _disable_current_modes

from dyncompile.lowering.sharing import Tape


def separate(segment: nn.Module) -> None:
    """Give each tensor memory of its own: inductor makes one constant of those in the same place.

    Neither its cache nor a segment of equal structure would know; both look at shapes and strides alone.
    """
    taken: set[int] = set()
    for tensor in (*segment.parameters(), *segment.buffers()):
        if tensor.layout != torch.strided:
            continue
        if tensor.untyped_storage().data_ptr() in taken:
            tensor.data = copy.deepcopy(tensor.data)
        taken.add(tensor.untyped_storage().data_ptr())


def pack_convolutions(gm: fx.GraphModule, hint: dict[Any, int], tape: Tape) -> None:
    """Bring the frozen weights of oneDNN convolutions into the layout that its kernels read."""
    if not torch.backends.mkldnn.is_available():
        return

    def known(size: Any) -> int:
        return int(size.node.expr.subs(hint)) if isinstance(size, torch.SymInt) else size

    pack = torch.ops.mkldnn._reorder_convolution_weight.default
    convolution = torch.ops.mkldnn._convolution_pointwise.default
    with _disable_current_modes():
        for node in gm.graph.find_nodes(op="call_function", target=convolution):
            source, weight, _, *geometry = node.args[:7]
            if weight.op != "get_attr" or weight.meta["val"].device.type != "cpu":
                continue
            frozen = getattr(gm, weight.target)
            if frozen.is_mkldnn:
                continue
            arguments = (*geometry, [known(size) for size in source.meta["val"].shape])
            with gm.graph.inserting_before(node):
                packed = gm.graph.call_function(pack, (weight, *arguments))
            packed.meta["val"] = weight.meta["val"]
            node.replace_input_with(weight, packed)
            tensor = pack(frozen.detach(), *arguments)
            tape.note(pack, (frozen, *arguments), {}, tensor)
            replace_node_with_constant(gm, packed, tensor)
    gm.graph.eliminate_dead_code()
    gm.recompile()


__all__ = ["pack_convolutions", "separate"]
