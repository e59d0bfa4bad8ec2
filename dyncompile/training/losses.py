"""Losses and accuracies of one prediction, whatever its shape."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncompile.data import IGNORE_INDEX
from dyncompile.errors import DataError


def class_dim(prediction: Tensor, targets: Tensor, argument: str = "targets") -> int:
    """Which dim of a prediction holds the classes, given integer targets.

    The last in `[N, K]` and `[N, L, K]`, the second in `[N, K, H, W]`; the other of the two where
    only that one fits the targets. Errors name the targets as `argument`.

    Raises:
        DataError: Neither fits.

    Example:
        >>> class_dim(torch.zeros(2, 7, 5), torch.zeros(2, 7))
        2
    """
    last = prediction.ndim - 1
    for dim in (1, last) if prediction.ndim == 4 else (last, 1):
        if prediction.shape[:dim] + prediction.shape[dim + 1 :] == targets.shape:
            return dim
    raise DataError(
        argument,
        found=f"targets {list(targets.shape)} for predictions {list(prediction.shape)}",
        expected="[N] for [N, K], [N, L] for [N, L, K] or [N, H, W] for [N, K, H, W]",
    )


def task_loss(prediction: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Cross entropy for integer targets, squared error for floating ones, averaged to a scalar.

    Args:
        prediction: `[N, K]`, `[N, L, K]`, `[N, K, H, W]`, or in regression the targets' shape.
        targets: `[N]`, `[N, L]`, `[N, H, W]`, or values.
        ignore_index: Label that is not counted; the loss of a batch without labels is 0.

    Raises:
        DataError: The shapes do not fit, or labels are out of range.
    """
    if targets.is_floating_point():
        return squared_error(prediction, targets).mean()
    logits = widen(prediction).movedim(class_dim(prediction, targets), 1)
    try:
        each = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    except IndexError as error:  # on a GPU torch ends the process; `finetune` looks at the data before
        labels = targets[targets != ignore_index]
        found = f"labels from {int(labels.min())} to {int(labels.max())}"
        raise DataError("targets", found=found, expected=f"integers in [0, {logits.shape[1]})") from error
    return _mean(each, targets != ignore_index)


def divergence(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """How far a student is from its teacher, a scalar.

    `T^2 KL(teacher || student)` of the softmaxes at temperature T, averaged over the positions that
    have a label; with floating targets the mean squared difference.
    """
    if targets.is_floating_point():
        return F.mse_loss(widen(student), widen(teacher))
    dim = class_dim(student, targets)
    log_p = F.log_softmax(widen(student) / temperature, dim)
    log_q = F.log_softmax(widen(teacher) / temperature, dim)
    each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim)
    return temperature**2 * _mean(each, targets != ignore_index)


def squared_error(prediction: Tensor, targets: Tensor) -> Tensor:
    """Elementwise, in the shape of the prediction; `[N, 1]` also fits targets `[N]`.

    Raises:
        DataError: The shapes do not fit.
    """
    if prediction.shape not in {targets.shape, (*targets.shape, 1)}:
        raise DataError(
            "targets",
            found=f"targets {list(targets.shape)} for predictions {list(prediction.shape)}",
            expected="one shape for both",
        )
    return (widen(prediction) - targets.reshape(prediction.shape)) ** 2


def sample_errors(prediction: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each sample, `[N]`; shapes as in `squared_error`."""
    return squared_error(prediction, targets).reshape(len(prediction), -1).mean(1)


def score(prediction: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, int]:
    """Accuracy, or mean squared error for floating targets; and the number of labels it is of."""
    if targets.is_floating_point():
        return squared_error(prediction, targets).mean(), len(targets)
    labelled = targets != ignore_index
    correct = prediction.argmax(class_dim(prediction, targets)) == targets
    return _mean(correct.float(), labelled), int(labelled.sum())


def widen(tensor: Tensor) -> Tensor:
    """Half precision to float32, in which losses are computed; anything else as it is."""
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)
