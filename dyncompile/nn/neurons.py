"""Feed-forward layers of which each sample or token computes the groups of neurons that its router opens."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from dyncompile.nn import ragged
from dyncompile.nn.channelwise import Results


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
        x = x.movedim((self.batch_dim, self.channel_dim), (0, -1))
        return x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)

    def restored(self, rows: Tensor, x: Tensor) -> Tensor:
        """`[R, P, E]` in the shape, and the order in memory, that the layer gives for x."""
        if self.by_token:
            return rows.reshape(*x.shape[:-1], rows.shape[-1])
        ends = (self.batch_dim, self.channel_dim), (0, -1)
        y = rows.reshape(*x.movedim(*ends).shape[:-1], rows.shape[-1]).movedim(*ends[::-1])
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


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
    """The parameters of a feed-forward layer, neurons in the order of their groups.

    Attributes:
        firsts: For each first projection its weight `[H, D]` and its bias `[H]` or None.
        second: `[H, E]`.
        bias: Of the second projection, `[E]` or None.
    """

    firsts: Sequence[tuple[Tensor, Tensor | None]]
    second: Tensor
    bias: Tensor | None


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
    ) -> None:
        super().__init__()
        order = list(itertools.chain.from_iterable(groups))
        self.act = act
        self.groups, self.size, self.layout = len(groups), len(groups[0]), layout
        self.biased, self.transposed = list(biased), list(transposed)
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
        every = [(0, self.groups)]
        found = self.together(self.layout.matrix(x), opened, every, self.arranged(weights), masked=True)
        if static is not None:
            found = torch.where(opened.all(1).view(-1, 1, 1), self.layout.matrix(static[0]), found)
        return (self.layout.restored(found, x),)

    def arranged(self, weights: Sequence[Tensor]) -> NeuronWeights:
        """The parameters, of which `forward` takes one after the other."""
        given = iter(weights)
        found: list[tuple[Tensor, Tensor | None]] = []
        for i, (biased, transposed) in enumerate(zip(self.biased, self.transposed, strict=True)):
            weight = next(given)
            weight = weight.t() if transposed else weight.flatten(1)
            bias = next(given) if biased else None
            if i == len(self.biased) - 1:
                return NeuronWeights(firsts=found, second=self._ordered(weight.t()), bias=bias)
            found.append((self._ordered(weight), None if bias is None else self._ordered(bias)))
        raise AssertionError

    def _ordered(self, entries: Tensor) -> Tensor:
        return entries if self.order is None else entries.index_select(0, self.order)

    def neurons(self, rows: Tensor, start: int, stop: int, weights: NeuronWeights) -> Tensor:
        """The activations of consecutive groups, from rows `[M, D]`: `[M, h]`."""
        own = slice(start * self.size, stop * self.size)
        made = (
            rows @ weight[own].t() if bias is None else torch.addmm(bias[own], rows, weight[own].t())
            for weight, bias in weights.firsts
        )
        return self.act(*made)  # type: ignore[no-any-return]

    def together(
        self,
        rows: Tensor,
        opened: Tensor,
        runs: Sequence[tuple[int, int]],
        weights: NeuronWeights,
        *,
        masked: bool,
    ) -> Tensor:
        """All rows on all groups of some runs of neighbours.

        Args:
            rows: `[R, P, D]`.
            opened: `[R, G]`.
            runs: The first group of each, and the one after the last.
            weights: In the order of the groups.
            masked: Whether some row does not open all of these groups; its neurons are set to nought there.

        Returns:
            `[R, P, E]`.
        """
        flat = rows.flatten(0, 1)
        found = weights.bias
        for start, stop in runs:
            hidden = self.neurons(flat, start, stop, weights)
            if masked:
                mask = opened[:, start:stop].repeat_interleave(self.size, 1).unsqueeze(1)
                hidden = hidden.view(*rows.shape[:2], -1).where(mask, 0).flatten(0, 1)
            part = weights.second[start * self.size : stop * self.size]
            found = hidden @ part if found is None else torch.addmm(found, hidden, part)
        if found is None or not runs:
            found = _constant(found, flat, weights.second)
        return found.view(*rows.shape[:2], -1)

    def lowered(self) -> "GatheredNeurons":
        """What runs in its place where groups are skipped for real."""
        return GatheredNeurons(self)


class GatheredNeurons(nn.Module):
    """The same in evaluation, of open groups alone.

    Together, all rows run the groups that any of them opens; apart, each group runs on the rows that open it. What
    takes less time is taken, by the FLOPs of either, the calls of its kernels and what these move.

    Args:
        dense: Whose parts it has.
    """

    def __init__(self, dense: GatedNeurons) -> None:
        super().__init__()
        self.dense = dense
        self.kernels = len(dense.biased) + 2 + sum(node.op.startswith("call") for node in dense.act.graph.nodes)
        self._kept: tuple[object, NeuronWeights] | None = None
        self.eval()

    def forward(self, static: None, decision: Tensor, x: Tensor, *weights: Tensor) -> Results:  # noqa: ARG002 - as in the dense form
        """Compute the layer; arguments as in `GatedNeurons.forward`, the decisions bool."""
        dense = self.dense
        opened = decision.view(-1, dense.groups)
        rows = dense.layout.matrix(x)
        if torch.compiler.is_exporting():
            picked = [opened[:, g].nonzero().view(-1) for g in range(dense.groups)]
            return (dense.layout.restored(self._apart(rows, picked, dense.arranged(weights)), x),)
        own = self._arranged(weights)
        counts = opened.sum(0).tolist()
        if self._together(rows, counts, own):
            masked = any(0 < count < len(rows) for count in counts)
            found = dense.together(rows, opened, list(_runs(counts)), own, masked=masked)
        else:
            found = self._apart(rows, opened.t().nonzero()[:, 1].split(counts), own)
        return (dense.layout.restored(found, x),)

    def _together(self, rows: Tensor, counts: list[int], weights: NeuronWeights) -> bool:
        """Whether to run all rows together."""
        used = sum(count > 0 for count in counts)
        ends = rows.shape[2] + weights.second.shape[1]
        neurons = 2 * self.dense.size * (len(weights.firsts) * rows.shape[2] + weights.second.shape[1])
        calls = used * self.kernels * ragged.CALL_FLOPS
        apart = rows.shape[1] * sum(counts) * (neurons + ends * ragged.MOVE_FLOPS) + calls
        return bool(rows.shape[1] * len(rows) * used * neurons <= apart)

    def _apart(self, rows: Tensor, picked: Sequence[Tensor], weights: NeuronWeights) -> Tensor:
        """Each group on its own rows `[r]`."""
        found = _constant(weights.bias, rows.flatten(0, 1), weights.second).view(*rows.shape[:2], -1)
        for g, own in enumerate(picked):
            if torch.compiler.is_exporting() or len(own):
                hidden = self.dense.neurons(rows.index_select(0, own).flatten(0, 1), g, g + 1, weights)
                part = hidden @ weights.second[g * self.dense.size : (g + 1) * self.dense.size]
                found = found.index_add_(0, own, part.view(-1, *found.shape[1:]))
        return found

    def _arranged(self, weights: Sequence[Tensor]) -> NeuronWeights:
        """The parameters as they are read fastest, made again when they change."""
        if any(weight.is_inference() for weight in weights):  # nobody can tell whether these change
            return self.dense.arranged(weights)
        key = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if self._kept is None or self._kept[0] != key:
            found = self.dense.arranged([weight.detach() for weight in weights])
            self._kept = (key, dataclasses.replace(found, second=found.second.contiguous()))
        return self._kept[1]


def _constant(bias: Tensor | None, rows: Tensor, second: Tensor) -> Tensor:
    """What a layer of no neurons gives for rows `[M, D]`: `[M, E]`."""
    if bias is None:
        return rows.new_zeros(rows.shape[0], second.shape[1])
    return bias.expand(rows.shape[0], -1).clone(memory_format=torch.contiguous_format)


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where numbers above nought follow each other: start and stop of each run."""
    start = 0
    for used, members in itertools.groupby(counts, bool):
        stop = start + len(list(members))
        if used:
            yield start, stop
        start = stop
