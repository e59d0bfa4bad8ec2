"""Layers that run in one arm of a `switch`: narrower copies that read the weights they are given."""

import copy

import torch
from torch import Tensor, nn


class ArmBatchNorm(nn.Module):
    """Batch norm of the first channels of a layer, with that layer's own parameters and statistics.

    In training it normalises by the batch and leaves the statistics alone: the layer itself keeps them, and a channel's
    are the same whichever others are computed beside it.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None
    ) -> Tensor:
        """Normalise `[N, C, ...]` by the first C entries of the layer's tensors."""
        tensors = (weight, bias, mean, variance)
        weight, bias, mean, variance = (None if t is None else t[: x.shape[1]] for t in tensors)
        if self.training or mean is None:
            return nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class ArmDropout(nn.Module):
    """A dropout inside an arm; it draws no random numbers while the gate of the arm is disabled.

    So the static model's own dropout draws the same with and without arms that nobody takes.

    Args:
        dropout: A layer without state.
    """

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout = copy.deepcopy(dropout)

    def forward(self, enabled: Tensor, x: Tensor, *rest: float) -> Tensor:
        """Drop in training mode and where `enabled`, the gate's buffer, is true."""
        if not self.training:
            return x
        if torch.compiler.is_compiling():
            return torch.where(enabled, self.dropout(x, *rest), x)
        return self.dropout(x, *rest) if bool(enabled) else x


def private_norm(norm: nn.modules.batchnorm._BatchNorm, channels: int) -> nn.modules.batchnorm._BatchNorm:
    """A batch norm of its own for an arm, starting from the first channels of another (arXiv 1812.08928)."""
    own = copy.deepcopy(norm)
    own.num_features = channels
    for name, parameter in list(own.named_parameters(recurse=False)):
        setattr(own, name, nn.Parameter(parameter.detach()[:channels].clone(), parameter.requires_grad))
    for name, buffer in list(own.named_buffers(recurse=False)):
        if buffer.dim() == 1:
            setattr(own, name, buffer[:channels].clone())
    return own
