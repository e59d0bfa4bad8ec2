"""The segments of a plan, compiled: those of equal structure by one program."""

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.demand import stands_in
from dyncompile.graph import spec
from dyncompile.lowering.plan import Segment
from dyncompile.lowering.runtime import Segments
from dyncompile.nn.neurons import GatheredNeurons


def compile_segments(
    modules: Mapping[Segment, fx.GraphModule], examples: Mapping[fx.Node, Tensor], options: Mapping[str, Any]
) -> Segments:
    """Compile with inductor. Weights are those of now: later changes go unseen.

    Args:
        modules: What each segment runs.
        examples: A value for each input of a segment, in the layout that it has.
        options: As `compile_segment` takes them.
    """
    from dyncompile.lowering.inductor import CompiledSegment, SegmentInput, compile_segment
    from dyncompile.lowering.sharing import structure

    compiled: dict[Segment, Callable[..., Sequence[Tensor]]] = {}
    kinds: dict[Hashable, CompiledSegment] = {}
    for segment, module in modules.items():
        if any(stands_in(n) or _recurrent(module, n) for n in segment.nodes):
            # Inductor unrolls a recurrent layer step by step; torch's own kernel runs it whole. What does a share of a
            # decision has a form of its own.
            frozen = copy.deepcopy(module)
            for part in frozen.modules():
                if isinstance(part, GatheredNeurons):
                    part.freeze()
            compiled[segment] = frozen.forward
            continue
        specs = [spec(n) for n in segment.inputs]
        inputs = [SegmentInput(batch_dim=s.batch_dim, rows=max(s.rows // segment.rows, 1)) for s in specs]
        given = [examples[n] for n in segment.inputs]
        alike = structure(module)
        kind = (alike and alike[0], *inputs, *((t.shape, t.dtype, t.device, t.stride()) for t in given))
        like = kinds.get(kind) if alike else None
        found = compile_segment(module, given, inputs, like=like, **options)
        kinds.setdefault(kind, found)
        compiled[segment] = found
    return compiled


def _recurrent(module: fx.GraphModule, node: fx.Node) -> bool:
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(called, nn.RNNBase | RecurrentLayer)
