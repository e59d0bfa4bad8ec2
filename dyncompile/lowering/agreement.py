"""Segments as they were compiled, beside the dense reference; and which memory their results lie in."""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dyncompile.capture.check import same
from dyncompile.errors import LoweringError
from dyncompile.lowering.plan import Plan, Segment
from dyncompile.lowering.runtime import Segments, is_compiled
from dyncompile.module import DynamicModule
from dyncompile.nn import Exit, Gate

_BATCHES = (1, 4)
_CLEAR = 0.05
"""Distance of a confidence or a logit from where a decision turns, beyond which no rounding turns it."""

Examples = Callable[[int], dict[fx.Node, Any]]
"""For a batch size: a value for every value that crosses a border of the plan."""


def compare(
    plan: Plan, segments: Segments, dyn: DynamicModule, examples: Examples
) -> tuple[set[fx.Node], dict[Segment, set[fx.Node]]]:
    """Run every segment at two batch sizes and compare it with the dense reference.

    Args:
        plan: What runs.
        segments: Its segments, callable.
        dyn: What was lowered.
        examples: Values of the reference.

    Returns:
        Outputs of segments that share memory neither with an input nor with another output, nor within; and for each
        segment the inputs that an output shares memory with.

    Raises:
        LoweringError: A compiled segment computes something else.
    """
    fresh = {n for segment in plan.segments() for n in segment.outputs}
    lent: dict[Segment, set[fx.Node]] = {segment: set() for segment in plan.segments()}
    for batch in _BATCHES:
        values = examples(batch)
        for segment in plan.segments():
            call = segments[segment]
            given = [values[n] for n in segment.inputs]
            # In eager mode it hangs on an input's layout whether an operation copies.
            if fixed := is_compiled(call):
                given = [t.contiguous(memory_format=f) for t, f in zip(given, call.formats, strict=True)]
            with torch.no_grad():
                results = call(*given)
            pointers = [t.untyped_storage().data_ptr() for t in results]
            held = Counter(pointers) + Counter(t.untyped_storage().data_ptr() for t in given)
            lent[segment].update(
                n
                for n, t in zip(segment.inputs, given, strict=True)
                if not fixed or t.untyped_storage().data_ptr() in pointers
            )
            for node, value in zip(segment.outputs, results, strict=True):
                if not _agree(node, value, values, dyn):
                    why = f"`{node.name}`, compiled, differs from eager mode at batch size {batch}"
                    raise LoweringError(f"{why}: lower(dyn, backend='eager') does not compile")
                # An expanded value has several entries in one place.
                if not fixed or held[value.untyped_storage().data_ptr()] > 1 or 0 in value.stride():
                    fresh.discard(node)
    return fresh, lent


def _agree(node: fx.Node, value: Tensor, values: dict[fx.Node, Any], dyn: DynamicModule) -> bool:
    """Whether a value is what eager mode gives, but for rounding.

    Of what an exit or a gate decides, only decisions that are far from turning are compared; what is made of a
    decision (one column of a policy's) is not.
    """
    expected = values[node]
    if value.is_floating_point():
        return same(value, expected, slack=10.0)
    deciding = decider(node)
    if deciding is None or not isinstance(module := dyn.graph.module_of(deciding), Exit | Gate):
        return True
    clear = module.clear(values[deciding], _CLEAR)
    return clear is None or torch.equal(value[clear], expected[clear])


def decider(node: fx.Node) -> fx.Node | None:
    """The module that a node is the decision of."""
    decides = node.meta.get("tap", ("",))[0] == "decision" and node.target is operator.getitem
    return node.all_input_nodes[0] if decides else None
