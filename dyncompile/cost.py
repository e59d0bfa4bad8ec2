"""What a dynamic model costs: FLOPs per demand region, and the expected cost given the decisions."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from dyncompile.demand import Guard, Region, Unit, analyse, scaled_by, specialise, stands_in


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Cost of each region per sample, relative to the static model.

    A static model that packs its sequences runs the steps that they have, so what it costs hangs on the sample. Weights
    are shares of what it costs for a sample of full length; `expected` is relative to what it costs for each sample, so
    that padding, which nobody runs, counts for neither side.

    Attributes:
        regions: The demand regions of the graph with its disabled decisions taken out; those of which a decision
            scales the work follow the region that they lie in.
        weights: Cost of each region; 1.0 is the whole static model.
        static: What 1.0 stands for, for a sample of full length: FLOPs (a multiply-add is two), or seconds.
        packed: Shares of the static model's work that run over packed sequences, by the name of the decision that says
            which steps are there.
    """

    regions: tuple[Region, ...]
    weights: tuple[float, ...]
    static: float
    packed: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def expected(self, decisions: Mapping[str, Tensor]) -> Tensor:
        """Expected cost of each sample: sum over regions of cost times the probability of the guard.

        Exact for boolean decisions; differentiable in floating ones.

        Args:
            decisions: `[N]` per decision, bool or probability; routes `[N]` integers or `[N, K]` weights. One more
                dim after N (tokens, frames) is averaged, after the product along the path.

        Returns:
            `[N]`, 1.0 = the static model on that sample.
        """
        return self.work(decisions) / self.static_work(decisions)

    def static_work(self, decisions: Mapping[str, Tensor]) -> Tensor:
        """What the static model does for each sample, `[N]` or `[1]`; 1.0 = for one of full length."""
        total = next((d for d in decisions.values()), torch.ones(1)).new_ones(1, dtype=torch.float32)
        for name, share in self.packed.items():
            if name in decisions:
                real = decisions[name].float()
                total = total - share * (1 - (real.mean(1) if real.dim() > 1 else real))
        return total

    def work(self, decisions: Mapping[str, Tensor]) -> Tensor:
        """As `expected`, for every sample in units of what the static model does for one of full length.

        A model's own decision about which steps are there may be left out: then all are.
        """
        if not decisions:
            return torch.full((1,), sum(self.weights))
        example = next(iter(decisions.values()))
        total = example.new_zeros(example.shape[0], dtype=torch.float32)
        cache: dict[Guard, Tensor] = {(): torch.ones_like(total)}
        for region, weight in zip(self.regions, self.weights, strict=True):
            if weight:
                p = _probability(region.guard, decisions, cache)
                total = total + weight * (p.mean(1) if p.dim() > 1 else p)
        return total


def _probability(guard: Guard, decisions: Mapping[str, Tensor], cache: dict[Guard, Tensor]) -> Tensor:
    if guard not in cache:
        unit, arm = guard[-1]
        known = [way for step, way in guard[:-1] if step.decision is unit.decision]
        if known:  # one decision does not fall twice
            same = _probability(guard[:-1], decisions, cache)
            cache[guard] = same if known[-1] == arm else torch.zeros_like(same)
            return cache[guard]
        if unit.name not in decisions and unit.name == unit.decision.meta.get("real"):
            cache[guard] = _probability(guard[:-1], decisions, cache)
            return cache[guard]
        value = decisions[unit.name]
        if unit.routed:
            p = value[..., arm] if value.is_floating_point() else value == arm
        else:
            p = value if arm else (1 - value if value.is_floating_point() else ~value)
        outer = _probability(guard[:-1], decisions, cache)
        rank = max(p.dim(), outer.dim())
        p, outer = (t.unsqueeze(1) if t.dim() < rank else t for t in (p.float(), outer))
        cache[guard] = p * outer
    return cache[guard]


def guard_probability(guard: Guard, decisions: Mapping[str, Tensor], samples: int) -> Tensor:
    """How far a guard holds for each sample: the product of the decisions on its path.

    Args:
        guard: Of a region or a conditional.
        decisions: As `CostModel.expected` takes them.
        samples: N.

    Returns:
        `[N]` in [0, 1], or `[N, r]` where the path holds decisions by token or frame.
    """
    return _probability(guard, decisions, {(): torch.ones(samples)})


def cost_model(graph: fx.Graph, fixed: Mapping[str, int] | None = None, *, unit: str = "flops") -> CostModel:
    """Build the cost model of a graph.

    Args:
        graph: The dynamic graph, propagated; for `seconds`, measured.
        fixed: Decisions that always take one arm, by name; what only the other arms need costs nothing.
        unit: Which of a node's costs counts: `flops` or `seconds`.
    """
    static = [node for node in graph.nodes if not node.meta.get("inserted")]
    reference = sum(node.meta.get(unit, 0.0) for node in static) or 1.0
    packed: dict[str, float] = {}
    for node in static:
        if name := node.meta.get("real"):
            packed[name] = packed.get(name, 0.0) + node.meta.get(unit, 0.0) / reference
    found = analyse(specialise(graph, dict(fixed or {}))).regions
    regions = [part for region in found for part in _parts(region)]
    weights = (sum(share * node.meta.get(unit, 0.0) for node, share in shares.items()) for _, shares in regions)
    return CostModel(tuple(region for region, _ in regions), tuple(w / reference for w in weights), reference, packed)


def _parts(region: Region) -> list[tuple[Region, dict[fx.Node, float]]]:
    """A region and, for each decision of which nodes in it do a share, a region of those: with each node's share.

    Work in proportion to a decision costs what a region under that decision would.
    """
    own = dict.fromkeys(region.nodes, 1.0)
    scaled: dict[str, dict[fx.Node, float]] = {}
    for node in region.nodes:
        if name := scaled_by(node):
            share = float(node.meta["share"]) if stands_in(node) else 1.0
            own[node] = 1.0 - share
            scaled.setdefault(name, {})[node] = share
    parts = [(region, own)]
    for shares in scaled.values():
        guard = (*region.guard, (Unit(next(iter(shares)), region.guard), 1))
        parts.append((Region(guard, tuple(shares)), shares))
    return parts


def exit_costs(model: CostModel, exits: Sequence[str]) -> dict[str, float]:
    """Cost of a sample by where it leaves.

    Args:
        model: A cost model in which `exits` are enabled.
        exits: Their names, in order of execution.

    Returns:
        Relative cost for each exit, then `final`; every other decision counted as taken, a route as its last arm.
    """
    units = {unit.name: unit for region in model.regions for unit, _ in region.guard}
    count = len(exits) + 1
    decisions = {name: torch.full((count,), unit.last) for name, unit in units.items()}
    decisions = {name: arm if units[name].routed else arm.bool() for name, arm in decisions.items()}
    for i, name in enumerate(exits):
        decisions[name] = torch.arange(count) == i
    costs = model.expected(decisions) if decisions else torch.full((1,), sum(model.weights))
    return dict(zip((*exits, "final"), costs.tolist(), strict=True))
