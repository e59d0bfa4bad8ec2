"""How a discrete choice is made in training, so that a gradient reaches what chose.

Everything is drawn and computed in float32 at least: bfloat16 has 256 uniform numbers, and 0, whose logarithm would
decide alone, is one of them.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.errors import ArgumentError


class Estimator(nn.Module):
    """Turns logits into decisions in training. In evaluation nothing is estimated: the likelier arm is taken."""

    @abstractmethod
    def binary(self, logits: Tensor) -> Tensor:
        """Decide between two arms.

        Args:
            logits: `[...]`, of arm 1.

        Returns:
            `[...]` in [0, 1].
        """

    @abstractmethod
    def categorical(self, logits: Tensor) -> Tensor:
        """Decide between K arms.

        Args:
            logits: `[..., K]`.

        Returns:
            `[..., K]`, not negative, summing to 1.
        """

    def anneal(self, progress: float) -> None:
        """Follow the schedule, if there is one.

        Args:
            progress: Share of training that is done, in [0, 1].
        """


class GumbelSoftmax(Estimator):
    """Samples of the concrete distribution (arXiv 1611.00712, 1611.01144), the temperature falling exponentially.

    Hard samples are exact draws from the probabilities, at any temperature. The gradient is that of the soft sample: it
    is biased, and the bias of soft samples goes to 0 with the temperature while their variance grows.

    Args:
        start: Temperature at the beginning, above 0.
        end: Temperature at the end, above 0.
        hard: Decide discretely and take the gradient of the soft sample; else mix.
    """

    temperature: Tensor

    def __init__(self, *, start: float = 1.0, end: float = 0.5, hard: bool = True) -> None:
        super().__init__()
        for name, value in (("start", start), ("end", end)):
            if not value > 0:
                raise ArgumentError(name, found=value, expected="a temperature above 0")
        self.start, self.end, self.hard = start, end, hard
        self.register_buffer("temperature", torch.tensor(start))

    def binary(self, logits: Tensor) -> Tensor:
        noisy = _wide(logits)
        u = _uniform(noisy)
        noisy = noisy + torch.log(u) - torch.log1p(-u)
        soft = torch.sigmoid(noisy / self.temperature.to(noisy.dtype)).to(logits.dtype)
        return _straight(noisy > 0, soft) if self.hard else soft

    def categorical(self, logits: Tensor) -> Tensor:
        noisy = _wide(logits)
        noisy = noisy + _gumbel(noisy)
        soft = torch.softmax(noisy / self.temperature.to(noisy.dtype), -1).to(logits.dtype)
        return _straight(_one_hot(noisy), soft) if self.hard else soft

    def anneal(self, progress: float) -> None:
        self.temperature.fill_(self.start * (self.end / self.start) ** progress)

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}, hard={self.hard}"


class StraightThrough(Estimator):
    """Draws from the probabilities and takes their gradient in place of the draw's (arXiv 1308.3432).

    Unbiased where the loss is linear in each decision, as the expected cost is; else biased by its curvature.
    """

    def binary(self, logits: Tensor) -> Tensor:
        return _straight(_drawn(logits), torch.sigmoid(logits))

    def categorical(self, logits: Tensor) -> Tensor:
        return _straight(_drawn_of_many(logits), torch.softmax(logits, -1))


class SemanticHashing(Estimator):
    """Improved semantic hashing (arXiv 1801.09797): noise before a saturating sigmoid; every other sample is discrete.

    The discrete half learns by the gradient of the soft one, so the gradient is that of the noisy saturating sigmoid.

    Args:
        noise: Standard deviation of the noise on the logits, not negative.
    """

    def __init__(self, *, noise: float = 1.0) -> None:
        super().__init__()
        if not noise >= 0:
            raise ArgumentError("noise", found=noise, expected="a standard deviation, not negative")
        self.noise = noise

    def binary(self, logits: Tensor) -> Tensor:
        noisy = self._noisy(logits)
        soft = (1.2 * torch.sigmoid(noisy) - 0.1).clamp(0, 1).to(logits.dtype)
        half = torch.rand(logits.shape, device=logits.device) < 0.5
        return torch.where(half, _straight(noisy > 0, soft), soft)

    def categorical(self, logits: Tensor) -> Tensor:
        noisy = self._noisy(logits)
        # For two arms the saturating sigmoid of their difference; the most likely arm keeps 1 / K at least.
        soft = (1.2 * torch.softmax(noisy, -1) - 0.2 / logits.shape[-1]).clamp(min=0)
        soft = (soft / soft.sum(-1, keepdim=True)).to(logits.dtype)
        half = torch.rand(logits.shape[:-1], device=logits.device) < 0.5
        return torch.where(half[..., None], _straight(_one_hot(noisy), soft), soft)

    def _noisy(self, logits: Tensor) -> Tensor:
        wide = _wide(logits)
        return wide + self.noise * torch.randn_like(wide)

    def extra_repr(self) -> str:
        return f"noise={self.noise}"


class Reinforce(Estimator):
    """Draws from the probabilities; no gradient passes the draw.

    `dyncompile.training.PolicyGradient` trains what chose, by the log-probability of what was drawn (REINFORCE,
    Williams 1992).
    """

    def binary(self, logits: Tensor) -> Tensor:
        return _drawn(logits).to(logits.dtype)

    def categorical(self, logits: Tensor) -> Tensor:
        return _drawn_of_many(logits).to(logits.dtype)


ESTIMATORS: dict[str, type[Estimator]] = {
    "gumbel": GumbelSoftmax,
    "straight_through": StraightThrough,
    "semantic_hashing": SemanticHashing,
    "reinforce": Reinforce,
}


def build_estimator(kind: str, **options: Any) -> Estimator:
    """Make an estimator by name.

    Args:
        kind: One of `ESTIMATORS`.
        options: Of that estimator.

    Raises:
        ArgumentError: No estimator of that name.
    """
    if kind not in ESTIMATORS:
        raise ArgumentError("estimator", found=repr(kind), expected=f"one of {sorted(ESTIMATORS)}")
    return ESTIMATORS[kind](**options)


def _straight(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, to the bit, with dtype and gradient of `soft`."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def _wide(logits: Tensor) -> Tensor:
    """Half precision to float32, anything else as it is."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _uniform(like: Tensor) -> Tensor:
    """Uniform in (0, 1), with neither end."""
    eps = torch.finfo(like.dtype).eps
    return torch.rand_like(like).clamp(min=eps / 2, max=1 - eps / 2)


def _gumbel(like: Tensor) -> Tensor:
    return -torch.log(-torch.log(_uniform(like)))


def _drawn(logits: Tensor) -> Tensor:
    """Draws, bool, from the probabilities of arm 1."""
    wide = _wide(logits.detach())
    return torch.rand_like(wide) < torch.sigmoid(wide)


def _drawn_of_many(logits: Tensor) -> Tensor:
    """One-hot draws, bool, from the softmax of `[..., K]`."""
    wide = _wide(logits.detach())
    return _one_hot(wide + _gumbel(wide))


def _one_hot(scores: Tensor) -> Tensor:
    """The highest of `[..., K]`, bool."""
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
