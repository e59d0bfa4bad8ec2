"""Segments of a plan as pieces of ONNX graphs, all exported by torch in one go."""

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import _config

from dyncompile.demand import stands_in
from dyncompile.errors import ExportError
from dyncompile.exporting.recurrent import Agent, Cell, SequenceLayer, Start
from dyncompile.exporting.scope import Scope
from dyncompile.graph import attribute, spec
from dyncompile.lowering.plan import Plan, Segment
from dyncompile.lowering.segments import segment_module
from dyncompile.module import DynamicModule
from dyncompile.nn.channelwise import GatheredChannels
from dyncompile.nn.recurrent import CompactedLayer, DroppingLayer
from dyncompile.ops import SELECT, SWITCH, mix, mix_many

OPSET = 20

Key = tuple[Segment, str]
"""A segment, and which part of it."""

KNOBS = ("threshold", "temperature", "bias", "enabled")
"""Buffers of exits and gates that stay changeable in an exported file."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to export.

    Attributes:
        module: Returns a tuple.
        inputs: An example of each of its inputs.
        dims: Their batch dims.
        outputs: How many it returns.
    """

    module: nn.Module
    inputs: list[Tensor]
    dims: list[int | None]
    outputs: int


class Pieces:
    """The segments of a plan, to be copied into the graphs of a model.

    Args:
        plan: Whose segments.
        dyn: Owns what they run.
        examples: A value for each value that a segment reads.

    Raises:
        ExportError: torch cannot export an operation.
    """

    def __init__(self, plan: Plan, dyn: DynamicModule, examples: Mapping[fx.Node, Tensor]) -> None:
        self.knobs = knobs(dyn)
        parts: dict[Key, Part] = {}
        for segment in plan.segments():
            module = exportable(segment_module(segment, dyn))
            _refuse_counted_groups(module)
            given = Part(
                module,
                [examples[n] for n in segment.inputs],
                [spec(n).batch_dim for n in segment.inputs],
                len(segment.outputs),
            )
            agent = state_agent(module)
            parts.update(agent_parts(segment, given, agent) if agent else {(segment, ""): given})
        graph = _exported(parts, self.knobs)
        inputs, outputs = iter(graph.inputs), iter(graph.outputs)
        self.inputs = {key: [next(inputs) for _ in part.inputs] for key, part in parts.items()}
        self.knob_inputs = dict(zip(self.knobs, inputs, strict=True))
        self.outputs = {key: [next(outputs) for _ in range(part.outputs)] for key, part in parts.items()}
        self.order = {node: i for i, node in enumerate(graph)}

    def copy(self, key: Key, scope: Scope, inputs: Sequence[ir.Value], knobs: Mapping[str, ir.Value]) -> list[ir.Value]:
        """Add the nodes of a segment to a graph.

        Args:
            key: Which segment, and which part of it: "" for all.
            scope: Where to.
            inputs: Of the segment.
            knobs: The value of each knob in the model.

        Returns:
            The values of its outputs.
        """
        made: dict[ir.Value, ir.Value] = dict(zip(self.inputs[key], inputs, strict=True))
        made.update((self.knob_inputs[name], value) for name, value in knobs.items())
        for node in self._needed(self.outputs[key]):
            copied(node, made, scope)
        return [made.get(value) or _constant(value, scope) for value in self.outputs[key]]

    def _needed(self, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        found: set[ir.Node] = set()
        queue = [v.producer() for v in outputs]
        while queue:
            node = queue.pop()
            if node is None or node in found or node not in self.order:
                continue
            found.add(node)
            queue.extend(value.producer() for value in _reads(node))
        return sorted(found, key=self.order.__getitem__)


def knobs(dyn: DynamicModule) -> dict[str, Tensor]:
    """What calibration sets, by its name in the state: `exits.exit0.threshold`, `gates.gate3.bias`."""
    buffers = dyn.named_buffers()
    return {n: b for n, b in buffers if n.split(".")[0] in ("exits", "gates") and n.rpartition(".")[2] in KNOBS}


def exportable(module: fx.GraphModule) -> fx.GraphModule:
    """A segment without what only dyncompile runs: selects of dense decisions, layers that skip steps."""
    for node in module.graph.nodes:
        if node.target in (SELECT, SWITCH):
            node.target = mix if node.target is SELECT else mix_many
        elif stands_in(node):
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, CompactedLayer):
                module.set_submodule(str(node.target), SequenceLayer(layer.layer))
    module.recompile()
    return module.eval()


_aten = torch.ops.aten
_GROUPS = {
    _aten.group_norm.default: 1,
    **{getattr(_aten, f"conv{n}d").default: 6 for n in (1, 2, 3)},
    **{getattr(_aten, f"conv{n}d").padding: 6 for n in (1, 2, 3)},
}
"""Which argument says how many groups there are: an attribute in ONNX, so a constant."""


def _refuse_counted_groups(module: fx.GraphModule) -> None:
    """Refuse gated channels that are read in groups, as many as channels are open."""
    for layer in module.modules():
        for node in layer.dense.body.graph.nodes if isinstance(layer, GatheredChannels) else ():
            if node.target in _GROUPS and isinstance(node.args[_GROUPS[node.target]], fx.Node):
                raise ExportError(
                    "a grouped convolution or group norm among channels that are gated one by one has as many groups "
                    "as channels are open, which ONNX cannot count: take granularity='levels', or export to *.pt2"
                )


