"""The dynamic model: the user's modules, what passes inserted, and the graph that runs them densely."""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from dyncompile.capture.cells import inside
from dyncompile.capture.check import resize
from dyncompile.cost import CostModel, cost_model, exit_costs
from dyncompile.demand import decision_name, stands_in
from dyncompile.errors import ArgumentError, CaptureError
from dyncompile.graph import Graph, is_tensor, program, spec
from dyncompile.nn import Exit, Gate
from dyncompile.ops import SWITCH, arms_of, decision_of, is_select
from dyncompile.recipe import Recipe, floating_dtype

_INSERTED = ("exits", "gates", "_modes", "_constants")

Unit = Literal["flops", "time"]

Override = Callable[[str, Tensor], Tensor]
"""Replaces a decision, given its name and value."""

Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Trace:
    """One run of a dynamic model with all that happened inside.

    Attributes:
        output: What the model returns: routed in evaluation, of full depth in training.
        final: Prediction of the full-depth path.
        exits: Prediction of every exit for every sample, enabled or not.
        confidence: `[N]` in [0, 1] per exit, after temperature.
        decisions: Per decision; evaluation: `[N]` bool, a route `[N]` int64; training: `[N]` in [0, 1], a route
            `[N, K]` weights, differentiable. Where a sample owns r tokens or frames: `[N, r]`, a route `[N, r, K]`.
            Beside them as `steps0`, ... which steps packed sequences have, `[N, T]` bool.
        probabilities: Per gate, what its policy gave before anything was drawn: shaped as in training.
        cost: `[N]`, expected cost of each sample by itself, as at batch 1; 1.0 = the static model on it. Differentiable
            in training.
        owners: For each decision the exit or gate that makes it; "" for the user's own.
        routes: For each decision that is a route the number of its arms.
        within: For each decision about the steps of packed sequences the name of the one that says which are there.
        parts: For each decision that holds one for each of K parts (groups of neurons, channels), next to each other in
            the last dim, K.
    """

    output: Any
    final: Tensor
    exits: dict[str, Tensor]
    confidence: dict[str, Tensor]
    decisions: dict[str, Tensor]
    probabilities: dict[str, Tensor]
    cost: Tensor
    owners: Mapping[str, str] = dataclasses.field(default_factory=dict)
    routes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    within: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)


