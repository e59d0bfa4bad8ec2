"""Feed-forward layers of which each sample or token computes the groups of neurons that its router opens."""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, fx, nn

from dyncompile.kernel_costs import KernelCosts, kernel_costs, seconds
from dyncompile.nn.channelwise import Results
from dyncompile.nn.grouped_gemm import GroupedMatrices, GroupedRows

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_PROBE = 150
"""Rows, at least, of which the clock tells more than what a call takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronLayout:
    """Where a feed-forward layer's input, neurons and output have the rows that decide, and their channels.

    Attributes:
        batch_dim: Of the samples.
        channel_dim: Of the channels.
        by_token: Every token is a row; samples come first then, channels last. Else every sample is one.
    """

    batch_dim: int
    channel_dim: int
    by_token: bool

    def matrix(self, x: Tensor) -> Tensor:
        """As `[R, P, D]`: P positions of each of R rows."""
        if self.by_token:
            return x.reshape(-1, 1, x.shape[-1])
        if not self._ends(x):
            x = x.movedim((self.batch_dim, self.channel_dim), (0, -1))
        return x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)

    def restored(self, rows: Tensor, x: Tensor) -> Tensor:
        """`[R, P, E]` in the shape, and the order in memory, that the layer gives for x."""
        if self.by_token or self._ends(x):
            return rows.reshape(*x.shape[:-1], rows.shape[-1])
        ends = (self.batch_dim, self.channel_dim), (0, -1)
        y = rows.reshape(*x.movedim(*ends).shape[:-1], rows.shape[-1]).movedim(*ends[::-1])
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _ends(self, x: Tensor) -> bool:
        """Whether rows come first and channels last anyway."""
        return self.batch_dim == 0 and self.channel_dim == x.dim() - 1


class NeuronMask(nn.Module):
    """Multiplies each neuron with the decision of its group, in training; in evaluation nothing is done.

    Args:
        groups: The neurons of each group.
        layout: Of the layer.
    """

    group_of: Tensor

    def __init__(self, groups: Sequence[Sequence[int]], layout: NeuronLayout) -> None:
        super().__init__()
        group_of = torch.empty(sum(map(len, groups)), dtype=torch.int64)
        for g, members in enumerate(groups):
            group_of[list(members)] = g
        self.register_buffer("group_of", group_of, persistent=False)
        self.groups, self.layout = len(groups), layout

    def forward(self, hidden: Tensor, decision: Tensor) -> Tensor:
        """Mask the neurons by decisions `[R * G]`, the groups of a row next to each other."""
        if not self.training:
            return hidden
        mask = decision.view(-1, 1, self.groups).index_select(-1, self.group_of)
        return self.layout.restored(self.layout.matrix(hidden) * mask.to(hidden.dtype), hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronWeights:
    """The parameters of some neurons of a feed-forward layer.

    Attributes:
        firsts: For each first projection its weight `[D, h]` and its bias `[h]` or None.
        second: `[h, E]`.
        bias: Of the second projection, `[E]` or None.
    """

    firsts: Sequence[tuple[Tensor, Tensor | None]]
    second: Tensor
    bias: Tensor | None

    def part(self, start: int, stop: int) -> "NeuronWeights":
        """Those of consecutive neurons."""
        own = slice(start, stop)
        firsts = [(weight[:, own], None if bias is None else bias[own]) for weight, bias in self.firsts]
        return NeuronWeights(firsts=firsts, second=self.second[own], bias=self.bias)


class GatedNeurons(nn.Module):
    """What a feed-forward layer computes from the groups of neurons that each row's router opens.

    Stands in for the layer. In training the layer's own value is already that of the masked neurons; in evaluation a
    row that opens every group has it to the bit.

    Args:
        act: Maps what the first projections make, each `[M, h]` for some neurons, to activations `[M, h]`.
        groups: The neurons of each group, all of one size.
        layout: Of the layer.
        biased: Whether each projection has a bias, the first ones and then the second.
        transposed: Whether each projection's weight lies as `[D, H]`; else as `[H, D, ...]`.
        cuts: Which outputs of its weight each projection makes.
    """

    order: Tensor | None

    def __init__(
        self,
        act: fx.GraphModule,
        groups: Sequence[Sequence[int]],
        *,
        layout: NeuronLayout,
        biased: Sequence[bool],
        transposed: Sequence[bool],
        cuts: Sequence[slice],
    ) -> None:
        super().__init__()
        order = list(itertools.chain.from_iterable(groups))
        self.act = act
        self.groups, self.size, self.layout = len(groups), len(groups[0]), layout
        self.biased, self.transposed, self.cuts = list(biased), list(transposed), list(cuts)
        self.register_buffer("order", None if order == sorted(order) else torch.tensor(order), persistent=False)

    def forward(self, static: Results | None, decision: Tensor, x: Tensor, *weights: Tensor) -> Results:
        """Compute the layer.

        Args:
            static: What the layer made, or None.
            decision: `[R * G]`, the groups of a row next to each other.
            x: The layer's input.
            weights: Of each projection, its weight and then its bias if it has one.
        """
        if self.training and static is not None:
            return static
        opened = decision.view(-1, self.groups)
        rows = self.layout.matrix(x)
        mask = opened.repeat_interleave(self.size, 1).unsqueeze(1)
        found = self.together(rows, [self.arranged(weights)], mask)
        if static is not None:
            found = torch.where(opened.all(1).view(-1, 1, 1), self.layout.matrix(static[0]), found)
        return (self.layout.restored(found, x),)

    def arranged(self, weights: Sequence[Tensor]) -> NeuronWeights:
        """The parameters, of which `forward` takes one after the other, neurons in the order of their groups."""
        given = iter(weights)
        firsts: list[tuple[Tensor, Tensor | None]] = []
        for biased, transposed, cut in zip(self.biased, self.transposed, self.cuts, strict=True):
            weight, bias = next(given), next(given) if biased else None
            weight = weight if transposed else weight.flatten(1).t()
            firsts.append((weight[:, cut], None if bias is None else bias[cut]))
        second, bias = firsts.pop()
        if self.order is not None:
            order = self.order
            firsts = [(w.index_select(1, order), None if b is None else b.index_select(0, order)) for w, b in firsts]
            second = second.index_select(0, order)
        return NeuronWeights(firsts=firsts, second=second, bias=bias)

    def neurons(self, rows: Tensor, parts: Sequence[NeuronWeights]) -> Tensor:
        """The activations of some neurons, from rows `[M, D]`: `[M, h]`."""
        made = []
        for i in range(len(self.biased) - 1):
            pairs = (part.firsts[i] for part in parts)
            values = [rows @ weight if bias is None else torch.addmm(bias, rows, weight) for weight, bias in pairs]
            made.append(values[0] if len(values) == 1 else torch.cat(values, 1))
        return self.act(*made)  # type: ignore[no-any-return]

    def together(self, rows: Tensor, parts: Sequence[NeuronWeights], mask: Tensor | None) -> Tensor:
        """All rows on some neurons.

        Args:
            rows: `[R, P, D]`.
            parts: One or more parts of the neurons.
            mask: `[R, 1, h]`, where a row does not read all of them.

        Returns:
            `[R, P, E]`.
        """
        hidden = self.neurons(rows.flatten(0, 1), parts)
        if mask is not None:
            hidden = _only(hidden.view(*rows.shape[:2], mask.shape[-1]), mask).flatten(0, 1)
        found = parts[0].bias
        hiddens = hidden.split([part.second.shape[0] for part in parts], 1) if len(parts) > 1 else [hidden]
        for own, part in zip(hiddens, parts, strict=True):
            found = own @ part.second if found is None else torch.addmm(found, own, part.second)
        assert found is not None
        return found.view(*rows.shape[:2], found.shape[-1])

    def lowered(self) -> "GatheredNeurons":
        """What runs in its place where groups are skipped for real."""
        return GatheredNeurons(self)


class GatheredNeurons(nn.Module):
    """The same in evaluation, of open groups alone.

    Together, all rows run the groups that any of them opens; apart, each group runs on the rows that open it. What
    takes less time is taken, as either was measured when rows first opened different groups. Frozen, on a processor,
    groups always run apart, by one kernel for all of them.

    Args:
        dense: Whose parts it has.
    """

    def __init__(self, dense: GatedNeurons) -> None:
        super().__init__()
        self.dense = dense
        self.frozen = False
        self._kept: NeuronWeights | _Packed | None = None
        self._known: dict[Hashable, KernelCosts] = {}
        self.eval()

    def freeze(self) -> None:
        """From now on the weights are always the same: what has to be sorted or packed is so once."""
        self.frozen = True

    def forward(self, static: None, decision: Tensor, x: Tensor, *weights: Tensor) -> Results:  # noqa: ARG002 - as in the dense form
        """Compute the layer; arguments as in `GatedNeurons.forward`, the decisions bool."""
        layout = self.dense.layout
        return (layout.restored(self._computed(layout.matrix(x), decision, weights), x),)

    def _computed(self, rows: Tensor, decision: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """`[R, P, E]` of rows `[R, P, D]`."""
        dense = self.dense
        opened = decision.view(-1, dense.groups)
        if self.frozen and self._kept is None:
            self._kept = self._frozen([weight.detach() for weight in weights])
        if isinstance(self._kept, _Packed):
            return self._kept(rows, opened, dense.act)
        whole = self._kept or dense.arranged(weights)
        if torch.compiler.is_exporting():
            return self._apart(rows, [(g, opened[:, g].nonzero().view(-1)) for g in range(dense.groups)], whole)
        counts: list[int] = decision.tolist() if len(opened) == 1 else opened.sum(0).tolist()
        used = [g for g, count in enumerate(counts) if count]
        if self._pays(rows, counts, whole):
            picked = opened.t().nonzero()[:, 1].split([counts[g] for g in used])
            return self._apart(rows, list(zip(used, picked, strict=True)), whole)
        if not used:
            return _constant(rows, whole.bias, whole.second.shape[1])
        mask = None
        if sum(counts) < len(used) * len(rows):
            mask = opened[:, used].repeat_interleave(dense.size, 1).unsqueeze(1)
        parts = [whole.part(start * dense.size, stop * dense.size) for start, stop in _runs(used)]
        return dense.together(rows, parts, mask)

    def _pays(self, rows: Tensor, counts: list[int], whole: NeuronWeights) -> bool:
        """Whether groups apart take less time."""
        samples = len(rows)
        used = sum(count > 0 for count in counts)
        if sum(counts) == used * samples:
            return False
        costs = kernel_costs(self._known, rows.shape[1:], rows, partial(self._measured, rows[:1], whole))
        return used * costs.call + sum(counts) * costs.gathered < costs.call + samples * used * costs.unit

    def _measured(self, row: Tensor, whole: NeuronWeights) -> KernelCosts:
        """Seconds of a call, and more for each group of a row."""
        samples = max(2, -(-_PROBE // row.shape[1]))
        rows = row.expand(samples, -1, -1).contiguous()
        first, every = (torch.arange(len(x), device=x.device) for x in (row, rows))
        call, apart, together = (
            seconds(run, row.device)
            for run in (
                partial(self._apart, row, [(0, first)], whole),
                partial(self._apart, rows, [(0, every)], whole),
                partial(self.dense.together, rows, [whole], None),
            )
        )
        return KernelCosts(
            call=call,
            unit=max(together - call, 0.0) / (samples * self.dense.groups),
            gathered=max(apart - call, 0.0) / samples,
        )

    def _apart(self, rows: Tensor, groups: Sequence[tuple[int, Tensor]], whole: NeuronWeights) -> Tensor:
        """Groups, each on its own rows `[r]`."""
        found, size = _constant(rows, whole.bias, whole.second.shape[1]), self.dense.size
        for g, own in groups:
            part = whole.part(g * size, (g + 1) * size)
            hidden = self.dense.neurons(rows.index_select(0, own).flatten(0, 1), [part])
            made = (hidden @ part.second).to(found.dtype)  # autocast may have lowered it
            found = found.index_add_(0, own, made.view(own.shape[0], *found.shape[1:]))
        return found

    def _frozen(self, weights: Sequence[Tensor]) -> "NeuronWeights | _Packed":
        whole = self.dense.arranged(weights)
        has_kernel = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in weights)
        return _Packed(whole, self.dense.groups) if has_kernel else whole


class _Packed:
    """The parameters of neurons as the kernel reads them that multiplies rows by the matrices of their groups.

    Args:
        whole: Neurons in the order of their groups, all of one size.
        groups: How many.
    """

    def __init__(self, whole: NeuronWeights, groups: int) -> None:
        self.bias = whole.bias
        self.firsts = [
            GroupedMatrices(
                weight.unflatten(1, (groups, -1)).transpose(0, 1), None if b is None else b.view(groups, -1)
            )
            for weight, b in whole.firsts
        ]
        self.second = GroupedMatrices(whole.second.unflatten(0, (groups, -1)))

    def __call__(self, rows: Tensor, opened: Tensor, act: nn.Module) -> Tensor:
        """Compute `[R, P, D]`, each row on the groups that it opens, `[R, G]`: `[R, P, E]`."""
        rows, own = rows.contiguous(), GroupedRows(opened)
        made = [first.gathered(rows, own) for first in self.firsts]
        hidden = act(*(values.flatten(0, 1) for values in made)).view(made[0].shape)
        found = _constant(rows, self.bias, self.second.width)
        self.second.scattered(found, hidden.contiguous(), own)
        return found


def _only(hidden: Tensor, mask: Tensor) -> Tensor:
    """Nought where the mask is false, whatever is there: even what is not a number."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return hidden.where(mask, 0)
    bits = _BITS[hidden.dtype.itemsize]  # takes an eighth of the time
    return (hidden.view(bits) & mask.to(bits).neg()).view(hidden.dtype)


def _constant(rows: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """What a layer of no neurons gives for rows `[R, P, D]`: `[R, P, width]`."""
    if bias is None:
        return rows.new_zeros(*rows.shape[:2], width)
    return bias.expand(*rows.shape[:2], -1).clone(memory_format=torch.contiguous_format)


def _runs(groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where ascending numbers follow each other: start and stop of each run."""
    start = groups[0]
    for before, after in itertools.pairwise((*groups, -1)):
        if after != before + 1:
            yield start, before + 1
            start = after
