"""Block policy: one small network reads the input once and decides about every residual branch at once."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import fx, nn

from dyncompile.branches import GRANULARITIES, Fixed, Skippable, skip, skippable
from dyncompile.errors import ArgumentError
from dyncompile.features import feature, token_mask
from dyncompile.graph import Graph, is_tensor, spec
from dyncompile.nn import ConvolutionalPolicy, FeedForwardPolicy, Gate, build_estimator
from dyncompile.nn.estimators import ESTIMATORS
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.shapes import module_flops

_WIDTHS = (32, 16, 8, 4)
_SHARE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPolicy(Pass):
    """Decide which residual branches run before any of them does (BlockDrop, arXiv 1711.08393).

    Before:  %b = branch(%h); %y = add(%b, %h)
    After:   %p, _ = gates.policy(%x); %d = %p[:, 3]
             %b = branch(%h); %a = add(%b, %h); %y = select(%d, %a, %h)

    The decisions are `block0`, `block1`, ... in order of execution, all known ahead.

    Legality: as for `layer_skip`, except that a branch has only to save something: what the policy
    costs has to be less than what all branches save together. The policy reads the model's main
    input: images and sequences through strided convolutions, vectors through two layers; where the
    input is integers, or a mask tells its tokens from padding, the mean of the first floating value.

    Args:
        granularity: "branch" or "block", as for `layer_skip`.
        projection: Also branches whose shortcut is computed; who skips takes the shortcut alone.
        width: Of the policy's first layer; None takes the widest of 32, 16, 8 and 4 that costs at
            most a twentieth of the model, or 4.
        estimator: How training decides: "reinforce" (the paper's, by `dyncompile.training.PolicyGradient`),
            "gumbel", "straight_through" or "semantic_hashing".
    """

    name: ClassVar[str] = "block_policy"
    summary: ClassVar[str] = "one policy reads the input and decides which residual branches run"
    paper: ClassVar[str] = "1711.08393"
    seeks: ClassVar[str] = "residual branches: a value plus what is computed from it"

    granularity: str = "branch"
    projection: bool = True
    width: int | None = None
    estimator: str = "gumbel"

    def __post_init__(self) -> None:
        for argument, value, allowed in (
            ("granularity", self.granularity, GRANULARITIES),
            ("estimator", self.estimator, tuple(ESTIMATORS)),
        ):
            if value not in allowed:
                raise ArgumentError(argument, found=repr(value), expected=f"one of {allowed}")
        if self.width is not None and (type(self.width) is not int or self.width < 1):
            raise ArgumentError("width", found=repr(self.width), expected="a width >= 1, or None")

    # --- where -----------------------------------------------------------------------------------

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """One site, of all branches worth a decision."""
        places: list[Skippable] = []
        for place in skippable(graph, granularity=self.granularity, projection=self.projection):
            reason = place.reason if isinstance(place, Fixed) else place.refuse(0.0)
            if reason:
                yield Refusal(node=place.add.name, reason=reason)
            elif isinstance(place, Skippable):
                places.append(place)
        if not places:
            return
        try:
            source = _source(graph, places[0].source)
            width, cost = self._measure(graph, source, len(places))
        except ArgumentError as error:
            yield Refusal(node=graph.main_input.name, reason=str(error))
            return
        saved = sum(place.saved for place in places)
        if cost >= saved:
            reason = f"the policy costs {cost:.0f} FLOPs and skipping every branch saves {saved:.0f}"
            yield Refusal(node=source.name, reason=reason)
            return
        data = {"width": width, "blocks": [place.data for place in places]}
        yield Site(name="policy", node=source.name, data=data)

    def _measure(self, graph: Graph, source: fx.Node, blocks: int) -> tuple[int, float]:
        """Width of the policy and its FLOPs per sample."""
        inputs = _inputs(graph, source)
        for width in _WIDTHS if self.width is None else (self.width,):
            cost = module_flops(lambda width=width: _policy(graph, source, width, blocks), inputs)  # type: ignore[misc]
            if cost <= _SHARE * graph.total_flops:
                break
        return width, cost

    # --- how -------------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Insert the policy, and a select for each branch."""
        source, blocks = find(graph, site.node), site.data["blocks"]
        policy = _policy(graph, source, site.data["width"], len(blocks))
        gate = Gate(policy, estimator=build_estimator(self.estimator), decisions=len(blocks))
        inputs = _inputs(graph, source)
        together, probability = graph.insert(f"gates.{site.name}", gate, inputs, ("", "probability"))
        for i, block in reversed(list(enumerate(blocks))):
            with graph.fx.inserting_after(probability):
                decision = graph.fx.call_function(torch.ops.aten.select.int, (together, 1, i))
            decision.meta.update(decision=f"block{i}", owner=site.name)
            skip(graph, decision, find(graph, block["output"]), find(graph, block["add"]).args[block["shortcut"]])


def _source(graph: Graph, first: fx.Node) -> fx.Node:
    """What the policy reads: the main input if it is features, else the first floating value after it.

    Args:
        graph: The graph.
        first: Where the first branch leaves the trunk; the policy reads nothing behind it.

    Raises:
        ArgumentError: There is no such value of one row a sample.
    """
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    for node in (graph.main_input, *graph.cut_points):
        if order[node] > order[first]:
            break
        rows = is_tensor(node) and node.meta["sliceable"] and spec(node).rows == 1
        if rows and spec(node).dtype.is_floating_point and len(spec(node).shape) > 1:
            return node
    expected = "floating features, one row a sample, before the first branch"
    raise ArgumentError("policy", found=f"input {list(spec(graph.main_input).shape)}", expected=expected)


def _inputs(graph: Graph, source: fx.Node) -> list[fx.Node]:
    mask = token_mask(graph, source)
    return [source] if mask is None else [source, mask]


def _policy(graph: Graph, source: fx.Node, width: int, blocks: int) -> nn.Module:
    mask = token_mask(graph, source)
    read = feature(graph, source, mask=mask, pool="mean")
    if source.op != "placeholder" or mask is not None or len(read.shape) == 2:
        return FeedForwardPolicy(read, width, blocks)
    return ConvolutionalPolicy(read, width, blocks)
