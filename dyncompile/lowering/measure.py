"""Seconds, measured: of segments and conditionals, to decline what cannot pay and to cost regions by the clock."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from dyncompile.graph import spec
from dyncompile.kernel_costs import seconds
from dyncompile.lowering.instructions import Arm, Code, Gather, Merge, Part, Program, Split
from dyncompile.lowering.plan import Block, Conditional, Plan, Segment
from dyncompile.lowering.runtime import Run, Segments

if TYPE_CHECKING:
    from dyncompile.module import DynamicModule

_BATCH = 16

Values = dict[fx.Node, Tensor]


def unprofitable(
    plan: Plan, segments: Segments, values: Values, carry_out: Callable[[Code], Program]
) -> dict[str, str]:
    """Conditionals whose own cost exceeds everything that their arms cost, with the reason.

    Args:
        plan: What runs.
        segments: Its segments, compiled.
        values: A value for every border.
        carry_out: Makes of instructions what runs them.
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
                loss = _overhead(step, values, carry_out)
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


def _overhead(step: Conditional, values: Values, carry_out: Callable[[Code], Program]) -> float:
    """Seconds to split half of a batch off and to put it back."""
    rows = step.unit.rows
    places: dict[fx.Node, int] = {}

    def gather(node: fx.Node) -> Gather:
        register = places.setdefault(node, len(places))
        return Gather(register=register, dim=spec(node).batch_dim, entries=spec(node).rows // rows)

    taken = tuple(gather(n) for arm in step.arms if arm for n in arm.inputs)
    returned = [gather(select) for select in step.selects]
    decision, target = len(places), len(places) + 1
    nothing = Code(name="taken", inputs=len(taken), registers=len(taken), steps=(), outputs=())
    split = Split(
        decision=decision,
        name=step.unit.name,
        rows=1,
        finer=1,
        arms=(Arm(wanted=False), Arm(code=nothing, gathered=taken)),
        dead=(),
        ungathered=(),
        merged=tuple(
            Merge(
                target=target,
                base=given.register,
                copied=True,
                parts=(Part(arm=1, result=None, rows=given),),
                dim=given.dim or 0,
                entries=given.entries,
            )
            for given in returned
        ),
    )
    program = carry_out(Code(name="all", inputs=target, registers=target + 1, steps=(split,), outputs=()))
    made = values[step.unit.decision]
    half = torch.arange(made.shape[0], device=made.device) % 2 == 0
    given = [*(values[node] for node in places), half]
    return seconds(lambda: program(list(given), len(half), None, Run(len(half))), made.device)


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
