"""Sequences of which each sample keeps some steps, run by torch's own recurrent kernels over those steps alone."""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from dyncompile.capture.recurrent import KERNELS, RecurrentLayer
from dyncompile.kernel_costs import KernelCosts, kernel_costs, seconds

_SAMPLES, _STEPS = 8, 16

_known: dict[Hashable, KernelCosts] = {}


def compacted(kept: Tensor, *, batch_first: bool, reverse: bool = False) -> "Alone | Ragged":
    """The kept steps of a batch; arguments as of `Ragged`."""
    kind = Alone if kept.shape[0] == 1 else Ragged
    return kind(kept, batch_first=batch_first, reverse=reverse)


class Alone:
    """The kept steps of a batch of one, where nothing has to be ordered; as `Ragged`, in a third of the operations."""

    def __init__(self, kept: Tensor, *, batch_first: bool, reverse: bool = False) -> None:
        self.batch_first = batch_first
        steps = kept[0].flip(0) if reverse else kept[0]
        self.source = steps.nonzero().squeeze(1)
        spread = steps.cumsum(0)
        if reverse:
            self.source, spread = kept.shape[1] - 1 - self.source, spread.flip(0)
        self.spread = spread

    def run(
        self,
        form: RecurrentLayer,
        x: Tensor,
        state: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        *,
        exact: bool,  # noqa: ARG002 - it always is
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `Ragged.run`."""
        outputs, final = state[0], state
        if len(self.source):
            part = x.flatten(0, 1).index_select(0, self.source).unsqueeze(1)
            given = [s.unsqueeze(0) for s in state]
            hx = given if len(given) > 1 else given[0]
            out, *after = KERNELS[form.mode](part, hx, weights, form.bias, 1, 0.0, False, False, False)
            outputs = torch.cat((outputs, out.squeeze(1)))
            final = (outputs[-1:], *(s[0] for s in after[1:]))
        spread = outputs.index_select(0, self.spread)
        return spread.unsqueeze(0 if self.batch_first else 1), final


class Ragged:
    """The kept steps of a batch, moved together.

    Samples are ordered by how many steps they keep, most first, so that those which still run are always the first
    ones. The steps are cut into stretches, each one call of a kernel on the samples that reach it.

    Args:
        kept: `[N, T]` bool.
        batch_first: Whether sequences are `[N, T, D]`, else `[T, N, D]`.
        reverse: Whether the sequence is read from its end.
    """

    def __init__(self, kept: Tensor, *, batch_first: bool, reverse: bool = False) -> None:
        self.batch_first = batch_first
        self.reverse = reverse
        self.batch, self.length = kept.shape
        kept = kept.flip(1) if reverse else kept
        done = kept.cumsum(1)
        count = done[:, -1]
        order = count.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(self.batch, device=kept.device)
        self.order, self.rank = order, rank
        self.counts: list[int] = count[order].tolist()
        sample, step = kept.nonzero(as_tuple=True)
        # Which row of the sequence the k-th kept step of a sample is.
        place = (done[sample, step] - 1) * self.batch + rank[sample]
        when = self.length - 1 - step if reverse else step
        row = sample * self.length + when if batch_first else when * self.batch + sample
        self.source = kept.new_zeros(self.counts[0] * self.batch, dtype=torch.int64).index_copy_(0, place, row)
        # Row 0 of the outputs is the state before the first step: the output until a step is kept.
        spread = done * self.batch + rank.unsqueeze(1)
        self.last = spread[:, -1]
        spread = spread.flip(1) if reverse else spread
        self.spread = (spread if batch_first else spread.t()).flatten()

    def run(
        self, form: RecurrentLayer, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], *, exact: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run one direction of a layer over the kept steps.

        Args:
            form: The layer.
            x: The whole sequence.
            state: Before the first step, `[N, ...]` each.
            weights: Of the direction.
            exact: Whether the cell state after a sample's last step is asked for; else it is left out.

        Returns:
            The output for every step, in the layout of `x`; and the final state, `[N, ...]` each.
        """
        now = [s.index_select(0, self.order) for s in state]
        longest = self.counts[0]
        compact = x.reshape(-1, x.shape[-1]).index_select(0, self.source).view(longest, self.batch, x.shape[-1])
        outputs = compact.new_empty(1 + longest, *now[0].shape)
        outputs[0] = now[0]
        costs = _costs(form, x, now, weights)
        exact = exact or len(now) == 1
        for start, end, rows in self._stretches(costs.call / costs.unit, every=exact and len(now) > 1):
            given = [s[:rows].unsqueeze(0) for s in now]
            part = compact[start:end, :rows]
            hx = given if len(given) > 1 else given[0]
            out, *after = KERNELS[form.mode](part, hx, weights, form.bias, 1, 0.0, False, False, False)
            outputs[1 + start : 1 + end, :rows] = out
            for old, new in zip(now, after, strict=True):
                old[:rows] = new[0]
        flat = outputs.view(-1, outputs.shape[-1])
        out = flat.index_select(0, self.spread)
        leading = (self.batch, self.length) if self.batch_first else (self.length, self.batch)
        # Where samples ended inside a stretch their cell state went on; their output did not.
        final = [flat.index_select(0, self.last), *(s.index_select(0, self.rank) for s in now[1:] if exact)]
        return out.view(*leading, -1), tuple(final)

    def _stretches(self, worth: float, *, every: bool) -> Iterator[tuple[int, int, int]]:
        """(first step, end, samples) of each call.

        Args:
            worth: Steps of a sample that may be wasted to save a call.
            every: Cut wherever a sample ends, so that its final state can be read.
        """
        ends = sorted({c for c in self.counts if c})
        start, rows, waste = 0, self._reach(0), 0.0
        for end, following in zip_longest(ends, ends[1:]):
            waste += 0 if following is None else (rows - self._reach(end)) * (following - end)
            if every or following is None or waste > worth:
                yield start, end, rows
                start, rows, waste = end, self._reach(end), 0.0

    def _reach(self, step: int) -> int:
        """How many samples keep more than `step` steps."""
        return bisect_left(self.counts, -step, key=lambda c: -c)


def _costs(form: RecurrentLayer, x: Tensor, state: Sequence[Tensor], weights: tuple[Tensor, ...]) -> KernelCosts:
    """Seconds of a call over one direction of a layer, and more for each step of a sample."""

    def run(samples: int, steps: int) -> float:
        part = x.new_zeros(steps, samples, x.shape[-1])
        given = [s.new_zeros(1, samples, *s.shape[1:]) for s in state]
        hx = given if len(given) > 1 else given[0]
        call = partial(KERNELS[form.mode], part, hx, weights, form.bias, 1, 0.0, False, False, False)
        return seconds(call, x.device)

    def measure() -> KernelCosts:
        call, longer = run(1, 1), run(_SAMPLES, _STEPS)
        unit = max(longer - call, 1e-9) / (_SAMPLES * _STEPS)
        return KernelCosts(call=call, unit=unit, gathered=unit)

    return kernel_costs(_known, (form.mode, form.bias, *(w.shape for w in weights)), x, measure)
