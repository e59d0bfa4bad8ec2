"""Seconds, measured: of segments and conditionals, to decline what cannot pay and to cost regions by the clock."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from dyncompile.graph import spec
from dyncompile.kernel_costs import seconds
from dyncompile.lowering.plan import Block, Conditional, Plan, Segment
from dyncompile.lowering.runtime import Segments, gather, merge

if TYPE_CHECKING:
    from dyncompile.module import DynamicModule

_BATCH = 16

Values = dict[fx.Node, Tensor]


def unprofitable(plan: Plan, segments: Segments, values: Values) -> dict[str, str]:
    """Conditionals whose own cost exceeds everything that their arms cost, with the reason.

    Args:
        plan: What runs.
        segments: Its segments, compiled.
        values: A value for every border.
    """
    losses: dict[str, str] = {}
    cost: dict[Segment, float] = {}
    with torch.no_grad():
        for segment in plan.segments():
            arguments = [values[n] for n in segment.inputs]
            cost[segment] = seconds(partial(segments[segment], *arguments), arguments[0].device)
        for block in plan.blocks():
            for step in block.steps:
                if not isinstance(step, Conditional) or step.unit.name in losses:
                    continue
                gain = sum(_block_seconds(arm, cost) for arm in step.arms if arm is not None)
                loss = _overhead(step, values)
                if loss > gain:
                    losses[step.unit.name] = (
                        f"splitting a batch costs {1e6 * loss:.0f} us and saves at most {1e6 * gain:.0f} us"
                    )
    return losses


def _block_seconds(block: Block, cost: dict[Segment, float]) -> float:
    total = 0.0
    for step in block.steps:
        if isinstance(step, Segment):
            total += cost[step]
        else:
            total += sum(_block_seconds(arm, cost) for arm in step.arms if arm is not None)
    return total


def _overhead(step: Conditional, values: Values) -> float:
    """Seconds to split half of a batch off and to put it back."""
    rows = step.unit.rows
    decision = values[step.unit.decision]
    decision = torch.arange(decision.shape[0], device=decision.device) % 2 == 0
    inputs = [(values[n], spec(n)) for arm in step.arms if arm for n in arm.inputs]
    outputs = [(values[s], spec(s)) for s in step.selects]

    def split() -> None:
        index = decision.nonzero().view(-1)
        for value, found in inputs:
            gather(value, index, found.batch_dim, found.rows // rows)
        for value, found in outputs:
            part = gather(value, index, found.batch_dim, found.rows // rows)
            merge(value.clone(), [(index, part)], found.batch_dim or 0, found.rows // rows, decision.shape[0])

    return seconds(split, decision.device)


def measure(dyn: "DynamicModule", *, batch: int = _BATCH, backend: str = "inductor") -> None:
    """Measure the time of each region and note it on its nodes (`seconds`, per sample).

    A region's time is shared among its nodes by their FLOPs, so that the cost model can leave
    disabled exits out as it does for FLOPs.

    Args:
        dyn: In eval mode or not; left as it is.
        batch: Samples in a batch.
        backend: The backend whose time counts.
    """
    from dyncompile.lowering.lowered import LoweredModule

    switches = [e.get_buffer("enabled") for e in dyn.exits.values()]
    flags = [bool(switch) for switch in switches]
    modes = {m: m.training for m in dyn.modules()}
    try:
        dyn.eval()
        for switch in switches:
            switch.fill_(True)
        fast = LoweredModule(dyn, backend=backend, decline=False, options={})
        values = fast.examples(batch)
        by_name = {node.name: node for node in dyn.graph.fx.nodes}
        with torch.no_grad():
            for segment, call in fast.segments.items():
                arguments = [values[n] for n in segment.inputs]
                took = seconds(partial(call, *arguments), arguments[0].device) / batch
                flops = sum(n.meta["flops"] for n in segment.nodes)
                for node in segment.nodes:
                    share = node.meta["flops"] / flops if flops else 1 / len(segment.nodes)
                    by_name[node.name].meta["seconds"] = took * share
    finally:
        for switch, flag in zip(switches, flags, strict=True):
            switch.fill_(flag)
        for owner, training in modes.items():
            owner.training = training
