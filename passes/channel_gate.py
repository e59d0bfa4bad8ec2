"""Channel gate: how many channels of a layer are computed is chosen per sample."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dyncompile.channels import ChannelGroup, channel_groups
from dyncompile.errors import ArgumentError, PassError
from dyncompile.features import feature, token_mask
from dyncompile.graph import Graph, spec
from dyncompile.narrowable import Region, flops_of, obstacle, region, saved_flops, unmasked
from dyncompile.narrowing import Arm, Body
from dyncompile.nn import FeedForwardPolicy, Gate, build_estimator
from dyncompile.nn.channelwise import ChannelMask, GatedChannels
from dyncompile.nn.topk import TopKGate
from dyncompile.ops import SWITCH
from dyncompile.passes.base import Pass, Refusal, Site
from dyncompile.shapes import module_flops
from dyncompile.standing import decide, stand_in
from dyncompile.values import share, whole

aten = torch.ops.aten

_LEVELS, _CHAIN = (0.25, 0.5, 0.75, 1.0), 2
_NORMS = ("switchable", "recalibrated", "shared")
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

    With `granularity="channel"` any of the channels is left out, as its saliency says (feature boosting and
    suppression, arXiv 1810.05124):

    After:   %d, _ = gates.channels0(%x)                                   ; one decision a channel, `[N * C]`
             %h = relu(bn1(conv1(%x))); %y = bn2(conv2(mask(%h, %d)))      ; the mask in training only
             %z = gated(static=(conv2,), %d, %x, weights...); ... bn2(%z)  ; stands in for the value of conv2

    Legality: convolutions or linear layers make the channels and read them, and what lies between works on each
    channel by itself (batch, group and layer norm, activations, pooling, grouped convolutions, sums, scales computed
    from the channels); no value between is read elsewhere; no layer is narrowed by two gates; the narrowest level
    saves more than the gate costs.

    Args:
        granularity: "levels": one of K widths, of the first channels; "channel": each channel has a decision.
        keep: With "channel", the share of a group's channels that every sample opens, those of the largest logits;
            None: as many as pass the gate.
        levels: With "levels", share of the channels at each width, ascending; the last is 1.
        chain: With "levels", up to how many groups one gate narrows together, where a layer reads one and makes the
            next (the two inside a bottleneck).
        norm: Batch norms that see other values at another width: "switchable": statistics and parameters for each
            width; "recalibrated": statistics for each width, which `dyncompile.training.recalibrate_norms` estimates
            anew; "shared": the static ones.
        worth: Least share of the model's FLOPs that the narrowest level of a gate saves.
        hidden: Width between the layers of a gate.
        pool: What of a feature map or of tokens a gate reads: "mean", "cls", "last", or "auto": as the model itself
            pools.
        estimator: How training decides: "gumbel", "straight_through", "semantic_hashing" or "reinforce".
    """

    name: ClassVar[str] = "channel_gate"
    summary: ClassVar[str] = "a gate on the channels between layers; a sample runs the width that it needs"
    paper: ClassVar[str] = "2103.13258"
    seeks: ClassVar[str] = "channels between layers that make and read them, and nothing else does"

    granularity: str = "levels"
    keep: float | None = None
    levels: Sequence[float] = _LEVELS
    chain: int = _CHAIN
    norm: str = "switchable"
    worth: float = 0.002
    hidden: int = 16
    pool: str = "mean"
    estimator: str = "gumbel"

    def __post_init__(self) -> None:
        if self.granularity not in ("levels", "channel"):
            raise ArgumentError("granularity", found=repr(self.granularity), expected="'levels' or 'channel'")
        number: Any = self.keep
        if number is not None and (self.granularity != "channel" or not 0 < share("keep", number) < 1):
            raise ArgumentError("keep", found=self.keep, expected="a share in (0, 1), with granularity='channel'")
        given: Any = self.levels
        shares = [share("levels", level) for level in given] if isinstance(given, list | tuple) else []
        ascending = all(a < b for a, b in zip([0.0, *shares], shares, strict=False))
        if len(shares) < 2 or not ascending or shares[-1] != 1:
            raise ArgumentError("levels", found=repr(self.levels), expected="at least two ascending shares up to 1.0")
        for argument, value, default in (("levels", tuple(given), _LEVELS), ("chain", self.chain, _CHAIN)):
            if self._each and value != default:
                found = f"{value} with granularity='channel'"
                raise ArgumentError(argument, found=found, expected="granularity='levels' beside it")
        for argument, value in (("chain", self.chain), ("hidden", self.hidden)):
            whole(argument, value, least=1)
        if not share("worth", self.worth) < 1:
            raise ArgumentError("worth", found=self.worth, expected="a share in [0, 1)")
        if self.norm not in _NORMS:
            raise ArgumentError("norm", found=repr(self.norm), expected=f"one of {_NORMS}")
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
                names[group.producers[0]] = f"{'channels' if self._each else 'width'}{len(names)}"
        covered = {group.producers[0] for chain in chosen.values() for group in chain}
        for group in groups:
            first = group.producers[0]
            if first in chosen:
                producers = [other.producers[0].name for other in chosen[first]]
                data: dict[str, Any] = {"groups": producers}
                if not self._each:
                    data["parts"] = self._parts(chosen[first])
                yield Site(name=names[first], node=first.name, data=data)
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
            if len(together) == (1 if self._each else self.chain):
                return
            readers = {layer for one in together for layer in one.consumers}
            follows = [g for g in groups if g not in together and readers.intersection(g.producers)]
            legal = [g for g in follows if self._refuse(graph, [*together, g]) is None]
            if not legal:
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
        if reason := obstacle(graph, found) or (unmasked(graph, found) if self._each else None):
            return reason
        if not self._parts(groups):
            wanted = f"keep={self.keep}" if self._each else f"levels {list(self.levels)}"
            return f"{groups[0].parts} parts are too few for {wanted}"
        try:
            columns = groups[0].parts if self._each else 2
            cost = module_flops(lambda: self._policy(graph, found.source, columns), self._inputs(graph, found.source))
        except ArgumentError as error:
            return str(error)
        saved = self._saved(graph, groups)
        if saved <= cost:
            return f"a gate costs {cost:.0f} FLOPs and the narrowest level saves {saved:.0f}"
        if saved < self.worth * graph.total_flops:
            return f"the narrowest level saves {100 * saved / graph.total_flops:.2g} % of the model"
        return None

    @property
    def _each(self) -> bool:
        return self.granularity == "channel"

    def _parts(self, groups: list[ChannelGroup]) -> list[list[int]]:
        """For each narrow level, how many parts of each group are kept; levels that coincide are one."""
        if self._each:
            fewest = self._kept(groups[0]) or 1
            return [[fewest]] if fewest < groups[0].parts else []
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

    def _kept(self, group: ChannelGroup) -> int | None:
        """How many parts every sample opens; None if as many as pass the gate."""
        return None if self.keep is None else max(round(self.keep * group.parts), 1)

    # --- how -------------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Gate the groups of one site."""
        groups = {group.producers[0].name: group for group in channel_groups(graph)}
        missing = [name for name in site.data["groups"] if name not in groups or groups[name].obstacles]
        if missing:
            raise PassError(f"`{missing[0]}` makes no group of channels here: the sites were made for another model")
        found = self._region(graph, [groups[name] for name in site.data["groups"]])
        if self._each:
            self._gate_channels(graph, site.name, found)
            return
        source = found.source
        arms = len(site.data["parts"]) + 1
        gate = Gate(self._policy(graph, source, arms), estimator=build_estimator(self.estimator), routes=arms)
        path = f"gates.{site.name}"
        route, _ = graph.insert(path, gate, self._inputs(graph, source), ("decision", "probability"))
        ends: dict[fx.Node, fx.Node] = {}
        narrow = []
        for level, parts in enumerate(site.data["parts"]):
            arm = Arm(graph, found, parts, owner=path, label=f"arm{level}", norm=self.norm)
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

    def _gate_channels(self, graph: Graph, name: str, found: Region) -> None:
        """Let each channel of a group have a decision."""
        (group,) = found.groups
        policy, estimator = self._policy(graph, found.source, group.parts), build_estimator(self.estimator)
        kept = self._kept(group)
        if kept is None:
            gate = Gate(policy, estimator=estimator, decisions=group.parts)
        else:
            gate = TopKGate(policy, estimator=estimator, k=kept, decisions=group.parts)
        decision = decide(graph, name, gate, self._inputs(graph, found.source))
        body = Body(graph, found)
        scaled = flops_of(graph, found)
        module = GatedChannels(
            body.module,
            parts=group.parts,
            values=[spec(v).batch_dim if isinstance(v, fx.Node) else None for v in body.values_read],
            results=[spec(node).batch_dim or 0 for node in found.exits],
        )
        self._mask(graph, name, found, decision)
        stand_in(graph, name, module, found.nodes, found.exits, [decision, *body.values_read], flops=scaled)

    def _mask(self, graph: Graph, name: str, found: Region, decision: fx.Node) -> None:
        """In training, multiply the channels with their decisions where layers read them."""
        (group,) = found.groups
        masks: dict[fx.Node, fx.Node] = {}
        for layer in group.consumers:
            x: fx.Node = layer.args[0]  # type: ignore[assignment]
            if x not in masks:
                path = f"_modes.{name}_{x.name}"
                dim = spec(x).batch_dim
                assert dim is not None
                graph.add_module(path, ChannelMask(group.parts, group.kept(x, 1), group.dims[x], dim))
                with graph.fx.inserting_after(x):
                    masks[x] = graph.fx.create_node("call_module", path, (x, decision))
                masks[x].meta["training_only"] = True
            layer.replace_input_with(x, masks[x])

    def _region(self, graph: Graph, groups: list[ChannelGroup]) -> Region:
        return region(graph, groups, norms=self.norm != "shared" and not self._each)

    def _inputs(self, graph: Graph, source: fx.Node) -> list[fx.Node]:
        mask = token_mask(graph, source)
        return [source] if mask is None else [source, mask]

    def _policy(self, graph: Graph, source: fx.Node, arms: int) -> nn.Module:
        read = feature(graph, source, mask=token_mask(graph, source), pool=self.pool)
        return FeedForwardPolicy(read, self.hidden, arms)
