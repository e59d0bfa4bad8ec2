"""Channel gate: how many channels of a layer are computed is chosen per sample."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import fx, nn

from dyncompile.channels import ChannelGroup, channel_groups
from dyncompile.errors import ArgumentError, PassError
from dyncompile.features import feature, token_mask
from dyncompile.graph import Graph, spec
from dyncompile.narrowing import Arm, Region, obstacle, region, saved_flops
from dyncompile.nn import FeedForwardPolicy, Gate, build_estimator
from dyncompile.ops import SWITCH
from dyncompile.passes.base import Pass, Refusal, Site
from dyncompile.shapes import module_flops

_LEAST = 2
"""Channels that the narrowest level keeps: of one channel the layouts of an image cannot be told apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelGate(Pass):
    """Choose one of K widths of each group of channels (slimmable, arXiv 1812.08928; dynamic slimmable, 2103.13258).

    Before:  %h = relu(bn1(conv1(%x))); %y = bn2(conv2(%h))
    After:   %r, _ = gates.width0(%x)
             %h = relu(bn1(conv1(%x))); %y = bn2(conv2(%h))
             %n = relu(bn1[:k](conv1[:k](%x))); %z = width0.bn2(conv2[:, :k](%n))      # one for each narrow level
             %s = switch(%r, [%z, ..., %y])

    A narrow arm runs slices of the same weights. Its batch norms see other values than the static model's where they
    stand behind a layer that reads narrowed channels.

    Legality: convolutions or linear layers make the channels and read them, and what lies between works on each
    channel by itself (batch, group and layer norm, activations, pooling, grouped convolutions, sums, scales computed
    from the channels); no value between is read elsewhere; no layer is narrowed by two gates; the narrowest level
    saves more than the gate costs.

    Args:
        levels: Share of the channels at each width, ascending; the last is 1.
        chain: Up to how many groups one gate narrows together, where a layer reads one and makes the next (the two
            inside a bottleneck).
        norm: Batch norms that see other values at another width: "switchable": statistics and parameters for each
            width; "shared": the static ones.
        worth: Least share of the model's FLOPs that the narrowest level of a gate saves.
        hidden: Width between the layers of a gate.
        pool: What of a feature map or of tokens a gate reads: "mean", "cls", "last", or "auto": as the model itself
            pools.
        estimator: How training decides: "gumbel", "straight_through", "semantic_hashing" or "reinforce".
    """

    name: ClassVar[str] = "channel_gate"
    summary: ClassVar[str] = "a gate on the channels between layers; a sample runs the width that it needs"
    paper: ClassVar[str] = "2103.13258"

    levels: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    chain: int = 2
    norm: str = "switchable"
    worth: float = 0.002
    hidden: int = 16
    pool: str = "mean"
    estimator: str = "gumbel"

    def __post_init__(self) -> None:
        given: Any = self.levels
        shares = list(given) if isinstance(given, list | tuple) else []
        ascending = all(a < b for a, b in zip([0.0, *shares], shares, strict=False))
        if len(shares) < 2 or not ascending or shares[-1] != 1:
            raise ArgumentError("levels", found=repr(self.levels), expected="at least two ascending shares up to 1.0")
        for argument, value in (("chain", self.chain), ("hidden", self.hidden)):
            number: Any = value
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ArgumentError(argument, found=repr(value), expected="a number >= 1")
        if not 0 <= self.worth < 1:
            raise ArgumentError("worth", found=self.worth, expected="a share in [0, 1)")
        if self.norm not in ("switchable", "shared"):
            raise ArgumentError("norm", found=repr(self.norm), expected="'switchable' or 'shared'")
        if self.pool not in ("auto", "mean", "cls", "last"):
            raise ArgumentError("pool", found=repr(self.pool), expected="'auto', 'mean', 'cls' or 'last'")
        build_estimator(self.estimator)

    # --- where -----------------------------------------------------------------------------------

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Groups worth a gate, in order of execution.

        Of gates that would narrow one layer, the one that saves most is chosen.
        """
        groups = channel_groups(graph)
        reasons = {group.producers[0]: self._refuse(graph, [group]) for group in groups}
        chains = [chain for group in groups for chain in self._chains(graph, group, groups, reasons)]
        saved = {tuple(g.producers[0] for g in chain): self._saved(graph, chain) for chain in chains}
        taken: dict[fx.Node, fx.Node] = {}
        chosen: dict[fx.Node, list[ChannelGroup]] = {}
        for chain in sorted(chains, key=lambda chain: -saved[tuple(g.producers[0] for g in chain)]):
            nodes = self._region(graph, chain).nodes
            if not any(node in taken for node in nodes):
                chosen[chain[0].producers[0]] = chain
                taken.update(dict.fromkeys(nodes, chain[0].producers[0]))
        names: dict[fx.Node, str] = {}
        for group in groups:
            if group.producers[0] in chosen:
                names[group.producers[0]] = f"width{len(names)}"
        covered = {group.producers[0] for chain in chosen.values() for group in chain}
        for group in groups:
            first = group.producers[0]
            if first in chosen:
                producers = [other.producers[0].name for other in chosen[first]]
                parts = self._parts(chosen[first])
                yield Site(name=names[first], node=first.name, data={"groups": producers, "parts": parts})
            elif first not in covered:
                yield Refusal(node=first.name, reason=reasons[first] or self._overlap(graph, group, taken, names))

    def _chains(
        self,
        graph: Graph,
        group: ChannelGroup,
        groups: list[ChannelGroup],
        reasons: dict[fx.Node, str | None],
    ) -> Iterator[list[ChannelGroup]]:
        """A group alone, then with those after it that one gate can narrow with it."""
        together = [group] if reasons[group.producers[0]] is None else []
        while together:
            yield list(together)
            readers = {layer for one in together for layer in one.consumers}
            follows = [g for g in groups if g not in together and readers.intersection(g.producers)]
            legal = [g for g in follows if self._refuse(graph, [*together, g]) is None]
            if not legal or len(together) == self.chain:
                return
            together.append(legal[0])

    def _overlap(
        self, graph: Graph, group: ChannelGroup, taken: dict[fx.Node, fx.Node], names: dict[fx.Node, str]
    ) -> str:
        shared = next(node for node in self._region(graph, [group]).nodes if node in taken)
        return f"`{names[taken[shared]]}` narrows `{shared.target}` and saves more"

    def _saved(self, graph: Graph, groups: list[ChannelGroup]) -> float:
        return saved_flops(graph, self._region(graph, groups), self._parts(groups)[0])

    def _refuse(self, graph: Graph, groups: list[ChannelGroup]) -> str | None:
        """Why one gate cannot narrow some groups; None if it can."""
        for group in groups:
            if group.obstacles:
                return group.obstacles[0]
            if not group.consumers:
                return "no layer reads its channels"
        found = self._region(graph, groups)
        if reason := obstacle(graph, found):
            return reason
        if not self._parts(groups):
            return f"{groups[0].parts} parts are too few for levels {list(self.levels)}"
        try:
            cost = module_flops(lambda: self._policy(graph, found.source, 2), self._inputs(graph, found.source))
        except ArgumentError as error:
            return str(error)
        saved = self._saved(graph, groups)
        if saved <= cost:
            return f"a gate costs {cost:.0f} FLOPs and the narrowest level saves {saved:.0f}"
        if saved < self.worth * graph.total_flops:
            return f"the narrowest level saves {100 * saved / graph.total_flops:.2g} % of the model"
        return None

    def _parts(self, groups: list[ChannelGroup]) -> list[list[int]]:
        """For each narrow level, how many parts of each group are kept; levels that coincide are one."""
        found: list[list[int]] = []
        for level in self.levels:
            kept = []
            for group in groups:
                width = min(spec(node).shape[dim] for node, dim in group.dims.items())
                least = -(-_LEAST * group.parts // width)
                kept.append(min(max(round(level * group.parts), least), group.parts))
            if kept not in found:
                found.append(kept)
        return found[:-1]

    # --- how -------------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Gate the groups of one site."""
        groups = {group.producers[0].name: group for group in channel_groups(graph)}
        missing = [name for name in site.data["groups"] if name not in groups or groups[name].obstacles]
        if missing:
            raise PassError(f"`{missing[0]}` makes no group of channels here: the sites were made for another model")
        found = self._region(graph, [groups[name] for name in site.data["groups"]])
        source = found.source
        arms = len(site.data["parts"]) + 1
        gate = Gate(self._policy(graph, source, arms), estimator=build_estimator(self.estimator), routes=arms)
        path = f"gates.{site.name}"
        route, _ = graph.insert(path, gate, self._inputs(graph, source), ("decision", "probability"))
        ends: dict[fx.Node, fx.Node] = {}
        narrow = []
        for level, parts in enumerate(site.data["parts"]):
            arm = Arm(graph, found, parts, owner=path, label=f"arm{level}", switchable=self.norm == "switchable")
            narrow.append(arm.insert(ends))
        for node in found.exits:
            values = [*(copies[node] for copies in narrow), node]
            with graph.fx.inserting_after(ends[node]):
                chosen = graph.fx.call_function(SWITCH, (route, values, spec(node).batch_dim))
            chosen.meta["path"] = node.meta.get("path", ())
            if node.meta.pop("final", False):
                chosen.meta["final"] = True
            for user in list(node.users):
                if user is not chosen and user not in found.nodes:
                    user.replace_input_with(node, chosen)

    def _region(self, graph: Graph, groups: list[ChannelGroup]) -> Region:
        return region(graph, groups, norms=self.norm == "switchable")

    def _inputs(self, graph: Graph, source: fx.Node) -> list[fx.Node]:
        mask = token_mask(graph, source)
        return [source] if mask is None else [source, mask]

    def _policy(self, graph: Graph, source: fx.Node, arms: int) -> nn.Module:
        read = feature(graph, source, mask=token_mask(graph, source), pool=self.pool)
        return FeedForwardPolicy(read, self.hidden, arms)
