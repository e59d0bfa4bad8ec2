"""Layers that run in one arm of a `switch`: narrower copies that read the weights they are given."""

import copy
from typing import Any

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


class ArmStatistics(nn.modules.batchnorm._BatchNorm):
    """Batch norm of an arm with statistics of its own, and the static layer's weight and bias.

    Args:
        norm: The static layer.
        channels: How many of its channels, the first ones, the arm has.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, channels: int) -> None:
        options: dict[str, Any] = {"momentum": norm.momentum, "track_running_stats": norm.track_running_stats}
        super().__init__(channels, norm.eps, affine=False, **options)
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer[:channels].clone() if buffer.dim() == 1 else buffer.clone())
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Any number of dims: the static layer has looked at them."""

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        """Normalise `[N, C, ...]`, then scale by the first C entries of the static layer's weight and bias."""
        shape = [1, -1, *[1] * (x.dim() - 2)]
        y: Tensor = super().forward(x)
        if weight is not None:
            y = y * weight[: x.shape[1]].view(shape)
        return y if bias is None else y + bias[: x.shape[1]].view(shape)


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
    """A batch norm of its own for an arm, starting from the first channels of another (arXiv 1812.08928).

    What the other one runs on its result, an activation of its own, is left out.
    """
    own = copy.deepcopy(norm)
    own.num_features = channels
    for name, _ in norm.named_children():
        setattr(own, name, nn.Identity())
    for name, parameter in list(own.named_parameters(recurse=False)):
        setattr(own, name, nn.Parameter(parameter.detach()[:channels].clone(), parameter.requires_grad))
    for name, buffer in list(own.named_buffers(recurse=False)):
        if buffer.dim() == 1:
            setattr(own, name, buffer[:channels].clone())
    return own
