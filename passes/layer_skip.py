"""Layer skip: a gate on every residual branch; a sample passes by the branches that it does not need."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from torch import fx, nn

from dyncompile.branches import GRANULARITIES, Fixed, Skippable, skip, skippable
from dyncompile.errors import ArgumentError, PassError
from dyncompile.features import POOLS, feature, token_mask
from dyncompile.graph import Graph, spec
from dyncompile.nn import FeedForwardPolicy, Gate, RecurrentPolicy, build_estimator
from dyncompile.nn.estimators import ESTIMATORS
from dyncompile.nn.policies import RecurrentCore
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.shapes import module_flops

_STATE = "layer_skip_state"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSkip(Pass):
    """Gate each residual branch (SkipNet, arXiv 1711.09485; ConvNet-AIG, arXiv 1711.11503).

    Before:  %b = branch(%x); %y = add(%b, %x)
    After:   %d, _ = gates.gate3(%x)
             %b = branch(%x); %a = add(%b, %x); %y = select(%d, %a, %x)

    Legality: the addition joins a branch and a shortcut of one shape on the chain of cut points; its
    value has a row for each sample; what only the branch needs costs more than the gate, whatever
    else reads values inside it; no other decision skips the branch.

    A value of r rows a sample (frames in the batch dim) gets a decision a row.

    Args:
        gate: "feed_forward": each gate decides by itself; "recurrent": one LSTM cell is shared by all
            gates, and its state goes from gate to gate, whatever they decide.
        granularity: "branch": each branch by itself; "block": attention and feed-forward branch of a
            transformer block together: who skips the block has its input as output, norms included. Every other
            branch, as those of an MLP-Mixer, stays by itself.
        projection: Also gate branches whose shortcut is computed; who skips takes the shortcut alone.
        hidden: Width between the layers of a gate; of the LSTM, if recurrent.
        pool: What of a feature map or of tokens a gate reads: "mean", "cls", "last", or "auto": as
            the model itself pools. Masks of tokens are heeded.
        estimator: How training decides: "gumbel", "straight_through", "semantic_hashing" or "reinforce".
    """

    name: ClassVar[str] = "layer_skip"
    summary: ClassVar[str] = "a gate on each residual branch; a sample runs the branches that it needs"
    paper: ClassVar[str] = "1711.09485"
    seeks: ClassVar[str] = "residual branches: a value plus what is computed from it"

    gate: str = "feed_forward"
    granularity: str = "branch"
    projection: bool = True
    hidden: int = 16
    pool: str = "mean"
    estimator: str = "gumbel"

    def __post_init__(self) -> None:
        for argument, value, allowed in (
            ("gate", self.gate, ("feed_forward", "recurrent")),
            ("granularity", self.granularity, GRANULARITIES),
            ("pool", self.pool, POOLS),
            ("estimator", self.estimator, tuple(ESTIMATORS)),
        ):
            if value not in allowed:
                raise ArgumentError(argument, found=repr(value), expected=f"one of {allowed}")
        if not isinstance(self.projection, bool):
            raise ArgumentError("projection", found=repr(self.projection), expected="True or False")
        if type(self.hidden) is not int or self.hidden < 1:
            raise ArgumentError("hidden", found=repr(self.hidden), expected="a width >= 1")

    # --- where -----------------------------------------------------------------------------------

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Branches worth a gate, in order of execution."""
        count = 0
        for place in skippable(graph, granularity=self.granularity, projection=self.projection):
            reason = place.reason if isinstance(place, Fixed) else self._refuse(graph, place)
            if reason:
                yield Refusal(node=place.add.name, reason=reason)
            elif isinstance(place, Skippable):
                yield Site(name=f"gate{count}", node=place.output.name, data=place.data)
                count += 1

    def _refuse(self, graph: Graph, place: Skippable) -> str:
        """Why a branch gets no gate; empty if it gets one."""
        source = place.source
        try:
            cost = module_flops(lambda: self._policy(graph, source, self._core()), self._features(graph, source))
        except ArgumentError as error:
            return str(error)
        return place.refuse(cost)

    # --- how -------------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Gate one branch, behind those that are gated already."""
        add = find(graph, site.data["add"])
        source = graph.dominator(add)
        if source is None:
            raise PassError(f"`{add.name}` is on no path to the prediction: the sites were made for another model")
        rows = spec(source).rows
        recurrent = self.gate == "recurrent"
        state = [node for node in graph.fx.nodes if recurrent and node.meta.get(_STATE) == rows][-2:]
        policy = self._policy(graph, source, self._shared(graph))
        gate = Gate(policy, estimator=build_estimator(self.estimator))
        taps = ["decision", "probability"] + ["", ""] * isinstance(policy, RecurrentPolicy)
        inputs = [*self._features(graph, source), *state]
        decision, _, *state = graph.insert(f"gates.{site.name}", gate, inputs, taps)
        for node in state:
            node.meta[_STATE] = rows
        skip(graph, decision, find(graph, site.node), add.args[site.data["shortcut"]])

    def _features(self, graph: Graph, source: fx.Node) -> list[fx.Node]:
        mask = token_mask(graph, source)
        return [source] if mask is None else [source, mask]

    def _policy(self, graph: Graph, source: fx.Node, core: RecurrentCore | None) -> nn.Module:
        read = feature(graph, source, mask=token_mask(graph, source), pool=self.pool)
        return FeedForwardPolicy(read, self.hidden) if core is None else RecurrentPolicy(read, core)

    def _core(self) -> RecurrentCore | None:
        return RecurrentCore(self.hidden) if self.gate == "recurrent" else None

    def _shared(self, graph: Graph) -> RecurrentCore | None:
        """The core of the gates that are there, or a new one for the first; None if they have none."""
        if self.gate != "recurrent":
            return None
        there = (module for module in graph.root.modules() if isinstance(module, RecurrentCore))
        return next(there, None) or self._core()
