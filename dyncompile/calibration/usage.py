"""What gates did: which work ran for which sample, and inputs to show beside it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dyncompile.cost import guard_probability
from dyncompile.data import Inputs, call
from dyncompile.module import DynamicModule, decision_owners, decision_parts, decision_routes, decisions_within

_SIDE = 96
_EXAMPLES = 240
_FEW_PARTS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Usage:
    """What ran for M samples.

    Attributes:
        ran: For each decision of a gate that is on, in order of execution: whether what it controls ran, `[M]`, or for
            each of a sample's r rows (frames, tokens) `[M, r]`. 0 or 1, or of a route with K arms k / (K - 1) for arm
            k. What lies behind an exit that the sample took, or in a block that another gate skipped, did not run. NaN
            at the steps that a packed sequence does not have. Of a decision that holds one for each of a few parts,
            `neurons0.0`, `neurons0.1`, ...; of more than 16, as of channels, the share of them that ran.
        groups: Decisions by the pass that inserted their gates.
        labels: Class of each sample, `[M]`; None where samples have not exactly one.
        examples: Inputs of some of the samples, by their index: an image `[C, H, W]`, a sequence `[T, D]`, a video
            `[T, C, H, W]` or token ids `[T]`.
    """

    ran: Mapping[str, NDArray[np.float32]]
    groups: Mapping[str, tuple[str, ...]]
    labels: NDArray[np.intp] | None
    examples: Mapping[int, NDArray[np.float32]]

    @property
    def rates(self) -> dict[str, float]:
        """By decision, the share of the samples for which it ran."""
        return {name: float(np.nanmean(ran, dtype=np.float64)) for name, ran in self.ran.items()}


def work(
    dyn: DynamicModule,
    decisions: Mapping[str, NDArray[Any]],
    leave: NDArray[np.intp],
    enabled: Sequence[str],
) -> dict[str, NDArray[np.float32]]:
    """Whether what each gate controls ran; see `Usage.ran`.

    Args:
        dyn: A dynamic model, its gates set as they were when they decided.
        decisions: What gates decided, `[M]` or `[M, r]`.
        leave: Index of the exit at which each sample leaves, `[M]`; the number of exits for the end.
        enabled: Exits that are used.
    """
    made = {name: torch.from_numpy(np.asarray(value)) for name, value in decisions.items()}
    left = {name: torch.from_numpy(leave == index) for index, name in enumerate(dyn.exits)}
    units = {unit.name: unit for region in dyn.cost_model(list(enabled)).regions for unit, _ in region.guard}
    routes, within = decision_routes(dyn.graph.fx), decisions_within(dyn.graph.fx)
    parts = decision_parts(dyn.graph.fx)
    found = {}
    for name, value in made.items():
        if name not in units or ("real" in units[name].decision.meta and name not in within):
            continue  # its gate is off, or it says which steps are there
        highest = routes.get(name, 2) - 1
        activation = value.float() / highest
        reached = guard_probability(units[name].guard, {**made, **left}, len(leave))
        if reached.dim() < activation.dim():
            reached = reached.unsqueeze(1)
        ran = activation * reached
        if name in within:
            ran = ran.masked_fill(~made[within[name]].bool(), torch.nan)
        if name not in parts:
            found[name] = ran.numpy()
            continue
        apart = ran.unflatten(1, (-1, parts[name]))
        apart = apart.squeeze(1) if apart.shape[1] == 1 else apart  # of the sample as a whole
        columns = apart.unbind(-1) if parts[name] <= _FEW_PARTS else [apart.mean(-1)]
        named = [f"{name}.{part}" for part in range(len(columns))] if len(columns) > 1 else [name]
        found.update((label, column.numpy()) for label, column in zip(named, columns, strict=True))
    return found


def decisions_by_group(
    dyn: DynamicModule, groups: Mapping[str, Sequence[str]], names: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Those of the decisions (or their parts) `names` that each group's gates make, in order of execution."""
    owners = decision_owners(dyn.graph.fx)
    found = {
        group: tuple(name for name in names if owners[name if name in owners else name.rpartition(".")[0]] in gates)
        for group, gates in groups.items()
    }
    return {group: made for group, made in found.items() if made}


def batch_first(dyn: DynamicModule, inputs: Inputs) -> list[Tensor]:
    """The tensors of a batch of inputs that have rows of samples, with these in dim 0."""
    tensors = call(lambda *args, **kwargs: dyn.graph.bind(args, kwargs), inputs)
    return [t.movedim(dim, 0) for t, dim in zip(tensors, dyn.graph.batch_dims, strict=True) if dim is not None]


class Examples:
    """Keeps some inputs while the data pass by: of all samples, each as likely as any other.

    Args:
        count: How many.
        seed: Of the draw.
    """

    def __init__(self, count: int = _EXAMPLES, seed: int = 0) -> None:
        self.count = count
        self._draw = np.random.default_rng(seed)
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._places: list[int] = []
        self._seen = 0

    def add(self, inputs: Sequence[Tensor], counted: Tensor) -> None:
        """Look at one batch.

        Args:
            inputs: `[N, ...]` each (`batch_first`); the first that can be drawn is kept from, tokens last.
            counted: Which samples are looked at, `[N]`; the others have no index.
        """
        shown = sorted(filter(_can_be_shown, inputs), key=lambda x: not x.is_floating_point())
        if shown:
            for row in counted.nonzero()[:, 0].tolist():
                self._offer(self._seen, shown[0][row])
                self._seen += 1
        else:
            self._seen += int(counted.sum())

    def _offer(self, index: int, value: Tensor) -> None:
        """Reservoir sampling (algorithm R)."""
        if len(self._places) < self.count:
            self._places.append(index)
        else:
            place = int(self._draw.integers(index + 1))
            if place >= self.count:
                return
            del self._kept[self._places[place]]
            self._places[place] = index
        self._kept[index] = _small(value)

    def of(self, samples: NDArray[np.intp]) -> dict[int, NDArray[np.float32]]:
        """The inputs of those of `samples` that were kept, by their place in it."""
        return {i: self._kept[index] for i, index in enumerate(samples.tolist()) if index in self._kept}


def _can_be_shown(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return tensor.ndim == 2 and tensor.dtype != torch.bool and not tensor.is_complex()
    if tensor.ndim not in (3, 4, 5):
        return False
    return tensor.ndim == 3 or (tensor.shape[-3] in (1, 3) and min(tensor.shape[-2:]) > 1)


def _small(value: Tensor) -> NDArray[np.float32]:
    value = value.detach().float()
    if value.ndim > 2 and (side := max(value.shape[-2:])) > _SIDE:
        size = [max(1, round(n * _SIDE / side)) for n in value.shape[-2:]]
        value = F.interpolate(value if value.ndim == 4 else value[None], size, mode="area").reshape(
            *value.shape[:-2], *size
        )
    return np.asarray(value.cpu().numpy()).copy()
