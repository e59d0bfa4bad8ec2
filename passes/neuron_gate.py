"""Neuron gate: the neurons of a feed-forward layer in groups, of which a router picks those that a row needs."""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import fx, nn

from dyncompile.clustering import balanced_clusters, even_split
from dyncompile.errors import ArgumentError
from dyncompile.features import pooling, token_mask
from dyncompile.feedforward import FeedForward, Projection, feed_forward, feed_forward_layers, idle_in_evaluation
from dyncompile.graph import Graph, spec
from dyncompile.nn import Feature, FeedForwardPolicy, Gate, build_estimator
from dyncompile.nn.neurons import AllOpen, NeuronMask, TopKGate
from dyncompile.ops import SELECT
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.shapes import module_flops

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronGate(Pass):
    """Compute the groups of hidden neurons that a sample or token needs.

    Conditional computation (arXiv 1511.06297); MoEfication (arXiv 2110.01786).

    Before:  %h = act(first(%x));  %y = second(%h)
    After:   %d0, %d1 = gates.neurons0(%x);  %w = all on(%d0, %d1)
             %y  = second(mask(act(first(%x)), %d0, %d1))
             %a  = bias of second
             %a0 = select(%d0, %a + part0(%x), %a)
             %a1 = select(%d1, %a0 + part1(%x), %a0);  %z = select(%w, %y, %a1)

    A part is the layer with the rows of `first` and the columns of `second` that belong to a group: slices of the same
    weights. Rows with every group on run the layer itself, so that nothing is rounded differently. In training the
    layer runs as a whole, its neurons multiplied with the decisions, which is the sum of the parts that are on.

    The layers are linear, convolutions that look at one position (ConvNeXt), or `x @ weight + bias` (GPT-2).

    Legality: between the two layers stands only what acts on each neuron alone (activations, dropout, the product of
    a gated layer such as SwiGLU); nobody else reads the neurons; layers do not overlap; there are at least as many
    neurons as groups; the layer is at least `min_share` of the model's FLOPs, and its gate is cheaper than what can be
    saved. Its input has a row for each sample; by the sample no more than one, by the token samples come first.

    Args:
        groups: How many, of equal size.
        split: "contiguous" neurons, or "cluster": neurons whose first weights are alike share a group.
        per: "sample" or "token": what picks its own groups. What has no tokens picks by the sample.
        top_k: Every row picks this many groups; None: as many as pass the gate.
        hidden: Width between the two layers of a gate.
        pool: How tokens become what a gate by the sample reads: "mean", "cls", "last", or "auto": as the model itself
            pools. Masks of tokens are heeded.
        estimator: How training decides: "gumbel", "straight_through", "semantic_hashing" or "reinforce".
        min_share: Share of the model's FLOPs below which a layer is left alone.
    """

    name: ClassVar[str] = "neuron_gate"
    summary: ClassVar[str] = "feed-forward layers in groups of neurons; a sample or token runs the groups it needs"
    paper: ClassVar[str] = "2110.01786"
    seeks: ClassVar[str] = (
        "feed-forward layers: two linear layers or 1x1 convolutions with elementwise operations between them"
    )

    groups: int = 8
    split: str = "contiguous"
    per: str = "sample"
    top_k: int | None = None
    hidden: int = 16
    pool: str = "mean"
    estimator: str = "gumbel"
    min_share: float = 0.005

    def __post_init__(self) -> None:
        for argument, value, allowed in (
            ("split", self.split, ("contiguous", "cluster")),
            ("per", self.per, ("sample", "token")),
            ("pool", self.pool, ("auto", "mean", "cls", "last")),
        ):
            if value not in allowed:
                raise ArgumentError(argument, found=repr(value), expected=f"one of {allowed}")
        if type(self.groups) is not int or self.groups < 2:
            raise ArgumentError("groups", found=repr(self.groups), expected="a number >= 2")
        if self.top_k is not None and (type(self.top_k) is not int or not 1 <= self.top_k < self.groups):
            raise ArgumentError("top_k", found=repr(self.top_k), expected=f"None, or from 1 to {self.groups - 1}")
        if type(self.hidden) is not int or self.hidden < 1:
            raise ArgumentError("hidden", found=repr(self.hidden), expected="a width >= 1")
        if not 0 <= self.min_share < 1:
            raise ArgumentError("min_share", found=self.min_share, expected="a share in [0, 1)")
        self._gate(nn.Identity())

    # --- where -----------------------------------------------------------------------------------

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Feed-forward layers worth a gate, in order of execution."""
        taken: dict[fx.Node, str] = {}
        for layer in feed_forward_layers(graph):
            if isinstance(layer, tuple):
                yield Refusal(node=layer[0].name, reason=layer[1])
                continue
            reason = self._refuse(graph, layer, taken)
            if reason:
                yield Refusal(node=layer.second.name, reason=reason)
                continue
            name = f"neurons{len(set(taken.values()))}"
            taken.update(dict.fromkeys(layer.nodes, name))
            data = {"groups": self._clusters(layer)} if self.split == "cluster" else {}
            yield Site(name=name, node=layer.second.name, data=data)

    def _refuse(self, graph: Graph, layer: FeedForward, taken: dict[fx.Node, str]) -> str:
        """Why a layer is not split; empty if it is."""
        for node in layer.nodes:
            if node in taken:
                return f"`{node}` belongs to the layer of `{taken[node]}` already"
        if layer.neurons < self.groups:
            return f"{layer.neurons} neurons are fewer than {self.groups} groups"
        x = spec(layer.source)
        if x.batch_dim is None or x.batch_dim == layer.channel_dim or not layer.source.meta["sliceable"]:
            return f"its input {list(x.shape)} has no row for each sample"
        if self._by_token(layer) and x.batch_dim != 0:
            return f"the samples lie along dim {x.batch_dim} of its input {list(x.shape)}, not along dim 0, per token"
        if not self._by_token(layer) and x.rows != 1:
            advice = "; take per='token'" if _last(layer) else ""
            return f"its input {list(x.shape)} has {x.rows} rows a sample{advice}"
        own = sum(graph.flops(node) for node in layer.nodes)
        if own < self.min_share * graph.total_flops:
            share = own / graph.total_flops
            return f"it is {share:.1%} of the model's FLOPs, less than min_share={self.min_share:.1%}"
        gate = module_flops(lambda: self._policy(graph, layer), self._reads(graph, layer))
        gate *= math.prod(x.shape[1:-1]) if self._by_token(layer) else 1
        saved = own * (1 - (self.top_k or 0) / self.groups)
        if gate >= saved:
            return f"a gate costs {gate:.0f} FLOPs and the groups that it can skip {saved:.0f}"
        return ""

    def _by_token(self, layer: FeedForward) -> bool:
        x = spec(layer.source)
        return self.per == "token" and _last(layer) and (len(x.shape) > 2 or x.rows > 1)

    def _clusters(self, layer: FeedForward) -> list[list[int]]:
        rows = [layer.projections[node].weight.detach().flatten(1) for node in layer.firsts]
        return balanced_clusters(torch.cat(rows, 1), self.groups)

    # --- the gate --------------------------------------------------------------------------------

    def _reads(self, graph: Graph, layer: FeedForward) -> list[fx.Node]:
        """What a gate reads: the layer's input, and the mask of its tokens."""
        mask = None if self._by_token(layer) else token_mask(graph, layer.source)
        return [layer.source] if mask is None else [layer.source, mask]

    def _policy(self, graph: Graph, layer: FeedForward, *, flat: bool = False) -> nn.Module:
        """Reads features `[N, ..., D]` and pools them, or `flat` tokens `[R, D]`, of which each is decided alone."""
        _, *masks = self._reads(graph, layer)
        x = spec(layer.source)
        read = Feature(
            shape=x.shape[-2:] if flat else x.shape,
            batch_dim=0 if flat else x.batch_dim or 0,
            channel_dim=1 if flat else layer.channel_dim,
            pool=pooling(graph, layer.source) if self.pool == "auto" else self.pool,
            masked=bool(masks),
            padding=bool(masks) and "pad" in masks[0].name,
        )
        return FeedForwardPolicy(read, self.hidden, self.groups)

    def _gate(self, policy: nn.Module) -> Gate:
        estimator = build_estimator(self.estimator)
        if self.top_k is None:
            return Gate(policy, estimator=estimator, decisions=self.groups)
        return TopKGate(policy, estimator=estimator, k=self.top_k, decisions=self.groups)

    # --- rewriting -------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Split one layer."""
        layer = feed_forward(graph, find(graph, site.node))
        if layer is None:
            raise ArgumentError("sites", found=f"`{site.node}`", expected="the second layer of a feed-forward layer")
        groups: list[list[int]] = site.data.get("groups") or even_split(layer.neurons, self.groups)
        source, *masks = self._reads(graph, layer)
        shape = spec(layer.second).shape[1:]
        dim = spec(source).batch_dim or 0
        flat = self._by_token(layer) and bool(shape[:-1])
        gate = self._gate(self._policy(graph, layer, flat=flat))
        rows = _flatten(graph, layer) if flat else source
        picked, _ = graph.insert(f"gates.{site.name}", gate, [rows, *masks], ("", "probability"))
        whole, decisions = _decisions(graph, site.name, picked, len(groups))
        _mask(graph, layer, site.name, NeuronMask(groups, dim, -1 if flat else layer.channel_dim), decisions)

        users = list(layer.second.users)
        call = graph.fx.call_function
        with graph.fx.inserting_before(layer.second.next):
            total = _bias(graph, layer, rows, flat=flat)
            for g, (decision, members) in enumerate(zip(decisions, groups, strict=True)):
                part = _part(graph, layer, rows, _Neurons(graph, members, f"_constants.{site.name}_{g}"))
                total = call(SELECT, (decision, call(_aten.add.Tensor, (total, part)), total, dim))
            result = call(SELECT, (whole, layer.second, total, dim))
            if flat:
                result = call(_aten.reshape.default, (result, [-1, *shape]))
        for user in users:
            user.replace_input_with(layer.second, result)
        if layer.second.meta.pop("final", False):
            result.meta["final"] = True
        if flat:
            for node in layer.nodes:
                for known in ("spec", "flops"):
                    node.meta.pop(known)


