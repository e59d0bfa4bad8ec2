"""Writes the segments of a plan as files of their own, and the rest of it as a manifest."""

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, fx

from dyncompile.exporting.checking import compare, on_arrays
from dyncompile.exporting.files import save
from dyncompile.exporting.loops import write_loop
from dyncompile.exporting.pieces import Pieces
from dyncompile.exporting.routing import finished, knob_values, made_decisions
from dyncompile.exporting.rows import annotate
from dyncompile.exporting.scope import Scope
from dyncompile.exporting.stages import MANIFEST, BlockSteps, ConditionalStep, Manifest, SegmentStep, StagedModel, Value
from dyncompile.graph import is_tensor, spec
from dyncompile.lowering import LoweredModule
from dyncompile.lowering.plan import Block, Conditional, Segment
from dyncompile.ops import arms_of


def write_stages(plain: LoweredModule, folder: Path, metadata: dict[str, str]) -> None:
    """Write a folder, run it, and compare.

    Args:
        plain: The lowered model.
        folder: Made here.
        metadata: For the manifest.

    Raises:
        ExportError: It computes something else.
    """
    folder.mkdir()
    plan, dyn = plain.plan, plain.dynamic
    pieces = Pieces(plan, dyn, plain.examples(5))
    files = {segment: f"{number:03}.onnx" for number, segment in enumerate(plan.segments())}
    for segment, name in files.items():
        save(_model(segment, pieces, plain), folder / name)
    signature = dyn.graph.signature
    placeholders = [n for n in plan.graph.nodes if n.op == "placeholder"]
    leaves: list[object] = list(plan.graph.output_node().args[0])  # type: ignore[arg-type]
    manifest = Manifest(
        inputs={name: node.name for name, node in zip(signature.names, placeholders, strict=True)},
        outputs={name: _leaf(leaf) for name, leaf in zip(signature.output_names, leaves, strict=True)},
        values={n.name: _value(n) for n in plan.graph.nodes if is_tensor(n)},
        decisions={name: node.name for node, name in made_decisions(plan).items()},
        exits=list(dyn.exits),
        root=_block(plan.root, files),
        metadata=metadata,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    staged = StagedModel(folder)
    compare(on_arrays(lambda inputs: staged(**inputs)), dyn)


def _model(segment: Segment, pieces: Pieces, plain: LoweredModule) -> ir.Model:
    """One segment as a model, its inputs and outputs named as the nodes are."""
    scope = Scope()
    inputs = [annotate(ir.Value(name=n.name), spec(n), symbol="rows") for n in segment.inputs]
    scope.values.update(zip(segment.inputs, inputs, strict=True))
    knobs = knob_values(pieces.knobs)
    if (segment, "agent") in pieces.inputs:
        values, _ = write_loop(pieces, segment, scope, knobs, plain.dynamic)
    else:
        values = pieces.copy((segment, ""), scope, inputs, knobs)
    outputs = []
    for node, value in zip(segment.outputs, values, strict=True):
        own = annotate(scope.op("Identity", value), spec(node), symbol="rows")
        own.name = node.name
        outputs.append(own)
    return finished(scope.finish("segment", outputs, inputs), scope, knobs)


def _leaf(leaf: object) -> str | int | float | bool | None:
    if isinstance(leaf, fx.Node):
        return leaf.name
    if isinstance(leaf, Tensor):
        leaf = leaf.item()
    return leaf if isinstance(leaf, int | float | bool) else None


def _value(node: fx.Node) -> Value:
    found = spec(node)
    dtype = str(torch.empty(0, dtype=found.dtype).numpy().dtype)
    return Value(dtype=dtype, shape=list(found.shape), batch_dim=found.batch_dim)


def _block(block: Block, files: dict[Segment, str]) -> BlockSteps:
    steps: list[SegmentStep | ConditionalStep] = []
    for step in block.steps:
        if isinstance(step, Segment):
            steps.append(SegmentStep(file=files[step], inputs=_names(step.inputs), outputs=_names(step.outputs)))
        else:
            steps.append(_conditional(step, files))
    return BlockSteps(name=block.name, inputs=_names(block.inputs), outputs=_names(block.outputs), steps=steps)


def _conditional(step: Conditional, files: dict[Segment, str]) -> ConditionalStep:
    return ConditionalStep(
        name=step.unit.name,
        decision=step.unit.decision.name,
        rows=step.unit.rows,
        arms=[None if arm is None else _block(arm, files) for arm in step.arms],
        selects={select.name: _names(arms_of(select)) for select in step.selects},
    )


def _names(nodes: list[fx.Node]) -> list[str]:
    return [node.name for node in nodes]
