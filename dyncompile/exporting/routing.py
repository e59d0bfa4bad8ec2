"""A plan as one ONNX model: conditionals become `If`, around whole batches or around the rows that take an arm."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, fx

from dyncompile.demand import decision_name, stands_in
from dyncompile.exporting.loops import steps, write_loop
from dyncompile.exporting.pieces import Pieces
from dyncompile.exporting.rows import annotate, any_of, filled, gathered, indices, inside, scattered, when, where
from dyncompile.exporting.scope import Scope
from dyncompile.exporting.settings import KNOBS_KEY
from dyncompile.graph import Spec, spec
from dyncompile.lowering.plan import Block, Conditional, Plan, Segment
from dyncompile.module import DynamicModule
from dyncompile.ops import arms_of

Routing = Literal["batch", "sample"]

Key = fx.Node | str
"""What leaves a conditional: the value of a select, or by its name a decision that was made inside."""

_NOT_ASKED = -1
"""What a decision's output says of a row that did not come to it."""


class Writer:
    """Writes a plan as a model.

    `NonZero` finds the rows of an arm. By the sample, `Gather` takes their live-ins, the arm runs on them inside an
    `If` that leaves it out where nobody takes it, and `ScatterND` writes them over a value of the whole batch. By the
    batch, the arm runs on every row as soon as one takes it, and `Where` keeps what it gives to those that do. Either
    way an arm stands in the file once.

    Args:
        plan: What to write.
        dyn: The model.
        pieces: The plan's segments.
        routing: "batch" or "sample".
        decisions: Whether decisions are outputs too.
    """

    def __init__(self, plan: Plan, dyn: DynamicModule, pieces: Pieces, *, routing: Routing, decisions: bool) -> None:
        self.plan = plan
        self.dyn = dyn
        self.pieces = pieces
        self.routing = routing
        self.knobs: dict[str, ir.Value] = {}
        self.made = made_decisions(plan) if decisions else {}
        self.rows = {name: spec(node).rows for node, name in self.made.items()}
        if decisions:
            calls = (n for s, part in pieces.inputs if part == "agent" for n in s.nodes if stands_in(n))
            self.rows.update((stands_in(call), steps(call)) for call in calls)

    def model(self) -> ir.Model:
        """The model, its tensors still in memory."""
        scope = Scope()
        signature = self.dyn.graph.signature
        placeholders = [n for n in self.plan.graph.nodes if n.op == "placeholder"]
        inputs = [
            annotate(ir.Value(name=name), spec(n), symbol="batch")
            for n, name in zip(placeholders, signature.names, strict=True)
        ]
        scope.values.update(zip(placeholders, inputs, strict=True))
        self.knobs = knob_values(self.pieces.knobs)
        decisions = self.block(self.plan.root, scope)
        outputs = []
        leaves: list[object] = list(self.plan.graph.output_node().args[0])  # type: ignore[arg-type]
        for leaf, name in zip(leaves, signature.output_names, strict=True):
            if isinstance(leaf, fx.Node):
                outputs.append(self._output(scope, scope.values[leaf], name, spec(leaf)))
            elif isinstance(leaf, Tensor | int | float | bool):
                constant = torch.as_tensor(leaf)
                value = scope.tensor(TorchTensor(constant))
                outputs.append(self._output(scope, value, name, Spec(tuple(constant.shape), constant.dtype, None)))
        for name, value in decisions.items():
            outputs.append(self._output(scope, value, f"decisions.{name}", self._spec(name)))
        exits = list(self.dyn.exits)
        if not decisions.keys().isdisjoint(exits):
            outputs.append(self._output(scope, _exit(scope, exits, decisions), "exit", Spec((1,), torch.int64, 0)))
        graph = scope.finish("dyncompile", outputs, inputs)
        return finished(graph, scope, self.knobs)

    def _output(self, scope: Scope, value: ir.Value, name: str, found: Spec) -> ir.Value:
        own = annotate(scope.op("Identity", value), found, symbol="batch")
        own.name = name
        return own

    def _spec(self, key: Key) -> Spec:
        return Spec((self.rows[key],), torch.int64, 0) if isinstance(key, str) else spec(key)

    # --- blocks ------------------------------------------------------------------------------------------

    def block(self, block: Block, scope: Scope) -> dict[str, ir.Value]:
        """Write the steps of a block into a graph, where its values are then known.

        Returns:
            The decisions that were made in it, by name: `[R]` int64.
        """
        decisions: dict[str, ir.Value] = {}
        for step in block.steps:
            if isinstance(step, Conditional):
                decisions |= self.conditional(step, scope)
                continue
            for name, value in self.segment(step, scope).items():
                decisions[name] = scope.op("Cast", value, to=ir.DataType.INT64)
        return decisions

    def segment(self, step: Segment, scope: Scope) -> dict[str, ir.Value]:
        """Write the operations of a segment into a graph, where the values of its outputs are then known.

        Returns:
            The decisions that it makes, by name.
        """
        within: dict[str, ir.Value] = {}
        if (step, "agent") in self.pieces.inputs:
            values, decision = write_loop(self.pieces, step, scope, self.knobs, self.dyn)
            within = {name: decision for n in step.nodes if (name := stands_in(n)) in self.rows}
        else:
            values = self.pieces.copy((step, ""), scope, [scope.values[n] for n in step.inputs], self.knobs)
        scope.values.update(zip(step.outputs, values, strict=True))
        return within | {self.made[n]: scope.values[n] for n in step.outputs if n in self.made}

    # --- conditionals ------------------------------------------------------------------------------------

    def conditional(self, step: Conditional, scope: Scope) -> dict[str, ir.Value]:
        """Write what a decision controls, into a graph where the selects' values are then known.

        Returns:
            The decisions that were made inside, by name.
        """
        rows = step.unit.rows
        results: dict[Key, ir.Value] = {}
        bases = {s: next((v for i, v in enumerate(arms_of(s)) if not inside(step, i, v)), None) for s in step.selects}
        results.update((s, scope.values[v]) for s, v in bases.items() if v is not None)
        for arm, block in enumerate(step.arms):
            values = {s: arms_of(s)[arm] for s in step.selects}
            outer = {s: v for s, v in values.items() if not inside(step, arm, v) and v is not bases[s]}
            if block is None and not outer:
                continue
            taken = self._taken(step, scope, arm)
            if outer:
                index = indices(scope, taken)
            for select, value in outer.items():
                part = gathered(scope, scope.values[value], index, spec(value), rows)
                before = self._before(scope, results, select, step)
                results[select] = scattered(scope, before, index, part, spec(select), rows)
            if block is not None:
                chosen = {s: v for s, v in values.items() if v in block.outputs}
                self._arm(step, block, chosen, taken, scope, results)
        scope.values.update((key, value) for key, value in results.items() if isinstance(key, fx.Node))
        return {key: value for key, value in results.items() if isinstance(key, str)}

    def _taken(self, step: Conditional, scope: Scope, arm: int) -> ir.Value:
        """Make the mask of the rows that take an arm."""
        decision = scope.values[step.unit.decision]
        if step.unit.routed:
            return scope.op("Equal", decision, scope.constant(arm))  # type: ignore[no-any-return]
        return decision if arm else scope.op("Not", decision)

    def _before(self, scope: Scope, results: dict[Key, ir.Value], key: Key, step: Conditional) -> ir.Value:
        """What the rows of an arm are written over."""
        if key in results:
            return results[key]
        fill = _NOT_ASKED if isinstance(key, str) else 0
        return filled(scope, scope.values[step.unit.decision], self._spec(key), step.unit.rows, fill)

    def _arm(
        self,
        step: Conditional,
        block: Block,
        selects: dict[fx.Node, fx.Node],
        taken: ir.Value,
        scope: Scope,
        results: dict[Key, ir.Value],
    ) -> None:
        """Write an arm inside an `If`, and its values over those of the rows that do not take it."""
        rows, whole = step.unit.rows, self.routing == "batch"
        index = indices(scope, taken)
        then, otherwise = Scope(scope), Scope(scope)
        for node in block.inputs:
            value = scope.values[node]
            then.values[node] = value if whole else gathered(then, value, index, spec(node), rows)
        made: dict[Key, ir.Value] = {}
        made.update(self.block(block, then).items())
        made.update((select, then.values[value]) for select, value in selects.items())
        before: dict[Key, ir.Value] = {key: self._before(scope, results, key, step) for key in made}
        if whole:
            made = {k: where(then, taken, v, before[k], self._spec(k), rows) for k, v in made.items()}
            nothing = before
        else:
            nothing = {key: otherwise.nothing(self._spec(key)) for key in made}
        values = when(
            scope, any_of(scope, index), (then, list(made.values())), (otherwise, list(nothing.values())),
            [self._spec(key) for key in made], block.name,
        )  # fmt: skip
        for key, value in zip(made, values, strict=True):
            over = value if whole else scattered(scope, before[key], index, value, self._spec(key), rows)
            results[key] = over


