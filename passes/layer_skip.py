"""Layer skip: a gate on every residual branch; a sample passes by the branches that it does not need."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from torch import fx, nn

from dyncompile.branches import Fixed, Skippable, skip, skippable
from dyncompile.errors import ArgumentError
from dyncompile.features import feature, token_mask
from dyncompile.graph import Graph
from dyncompile.nn import FeedForwardPolicy, Gate, build_estimator
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.shapes import module_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSkip(Pass):
    """Gate each residual branch (SkipNet, arXiv 1711.09485; ConvNet-AIG, arXiv 1711.11503).

    Before:  %b = branch(%x); %y = add(%b, %x)
    After:   %d, _ = gates.gate3(%x)
             %b = branch(%x); %a = add(%b, %x); %y = select(%d, %a, %x)

    Legality: the addition joins a branch and a shortcut of one shape on the chain of cut points; its
    value has a row for each sample; what only the branch needs costs more than the gate, so that
    values inside which others read leave enough to save; no other decision skips the branch.

    Args:
        projection: Also gate branches whose shortcut is computed; a sample that skips takes the
            shortcut alone.
        hidden: Width between the layers of a gate.
        pool: What of a feature map or of tokens a gate reads: "mean", "cls", "last", or "auto": as
            the model itself pools. Masks of tokens are heeded.
        estimator: How training decides: "gumbel", "straight_through", "semantic_hashing" or "reinforce".
    """

    name: ClassVar[str] = "layer_skip"
    summary: ClassVar[str] = "a gate on each residual branch; a sample runs the branches that it needs"
    paper: ClassVar[str] = "1711.09485"

    projection: bool = True
    hidden: int = 16
    pool: str = "mean"
    estimator: str = "gumbel"

    def __post_init__(self) -> None:
        if self.pool not in ("auto", "mean", "cls", "last"):
            raise ArgumentError("pool", found=repr(self.pool), expected="'auto', 'mean', 'cls' or 'last'")
        if type(self.hidden) is not int or self.hidden < 1:
            raise ArgumentError("hidden", found=repr(self.hidden), expected="a width >= 1")
        build_estimator(self.estimator)

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Branches worth a gate, in order of execution."""
        count = 0
        for place in skippable(graph, projection=self.projection):
            reason = place.reason if isinstance(place, Fixed) else self._refuse(graph, place)
            if reason:
                yield Refusal(node=place.add.name, reason=reason)
            elif isinstance(place, Skippable):
                yield Site(name=f"gate{count}", node=place.output.name, data=place.data)
                count += 1

    def _refuse(self, graph: Graph, place: Skippable) -> str:
        """Why a branch gets no gate; empty if it gets one."""
        try:
            cost = module_flops(lambda: self._policy(graph, place.source), self._inputs(graph, place.source))
        except ArgumentError as error:
            return str(error)
        if cost < place.saved:
            return ""
        why = f", since `{place.leak}` inside it is read outside too" if place.leak else ""
        return f"a gate costs {cost:.0f} FLOPs and skipping the branch saves {place.saved:.0f}{why}"

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Gate one branch."""
        add = find(graph, site.data["add"])
        shortcut = add.args[site.data["shortcut"]]
        source = graph.dominators[add]
        gate = Gate(self._policy(graph, source), estimator=build_estimator(self.estimator))
        inputs = self._inputs(graph, source)
        decision, _ = graph.insert(f"gates.{site.name}", gate, inputs, ("decision", "probability"))
        skip(graph, decision, find(graph, site.node), shortcut)

    def _inputs(self, graph: Graph, source: fx.Node) -> list[fx.Node]:
        mask = token_mask(graph, source)
        return [source] if mask is None else [source, mask]

    def _policy(self, graph: Graph, source: fx.Node) -> nn.Module:
        read = feature(graph, source, mask=token_mask(graph, source), pool=self.pool)
        return FeedForwardPolicy(read, self.hidden)
