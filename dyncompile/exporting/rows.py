"""Rows of a batch in ONNX: find those that take an arm, gather them, write them back."""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import fx

from dyncompile.exporting.scope import Scope
from dyncompile.graph import Spec
from dyncompile.lowering.plan import Conditional


def indices(scope: Scope, taken: ir.Value) -> ir.Value:
    """`[k, 1]`: where a mask `[R]` is true."""
    return scope.op("Transpose", scope.op("NonZero", taken), perm=[1, 0])  # type: ignore[no-any-return]


def any_of(scope: Scope, index: ir.Value) -> ir.Value:
    """Whether there is a row among `[k, 1]`."""
    return scope.op("Greater", scope.op("Size", index), scope.constant(0))  # type: ignore[no-any-return]


def gathered(scope: Scope, value: ir.Value, index: ir.Value, found: Spec, rows: int) -> ir.Value:
    """Some rows of a value.

    Args:
        scope: The graph that does it.
        value: What `found` describes; without a batch dim it is the same for all.
        index: `[k, 1]` rows.
        found: Its shape.
        rows: How many rows a sample has; each may own several entries.
    """
    dim = found.batch_dim
    if dim is None:
        return value
    whole = found.rows == rows
    value = value if whole else _split(scope, value, found, rows)
    if dim:
        value = scope.op("Gather", value, scope.op("Reshape", index, scope.constant([-1])), axis=dim)
    else:
        value = scope.op("GatherND", value, index)
    return value if whole else _joined(scope, value, found)


def scattered(scope: Scope, base: ir.Value, index: ir.Value, part: ir.Value, found: Spec, rows: int) -> ir.Value:
    """A value with some of its rows replaced: the inverse of `gathered`.

    Args:
        scope: The graph that does it.
        base: What is written over.
        index: `[k, 1]` rows.
        part: Their values.
        found: Shape of the base.
        rows: How many rows a sample has.
    """
    dim = found.batch_dim or 0
    whole = found.rows == rows
    if not whole:
        base, part = _split(scope, base, found, rows), _split(scope, part, found, rows)
    rank = len(found.shape) + (not whole)
    first = [dim, *(i for i in range(rank) if i != dim)]
    if dim:
        base, part = (scope.op("Transpose", v, perm=first) for v in (base, part))
    result = scope.op("ScatterND", base, index, part)
    if dim:
        result = scope.op("Transpose", result, perm=[first.index(i) for i in range(rank)])
    return result if whole else _joined(scope, result, found)


def where(scope: Scope, mask: ir.Value, value: ir.Value, other: ir.Value, found: Spec, rows: int) -> ir.Value:
    """Some rows of one value, the rest of another.

    Args:
        scope: The graph that does it.
        mask: `[R]`, the rows of `value`.
        value: What `found` describes.
        other: Another such value.
        found: Their shape.
        rows: How many rows a sample has; each may own several entries.
    """
    dim = found.batch_dim or 0
    whole = found.rows == rows
    if not whole:
        value, other = _split(scope, value, found, rows), _split(scope, other, found, rows)
    rank = len(found.shape) + (not whole)
    if rank > 1:
        mask = scope.op("Unsqueeze", mask, scope.constant([i for i in range(rank) if i != dim]))
    # onnxruntime chooses between these alone.
    native = found.dtype.is_floating_point or found.dtype in (torch.int32, torch.int64, torch.uint8)
    if not native:
        value, other = (scope.op("Cast", v, to=ir.DataType.INT64) for v in (value, other))
    result = scope.op("Where", mask, value, other)
    if not native:
        result = scope.op("Cast", result, to=from_torch_dtype(found.dtype))
    return result if whole else _joined(scope, result, found)


def filled(scope: Scope, decision: ir.Value, found: Spec, rows: int, fill: int) -> ir.Value:
    """A value of one number, with as many rows as a decision has."""
    dim = found.batch_dim or 0
    count = scope.op("Mul", scope.op("Shape", decision), scope.constant([found.rows // rows]))
    sizes = [scope.constant(part) if isinstance(part, list) else part
             for part in (list(found.shape[:dim]), count, list(found.shape[dim + 1 :])) if part != []]  # fmt: skip
    shape = scope.op("Concat", *sizes, axis=0)
    value = ir.tensor(torch.full((1,), fill, dtype=found.dtype).numpy())
    return scope.op("ConstantOfShape", shape, value=value)  # type: ignore[no-any-return]


def when(
    scope: Scope, some: ir.Value, then: tuple[Scope, list[ir.Value]], otherwise: tuple[Scope, list[ir.Value]],
    specs: Sequence[Spec], name: str,
) -> list[ir.Value]:  # fmt: skip
    """An `If`.

    Args:
        scope: The graph that it stands in.
        some: Whether there are rows to run.
        then: The graph that runs where there are, and what it gives.
        otherwise: The graph that runs else, and what it gives.
        specs: What is given.
        name: Of what is run.

    Returns:
        The values.
    """
    graphs = [
        inner.finish(title, [inner.own(value) for value in values])
        for (inner, values), title in ((then, name), (otherwise, f"{name}: no row"))
    ]
    found = scope.op("If", some, outputs=len(specs), then_branch=graphs[0], else_branch=graphs[1])
    values = [found] if len(specs) == 1 else list(found)
    for value, known in zip(values, specs, strict=True):
        annotate(value, known)
    return values


def annotate(value: ir.Value, found: Spec, symbol: str | None = None) -> ir.Value:
    """Note the dtype and shape of a value, its batch dim a symbol or unknown."""
    dims: list[int | str | None] = list(found.shape)
    if found.batch_dim is not None:
        dims[found.batch_dim] = symbol if symbol is None or found.rows == 1 else f"{found.rows}*{symbol}"
    value.type, value.shape = ir.TensorType(from_torch_dtype(found.dtype)), ir.Shape(dims)
    return value


def _split(scope: Scope, value: ir.Value, found: Spec, rows: int) -> ir.Value:
    """The entries of a row in a dim of their own, behind that of the rows."""
    dim = found.batch_dim or 0
    sizes = [*found.shape[:dim], -1, found.rows // rows, *found.shape[dim + 1 :]]
    return scope.op("Reshape", value, scope.constant(sizes))  # type: ignore[no-any-return]


def _joined(scope: Scope, value: ir.Value, found: Spec) -> ir.Value:
    dim = found.batch_dim or 0
    sizes = [*found.shape[:dim], -1, *found.shape[dim + 1 :]]
    return scope.op("Reshape", value, scope.constant(sizes))  # type: ignore[no-any-return]


def inside(step: Conditional, arm: int, value: fx.Node) -> bool:
    """Whether an arm of a conditional makes a value itself."""
    block = step.arms[arm]
    return block is not None and value in block.outputs
