"""Confidence of a prediction, in [0, 1]: what an exit compares with its threshold."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dyncompile.errors import ArgumentError


class Criterion(Protocol):
    """Maps logits to confidence.

    Called with `logits` `[N, K, ...]` (classes in dim 1, already divided by the temperature) and
    the `earlier` exits' logits in order; returns `[N, ...]` in [0, 1], larger for surer.
    """

    def __call__(self, logits: Tensor, earlier: Sequence[Tensor], /) -> Tensor:
        """Confidence of each prediction."""


def max_softmax(logits: Tensor, _: Sequence[Tensor] = ()) -> Tensor:
    """The largest class probability (Shallow-Deep Networks, arXiv 1810.07052)."""
    # The softmax of the largest logit alone: a compiler need not write out the others. Subtracted this way round
    # because inductor takes the other for a softmax of scaled logits, and reduces three times for it.
    logits = logits.float()
    return (logits.amax(1, keepdim=True) - logits).neg().exp().sum(1).reciprocal()


def margin(logits: Tensor, _: Sequence[Tensor] = ()) -> Tensor:
    """The gap between the two largest class probabilities."""
    top = logits.softmax(1).topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def entropy(logits: Tensor, _: Sequence[Tensor] = ()) -> Tensor:
    """One minus the normalised entropy (BranchyNet, arXiv 1709.01686)."""
    log = logits.log_softmax(1)
    return 1 + (log.exp() * log).sum(1) / math.log(logits.shape[1])


def patience(logits: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
    """Of the exits before, how many in a row agree on the class, as a share of all (PABEE, arXiv 2006.04152).

    The first exit has nothing to agree with: its confidence is 0.
    """
    label = logits.argmax(1)
    agreed = torch.zeros(label.shape, device=logits.device, dtype=logits.dtype)
    running = torch.ones_like(label, dtype=torch.bool)
    for other in reversed(earlier):
        running = running & (other.argmax(1) == label)
        agreed = agreed + running
    return agreed / max(len(earlier), 1)


CRITERIA: dict[str, Criterion] = {
    "max_softmax": max_softmax,
    "margin": margin,
    "entropy": entropy,
    "patience": patience,
}

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda c: c.mean(1),
    "min": lambda c: c.amin(1),
    "quantile10": lambda c: c.quantile(0.1, dim=1),
}

_OF_KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda c, keep: torch.where(keep, c, 0).sum(1) / keep.sum(1).clamp(min=1),
    "min": lambda c, keep: torch.where(keep, c, math.inf).amin(1).clamp(max=1),
    "quantile10": lambda c, keep: _quantile(torch.where(keep, c, math.inf).sort(1).values, 0.1, keep.sum(1)).clamp(
        max=1
    ),
}


def _quantile(ordered: Tensor, q: float, count: Tensor) -> Tensor:
    """The quantile of the first `count` `[N]` of each row, interpolated as torch does."""
    place = (q * (count - 1)).clamp(min=0)
    low, high = (ordered.gather(1, end.long().unsqueeze(1)).squeeze(1) for end in (place.floor(), place.ceil()))
    return low + (place - place.floor()).to(low.dtype) * (high - low)


def reduce(confidence: Tensor, reduction: str, keep: Tensor | None) -> Tensor:
    """One confidence a sample, `[N]`, from those of its pixels or tokens.

    Args:
        confidence: `[N, L]`.
        reduction: A name of `REDUCTIONS`.
        keep: `[N, L]` bool, the tokens that count; None for all.
    """
    return REDUCTIONS[reduction](confidence) if keep is None else _OF_KEPT[reduction](confidence, keep)


def certainty(name: str | Criterion) -> Criterion:
    """The criterion of a name, or the callable itself.

    Raises:
        ArgumentError: No criterion of that name.
    """
    if callable(name):
        return name
    if str(name) not in CRITERIA:
        raise ArgumentError("criterion", found=repr(name), expected=f"one of {sorted(CRITERIA)} or a callable")
    return CRITERIA[name]


def check_criterion(criterion: Criterion, shape: Sequence[int], device: torch.device) -> None:
    """Try a criterion of the user's own on two predictions.

    Args:
        criterion: What is tried, unless it is one of `CRITERIA`.
        shape: Of the logits of one sample, classes first: `(K, ...)`.
        device: Where the logits are.

    Raises:
        ArgumentError: It stops, or returns something else than `[N, ...]` in [0, 1].
    """
    if criterion in CRITERIA.values():
        return
    expected = "a callable (logits [N, K, ...], earlier) -> confidences [N, ...] in [0, 1]"
    logits = torch.linspace(-1, 1, 2 * math.prod(shape), device=device).reshape(2, *shape)
    try:
        with torch.no_grad():
            found: Any = criterion(logits, [logits.neg()])
    except Exception as error:  # what a user's code raises can be anything
        reason = f"one that stops: {type(error).__name__}: {error}"
        raise ArgumentError("criterion", found=reason, expected=expected) from error
    if not isinstance(found, Tensor) or found.shape not in {logits[:, 0].shape, (2,)}:
        kind = f"{list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        reason = f"one that returns {kind} for logits {list(logits.shape)}"
        raise ArgumentError("criterion", found=reason, expected=expected)
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ArgumentError("criterion", found="one that returns NaN or values outside [0, 1]", expected=expected)


def reads_earlier(criterion: Criterion) -> bool:
    """Whether a criterion may look at the exits before; those must then run even where they are disabled."""
    return criterion is patience or criterion not in CRITERIA.values()


def classes_first(logits: Tensor, class_dim: int) -> Tensor:
    """Logits with their classes in dim 1, in float32."""
    return logits.movedim(class_dim, 1).float()
