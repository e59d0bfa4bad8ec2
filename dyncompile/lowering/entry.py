"""A segment as inductor sees it: batch size first, dense tensors out, and layers in the form that it compiles best."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dyncompile.errors import LoweringError

_SMALL = 1 << 14
"""Weights up to which a linear layer is not worth a call of oneDNN."""


class Entry(nn.Module):
    """The segment as inductor sees it: batch size first, a flat list of dense tensors out.

    Not a GraphModule: inductor would fold batch norm into modules after it has read their weights.
    """

    def __init__(self, segment: nn.Module, formats: list[torch.memory_format]) -> None:
        super().__init__()
        self.segment = segment
        self.formats = formats
        if isinstance(segment, fx.GraphModule):
            for node in segment.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
                weight: Any = node.args[1]
                groups = node.args[6] if len(node.args) > 6 else 1
                frozen = weight.op == "get_attr"
                if groups == 1 and frozen and operator.attrgetter(str(weight.target))(segment).shape[1] == 1:
                    node.target = _convolve_one
            segment.recompile()
        for owner in list(segment.modules()):
            if isinstance(owner, _OneChannelConv | _SmallLinear):
                continue  # of an earlier program of this segment
            for name, child in owner.named_children():
                if child._forward_hooks or child._forward_pre_hooks:
                    continue
                if type(child) is nn.Conv2d and child.in_channels == 1:
                    setattr(owner, name, _OneChannelConv(child))
                elif type(child) is nn.Linear and child.weight.numel() <= _SMALL:
                    setattr(owner, name, _SmallLinear(child))

    def forward(self, _: int, *tensors: Tensor) -> list[Tensor]:
        outputs = pytree.tree_leaves(self.segment(*tensors))
        for output in outputs:
            if not isinstance(output, Tensor):
                raise LoweringError(f"a segment returns tensors only, not {output!r}")
        self.formats[:] = [memory_format(t) for t in outputs]
        return [t.contiguous(memory_format=layout) for t, layout in zip(outputs, self.formats, strict=True)]


class _OneChannelConv(nn.Module):
    """A convolution of one channel, computed with a second channel of zeros.

    Of one channel row-major and channels-last are the same memory. With a symbolic batch inductor takes such an input
    for row-major and oneDNN does not; what follows would run row-major at best, and fail an assertion at worst.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        conv = self.convolution
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return conv(x)  # type: ignore[no-any-return]
        return _convolve_one(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def _convolve_one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    _: int = 1,
) -> Tensor:
    """`conv2d` of one channel, for `_OneChannelConv` and where a model calls the function itself; of one group."""
    wide = nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).contiguous(memory_format=torch.channels_last)
    weight = nn.functional.pad(weight, (0, 0, 0, 0, 0, 1))
    return nn.functional.conv2d(wide, weight, bias, stride, padding, dilation)


class _SmallLinear(nn.Module):
    """A linear layer of few weights as inductor's own code, which fuses with what is around it.

    A call of oneDNN takes longer than its work there, and splits an exit's head into three kernels.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """Which the module that owns the layer may read, as torch's transformer layers do."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.device.type != "cpu":
            return self.linear(x)  # type: ignore[no-any-return]
        product = (x.unsqueeze(1) * self.weight).sum(-1)
        return product if self.bias is None else product + self.bias


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels-last where a tensor is that and no more than that, else row-major."""
    if not tensor.is_contiguous():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
        if last is not None and tensor.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format
