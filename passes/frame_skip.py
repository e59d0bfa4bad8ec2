"""Frame skip: an agent decides at each step of a recurrent layer whether the state is updated or copied."""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dyncompile.errors import ArgumentError
from dyncompile.graph import Graph, Spec, spec
from dyncompile.nn import Admission, FramePolicy, PacedGate, SequencePolicy, SkippingLayer, StepGate, build_estimator
from dyncompile.ops import SELECT
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.sequences import Backbone, Layer, backbone, defer, flops_between, gather, layer_at, stacks
from dyncompile.shapes import module_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSkip(Pass):
    """Let an agent skip steps of recurrent layers (Skip RNN, arXiv 1708.06834).

    Before:  %y, %h = rnn(%x, %h0)
    After:   %d, _ = gates.frames0(%x)                     ; one decision a step, `[N * T]`
             %y, %h = rnn(%x, %h0)
             %z, %g = skipping(static=(%y, %h), %d, %x, %h0, weights...)
             ; z, g stand in for y, h: y, h themselves where the gate is off, and not needed where it is on

    With a backbone that computes the features of each frame before the layer:

    Before:  %f = backbone(%frames)                        ; frames `[N * T, ...]`, f `[N * T, D]`
    After:   %d, _ = gates.frames0(%frames); %f = backbone(%frames); %s = select(%d, %f, 0)

    A skipped step copies the state; the output at that step is the last one computed, the initial `h` before any. The
    layers of one stack skip the same steps.

    Packed sequences (`pack_padded_sequence`): a step happens where the sample has it and the agent keeps it. Padding is
    not read, has no part in the agent's statistics, rates and probabilities, and counts neither as run nor as skipped:
    a cost of 1.0 is what the static model does for that sample. The agent itself runs for every step of the padded
    batch, which its cost says.

    Legality: the layer is torch's own LSTM, GRU or RNN, of any number of layers, with projections or
    without, on a batch of sequences whose rows are the samples; an agent that reads the state needs one
    direction; the agent must cost less than what it controls. A backbone is skipped too where the
    features of each frame depend on that frame alone and nothing but the layer reads them; its agent
    then sees the raw frame.

    Args:
        reads: "input", so that all steps are decided ahead, or "state": the step's input and the output before it, of
            the lowest layer.
        hidden: Width of the agent.
        estimator: How training decides: "gumbel", "straight_through", "semantic_hashing" or "reinforce".
    """

    name: ClassVar[str] = "frame_skip"
    summary: ClassVar[str] = "an agent at recurrent layers; a step that it skips copies the state"
    paper: ClassVar[str] = "1708.06834"
    seeks: ClassVar[str] = "nn.LSTM, nn.GRU or nn.RNN layers over sequences"

    reads: str = "input"
    hidden: int = 8
    estimator: str = "gumbel"

    def __post_init__(self) -> None:
        if self.reads not in ("input", "state"):
            raise ArgumentError("reads", found=repr(self.reads), expected="'input' or 'state'")
        if type(self.hidden) is not int or self.hidden < 1:
            raise ArgumentError("hidden", found=repr(self.hidden), expected="a width >= 1")
        build_estimator(self.estimator)

    # --- where -----------------------------------------------------------------------------------

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Recurrent stacks, in order of execution."""
        count = 0
        for stack in stacks(graph):
            layers = [layer_at(graph, node) for node in stack]
            first = layers[0]
            reason = _unfit(graph, stack[0], first)
            if first is None or reason:
                yield Refusal(node=stack[0].name, reason=reason)
                continue
            found = backbone(graph, first) if self.reads == "input" else None
            if isinstance(found, str):
                yield Refusal(node=first.x.name, reason=f"the backbone runs for every frame: {found}")
            data = _data(stack, found if isinstance(found, Backbone) else None)
            reason = self._refuse(graph, first, data)
            if reason and "frames" in data:
                # An agent that reads features is cheaper than one that reads frames.
                alone = _data(stack, None)
                yield Refusal(node=first.x.name, reason=f"the backbone runs for every frame: {reason}")
                data, reason = alone, self._refuse(graph, first, alone)
            if reason:
                yield Refusal(node=stack[0].name, reason=reason)
                continue
            yield Site(name=f"frames{count}", node=stack[0].name, data=data)
            count += 1

    def _refuse(self, graph: Graph, first: Layer, data: dict[str, Any]) -> str:
        """Why a stack gets no agent; empty if it gets one."""
        if self.reads == "state" and first.form.bidirectional:
            return "an agent that reads the state cannot decide for two directions at once"
        controlled = [find(graph, name) for name in data["layers"]]
        saved = sum(graph.flops(node) for node in controlled)
        source = first.x
        if "frames" in data:
            source = find(graph, data["frames"])
            saved += flops_between(graph, source, find(graph, data["features"]))
        if not spec(source).dtype.is_floating_point or len(spec(source).shape) > 5:
            return f"no agent reads frames of {list(spec(source).shape)} {spec(source).dtype}"
        if self.reads == "state":
            width = spec(first.x).shape[-1] + first.form.output_size
            cost = 2.0 * first.steps * self.hidden * (width + 1)
        else:
            cost = module_flops(lambda: self._policy(graph, first, data), [source])
        if cost >= saved:
            return f"an agent costs {cost:.0f} FLOPs, and what it controls {saved:.0f}"
        return ""

    def _policy(self, graph: Graph, first: Layer, data: dict[str, Any]) -> nn.Module:
        """What the agent decides by, all steps at once."""
        if "frames" in data:
            return FramePolicy(spec(find(graph, data["frames"])).shape[1:], self.hidden)
        return SequencePolicy(spec(first.x).shape[-1], self.hidden, batch_first=first.form.batch_first)

    # --- how -------------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Insert one agent, and what skips, behind each layer of a stack."""
        decision: fx.Node | None = None
        for number, name in enumerate(site.data["layers"]):
            # Asked for one by one: a layer reads what stands in for the one below it.
            layer = layer_at(graph, find(graph, name))
            assert layer is not None
            if number == 0 and self.reads == "input":
                decision = self._decide(graph, site, layer)
            decision = self._skip(graph, site, layer, number, decision)

    def _decide(self, graph: Graph, site: Site, first: Layer) -> fx.Node:
        """Insert an agent that decides ahead, and keep skipped frames out of the backbone."""
        policy = self._policy(graph, first, site.data)
        gate = PacedGate(policy, estimator=build_estimator(self.estimator), steps=first.steps)
        source = find(graph, site.data["frames"]) if "frames" in site.data else first.x
        reads = [source] if first.real is None else [source, first.real]
        decision, _ = graph.insert(f"gates.{site.name}", gate, reads, ("decision", "probability"))
        if "features" not in site.data:
            return decision
        features, reader = find(graph, site.data["features"]), find(graph, site.data["reader"])
        defer(reader, first.node, decision)
        graph.add_module(f"_modes.{site.name}", Admission())
        nothing = f"_constants.{site.name}"
        width = spec(features).shape[1]
        graph.add_constant(nothing, torch.zeros(1, width, dtype=spec(features).dtype, device=graph.inputs[0].device))
        with graph.fx.inserting_after(decision):
            admitted = graph.fx.create_node("call_module", f"_modes.{site.name}", (decision,))
        admitted.meta.update(decision=site.name, owner=site.name)
        with graph.fx.inserting_before(reader):
            zero = graph.fx.create_node("get_attr", nothing)
            rows = graph.fx.call_function(torch.ops.aten.unsqueeze.default, (admitted, 1))
            otherwise = graph.fx.call_function(torch.ops.aten.mul.Tensor, (zero, rows))
            chosen = graph.fx.call_function(SELECT, (admitted, features, otherwise))
        reader.replace_input_with(features, chosen)
        return decision

    def _skip(self, graph: Graph, site: Site, layer: Layer, number: int, decision: fx.Node | None) -> fx.Node:
        """Insert what stands in for one layer, behind it; where the agent reads the state, the agent with it."""
        results = gather(graph, layer)
        static = tuple(nodes[0] if nodes else None for nodes in results.parts)
        skipping = SkippingLayer(layer.form, cell_read=static[-1] is not None)
        with graph.fx.inserting_before(results.last.next):
            state = layer.state
            if isinstance(state, fx.Node) and isinstance(state.meta["spec"], tuple):
                state = tuple(graph.fx.call_function(operator.getitem, (state, i)) for i in range(2))
            weights = [graph.fx.create_node("get_attr", path) for path in layer.weights]
            packed: dict[str, Any] = {} if layer.real is None else {"real": layer.real}
            if decision is not None:
                graph.add_module(f"_modes.{site.name}_{number}", skipping)
                inputs = (static, decision, layer.x, state, *weights)
                call = graph.fx.create_node("call_module", f"_modes.{site.name}_{number}", inputs, packed)
            else:
                width = spec(layer.x).shape[-1] + layer.form.output_size
                policy = FramePolicy((width,), self.hidden)
                gate = StepGate(policy, estimator=build_estimator(self.estimator), layer=skipping)
                graph.add_module(f"gates.{site.name}", gate.to(graph.inputs[0].device, graph.dtype))
                inputs = (static, layer.x, state, *weights)
                call = graph.fx.create_node("call_module", f"gates.{site.name}", inputs, packed)
            found = [
                graph.fx.call_function(operator.getitem, (call, i)) if part else None for i, part in enumerate(static)
            ]
            taps = ("decision", "probability") if decision is None else ()
            for i, tap in enumerate(taps):
                part = graph.fx.call_function(operator.getitem, (call, len(static) + i))
                part.meta.update(tap=(tap, site.name), owner=site.name)
                if tap == "decision":
                    part.meta["decision"] = site.name
                    decision = part
        results.replace(found, call)
        graph.invalidate()
        graph.propagate()
        call.meta.update(stands_in=site.name, owner=site.name, share=graph.flops(layer.node) / graph.flops(call))
        if layer.real is not None:
            call.meta["real"] = layer.node.meta["real"]
        assert decision is not None
        return decision


def _unfit(graph: Graph, node: fx.Node, layer: Layer | None) -> str:
    """Why no step of a layer can be skipped; empty if they can."""
    if layer is None:
        kind = type(graph.module_of(node))
        return f"it is a {kind.__module__}.{kind.__qualname__}, whose steps may not be those of torch's own layers"
    found = layer.x.meta.get("spec")
    if not isinstance(found, Spec) or len(found.shape) != 3 or found.batch_dim != (0 if layer.form.batch_first else 1):
        shape = list(found.shape) if isinstance(found, Spec) else "several tensors"
        return f"its input, {shape}, is no batch of sequences"
    if found.rows != 1 or not layer.x.meta["sliceable"]:
        return f"its input {list(found.shape)} has not one sequence for each sample"
    if not found.dtype.is_floating_point:
        return f"its input is {found.dtype}"
    return ""


def _data(stack: list[fx.Node], before: Backbone | None) -> dict[str, Any]:
    """A stack and its backbone, as plain data."""
    data: dict[str, Any] = {"layers": [node.name for node in stack]}
    if before is not None:
        data.update(frames=before.frames.name, features=before.features.name, reader=before.reader.name)
    return data
