"""Runs a plan: calls segments, counts decisions, gathers rows, writes results back. As little Python as it takes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dyncompile.graph import Spec, spec
from dyncompile.lowering.plan import Block, Conditional, Segment
from dyncompile.ops import SELECT, arms_of

Override = Callable[[str, Tensor, Tensor | None], Tensor]
"""Replaces a decision, given its name, its value, and which samples it is about (None: all)."""

Segments = Mapping[Segment, Callable[..., Sequence[Tensor]]]
Frame = list[Any]


@dataclasses.dataclass(slots=True)
class Run:
    """One call of a lowered model.

    Attributes:
        rows: Rows that ran, per region.
        override: Replaces a decision, given its name, value and the rows it is about.
        buckets: Batch sizes that parts of a batch are filled up to, ascending; empty for none.
    """

    rows: dict[str, int]
    override: Override | None = None
    buckets: tuple[int, ...] = ()

    def padded(self, index: Tensor) -> Tensor:
        """Rows filled up to the next bucket by repeating the first one."""
        size = index.shape[0]
        bucket = next((b for b in self.buckets if b >= size), size)
        return index if bucket == size else torch.cat((index, index[:1].expand(bucket - size)))


def gather(tensor: Tensor, index: Tensor, found: Spec) -> Tensor:
    """The rows of some samples.

    Args:
        tensor: Shaped as `found` says.
        index: `[n]` samples.
        found: Where the samples are, and how many rows each owns.

    Returns:
        The same layout, with n samples.
    """
    dim = found.batch_dim
    if dim is None:
        return tensor
    if found.rows != 1:
        parts: Tensor = tensor.unflatten(dim, (-1, found.rows))
        return parts.index_select(dim, index).flatten(dim, dim + 1)
    if dim == 0 and tensor.dim() == 4 and not tensor.is_contiguous():
        # Copy whole rows: index_select would rewrite a channels-last tensor as a contiguous one.
        rows = tensor.permute(0, 2, 3, 1).index_select(0, index)
        return rows.permute(0, 3, 1, 2)
    return tensor.index_select(dim, index)


def scatter(base: Tensor, index: Tensor, rows: Tensor, found: Spec) -> None:
    """Write the rows of some samples into a tensor: the inverse of `gather`."""
    dim = found.batch_dim
    if dim is None:
        raise ValueError("no batch dim to scatter along")
    if found.rows != 1:
        base = base.unflatten(dim, (-1, found.rows))
        rows = rows.unflatten(dim, (-1, found.rows))
    elif dim == 0 and base.dim() == 4 and not base.is_contiguous():
        base, rows = base.permute(0, 2, 3, 1), rows.permute(0, 2, 3, 1)
    base.index_copy_(dim, index, rows)


class BlockRunner:
    """A block of the plan, ready to run.

    Values live in a list, the frame; a slot is emptied after its last use, so that memory is held no longer than the
    static model would.
    """

    def __init__(self, block: Block, segments: Segments) -> None:
        self.name = block.name
        self.inputs = block.inputs
        slots = {node: i for i, node in enumerate(block.inputs)}
        for step in block.steps:
            produced = step.outputs if isinstance(step, Segment) else step.selects
            for node in produced:
                slots[node] = len(slots)
        self.padding = len(slots) - len(block.inputs)
        self.outputs = [slots[node] for node in block.outputs]
        needed = set(block.outputs)
        self.steps: list[SegmentRunner | ConditionalRunner] = []
        for step in reversed(block.steps):
            produced = step.outputs if isinstance(step, Segment) else step.selects
            reads = _reads(step)
            dead = [slots[n] for n in {*reads, *produced} if n not in needed and n in slots]
            needed.update(reads)
            if isinstance(step, Segment):
                self.steps.append(SegmentRunner(step, segments[step], slots, dead))
            else:
                self.steps.append(ConditionalRunner(step, segments, slots, dead))
        self.steps.reverse()

    def __call__(self, frame: Frame, samples: Tensor | None, count: int, run: Run) -> list[Tensor]:
        """Run on a frame that holds the inputs.

        Args:
            frame: The inputs; taken over and emptied.
            samples: Which samples of the batch the rows are; None for all.
            count: How many.
            run: Collects what ran.
        """
        run.rows[self.name] = run.rows.get(self.name, 0) + count
        frame.extend([None] * self.padding)
        for step in self.steps:
            step(frame, samples, count, run)
        return [frame[i] for i in self.outputs]


def _reads(step: Segment | Conditional) -> list[fx.Node]:
    if isinstance(step, Segment):
        return step.inputs
    values = [step.unit.decision]
    for arm in step.arms:
        values.extend(arm.inputs if arm else ())
    values.extend(v for select in step.selects for v in arms_of(select))
    return values


class SegmentRunner:
    """Calls one segment."""

    __slots__ = ("call", "dead", "reads", "writes")

    def __init__(
        self,
        step: Segment,
        call: Callable[..., Sequence[Tensor]],
        slots: dict[fx.Node, int],
        dead: list[int],
    ) -> None:
        self.call = call
        self.reads = [slots[n] for n in step.inputs]
        self.writes = [slots[n] for n in step.outputs]
        self.dead = dead

    def __call__(self, frame: Frame, *_: object) -> None:
        results = self.call(*[frame[i] for i in self.reads])
        for slot, value in zip(self.writes, results, strict=True):
            frame[slot] = value
        for slot in self.dead:
            frame[slot] = None


class ConditionalRunner:
    """Carries out the selects of one decision, an arm on the rows that take it."""

    def __init__(self, step: Conditional, segments: Segments, slots: dict[fx.Node, int], dead: list[int]) -> None:
        self.name = step.unit.name
        self.decision = slots[step.unit.decision]
        self.routed = step.selects[0].target is not SELECT
        self.arms = [BlockRunner(arm, segments) if arm else None for arm in step.arms]
        self.reads = [[(slots[n], spec(n)) for n in arm.inputs] if arm else [] for arm in step.arms]
        inside = [{n: i for i, n in enumerate(arm.outputs)} if arm else {} for arm in step.arms]
        # For each select: its slot, its layout, and for each arm (is it a value of this frame, slot or result).
        self.selects = [
            (
                slots[select],
                spec(select),
                [
                    (v not in inside[i], slots[v] if v not in inside[i] else inside[i][v])
                    for i, v in enumerate(arms_of(select))
                ],
            )
            for select in step.selects
        ]
        self.dead = dead
        outer = {where for _, _, sources in self.selects for here, where in sources if here}
        self.gathered = [slot for slot in dead if slot not in outer]
        # The rows of one arm tell how the batch splits; take an arm whose rows are needed anyway.
        self.first = next((i for i, arm in enumerate(self.arms) if arm is not None), 0)
        self.indexed = [
            arm is not None or any(not self._is_base(sources, i) for _, _, sources in self.selects)
            for i, arm in enumerate(self.arms)
        ]

    @staticmethod
    def _is_base(sources: list[tuple[bool, int]], arm: int) -> bool:
        """Whether an arm's value is the one that the others are written into: the first already there."""
        return next((i for i, (here, _) in enumerate(sources) if here), None) == arm

    def __call__(self, frame: Frame, samples: Tensor | None, count: int, run: Run) -> None:
        decision = frame[self.decision]
        if run.override is not None:
            decision = run.override(self.name, decision, samples)
        if count == 1:
            self._whole(int(decision.item()), frame, samples, count, run)
            return
        index = self._rows_of(decision, self.first)
        if index.shape[0] == count:
            self._whole(self.first, frame, samples, count, run)
        elif index.shape[0] == 0 and len(self.arms) == 2:
            self._whole(1 - self.first, frame, samples, count, run)
        else:
            rows = [
                index if arm == self.first else self._rows_of(decision, arm) if needed else None
                for arm, needed in enumerate(self.indexed)
            ]
            whole = [arm for arm, part in enumerate(rows) if part is not None and part.shape[0] == count]
            if whole:
                self._whole(whole[0], frame, samples, count, run)
            else:
                self._mixed(rows, frame, samples, count, run)

    def _rows_of(self, decision: Tensor, arm: int) -> Tensor:
        if self.routed:
            return (decision == arm).nonzero().view(-1)
        return (decision if arm else decision.logical_not()).nonzero().view(-1)

    def _whole(self, arm: int, frame: Frame, samples: Tensor | None, count: int, run: Run) -> None:
        """Every row takes one arm: run it on the values themselves, copy nothing."""
        block = self.arms[arm]
        taken = [(slot, sources[arm]) for slot, _, sources in self.selects]
        outer = [(slot, frame[where]) for slot, (here, where) in taken if here]
        results: list[Tensor] = []
        if block is not None:
            values = [frame[i] for i, _ in self.reads[arm]]
            self._release(frame, self.dead)  # the arm now holds its inputs alone
            results = block(values, samples, count, run)
        self._release(frame, self.dead)
        for slot, value in outer:
            frame[slot] = value
        for slot, (here, where) in taken:
            if not here:
                frame[slot] = results[where]

    def _mixed(
        self,
        rows: list[Tensor | None],
        frame: Frame,
        samples: Tensor | None,
        count: int,
        run: Run,
    ) -> None:
        """Rows differ: run each arm on those that take it, and put the results together."""
        inputs = []
        for index, reads in zip(rows, self.reads, strict=True):
            padded = None if index is None or not index.shape[0] else run.padded(index)
            values = [] if padded is None else [gather(frame[i], padded, found) for i, found in reads]
            inputs.append((padded, values))
        self._release(frame, self.gathered)
        results: list[list[Tensor]] = []
        for block, (index, values) in zip(self.arms, inputs, strict=True):
            if block is None or index is None:
                results.append([])
                continue
            inner = index if samples is None or run.override is None else samples[index]
            results.append(block(values, inner, index.shape[0], run))
        merged = [
            (slot, self._merge(rows, frame, results, sources, found, count)) for slot, found, sources in self.selects
        ]
        self._release(frame, self.dead)
        for slot, value in merged:
            frame[slot] = value

    def _merge(
        self,
        rows: list[Tensor | None],
        frame: Frame,
        results: list[list[Tensor]],
        sources: list[tuple[bool, int]],
        found: Spec,
        count: int,
    ) -> Tensor:
        """One value from the arms' parts; a value that is already there is copied once and written into."""
        base: Tensor | None = None
        for here, where in sources:
            if here:
                base = frame[where].clone()
                break
        for arm, (here, where) in enumerate(sources):
            index = rows[arm]
            if index is None or not index.shape[0] or self._is_base(sources, arm):
                continue
            part = gather(frame[where], index, found) if here else results[arm][where]
            assert found.batch_dim is not None
            size = index.shape[0] * found.rows
            if part.shape[found.batch_dim] != size:
                part = part.narrow(found.batch_dim, 0, size)  # what only fills a bucket
            if base is None:
                shape = list(part.shape)
                shape[found.batch_dim] = count * found.rows
                base = _like(part, shape)
            scatter(base, index, part, found)
        assert base is not None
        return base

    def _release(self, frame: Frame, slots: list[int]) -> None:
        for slot in slots:
            frame[slot] = None


def _like(part: Tensor, shape: list[int]) -> Tensor:
    """An empty tensor of another batch size, in channels-last layout where the part has it."""
    if part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
    return part.new_empty(shape)