class DynamicModule(nn.Module):
    """A static model with decisions and selects: the dense reference, to train, to trace, to compile whole.

    It owns the static model's modules under their own names, so the static model's `state_dict` keys survive.
    `dyncompile.dynamize` makes it; `dyncompile.lower` makes it skip.

    Attributes:
        exits: Inserted exits by name, in order of execution.
        gates: Inserted gates by name.
        recipe: What was done to the static model.
        task: "classification" or "regression".
    """

    exits: nn.ModuleDict
    gates: nn.ModuleDict

    def __init__(self, graph: Graph, recipe: Recipe) -> None:
        super().__init__()
        root = graph.root
        clashes = [n for n in (*root._modules, *root._parameters, *root._buffers) if hasattr(DynamicModule, n)]
        if clashes:
            raise CaptureError(f"the model's own `{clashes[0]}` has the name of a method of a dynamic model; rename it")
        for name in _INSERTED[:2]:
            root._modules.setdefault(name, nn.ModuleDict())
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        self._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
        self._modules.update(root._modules)
        self.training = root.training
        for name in _INSERTED:
            root._modules.pop(name, None)
        # In a tuple, so that the static model's skeleton is no sub-module: its modules are this module's own.
        self._skeleton = (root,)
        graph.root = self
        self._graph = graph
        self.recipe = recipe
        self.task = graph.task
        self._override: Override | None = None
        self._forced: frozenset[str] = frozenset()
        self.refresh()

    def refresh(self) -> None:
        """Take over what passes have changed in the graph."""
        # Made here and not when first called, so that torch.compile finds plain functions.
        self._forward, self._trace = program(self._graph.fx), program(self._trace_graph())
        self._costs: dict[tuple[str, tuple[tuple[str, int], ...]], CostModel] = {}
        self._owners = decision_owners(self._graph.fx)
        self._routes = decision_routes(self._graph.fx)
        self._within = decisions_within(self._graph.fx)

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave the cost models out: they hold nodes, and are made again when asked for."""
        return {**self.__dict__, "_costs": {}}

    def examples(self, batch: int) -> list[Tensor]:
        """Example inputs of a batch size, on the model's present device and in its present dtype."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        first = next((t for t in tensors if t.is_floating_point()), None)
        sized = resize(self._graph.inputs, self._graph.batch_dims, batch)
        if first is None:
            return list(sized)
        return [t.to(first.device, self.present(t.dtype)) for t in sized]

    @property
    def home(self) -> torch.device:
        """Where the model is: its first parameter or buffer."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((t.device for t in tensors), self._graph.inputs[0].device)

    def present(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a captured value has now that the model may have been cast."""
        now: torch.dtype = getattr(torch, floating_dtype(self))
        return now if dtype == getattr(torch, self.recipe.dtype, None) else dtype

    # --- running ---------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The graph of the dense reference."""
        return self._graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run densely, with the static model's own arguments and structure of outputs."""
        signature = self._graph.signature
        inputs = self._graph.bind(args, kwargs)
        if self._override is not None:
            return self.trace(*args, **kwargs).output
        with self._explaining(inputs):
            return signature.unflatten(self._forward(self, *inputs))

    def _explaining(self, inputs: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._explained(inputs)

    @contextlib.contextmanager
    def _explained(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Where torch stops at an input on another device or of another dtype, say so.

        Not refused beforehand: a model may convert its inputs itself, and autocast does.

        Raises:
            ArgumentError: It stopped, and an input is not as captured.
        """
        try:
            yield
        except RuntimeError as error:
            for name, given, captured in zip(self._graph.signature.names, inputs, self._graph.inputs, strict=True):
                wanted = self.present(captured.dtype)
                if (given.device, given.dtype) != (self.home, wanted):
                    found = f"{given.dtype} on {given.device}"
                    expected = f"{wanted} on {self.home}, as the model was captured and is now"
                    raise ArgumentError(name, found=found, expected=expected) from error
            raise

    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """Run densely and return every exit's prediction, every decision and the cost of each sample.

        Args:
            args: The model's own arguments.
            kwargs: The model's own keyword arguments.

        Returns:
            The trace; in training mode its `cost` and `decisions` are differentiable.
        """
        inputs = self._graph.bind(args, kwargs)
        nodes = self._taps()
        with self._explaining(inputs):
            if self._override is None:
                values = self._trace(self, *inputs)
            else:
                values = _Overriding(self, self._override).run(*inputs)
        output = self._graph.signature.unflatten(values[0])
        taps: dict[str, dict[str, Tensor]] = {"exit": {}, "confidence": {}, "decision": {}, "probability": {}}
        for ((kind, name), node), value in zip(nodes.items(), values[2], strict=True):
            flat = kind in ("decision", "probability") and is_tensor(node) and spec(node).rows > 1
            taps[kind][name] = value.unflatten(0, (-1, spec(node).rows)) if flat else value
        decisions = taps["decision"]
        if self.training:
            for name, confidence in taps["confidence"].items():
                exit_ = self.exits[name]
                assert isinstance(exit_, Exit)
                decisions[name] = exit_.firing(confidence)
        if self._override is not None:
            for name, real in self._within.items():
                decisions[name] = inside(decisions[name], decisions[real])
        final = values[1]
        cost = self.cost_model().expected(decisions)
        if not decisions:
            batch = inputs[self._batched()].shape[self._graph.batch_dims[self._batched()] or 0]
            cost = cost.to(final.device).expand(batch)
        return Trace(
            output,
            final,
            taps["exit"],
            taps["confidence"],
            decisions,
            taps["probability"],
            cost,
            self._owners,
            self._routes,
            self._within,
            decision_parts(self._graph.fx),
        )

    def _batched(self) -> int:
        return next(i for i, dim in enumerate(self._graph.batch_dims) if dim is not None)

    def _taps(self) -> dict[tuple[str, str], fx.Node]:
        """Nodes that a trace shows, by (kind, name); decisions that no pass named carry their node's name."""
        nodes = {n.meta["tap"]: n for n in self._graph.fx.nodes if "tap" in n.meta}
        for node in self._graph.fx.nodes:
            if is_select(node):
                decision = decision_of(node)
                nodes.setdefault(("decision", decision_name(decision)), decision)
        return nodes

    def _trace_graph(self) -> fx.Graph:
        traced = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = traced.graph_copy(self._graph.fx, mapping)
        taps = tuple(mapping[node] for node in self._taps().values())
        traced.output((output, mapping[self._graph.final], taps))
        return traced

    # --- cost ------------------------------------------------------------------------------------

    def cost_model(self, enabled: Sequence[str] | None = None, *, unit: Unit = "flops") -> CostModel:
        """Cost per demand region; disabled exits cost nothing, since lowering leaves their heads out.

        Args:
            enabled: Names of the exits that count as enabled; None takes their buffers, and in
                training all. Gates count as their buffers say, and in training as enabled. Decisions that
                `testing.forced` replaces count as enabled.
            unit: "flops", or "time": seconds measured on this machine, once, by running the
                lowered regions (`dyncompile.lowering.measure`).
        """
        if unit not in get_args(Unit):
            raise ArgumentError("unit", found=repr(unit), expected="'flops' or 'time'")
        if enabled is None:
            enabled = [n for n, e in self.exits.items() if self.training or bool(e.enabled) or n in self._forced]
        fixed = dict.fromkeys(set(self.exits) - set(enabled), 0)
        if not self.training:
            fixed |= disabled_gates(self, forced=self._forced)
        key = (unit, tuple(sorted(fixed.items())))
        if key not in self._costs:
            if unit == "time" and not any("seconds" in n.meta for n in self._graph.fx.nodes):
                from dyncompile.lowering.measure import measure

                measure(self)
            meta = "seconds" if unit == "time" else "flops"
            self._costs[key] = cost_model(self._graph.fx, fixed, unit=meta)
        return self._costs[key]

    def exit_costs(self, enabled: Sequence[str] | None = None, *, unit: Unit = "flops") -> dict[str, float]:
        """Relative cost of a sample by where it leaves; where sequences are packed, of one of full length.

        Args:
            enabled: Names of the exits that count as enabled; None takes their buffers.
            unit: "flops" or "time", as in `cost_model`.

        Returns:
            1.0 = the static model; one entry for each enabled exit in order of execution, then
            `final`.

        Raises:
            ArgumentError: An exit that the model does not have.
        """
        if enabled is None:
            enabled = [n for n, e in self.exits.items() if bool(e.enabled)]
        unknown = sorted(set(enabled) - set(self.exits))
        if unknown:
            raise ArgumentError("enabled", found=unknown, expected=f"names among {list(self.exits)}")
        ordered = [name for name in self.exits if name in enabled]
        return exit_costs(self.cost_model(ordered, unit=unit), ordered)

    def inspect(self) -> str:
        """The regions, their guards, how many operations they hold and their share of the static model's cost."""
        model = cost_model(self._graph.fx)
        rows = [
            (region.name, str(len(region.nodes)), f"{100 * weight:.1f} %")
            for region, weight in zip(model.regions, model.weights, strict=True)
        ]
        rows.insert(0, ("region (guard)", "ops", "cost"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{name:<{widths[0]}}  {ops:>{widths[1]}}  {share:>{widths[2]}}" for name, ops, share in rows]
        total = f"static model: {model.static / 1e6:.2f} MFLOPs per sample"
        return "\n".join([*lines, total])

    # --- the static model ------------------------------------------------------------------------

    def static(self) -> nn.Module:
        """A copy of the static model, of its own class, with the present weights, mode and device."""
        root = copy.copy(self._skeleton[0])
        root.__dict__ = dict(root.__dict__)
        for kind in ("_parameters", "_buffers", "_modules"):
            own = getattr(self, kind)
            names = [n for n in own if n not in _INSERTED]
            root.__dict__[kind] = {n: own[n] for n in names}
        root = copy.deepcopy(root)
        root.training = self.training
        for path in self._graph.overwriting:
            root.get_submodule(path).inplace = True  # type: ignore[assignment]
        return root

    def extra_repr(self) -> str:
        return f"exits={len(self.exits)}, gates={len(self.gates)}, task={self.task}"


class _Overriding(fx.Interpreter):
    """Runs the trace graph with some decisions replaced."""

    def __init__(self, module: DynamicModule, override: Override) -> None:
        super().__init__(module, graph=module._trace_graph())
        self.override = override
        self.names = {decision_of(n): decision_name(decision_of(n)) for n in self.graph.nodes if is_select(n)}
        self.names.update({n: str(n.meta["decision"]) for n in self.graph.nodes if "decision" in n.meta})

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self.override(self.names[n], value) if n in self.names else value


def disabled_decisions(module: DynamicModule) -> dict[str, int]:
    """The arm of each decision that is known before any input is seen: that of an exit or gate that is switched off."""
    exits = {name: 0 for name, e in module.exits.items() if not bool(e.enabled)}
    return exits | disabled_gates(module)


def disabled_gates(module: DynamicModule, *, forced: Collection[str] = ()) -> dict[str, int]:
    """The decisions of gates that are switched off and not forced, with the arm that computes everything."""
    gates = {name: g for name, g in module.gates.items() if isinstance(g, Gate) and not bool(g.enabled)}
    if not gates:
        return {}
    free = {decision: owner for decision, owner in module._owners.items() if decision not in forced}
    return {decision: gates[owner].open_arm for decision, owner in free.items() if owner in gates}


def decision_owners(graph: fx.Graph) -> dict[str, str]:
    """For each decision, by name and in order of execution, the exit or gate that makes it; "" for the user's own."""
    found = decision_nodes(graph).items()
    return {name: str(node.meta.get("owner", "")) for name, node in found}


def decision_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The node of each decision, by name and in order of execution."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if is_select(node):
            found.setdefault(decision_name(decision_of(node)), decision_of(node))
        elif name := stands_in(node):
            near = (*node.all_input_nodes, *node.users)
            found.setdefault(name, next(n for n in near if n.meta.get("decision") == name))
    return found


def decisions_within(graph: fx.Graph) -> dict[str, str]:
    """For each decision about the steps of packed sequences the model's own decision on which of them are there."""
    return {name: str(node.meta["real"]) for node in graph.nodes if (name := stands_in(node)) and "real" in node.meta}


def decision_parts(graph: fx.Graph) -> dict[str, int]:
    """The number of parts of each decision that holds one for each of several, by name."""
    return {decision_name(node): int(node.meta["parts"]) for node in graph.nodes if "parts" in node.meta}


def decision_routes(graph: fx.Graph) -> dict[str, int]:
    """The number of arms of each decision that is the route of a `switch`, by name."""
    switches = (node for node in graph.nodes if node.target is SWITCH)
    return {decision_name(decision_of(node)): len(arms_of(node)) for node in switches}
