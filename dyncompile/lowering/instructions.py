"""What a lowered program does, step by step: written by `program`, carried out by `source` and by `native`.

Values lie in registers, numbered from 0 in each block of its own; a block's inputs come first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, memory_format

from dyncompile.lowering.runtime import Run

Program = Callable[[list[Tensor], int, Tensor | None, Run], tuple[Tensor, ...]]
"""Of the inputs, the number of samples, which of the batch they are (None: all), and the run; returns the outputs."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What a segment reads.

    Attributes:
        register: Where it lies.
        layout: Memory format that it is brought into; None where it has that.
        copied: Whether it is copied anyhow, since the segment writes into it.
    """

    register: int
    layout: memory_format | None = None
    copied: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """Run a segment.

    Attributes:
        segment: What is called.
        arguments: What it reads.
        dead: Registers that nobody reads afterwards: emptied before the segment runs.
        results: Where its outputs go.
    """

    segment: Callable[..., Any]
    arguments: tuple[Argument, ...]
    dead: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Replace a decision of which a segment does a share, if the run says so, and note how much that is.

    Attributes:
        decision: Where it lies.
        name: What it is called.
        rows: Decisions a sample.
        finer: Decisions a row of the block.
        real: Where it lies which of them are there; None: all.
    """

    decision: int
    name: str
    rows: int
    finer: int
    real: int | None


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Empty registers."""

    registers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Rows of a value.

    Attributes:
        register: Where it lies.
        dim: Where its rows are; None if it is the same for all.
        entries: Of that dim, a row.
    """

    register: int
    dim: int | None
    entries: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """What an arm delivers of a merged value: an output of its block, or rows of a value that was there.

    Attributes:
        arm: Which.
        result: Position among the block's outputs; None if it computes nothing.
        rows: What is gathered if it computes nothing.
    """

    arm: int
    result: int | None
    rows: Gather | None


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One value from the arms' parts.

    Attributes:
        target: Where it goes.
        base: Where the value lies that the parts are written into; None: they cover every row.
        copied: Whether the base is copied first.
        parts: What is written.
        dim: Where the rows are.
        entries: Of that dim, a row.
    """

    target: int
    base: int | None
    copied: bool
    parts: tuple[Part, ...]
    dim: int
    entries: int


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm of a conditional.

    Attributes:
        code: What it computes; None for nothing.
        wanted: Whether its rows must be known where arms differ.
        moved: If all rows take it, registers that are filled with values from outside, and those.
        given: The block's inputs, and whether they are copied, if all rows take it.
        results: If all rows take it, registers that are filled with outputs of the block, and their positions.
        gathered: The block's inputs where arms differ.
    """

    code: "Code | None" = None
    wanted: bool = True
    moved: tuple[tuple[int, int], ...] = ()
    given: tuple[tuple[int, bool], ...] = ()
    results: tuple[tuple[int, int], ...] = ()
    gathered: tuple[Gather, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Split:
    """Run each arm on the rows that take it, and put the results together.

    Attributes:
        decision: Where it lies.
        name: What it is called.
        rows: Decisions a sample.
        finer: Decisions a row of the block.
        arms: What is chosen between.
        dead: Registers that nobody reads afterwards: emptied before an arm runs on all rows.
        ungathered: Those of them that no merge reads: emptied before arms run on some rows.
        merged: Values that the conditional delivers.
    """

    decision: int
    name: str
    rows: int
    finer: int
    arms: tuple[Arm, ...]
    dead: tuple[int, ...]
    ungathered: tuple[int, ...]
    merged: tuple[Merge, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    """What a block does.

    Attributes:
        name: Of the region.
        inputs: How many it takes.
        registers: How many it needs.
        steps: In order.
        outputs: Registers of what it returns.
    """

    name: str
    inputs: int
    registers: int
    steps: tuple[Call | Share | Drop | Split, ...]
    outputs: tuple[int, ...]
