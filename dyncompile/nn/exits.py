"""An exit: a head, how sure it is, and whether a sample leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncompile.errors import ArgumentError
from dyncompile.nn.criteria import REDUCTIONS, Criterion, certainty, classes_first, reduce

_SHARPNESS = 20.0


class Exit(nn.Module):
    """A prediction head with a criterion.

    Buffers `threshold`, `temperature` (float32) and `enabled` (bool) are what calibration sets. A
    sample leaves in evaluation where `enabled & (confidence >= threshold)`; in training nobody
    does.

    Args:
        head: Maps the features (one or several tensors) to a prediction; a regression head to
            (prediction, logit of the confidence).
        criterion: Name or callable of `dyncompile.nn.criteria`; unused by regression, whose head
            learns it.
        reduction: How the confidences of one sample's pixels or tokens become one.
        class_dim: Dim of the prediction that holds the classes.
        features: How many leading inputs are for the head; earlier exits' predictions follow.
        masked: A mask `[N, L]` of the tokens that count stands between them: the confidences of others are left out.
        padding: The mask marks padding instead of tokens to keep.
        learned: The head returns its own confidence (regression).
    """

    threshold: Tensor
    temperature: Tensor
    enabled: Tensor

    def __init__(
        self,
        head: nn.Module,
        *,
        criterion: str | Criterion = "max_softmax",
        reduction: str = "mean",
        class_dim: int = 1,
        features: int = 1,
        masked: bool = False,
        padding: bool = False,
        learned: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ArgumentError("reduction", found=repr(reduction), expected=f"one of {sorted(REDUCTIONS)}")
        self.head = head
        self.criterion = certainty(criterion)
        self.reduction = reduction
        self.class_dim = class_dim
        self.features = features
        self.masked = masked
        self.padding = padding
        self.learned = learned
        self.register_buffer("threshold", torch.tensor(0.9))
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("enabled", torch.tensor(False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Exit":
        """Keep threshold and temperature in float32, to the bit, when the model is cast to another dtype."""
        before = {name: self._buffers[name] for name in ("threshold", "temperature")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            moved = self._buffers[name]
            if exact is not None and moved is not None and moved.dtype != exact.dtype:
                self._buffers[name] = exact.to(moved.device)
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict and decide.

        Args:
            inputs: `features` tensors that the head reads, the mask if there is one, then the earlier exits'
                predictions.

        Returns:
            prediction (the model's output shape), confidence `[N]` in [0, 1], decision `[N]`: bool
            in evaluation, zeros of the prediction's dtype in training.
        """
        output: Any = self.head(*inputs[: self.features])
        earlier, mask = self.beside(inputs)
        if self.learned:
            prediction, logit = output
            logit = logit if logit.dim() == 1 else reduce(logit, "mean", self._kept(mask))
            confidence = torch.sigmoid(logit.float() / self.temperature)
        else:
            prediction = output
            confidence = self.confidence_of(prediction, earlier, mask)
        if self.training:
            return (
                prediction,
                confidence,
                torch.zeros_like(confidence, dtype=prediction.dtype).detach(),
            )
        return prediction, confidence, self.enabled & (confidence >= self.threshold)

    def clear(self, results: Sequence[Tensor], margin: float) -> Tensor:
        """Which decisions of evaluation, `[N]`, no change of the confidence by up to a margin turns.

        Args:
            results: What the exit returned.
            margin: Of confidences.
        """
        return (results[1] - self.threshold).abs() > margin

    def beside(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
        """Of the inputs what the head does not read: earlier exits' predictions, and the mask if there is one."""
        rest = inputs[self.features :]
        return (rest[1:], rest[0]) if self.masked else (rest, None)

    def confidence_of(self, prediction: Tensor, earlier: Sequence[Tensor] = (), mask: Tensor | None = None) -> Tensor:
        """Confidence of predictions after temperature scaling.

        Args:
            prediction: `[N, K]`, `[N, L, K]` or `[N, K, H, W]` logits.
            earlier: Predictions of the exits before this one, same shape.
            mask: `[N, L]`, of an exit that is masked.

        Returns:
            `[N]` in [0, 1].
        """
        logits = classes_first(prediction, self.class_dim) / self.temperature
        past = [classes_first(p, self.class_dim) for p in earlier]
        confidence = self.criterion(logits, past)
        if confidence.dim() > 1:
            confidence = reduce(confidence.flatten(1), self.reduction, self._kept(mask))
        return confidence

    def _kept(self, mask: Tensor | None) -> Tensor | None:
        """The tokens that count, as bool."""
        return None if mask is None else (mask == 0) if self.padding else (mask != 0)

    def firing(self, confidence: Tensor) -> Tensor:
        """A differentiable stand-in for the decision: how nearly, in (0, 1), the confidence passes the threshold."""
        return torch.sigmoid(_SHARPNESS * (confidence - self.threshold))

    def extra_repr(self) -> str:
        """What calibration set."""
        return (
            f"enabled={bool(self.enabled)}, threshold={float(self.threshold):.4g}, "
            f"temperature={float(self.temperature):.4g}"
        )