def knob_values(knobs: Mapping[str, Tensor]) -> dict[str, ir.Value]:
    """A value for each knob: an initialiser that is equal to no other, whatever it holds."""
    values = {}
    for name, buffer in knobs.items():
        tensor = TorchTensor(buffer.detach().cpu(), name=name)
        kind = ir.TensorType(tensor.dtype)
        values[name] = ir.Value(name=name, shape=ir.Shape(()), type=kind, const_value=tensor)
    return values


def finished(graph: ir.Graph, scope: Scope, knobs: Mapping[str, ir.Value]) -> ir.Model:
    """A model of a graph, its constants and those knobs that it reads."""
    used = [value for value in knobs.values() if value.uses()]
    for value in used:
        graph.register_initializer(value)
    scope.place_constants()
    model = ir.Model(graph, ir_version=10, producer_name="dyncompile")
    model.metadata_props[KNOBS_KEY] = json.dumps([value.name for value in used])
    return model


def made_decisions(plan: Plan) -> dict[fx.Node, str]:
    """The decisions that segments of a plan make, with their names."""
    found = {u.decision: u.name for u in plan.demand.units}
    for segment in plan.segments():
        names = {stands_in(node) for node in segment.nodes}
        found.update(
            {n: decision_name(n) for n in segment.inputs if "decision" in n.meta and decision_name(n) in names}
        )
    return found


def _exit(scope: Scope, exits: Sequence[str], decisions: dict[str, ir.Value]) -> ir.Value:
    """Which exit each sample took; how many the model has, disabled ones counted, where it took none."""
    index = scope.constant(len(exits))
    for number, name in reversed(list(enumerate(exits))):
        if name in decisions:
            left = scope.op("Equal", decisions[name], scope.constant(1))
            index = scope.op("Where", left, scope.constant(number), index)
    return index