def _flatten(graph: Graph, layer: FeedForward) -> fx.Node:
    """Let the layer run on rows `[R, D]`, one for each token."""
    source = layer.source
    with graph.fx.inserting_after(source):
        rows = graph.fx.call_function(_aten.reshape.default, (source, [-1, spec(source).shape[-1]]))
    for node in layer.firsts:
        node.replace_input_with(source, rows)
    return rows


def _decisions(graph: Graph, name: str, picked: fx.Node, count: int) -> tuple[fx.Node, list[fx.Node]]:
    """Whether every group is on; and the decision of each group, `[R]`."""
    path = f"_modes.{name}_whole"
    graph.add_module(path, AllOpen())
    parts = [f"{name}.{g}" for g in range(count)]
    with graph.fx.inserting_before(picked.next):
        whole = graph.fx.create_node("call_module", path, (picked,))
        decisions = [graph.fx.call_function(_aten.select.int, (picked, 1, g)) for g in range(count)]
    for node, decision in zip((whole, *decisions), (f"{name}.whole", *parts), strict=True):
        node.meta.update(owner=name, decision=decision)
    whole.meta["all_of"] = parts
    return whole, decisions


def _mask(graph: Graph, layer: FeedForward, name: str, mask: NeuronMask, decisions: list[fx.Node]) -> None:
    """Multiply the neurons with the decisions of their groups, in training."""
    path = f"_modes.{name}_mask"
    graph.add_module(path, mask.to(graph.inputs[0].device))
    with graph.fx.inserting_before(layer.second):
        masked = graph.fx.create_node("call_module", path, (layer.hidden, *decisions))
    masked.meta["training_only"] = True
    layer.second.replace_input_with(layer.hidden, masked)


