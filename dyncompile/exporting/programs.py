"""A plan as a program of torch with nested `torch.cond`: an arm runs on the whole batch as soon as one row takes it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dyncompile.demand import stands_in
from dyncompile.errors import ExportError
from dyncompile.exporting.pieces import exportable, quiet
from dyncompile.exporting.recurrent import ConditionalAgent, ConditionalLayer, SequenceLayer
from dyncompile.exporting.rows import inside
from dyncompile.graph import attribute, spec
from dyncompile.lowering import LoweredModule
from dyncompile.lowering.plan import Block, Conditional, Plan, Segment
from dyncompile.lowering.segments import segment_module
from dyncompile.module import DynamicModule
from dyncompile.nn.recurrent import DroppingLayer
from dyncompile.ops import arms_of

_INDUCTOR = {
    # A branch must give what the other gives, strides included.
    "layout_optimization": False,
}


def export_program(plain: LoweredModule, path: Path, metadata: dict[str, str], *, compiled: bool) -> None:
    """Write a program, load it again, and compare.

    Args:
        plain: The lowered model.
        path: Where to.
        metadata: Saved beside the program, as extra files; AOTInductor's packages have no place for it.
        compiled: Compile it by AOTInductor, else save what `torch.export` gives.

    Raises:
        ExportError: torch cannot export or compile it, or it computes something else.
    """
    dyn = plain.dynamic
    program = _exported(plain.plan, dyn)
    try:
        if compiled:
            with quiet(), _operands_as_traced():
                torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=_INDUCTOR)
            call: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
        else:
            torch.export.save(program, path, extra_files=metadata)
            call = torch.export.load(path).module()
    except Exception as error:
        raise ExportError(f"torch cannot write the program: {_first(error)}") from error
    from dyncompile.exporting.checking import compare

    def run(inputs: Any) -> Any:
        tensors = [inputs[name] for name in dyn.graph.signature.names]
        device = dyn.graph.inputs[0].device
        args, kwargs = dyn.graph.signature.call_arguments([t.to(device) for t in tensors])
        with torch.no_grad():
            leaves = pytree.tree_leaves(call(*args, **kwargs))
        names = dyn.graph.signature.output_names
        return {n: v.cpu() for n, v in zip(names, leaves, strict=True) if isinstance(v, Tensor)}

    compare(run, dyn)


def _exported(plan: Plan, dyn: DynamicModule) -> torch.export.ExportedProgram:
    whole = _Program(plan, dyn).eval()
    signature = dyn.graph.signature
    inputs = dyn.examples(5)
    args, kwargs = signature.call_arguments(inputs)
    shapes: Any = torch.export.ShapesCollection()
    for tensor, dim in zip(inputs, dyn.graph.batch_dims, strict=True):
        if dim is not None:
            shapes[tensor] = {dim: torch.export.Dim.DYNAMIC}
    try:
        with quiet(), torch.no_grad():
            captured = torch.export.export(whole, args, kwargs, dynamic_shapes=shapes, strict=False)
            program: torch.export.ExportedProgram = captured.run_decompositions({})
    except Exception as error:
        raise ExportError(f"torch cannot export the model with conditionals: {_first(error)}") from error
    # What torch assumes of a size it does not know, at least 2, forbids a batch of one.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    return program


@contextlib.contextmanager
def _operands_as_traced() -> Iterator[None]:
    """While open, inductor lays operands of `torch.cond` out as they were traced.

    Else it may choose another order of the dims where it writes an operand, while the branches read it by the strides
    that were traced.
    """
    from torch._inductor.ir import ExternKernel, TensorBox
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    original = lowerings[torch.ops.higher_order.cond]

    def lowered(predicate: Any, true: Any, false: Any, operands: Any) -> Any:
        nodes: Any = V.graph.current_node.args[-1]
        laid_out = [
            ExternKernel.require_exact_strides(value, node.meta["val"].stride())
            if isinstance(value, TensorBox)
            else value
            for value, node in zip(operands, nodes, strict=True)
        ]
        return original(predicate, true, false, laid_out)

    lowerings[torch.ops.higher_order.cond] = lowered
    try:
        yield
    finally:
        lowerings[torch.ops.higher_order.cond] = original


def _first(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _Program(nn.Module):
    """Called as the static model is."""

    def __init__(self, plan: Plan, dyn: DynamicModule) -> None:
        super().__init__()
        self.signature = dyn.graph.signature
        self.root = _Writer(dyn).block(plan.root)
        place = {node: i for i, node in enumerate(plan.root.outputs)}
        leaves: Any = plan.graph.output_node().args[0]
        self.leaves = [(place[v], None) if isinstance(v, fx.Node) else (-1, v) for v in leaves]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

        # Export names inputs by it, and matches keyword arguments.
        forward.__signature__ = self.signature.parameters  # type: ignore[attr-defined]
        self.forward = forward

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward."""
        values = self.root(*self.signature.flatten(args, kwargs))
        return self.signature.unflatten([values[i] if i >= 0 else constant for i, constant in self.leaves])


