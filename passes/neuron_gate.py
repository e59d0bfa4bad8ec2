"""Neuron gate: the neurons of a feed-forward layer in groups, of which a router picks those that a row needs."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dyncompile.clustering import balanced_clusters, even_split
from dyncompile.errors import ArgumentError
from dyncompile.features import pooling, token_mask
from dyncompile.feedforward import FeedForward, feed_forward, feed_forward_layers, idle_in_evaluation
from dyncompile.graph import Graph, spec
from dyncompile.nn import Feature, FeedForwardPolicy, Gate, build_estimator
from dyncompile.nn.neurons import GatedNeurons, NeuronLayout, NeuronMask
from dyncompile.nn.topk import TopKGate
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.shapes import module_flops
from dyncompile.standing import decide, stand_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronGate(Pass):
    """Compute the groups of hidden neurons that a sample or token needs.

    Conditional computation (arXiv 1511.06297); MoEfication (arXiv 2110.01786).

    Before:  %h = act(first(%x));  %y = second(%h)
    After:   %d, _ = gates.neurons0(%x)                                   ; one decision a group, `[N * G]`
             %y = second(mask(act(first(%x)), %d))                        ; the mask in training only
             %z = gated(static=(%y,), %d, %x, weights...)                 ; stands in for the value of second

    What stands in runs slices of the same weights: the rows of `first` and the columns of `second` that belong to
    open groups. Rows with every group on have the value of the layer itself, so that nothing is rounded differently.
    In training the layer runs as a whole, its neurons multiplied with the decisions.

    The layers are linear, convolutions that look at one position (ConvNeXt), or `x @ weight + bias` (GPT-2). A
    gated layer's first projections may be one layer whose outputs are taken apart (`chunk(2, -1)`: Phi-3, ModernBERT).

    Legality: between the two layers stands only what acts on each neuron alone (activations, dropout, the product of
    a gated layer such as SwiGLU); nobody else reads the neurons; layers do not overlap; there are at least as many
    neurons as groups; the layer is at least `min_share` of the model's FLOPs, and its gate is cheaper than what can be
    saved. Its input has a row for each sample; by the sample no more than one, by the token samples come first. In
    layers that `channel_gate` narrows, the groups are those of the full width: narrower levels run whole.

    Args:
        groups: How many at most: the largest number up to it that splits the neurons into groups of equal size.
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
        share: Any = self.min_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ArgumentError("min_share", found=repr(share), expected="a share in [0, 1)")
        self._gate(nn.Identity(), self.groups)

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
        count = self._count(layer)
        if count < 2:
            return f"{layer.neurons} neurons cannot be split into 2 to {self.groups} groups of equal size"
        if count <= (self.top_k or 0):
            return f"its {layer.neurons} neurons make {count} groups, no more than top_k={self.top_k} picks"
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
        saved = own * (1 - (self.top_k or 0) / count)
        if gate >= saved:
            return f"a gate costs {gate:.0f} FLOPs and the groups that it can skip {saved:.0f}"
        return ""

    def _by_token(self, layer: FeedForward) -> bool:
        x = spec(layer.source)
        return self.per == "token" and _last(layer) and (len(x.shape) > 2 or x.rows > 1)

    def _count(self, layer: FeedForward) -> int:
        """How many groups a layer has."""
        return next(count for count in range(self.groups, 0, -1) if layer.neurons % count == 0)

    def _clusters(self, layer: FeedForward) -> list[list[int]]:
        rows = [layer.projections[node].weight.detach().flatten(1) for node in layer.firsts]
        return balanced_clusters(torch.cat(rows, 1), self._count(layer))

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
        return FeedForwardPolicy(read, self.hidden, self._count(layer))

    def _gate(self, policy: nn.Module, count: int) -> Gate:
        estimator = build_estimator(self.estimator)
        if self.top_k is None:
            return Gate(policy, estimator=estimator, decisions=count)
        return TopKGate(policy, estimator=estimator, k=self.top_k, decisions=count)

    # --- rewriting -------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Split one layer."""
        layer = feed_forward(graph, find(graph, site.node))
        if layer is None:
            raise ArgumentError("sites", found=f"`{site.node}`", expected="the second layer of a feed-forward layer")
        groups: list[list[int]] = site.data.get("groups") or even_split(layer.neurons, self._count(layer))
        read, flops = self._reads(graph, layer), sum(graph.flops(node) for node in layer.nodes)
        if flat := self._by_token(layer):
            with graph.fx.inserting_after(layer.source):
                tokens = (layer.source, [-1, spec(layer.source).shape[-1]])
                read = [graph.fx.call_function(torch.ops.aten.reshape.default, tokens)]
        gate = self._gate(self._policy(graph, layer, flat=flat), len(groups))
        decision = decide(graph, site.name, gate, read)

        batch_dim = spec(layer.source).batch_dim or 0
        layout = NeuronLayout(batch_dim=batch_dim, channel_dim=layer.channel_dim, by_token=flat)
        path = f"_modes.{site.name}_mask"
        graph.add_module(path, NeuronMask(groups, layout).to(graph.inputs[0].device))
        with graph.fx.inserting_before(layer.second):
            masked = graph.fx.create_node("call_module", path, (layer.hidden, decision))
        masked.meta["training_only"] = True
        layer.second.replace_input_with(layer.hidden, masked)

        projections = list(layer.projections.values())
        module = GatedNeurons(
            _activation(graph, layer),
            groups,
            layout=layout,
            biased=[made.biased for made in projections],
            transposed=[made.transposed for made in projections],
            cuts=[made.cut for made in projections],
        )
        weights = [
            f"{made.node.target}.{name}" for made in projections for name in ("weight", "bias")[: 1 + made.biased]
        ]
        read = [decision, layer.source]
        stand_in(graph, site.name, module, layer.nodes, (layer.second,), [*read, *weights], flops=flops)


def _activation(graph: Graph, layer: FeedForward) -> fx.GraphModule:
    """What acts on each neuron alone, from what the first projections make; without dropout, which only trains."""
    made, owned = fx.Graph(), nn.Module()
    mapping = {node: made.placeholder(f"made{i}") for i, node in enumerate(layer.firsts)}
    for node in layer.between:
        if idle_in_evaluation(graph, node):
            mapping[node] = mapping[node.args[0]]  # type: ignore[index]
            continue
        if (module := graph.module_of(node)) is not None:
            owned.add_module(node.name, copy.deepcopy(module).eval())
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), mapping.__getitem__)
        target = node.name if module is not None else node.target
        mapping[node] = made.create_node(node.op, target, args, kwargs)
    made.output(mapping[layer.hidden])
    return fx.GraphModule(owned, made, class_name="Activation")


def _last(layer: FeedForward) -> bool:
    """Whether channels come last, after the tokens."""
    return layer.channel_dim == len(spec(layer.source).shape) - 1