def _bias(graph: Graph, layer: FeedForward, rows: fx.Node, *, flat: bool) -> fx.Node:
    """What the layer gives with no neuron: its second bias, for each row."""
    call = graph.fx.call_function
    value = spec(layer.second)
    rank, dim = (2, 1) if flat else (len(value.shape), layer.channel_dim)
    column = call(_aten.slice.Tensor, (rows, dim, 0, 1))
    nothing = call(_aten.zeros_like.default, (column,))
    sizes = [-1] * rank
    sizes[dim] = value.shape[layer.channel_dim]
    if not layer.projections[layer.second].biased:
        return call(_aten.clone.default, (call(_aten.expand.default, (nothing, sizes)),))
    bias = graph.fx.get_attr(f"{layer.second.target}.bias")
    if dim < rank - 1:
        bias = call(_aten.reshape.default, (bias, [-1] + [1] * (rank - 1 - dim)))
    return call(_aten.add.Tensor, (nothing, bias))


def _last(layer: FeedForward) -> bool:
    """Whether channels come last, after the tokens."""
    return layer.channel_dim == len(spec(layer.source).shape) - 1


class _Neurons:
    """Takes the entries of a group out of a weight: a slice of consecutive ones, else by a constant index."""

    def __init__(self, graph: Graph, members: list[int], path: str) -> None:
        self.graph = graph
        self.start, self.stop = members[0], members[-1] + 1
        self.consecutive = members == list(range(self.start, self.stop))
        self.path = path
        if not self.consecutive:
            graph.add_constant(path, torch.tensor(members, device=graph.inputs[0].device))

    def of(self, weight: str, dim: int) -> fx.Node:
        """The group's entries of a parameter, along a dim."""
        whole = self.graph.fx.get_attr(weight)
        if self.consecutive:
            return self.graph.fx.call_function(_aten.slice.Tensor, (whole, dim, self.start, self.stop))
        return self.graph.fx.call_function(_aten.index_select.default, (whole, dim, self.graph.fx.get_attr(self.path)))

    def project(self, node: fx.Node, how: Projection, x: fx.Node, *, made: bool) -> fx.Node:
        """The projection of a node, of those neurons that it makes, with their bias, or that it reads, without one."""
        call = self.graph.fx.call_function
        weight = self.of(f"{node.target}.weight", int(made == how.transposed))
        if how.transposed:
            weight = call(_aten.t.default, (weight,))
        bias = self.of(f"{node.target}.bias", 0) if made and how.biased else None
        return call(how.op, (x, weight, bias))


def _part(graph: Graph, layer: FeedForward, rows: fx.Node, neurons: _Neurons) -> fx.Node:
    """What a group of neurons adds, without the second bias. Dropout is left out: training runs the layer itself."""
    mapping: dict[fx.Node, fx.Node] = {
        node: neurons.project(node, layer.projections[node], rows, made=True) for node in layer.firsts
    }
    for node in layer.between:
        if idle_in_evaluation(graph, node):
            mapping[node] = mapping[node.args[0]]  # type: ignore[index]
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), mapping.__getitem__)
        mapping[node] = graph.fx.create_node(node.op, node.target, args, kwargs)
    return neurons.project(layer.second, layer.projections[layer.second], mapping[layer.hidden], made=False)
