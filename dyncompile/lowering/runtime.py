"""What a lowered program does between its segments: split rows by decision, gather them, put results together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from dyncompile.lowering.plan import Segment

if TYPE_CHECKING:
    from dyncompile.lowering.inductor import CompiledSegment

Override = Callable[[str, Tensor, Tensor | None, int], Tensor]
"""Replaces a decision, given its name, its value, which of all rows it is about (None: all), and how many there are.

One with a true attribute `fixed` says the same in every call of a batch size, or always returns the value that it is
given: it may be asked once, about all rows.
"""

Segments = Mapping[Segment, Callable[..., Sequence[Tensor]]]


def is_compiled(segment: object) -> "TypeGuard[CompiledSegment]":
    """Whether inductor made a segment; asked without loading inductor, which takes seconds."""
    return hasattr(segment, "formats")


@dataclasses.dataclass(slots=True)
class Run:
    """One call of a lowered model.

    Attributes:
        batch: Samples in the call.
        rows: Rows that ran, per region; filled by the program.
        override: Replaces a decision.
        buckets: Batch sizes that parts of a batch are filled up to, ascending; empty for none.
    """

    batch: int
    override: Override | None = None
    buckets: tuple[int, ...] = ()
    rows: dict[str, int] = dataclasses.field(default_factory=dict)

    def padded(self, index: Tensor) -> Tensor:
        """Rows filled up to the next bucket by repeating the first one."""
        size = index.shape[0]
        bucket = next((b for b in self.buckets if b >= size), size)
        return index if bucket == size else torch.cat((index, index[:1].expand(bucket - size)))


def choice(decision: Tensor, arms: int, wanted: tuple[bool, ...]) -> tuple[int, Sequence[Tensor | None]]:
    """How rows split over the arms; waits for the device once, for a route once more an arm.

    Args:
        decision: `[n]` bool, or arms as integers.
        arms: How many there are.
        wanted: For which arms the rows are needed.

    Returns:
        The arm that all rows take, or -1 and the rows of each arm, None where nobody wants them.
    """
    if arms == 2 and decision.dtype == torch.bool:
        first = 0 if wanted[0] else 1
        rows = (decision if first else decision.logical_not()).nonzero().view(-1)
        if rows.shape[0] == decision.shape[0]:
            return first, ()
        if not rows.shape[0]:
            return 1 - first, ()
        others = (decision.logical_not() if first else decision).nonzero().view(-1) if wanted[1 - first] else None
        return -1, ((others, rows) if first else (rows, others))
    sizes = torch.bincount(decision, minlength=arms).tolist()
    if max(sizes) == decision.shape[0]:
        return sizes.index(max(sizes)), ()
    ordered = decision.argsort(stable=True).split(sizes)
    return -1, [rows if need else None for rows, need in zip(ordered, wanted, strict=True)]


def within(index: Tensor | None, entries: int) -> Tensor | None:
    """Rows of which each holds several finer ones, as the finer ones."""
    if index is None or entries == 1:
        return index
    return (index.unsqueeze(1) * entries + torch.arange(entries, device=index.device)).view(-1)


def gather(tensor: Tensor, index: Tensor, dim: int | None, entries: int = 1) -> Tensor:
    """Some rows.

    Args:
        tensor: Rows along `dim`, each of several entries; without a `dim` it is the same for all.
        index: `[n]` rows.
        dim: Where they are.
        entries: How many entries a row owns.

    Returns:
        The same layout, with n rows.
    """
    if dim is None:
        return tensor
    if entries != 1:
        parts: Tensor = tensor.unflatten(dim, (-1, entries))
        return parts.index_select(dim, index).flatten(dim, dim + 1)
    if dim == 0 and tensor.dim() == 4 and not tensor.is_contiguous():
        # Copy whole rows: index_select would rewrite a channels-last tensor as a contiguous one.
        rows = tensor.permute(0, 2, 3, 1).index_select(0, index)
        return rows.permute(0, 3, 1, 2)
    return tensor.index_select(dim, index)


def scatter(base: Tensor, index: Tensor, rows: Tensor, dim: int, entries: int = 1) -> None:
    """Write some rows into a tensor: the inverse of `gather`."""
    if entries != 1:
        base = base.unflatten(dim, (-1, entries))
        rows = rows.unflatten(dim, (-1, entries))
    elif dim == 0 and base.dim() == 4 and not base.is_contiguous():
        base, rows = base.permute(0, 2, 3, 1), rows.permute(0, 2, 3, 1)
    base.index_copy_(dim, index, rows)


def merge(base: Tensor | None, parts: Sequence[tuple[Tensor, Tensor]], dim: int, entries: int, count: int) -> Tensor:
    """One value from the arms' parts.

    Args:
        base: Written into; None makes a new one, of which the parts cover every row.
        parts: Rows `[n]` and their values; values of more rows than that only fill a bucket.
        dim: Where the rows are.
        entries: How many entries a row owns.
        count: Rows of the result.
    """
    for index, part in parts:
        size = index.shape[0] * entries
        rows = part if part.shape[dim] == size else part.narrow(dim, 0, size)
        if base is None:
            base = _like(rows, dim, count * entries)
        scatter(base, index, rows, dim, entries)
    assert base is not None
    return base


def _like(part: Tensor, dim: int, size: int) -> Tensor:
    """An empty tensor of another number of rows, in channels-last layout where the part has it."""
    shape: list[Any] = list(part.shape)
    shape[dim] = size
    if part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
    return part.new_empty(shape)