class _All(nn.Module):
    """Runs every part on inputs of its own."""

    def __init__(self, parts: Sequence[Part], knobs: Sequence[str]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(part.module for part in parts)
        self.counts = [len(part.inputs) for part in parts]
        self.knobs = knobs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = iter(tensors)
        given = [tuple(next(inputs) for _ in range(count)) for count in self.counts]
        knobs = dict(zip(self.knobs, inputs, strict=True))
        found: list[Tensor] = []
        for module, arguments in zip(self.segments, given, strict=True):
            own = {name: knobs[name] for name, _ in module.named_buffers() if name in knobs}
            found += torch.func.functional_call(module, own, arguments)
        return tuple(found)


def _exported(parts: Mapping[Key, Part], knobs: Mapping[str, Tensor]) -> ir.Graph:
    """All parts as one graph, in which they have nothing in common but constants and knobs."""
    # Of one tensor given twice export makes one input.
    arguments = [*(t.detach() for part in parts.values() for t in part.inputs), *knobs.values()]
    dims = [dim for part in parts.values() for dim in part.dims]
    shapes = [None if dim is None else {dim: torch.export.Dim.DYNAMIC} for dim in dims]
    whole = _All(list(parts.values()), list(knobs)).eval()
    try:
        # Two parts that are traced at one batch size are still two batches.
        with quiet(), torch.no_grad(), _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            program = torch.export.export(
                whole, tuple(arguments), dynamic_shapes=((*shapes, *(None for _ in knobs)),), strict=False
            )
            found = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=True, verbose=False)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"torch cannot export a segment: {str(error).strip().splitlines()[0]}") from error
    assert found is not None
    graph: ir.Graph = found.model.graph
    return graph


def state_agent(module: fx.GraphModule) -> DroppingLayer | None:
    """The layer of a segment whose agent reads the state before each step, if it is such a segment."""
    layers = [m for m in module.modules() if isinstance(m, DroppingLayer)]
    return layers[0] if layers and any(stands_in(n) for n in module.graph.nodes) else None


def agent_parts(segment: Segment, whole: Part, dropping: DroppingLayer) -> dict[Key, Part]:
    """What a loop over the steps of a sequence is made of: what goes into it, the agent, and the cell."""
    module = whole.module
    assert isinstance(module, fx.GraphModule)
    call = next(node for node in module.graph.nodes if stands_in(node))
    if "real" in call.kwargs:
        raise ExportError(
            f"`{stands_in(call)}` is decided by an agent that reads the state, on packed sequences, which no loop of "
            "ONNX is written for: export to *.pt2, take FrameSkip(reads='input'), or disable its gate"
        )
    path = str(call.target)
    weights = [attribute(module, str(node.target)) for node in call.args[3:]]
    module.set_submodule(path, Start(dropping.gate.layer))
    module.graph.output_node().args = (call,)
    module.graph.eliminate_dead_code()
    module.recompile()
    with torch.no_grad():
        sequence, *state = module(*whole.inputs)
    return {
        (segment, "start"): dataclasses.replace(whole, outputs=1 + len(state)),
        (segment, "agent"): Part(Agent(dropping.gate, path), [sequence[0], state[0]], [0, 0], 1),
        (segment, "cell"): Part(
            Cell(dropping.gate.layer, weights), [sequence[0], *state], [0] * (1 + len(state)), len(state)
        ),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch says of its own exporter."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    # Where it stops it prints half a graph.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# --- copying nodes -----------------------------------------------------------------------------------


def copied(node: ir.Node, made: dict[ir.Value, ir.Value], scope: Scope) -> None:
    """Add a copy of a node, graphs inside of it included; `made` says by what its inputs are replaced."""
    inputs = [None if v is None else made.get(v) or _constant(v, scope) for v in node.inputs]
    attributes = [
        ir.AttrGraph(attribute.name, _inner(attribute.as_graph(), made, scope))
        if attribute.type == ir.AttributeType.GRAPH
        else attribute
        for attribute in node.attributes.values()
    ]
    outputs = [ir.Value(name=f"{v.name}/{next(scope.count)}" if v.name else "", type=v.type) for v in node.outputs]
    scope.add(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs))
    made.update(zip(node.outputs, outputs, strict=True))


def _inner(graph: ir.Graph, made: dict[ir.Value, ir.Value], scope: Scope) -> ir.Graph:
    inside = Scope(scope)
    inputs = [ir.Value(name=f"{v.name}/{next(scope.count)}", type=v.type, shape=v.shape) for v in graph.inputs]
    known = {**made, **dict(zip(graph.inputs, inputs, strict=True))}
    for node in graph:
        copied(node, known, inside)
    outputs = [known.get(v) or inside.op("Identity", _constant(v, inside)) for v in graph.outputs]
    return inside.finish(graph.name or "inner", outputs, inputs)


def _constant(value: ir.Value, scope: Scope) -> ir.Value:
    if value.const_value is None:
        raise ExportError(f"`{value.name}` of an exported segment is neither made there nor constant")
    return scope.tensor(value.const_value, _plain(value.name or ""))


def _plain(name: str) -> str | None:
    """The name of a parameter; None for what torch named itself."""
    if not name.startswith("segments."):
        return None
    return name.split(".", 2)[2]


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, the graphs inside of it included."""
    found = [v for v in node.inputs if v is not None]
    for inner_of in node.attributes.values():
        if inner_of.type == ir.AttributeType.GRAPH:
            for inner in inner_of.as_graph():
                found += _reads(inner)
    return found
