"""A recurrent layer whose agent reads the state, as a `Loop` in which the cell runs on the rows that take a step."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from dyncompile.demand import stands_in
from dyncompile.exporting.pieces import Pieces
from dyncompile.exporting.rows import annotate, any_of, gathered, indices, scattered, when
from dyncompile.exporting.scope import Scope
from dyncompile.graph import Spec, spec
from dyncompile.lowering.plan import Segment
from dyncompile.module import DynamicModule
from dyncompile.nn.recurrent import StepGate


def write_loop(
    pieces: Pieces, step: Segment, scope: Scope, knobs: Mapping[str, ir.Value], dyn: DynamicModule
) -> tuple[list[ir.Value], ir.Value]:
    """Write the loop over a sequence.

    Args:
        pieces: Hold what goes into the loop, the agent, and the cell.
        step: The segment.
        scope: Where to.
        knobs: The value of each knob in the model.
        dyn: Owns the layer.

    Returns:
        The values of the segment's outputs, and the decisions, `[N * T]` bool.
    """
    call = next(node for node in step.nodes if stands_in(node))
    gate = dyn.get_submodule(str(call.target))
    assert isinstance(gate, StepGate)
    form = gate.layer.form
    dtype = _dtype(step)
    sizes = [form.output_size, *([form.hidden_size] if form.mode == "LSTM" else [])]
    specs = [Spec((1, size), dtype, 0) for size in sizes]
    inputs = [scope.values[n] for n in step.inputs]
    sequence, *state = pieces.copy((step, "start"), scope, inputs, knobs)

    body = Scope(scope)
    number, going = ir.Value(name=f"step/{next(scope.count)}"), ir.Value(name=f"going/{next(scope.count)}")
    annotate(number, Spec((), torch.int64, None))
    annotate(going, Spec((), torch.bool, None))
    before = [annotate(ir.Value(name=f"state/{next(scope.count)}"), found) for found in specs]
    x = body.op("Gather", sequence, number, axis=0)
    (decision,) = pieces.copy((step, "agent"), body, [x, before[0]], knobs)
    index = indices(body, decision)
    then, otherwise = Scope(body), Scope(body)
    rows = [then.op("GatherND", x, index)]
    rows += [gathered(then, s, index, found, 1) for s, found in zip(before, specs, strict=True)]
    parts = when(
        body, any_of(body, index), (then, pieces.copy((step, "cell"), then, rows, knobs)),
        (otherwise, [otherwise.nothing(found) for found in specs]), specs, f"{stands_in(call)}: step",
    )  # fmt: skip
    after = [scattered(body, s, index, p, f, 1) for s, p, f in zip(before, parts, specs, strict=True)]
    outputs = [body.own(going), *after, body.op("Identity", after[0]), body.own(decision)]
    graph = body.finish(f"{stands_in(call)}: steps", outputs, [number, going, *before])

    length = scope.op("Gather", scope.op("Shape", sequence), scope.constant(0))
    *finals, out, decisions = scope.op("Loop", length, None, *state, outputs=len(outputs) - 1, body=graph)
    if gate.layer.batch_first:
        out = scope.op("Transpose", out, perm=[1, 0, 2])
    flat = scope.op("Reshape", scope.op("Transpose", decisions, perm=[1, 0]), scope.constant([-1]))
    found = [out, *(scope.op("Unsqueeze", s, scope.constant([0])) for s in finals), flat]
    return [found[_index(node)] for node in step.outputs], flat


def steps(call: fx.Node) -> int:
    """The length of the sequences that a recurrent layer with an agent reads."""
    x: Any = call.args[1]
    found = spec(x)
    return found.shape[1 if found.batch_dim == 0 else 0]


def _index(node: fx.Node) -> int:
    """Which result of the layer a node is."""
    index = node.args[1]
    assert isinstance(index, int)
    return index


def _dtype(step: Segment) -> torch.dtype:
    found = step.outputs[0].meta["spec"]
    assert isinstance(found, Spec)
    return found.dtype