class _Writer:
    """Writes blocks as modules whose forwards are straight code with calls of `torch.cond`."""

    def __init__(self, dyn: DynamicModule) -> None:
        self.dyn = dyn

    def block(self, block: Block, before: list[fx.Node] | None = None, conditional: Conditional | None = None,
              arm: int = 0) -> fx.GraphModule:  # fmt: skip
        """A block as a module of its inputs, which returns a tuple.

        Args:
            block: What it runs.
            before: For an arm, the selects whose values of the other rows are further inputs; they are returned with
                the arm's rows replaced.
            conditional: Of which the block is an arm.
            arm: Which.
        """
        root, graph = nn.Module(), fx.Graph()
        values = {node: graph.placeholder(node.name) for node in block.inputs}
        mask = graph.placeholder("mask") if conditional else None
        others = {select: graph.placeholder(f"before_{select.name}") for select in before or []}
        for step in block.steps:
            if isinstance(step, Segment):
                name = f"segment{len(root._modules)}"
                root.add_module(name, _steps(exportable(segment_module(step, self.dyn))))
                call = graph.call_module(name, tuple(values[n] for n in step.inputs))
                values.update((n, graph.call_function(_item, (call, i))) for i, n in enumerate(step.outputs))
            else:
                self._conditional(step, root, graph, values)
        if conditional:
            results = [
                graph.call_function(_merged, (mask, values[arms_of(s)[arm]], other, *_place(s, conditional)))
                for s, other in others.items()
            ]
        else:
            results = [values[n] for n in block.outputs]
        graph.output(tuple(results))
        return fx.GraphModule(root, graph)

    def _conditional(self, step: Conditional, root: nn.Module, graph: fx.Graph, values: dict[fx.Node, fx.Node]) -> None:
        decision = values[step.unit.decision]
        bases = {s: next((v for i, v in enumerate(arms_of(s)) if not inside(step, i, v)), None) for s in step.selects}
        found = {s: values[v] for s, v in bases.items() if v is not None}
        for arm, block in enumerate(step.arms):
            chosen = {s: arms_of(s)[arm] for s in step.selects}
            selects = [s for s, v in chosen.items() if inside(step, arm, v)]
            outer = {s: v for s, v in chosen.items() if s not in selects and v is not bases[s]}
            if block is None and not outer:
                continue
            taken = graph.call_function(_taken, (decision, arm, step.unit.routed))
            for select, value in outer.items():
                arguments = (taken, values[value], found[select], *_place(select, step))
                found[select] = graph.call_function(_merged, arguments)
            if block is None:
                continue
            for select in selects:
                if select not in found:
                    known = spec(select)
                    shape = (decision, known.shape, known.dtype, *_place(select, step))
                    found[select] = graph.call_function(_zeros, shape)
            name = f"arm{len(root._modules)}"
            root.add_module(name, self.block(block, selects, step, arm))
            root.add_module(f"{name}_not", _Unchanged(len(block.inputs) + 1))
            operands = [*(values[n] for n in block.inputs), taken, *(found[s] for s in selects)]
            some = graph.call_function(torch.any, (taken,))
            branches = (graph.get_attr(name), graph.get_attr(f"{name}_not"))
            call = graph.call_function(torch.cond, (some, *branches, tuple(operands)))
            found.update((s, graph.call_function(_item, (call, i))) for i, s in enumerate(selects))
        values.update(found)


class _Unchanged(nn.Module):
    """The other branch: what was there before, copied, since a branch may not return its operand."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone(memory_format=torch.contiguous_format) for value in operands[self.first :])


def _item(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


def _taken(decision: Tensor, arm: int, routed: bool) -> Tensor:
    if routed:
        return decision == arm
    return decision if arm else decision.logical_not()


def _place(select: fx.Node, step: Conditional) -> tuple[int, int]:
    """The dim of the rows, and how many entries each owns."""
    found = spec(select)
    return found.batch_dim or 0, found.rows // step.unit.rows


def _merged(mask: Tensor, value: Tensor, before: Tensor, dim: int, entries: int) -> Tensor:
    """The value where the mask is true; row-major, since both branches have to give the same strides."""
    if entries > 1:
        mask = mask.unsqueeze(1).expand(-1, entries).reshape(-1)
    return torch.where(mask.reshape([1] * dim + [-1] + [1] * (value.dim() - dim - 1)), value, before).contiguous()


def _zeros(decision: Tensor, shape: tuple[int, ...], dtype: torch.dtype, dim: int, entries: int) -> Tensor:
    sizes = [decision.shape[0] * entries if i == dim else size for i, size in enumerate(shape)]
    return torch.zeros(sizes, dtype=dtype, device=decision.device)


def _steps(module: fx.GraphModule) -> fx.GraphModule:
    """A segment whose recurrent layers run a step where a sample of the batch keeps it."""
    for node in module.graph.nodes:
        if stands_in(node):
            layer = module.get_submodule(str(node.target))
            agent = isinstance(layer, DroppingLayer)
            weights = [attribute(module, str(n.target)) for n in node.args[3 if agent else 4 :]]
            if isinstance(layer, SequenceLayer):
                module.set_submodule(str(node.target), ConditionalLayer(layer.layer, weights))
            elif isinstance(layer, DroppingLayer):
                module.set_submodule(str(node.target), ConditionalAgent(layer.gate, weights))
    return module
