"""How a discrete choice is made in training, so that a gradient reaches what chose."""

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
        noise = _logistic(logits)
        soft = torch.sigmoid((logits + noise) / self.temperature.to(logits.dtype))
        return _straight((soft > 0.5).to(soft.dtype), soft) if self.hard else soft

    def categorical(self, logits: Tensor) -> Tensor:
        gumbel = -torch.log(-torch.log(_uniform(logits)))
        soft = torch.softmax((logits + gumbel) / self.temperature.to(logits.dtype), -1)
        return _straight(_one_hot(soft.argmax(-1), soft), soft) if self.hard else soft

    def anneal(self, progress: float) -> None:
        self.temperature.fill_(self.start * (self.end / self.start) ** progress)

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}, hard={self.hard}"


class StraightThrough(Estimator):
    """Draws from the probabilities and takes their gradient in place of the draw's (arXiv 1308.3432)."""

    def binary(self, logits: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        return _straight(torch.bernoulli(p.detach()), p)

    def categorical(self, logits: Tensor) -> Tensor:
        p = torch.softmax(logits, -1)
        return _straight(_drawn(p), p)


class SemanticHashing(Estimator):
    """Improved semantic hashing (arXiv 1801.09797): noise before a saturating sigmoid; every other sample is discrete.

    Args:
        noise: Standard deviation of the noise on the logits.
    """

    def __init__(self, *, noise: float = 1.0) -> None:
        super().__init__()
        self.noise = noise

    def binary(self, logits: Tensor) -> Tensor:
        noisy = logits + self.noise * torch.randn_like(logits)
        soft = (1.2 * torch.sigmoid(noisy) - 0.1).clamp(0, 1)
        # The discrete half learns by the gradient of the soft one.
        hard = _straight((noisy > 0).to(soft.dtype), soft)
        half = torch.rand_like(logits) < 0.5
        return torch.where(half, hard, soft)

    def categorical(self, logits: Tensor) -> Tensor:
        noisy = logits + self.noise * torch.randn_like(logits)
        soft = (1.2 * torch.softmax(noisy, -1) - 0.1).clamp(0, 1)
        soft = soft / soft.sum(-1, keepdim=True).clamp(min=1e-6)
        hard = _straight(_one_hot(noisy.argmax(-1), soft), soft)
        half = torch.rand(logits.shape[:-1], dtype=logits.dtype, device=logits.device) < 0.5
        return torch.where(half[..., None], hard, soft)


class Reinforce(Estimator):
    """Draws from the probabilities; no gradient passes the draw.

    `dyncompile.training.PolicyGradient` trains what chose, by the log-probability of what was drawn (REINFORCE,
    Williams 1992).
    """

    def binary(self, logits: Tensor) -> Tensor:
        return torch.bernoulli(torch.sigmoid(logits.detach()))

    def categorical(self, logits: Tensor) -> Tensor:
        return _drawn(torch.softmax(logits.detach(), -1))


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
    """The value of `hard`, to the bit, with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())


def _uniform(like: Tensor) -> Tensor:
    """Uniform in (0, 1), with neither end."""
    tiny = torch.finfo(like.dtype).tiny
    return torch.rand_like(like).clamp(min=tiny, max=1 - torch.finfo(like.dtype).eps)


def _logistic(like: Tensor) -> Tensor:
    u = _uniform(like)
    return torch.log(u) - torch.log1p(-u)


def _drawn(p: Tensor) -> Tensor:
    """One-hot draws from `[..., K]` probabilities."""
    flat = torch.multinomial(p.detach().reshape(-1, p.shape[-1]), 1).reshape(p.shape[:-1])
    return _one_hot(flat, p)


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(index, like.shape[-1]).to(like.dtype)
