"""What a dynamic model is trained for: scalar losses of a trace, which add up with `+`."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from dyncompile.data import IGNORE_INDEX, Inputs, call
from dyncompile.errors import ArgumentError
from dyncompile.training.losses import divergence, sample_errors, task_loss, widen
from dyncompile.values import not_negative, positive, share

if TYPE_CHECKING:
    from dyncompile.cost import CostModel
    from dyncompile.module import Trace

Weights = Sequence[float] | Mapping[str, float] | None


class Objective(ABC):
    """A scalar loss of a trace: `loss = objective(dyn.trace(inputs), targets)`.

    Integer targets mean classification: cross entropy between `[N]` and predictions `[N, K]`,
    `[N, L]` and `[N, L, K]`, or `[N, H, W]` and `[N, K, H, W]`. Floating targets mean regression:
    squared error. Predictions of half precision are taken to float32 first.
    """

    ignore_index: int = IGNORE_INDEX

    @abstractmethod
    def parts(self, trace: "Trace", targets: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """The summands of the loss by name, for logging.

        Args:
            trace: What `dyn.trace` returned for the batch.
            targets: Labels or values, see the class.
            inputs: The inputs of the batch, for objectives that ask another model about them.
        """

    def __call__(self, trace: "Trace", targets: Tensor, inputs: Inputs | None = None) -> Tensor:
        """The loss, a scalar; arguments as in `parts`.

        Raises:
            ArgumentError: `trace` is no trace, or `targets` no tensor.
            DataError: Targets do not fit the predictions.
        """
        from dyncompile.module import Trace

        given: dict[str, tuple[object, type, str]] = {
            "trace": (trace, Trace, "what `dyn.trace(inputs)` returned"),
            "targets": (targets, Tensor, "a tensor"),
        }
        for name, (value, kind, expected) in given.items():
            if not isinstance(value, kind):
                raise ArgumentError(name, found=f"a {type(value).__name__}", expected=expected)
        return torch.stack(list(self.parts(trace, targets, inputs).values())).sum()

    def __add__(self, other: object) -> "Objective":
        return _Sum((self, other)) if isinstance(other, Objective) else NotImplemented


@dataclass(frozen=True)
class _Sum(Objective):
    terms: tuple[Objective, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore_index", self.terms[0].ignore_index)

    def parts(self, trace: "Trace", targets: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for term in self.terms:
            for name, part in term.parts(trace, targets, inputs).items():
                total[name] = total[name] + part if name in total else part
        return total


@dataclass(frozen=True, kw_only=True)
class MultiExit(Objective):
    """Every exit and the full depth learn the task: `L = sum_i lambda_i l(y, f_i(x))`.

    `l` is the cross entropy or the squared error, averaged over the positions that have a label
    (BranchyNet, arXiv 1709.01686; Shallow-Deep Networks, arXiv 1810.07052).

    Args:
        weights: The lambdas. None: all 1. A sequence: one per exit in order, then one for the full
            depth. A mapping from the names of exits and "final": those left out keep 1.
        ignore_index: Integer targets of this value are not counted.

    Raises:
        ArgumentError: A weight is negative, or given for an exit that the model does not have.
    """

    weights: Weights = None
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        _check_weights(self.weights)

    def parts(
        self,
        trace: "Trace",
        targets: Tensor,
        inputs: Inputs | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        predictions = {**trace.exits, "final": trace.final}
        weights = _resolve(self.weights, list(predictions))
        return {
            f"task/{name}": weights[name] * task_loss(prediction, targets, self.ignore_index)
            for name, prediction in predictions.items()
        }


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """Exits learn the task and from a teacher: `L_i = alpha l_i + (1 - alpha) T^2 KLD_i`.

    `KLD_i = sum_c p_k(c|x; T) log(p_k(c|x; T) / p_i(c|x; T))`, with softmax temperature T and the
    teacher's p_k taken as constant, so that no gradient reaches it. `T^2` keeps the size of the
    gradients independent of T (Hinton et al., arXiv 1503.02531). Summed over exits and full depth
    as in `MultiExit`; where the full depth is the teacher, its own divergence is 0 and left out.
    `alpha=1` is `MultiExit`. In regression the divergence is the squared difference to the teacher,
    without temperature.

    Args:
        alpha: Share of the task in [0, 1].
        temperature: T, above 0.
        teacher: "final", the full depth of the model that is trained, or a static model. A static
            one is copied and frozen, and the objective has to be called with the inputs.
        weights: As in `MultiExit`.
        ignore_index: As in `MultiExit`.

    Raises:
        ArgumentError: alpha, temperature, weights or teacher are of another kind, or `inputs` are
            missing.
    """

    alpha: float = 0.5
    temperature: float = 3.0
    teacher: nn.Module | str = "final"
    weights: Weights = None
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        share("alpha", self.alpha)
        positive("temperature", self.temperature)
        if isinstance(self.teacher, nn.Module):
            # The caller may go on training its model, or share weights with the one trained here.
            frozen = copy.deepcopy(self.teacher).eval().requires_grad_(requires_grad=False)
            object.__setattr__(self, "teacher", frozen)
        elif self.teacher != "final":
            raise ArgumentError("teacher", found=repr(self.teacher), expected='"final" or a module')

    def parts(self, trace: "Trace", targets: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        predictions = {**trace.exits, "final": trace.final}
        weights = _resolve(self.weights, list(predictions))
        teacher = self._ask(trace, inputs).detach()
        parts = {}
        for name, prediction in predictions.items():
            task = task_loss(prediction, targets, self.ignore_index)
            parts[f"task/{name}"] = weights[name] * self.alpha * task
            if name != "final" or self.teacher != "final":
                apart = divergence(prediction, teacher, targets, self.temperature, self.ignore_index)
                parts[f"distillation/{name}"] = weights[name] * (1 - self.alpha) * apart
        return parts

    def _ask(self, trace: "Trace", inputs: Inputs | None) -> Tensor:
        if not isinstance(self.teacher, nn.Module):
            return trace.final
        if inputs is None:
            raise ArgumentError(
                "inputs",
                found=None,
                expected="those of the batch: objective(trace, targets, inputs)",
            )
        self.teacher.to(trace.final.device)
        with torch.no_grad():
            output: object = call(self.teacher, inputs)
        return _leaf_like(output, trace.final)


@dataclass(frozen=True, kw_only=True)
class ExpectedCost(Objective):
    """What a sample costs on average, relative to the static model; differentiable in training.

    `weight * mean(cost)`, or `weight * (mean(cost) - target)^2`: with a target it pushes back on
    both sides, against everything on and against everything off (ConvNet-AIG, arXiv 1711.11503).

    Args:
        weight: Factor, above 0.
        target: Cost to aim at; 1.0 is the static model.
        costs: What the regions of the model cost; None: their FLOPs, as in `Trace.cost`. The time that they take on
            this machine: `dyn.train().cost_model(unit="time")`.

    Raises:
        ArgumentError: weight or target are not above 0.
    """

    weight: float = 1.0
    target: float | None = None
    costs: "CostModel | None" = None

    def __post_init__(self) -> None:
        positive("weight", self.weight)
        if self.target is not None:
            positive("target", self.target)

    def parts(
        self,
        trace: "Trace",
        targets: Tensor,  # noqa: ARG002
        inputs: Inputs | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        cost = widen(trace.cost if self.costs is None else self.costs.expected(trace.decisions)).mean()
        loss = cost if self.target is None else (cost - self.target) ** 2
        return {"sparsity/cost": self.weight * loss}


@dataclass(frozen=True, kw_only=True)
class LearnedConfidence(Objective):
    """In regression, exits learn how well they do: `weight * sum_i mean((confidence_i - t_i)^2)`.

    `t_i = exp(-e_i / s)`, with e_i the sample's squared error at exit i and s its mean over batch,
    exits and full depth, both taken as constants. The loss is least where the confidence is the
    mean of t_i given the features: confidences fall as errors rise, and compare between exits.

    Args:
        weight: Factor, above 0.

    Raises:
        ArgumentError: weight is not above 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        positive("weight", self.weight)

    def parts(
        self,
        trace: "Trace",
        targets: Tensor,
        inputs: Inputs | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """See `Objective.parts`."""
        predictions = {**trace.exits, "final": trace.final}
        errors = {name: sample_errors(prediction.detach(), targets) for name, prediction in predictions.items()}
        scale = torch.stack(list(errors.values())).mean().clamp(min=1e-12)
        return {
            f"confidence/{name}": self.weight
            * F.mse_loss(widen(trace.confidence[name]), torch.exp(-errors[name] / scale))
            for name in trace.exits
        }


def _check_weights(weights: Weights) -> None:
    if weights is None:
        return
    values: object = weights.values() if isinstance(weights, Mapping) else weights
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ArgumentError("weights", found=repr(weights), expected="one number for each exit and the full depth")
    not_negative("weights", values)


def _resolve(weights: Weights, names: list[str]) -> dict[str, float]:
    """One weight for each of the names."""
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, Mapping):
        if unknown := [name for name in weights if name not in names]:
            raise ArgumentError("weights", found=unknown, expected=f"names out of {names}")
        return {name: weights.get(name, 1.0) for name in names}
    if len(weights) != len(names):
        raise ArgumentError("weights", found=f"{len(weights)} numbers", expected=f"{len(names)}, for {names}")
    return dict(zip(names, weights, strict=True))


def _leaf_like(output: object, prediction: Tensor) -> Tensor:
    """The leaf of a teacher's output that says the same thing as a prediction."""
    shapes = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point() and leaf.shape == prediction.shape:
                return leaf
            shapes.append(list(leaf.shape))
    raise ArgumentError(
        "teacher",
        found=f"outputs of shape {shapes}",
        expected=f"a model whose prediction has the shape {list(prediction.shape)}",
    )
