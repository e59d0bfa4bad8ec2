"""Losses in [0, 1] of leaving at an exit: their mean is the risk that calibration holds.

A loss takes `(prediction, targets, final)`, the exit's prediction, the targets and the full-depth
prediction, and returns `[N]`. For classification the classes stand in dim 1 of both predictions.
The full depth's own loss is that of `final` against itself, so a loss may be relative to the static
model or absolute.
"""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from dyncompile.calibration.temperature import mean_of_labelled
from dyncompile.errors import ArgumentError, DataError
from dyncompile.values import positive

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def accuracy_drop(prediction: Tensor, targets: Tensor, final: Tensor) -> Tensor:
    """Where the full depth is right and the exit wrong: accuracy drops by at most its mean.

    Args:
        prediction: Logits of the exit, `[N, K, ...]`.
        targets: Class indices, `[N, ...]`; -100 does not count.
        final: Logits of the full depth, `[N, K, ...]`.

    Returns:
        `[N]`, 0 or 1 for targets `[N]`, else the share of the sample's labels.
    """
    lost = (final.argmax(1) == targets) & (prediction.argmax(1) != targets)
    return mean_of_labelled(lost.float(), targets)


def disagreement(prediction: Tensor, targets: Tensor, final: Tensor) -> Tensor:
    """Where the exit's class is not the full depth's, right or wrong.

    Args:
        prediction: Logits of the exit, `[N, K, ...]`.
        targets: Class indices, `[N, ...]`; only -100 matters, which does not count.
        final: Logits of the full depth, `[N, K, ...]`.

    Returns:
        `[N]`, 0 or 1 for targets `[N]`, else the share of the sample's labels.
    """
    return mean_of_labelled((final.argmax(1) != prediction.argmax(1)).float(), targets)


def excess_error(scale: float) -> Loss:
    """For regression: how much further off than the full depth, over `scale`, cut to [0, 1].

    Args:
        scale: Mean absolute error, in the target's unit, that counts as a full loss.

    Returns:
        The loss.

    Raises:
        ArgumentError: `scale` is not positive.

    Example:
        >>> import torch
        >>> loss = excess_error(scale=2.0)
        >>> prediction, final = torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0], [2.0]])
        >>> loss(prediction, torch.tensor([[1.0], [1.0]]), final)
        tensor([1., 0.])
    """
    positive("scale", scale)

    def loss(prediction: Tensor, targets: Tensor, final: Tensor) -> Tensor:
        if targets.shape not in {prediction.shape, prediction.shape[:-1]} or prediction.numel() != targets.numel():
            found = f"targets {list(targets.shape)} for predictions {list(prediction.shape)}"
            raise DataError("data", found=found, expected="one shape for both")
        targets = targets.reshape(prediction.shape)
        excess = (prediction - targets).abs() - (final - targets).abs()
        return (excess.reshape(len(excess), -1).mean(1) / scale).clamp(0, 1)

    return loss


NAMED: dict[str, Loss] = {"accuracy_drop": accuracy_drop, "disagreement": disagreement}


def resolve(risk: str | Loss, *, task: str) -> Loss:
    """The loss of a name, or the callable itself.

    Args:
        risk: "accuracy_drop", "disagreement" or a loss.
        task: "classification" or "regression".

    Raises:
        ArgumentError: No loss of that name, or the named ones do not suit the task.
    """
    if callable(risk):
        return risk
    if task != "classification":
        raise ArgumentError(
            "risk",
            found=f"{risk!r} for a {task} model",
            expected="a loss (prediction, targets, final) -> [N] in [0, 1], such as "
            "dyncompile.calibration.excess_error(scale)",
        )
    if risk not in NAMED:
        raise ArgumentError("risk", found=repr(risk), expected=f"{', '.join(NAMED)} or a loss")
    return NAMED[risk]
