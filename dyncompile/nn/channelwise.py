"""Channels that are computed one by one: each sample reads those that its gate opens."""

from collections.abc import Hashable, Iterable
from functools import partial

import torch
from torch import Tensor, fx, nn

from dyncompile.kernel_costs import KernelCosts, kernel_costs, seconds

Results = tuple[Tensor, ...]

_SAMPLES = 4


def entries_of(index: Tensor, entries: int) -> Tensor:
    """The channels of parts: of `[K]` parts of so many consecutive channels `[K * entries]`."""
    return (index.unsqueeze(1) * entries + torch.arange(entries, device=index.device)).flatten()


def masked(x: Tensor, opened: Tensor, entries: int, dim: int, batch_dim: int) -> Tensor:
    """Multiply each channel of a sample with the decision of its part.

    Args:
        x: The channels lie along `dim`, the samples along `batch_dim`.
        opened: `[N, K]` for the K parts that x holds.
        entries: Channels of a part.
        dim: Of x.
        batch_dim: Of x.
    """
    if entries > 1:
        opened = opened.repeat_interleave(entries, 1)
    shape = [1] * x.dim()
    shape[batch_dim], shape[dim] = opened.shape
    return x * (opened if batch_dim < dim else opened.t()).to(x.dtype).reshape(shape)


class ChannelMask(nn.Module):
    """Multiplies each channel with the decision of its part, in training; in evaluation nothing is done.

    Args:
        parts: How many a sample decides for.
        entries: Channels of a part.
        dim: Of the channels.
        batch_dim: Of the samples.
    """

    def __init__(self, parts: int, entries: int, dim: int, batch_dim: int) -> None:
        super().__init__()
        self.parts, self.entries, self.dim, self.batch_dim = parts, entries, dim, batch_dim

    def forward(self, x: Tensor, decision: Tensor) -> Tensor:
        """Mask x by decisions `[N * parts]`."""
        if not self.training:
            return x
        return masked(x, decision.view(-1, self.parts), self.entries, self.dim, self.batch_dim)


class GatedChannels(nn.Module):
    """What layers compute from the channels that each sample's gate opens.

    Stands in for the static layers. In training their own value is already that of the masked channels; in evaluation
    a sample that opens all has it to the bit.

    Args:
        body: `(index, open, *values)`, see `dyncompile.narrowing.Body`.
        parts: How many a sample decides for.
        values: Of each value that the body reads, the dim of the samples; None for weights.
        results: Of each result, the dim of the samples.
    """

    def __init__(self, body: fx.GraphModule, *, parts: int, values: list[int | None], results: list[int]) -> None:
        super().__init__()
        self.body = body
        self.parts, self.values, self.results = parts, values, results

    def forward(self, static: Results | None, decision: Tensor, *values: Tensor) -> Results:
        """Compute the results.

        Args:
            static: What the static layers made, or None.
            decision: `[N * parts]`, the parts of a sample next to each other.
            values: What the layers read, and their weights.
        """
        if self.training and static is not None:
            return static
        opened = decision.view(-1, self.parts)
        found: Results = self.body(torch.arange(self.parts, device=decision.device), opened, *values)
        if static is None:
            return found
        whole = opened.all(1)
        rows = [whole.view([-1 if i == dim else 1 for i in range(v.dim())]) for v, dim in self._with(found)]
        return tuple(torch.where(w, a, b) for w, a, b in zip(rows, static, found, strict=True))

    def _with(self, results: Results) -> Iterable[tuple[Tensor, int]]:
        return zip(results, self.results, strict=True)

    def lowered(self) -> "GatheredChannels":
        """What runs in its place where channels are skipped for real."""
        return GatheredChannels(self)


class GatheredChannels(nn.Module):
    """The same in evaluation: the weights of open channels are gathered, and nothing else is computed.

    The samples of a batch run together on the channels that any of them opens, or in groups that open the same ones,
    whichever takes less time, as was measured when samples first opened different channels.

    Args:
        dense: Whose body and results it has.
    """

    def __init__(self, dense: GatedChannels) -> None:
        super().__init__()
        self.dense = dense
        self._known: dict[Hashable, KernelCosts] = {}
        self.eval()

    def forward(self, static: None, decision: Tensor, *values: Tensor) -> Results:  # noqa: ARG002 - as in the dense form
        """Compute the results; arguments as in `GatedChannels.forward`, the decisions bool."""
        opened = decision.view(-1, self.dense.parts)
        if torch.compiler.is_exporting() or len(opened) == 1:
            return self._run(opened, values)
        patterns, group, sizes = opened.unique(dim=0, return_inverse=True, return_counts=True)
        if len(patterns) > 1:
            costs = kernel_costs(self._known, None, values[0], partial(self._measured, values))
            together = costs.call + costs.unit * len(opened) * int(opened.any(0).count_nonzero())
            apart = costs.call * len(patterns) + costs.gathered * int((patterns.sum(1) * sizes).sum())
            if apart < together:
                return self._grouped(opened, group.argsort(stable=True).split(sizes.tolist()), values)
        return self._run(opened, values)

    def _grouped(self, opened: Tensor, groups: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Results:
        found = []
        for rows in groups:
            pairs = zip(values, self.dense.values, strict=True)
            own = tuple(v if dim is None else v.index_select(dim, rows) for v, dim in pairs)
            found.append(self._run(opened.index_select(0, rows), own))
        order = torch.cat(groups).argsort()
        return tuple(
            torch.cat(parts, dim).index_select(dim, order)
            for parts, dim in zip(zip(*found, strict=True), self.dense.results, strict=True)
        )

    def _run(self, opened: Tensor, values: tuple[Tensor, ...]) -> Results:
        read = opened.any(0)
        # A layer reads at least one channel: the first one, multiplied with nought.
        first = torch.arange(len(read), device=read.device) == 0
        index = (read | (first & ~read.any())).nonzero().view(-1)
        torch._check(index.shape[0] >= 1)  # for who traces this
        return self.dense.body(index, opened.index_select(1, index), *values)  # type: ignore[no-any-return]

    def _measured(self, values: tuple[Tensor, ...]) -> KernelCosts:
        """Seconds of a call, and more for each part of a sample."""

        def run(samples: int, parts: int, *, gathered: bool = False) -> float:
            first = torch.zeros(samples, dtype=torch.int64, device=values[0].device)
            pairs = zip(values, self.dense.values, strict=True)
            own = tuple(v if dim is None else v.index_select(dim, first) for v, dim in pairs)
            opened = torch.arange(self.dense.parts, device=first.device).expand(samples, -1) < parts
            rows = torch.arange(samples, device=first.device)
            apart = partial(self._grouped, opened, (rows,), own)
            return seconds(apart if gathered else partial(self._run, opened, own), first.device)

        call, work = run(1, 1), _SAMPLES * self.dense.parts
        unit, gathered = (max(run(_SAMPLES, self.dense.parts, gathered=g) - call, 0.0) / work for g in (False, True))
        return KernelCosts(call=call, unit=unit, gathered=gathered)
