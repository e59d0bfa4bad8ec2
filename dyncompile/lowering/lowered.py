"""`lower`: from a dynamic model to one that really skips, sample by sample, inside a batch."""

import contextlib
import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyncompile.demand import specialise
from dyncompile.errors import ArgumentError, LoweringError
from dyncompile.graph import Spec, is_tensor, spec
from dyncompile.lowering.absorbing import absorb_activations
from dyncompile.lowering.agreement import compare, decider
from dyncompile.lowering.compiling import compile_segments
from dyncompile.lowering.instructions import Code, Program
from dyncompile.lowering.measure import unprofitable
from dyncompile.lowering.native import native_program
from dyncompile.lowering.plan import Block, Conditional, Plan, make_plan
from dyncompile.lowering.program import write_program
from dyncompile.lowering.runtime import Override, Run, Segments, is_compiled
from dyncompile.lowering.segments import live, segment_module
from dyncompile.lowering.source import python_program, python_source
from dyncompile.module import DynamicModule, disabled_decisions
from dyncompile.values import sizes

_NOTHING = contextlib.nullcontext()

BACKENDS = ("inductor", "eager")
_OPTIONS: dict[str, set[str]] = {"inductor": {"cudagraphs", "settings"}, "eager": set()}


class LoweredModule(nn.Module):
    """A dynamic model that runs only what each sample of a batch needs.

    Called as the static model is; results come in input order, for every batch size. Made by `dyncompile.lower`.

    Attributes:
        plan: What runs, and which decisions are run densely and why.
        backend: "inductor" or "eager".
        snapshot: Whether later changes of the dynamic model's weights and thresholds go unseen until `relower()`.
        last_run: Rows that ran in the last call, by region; of several threads' calls, in the one that ended last.
            Results do not mix: each call has its own.
    """

    def __init__(
        self,
        dyn: DynamicModule,
        *,
        backend: str,
        decline: bool,
        buckets: Sequence[int] = (),
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        # In a tuple, so that the lowered model has no parameters of its own: it is not trained.
        self._source = (dyn,)
        self.backend = backend
        self.snapshot = backend != "eager"
        self.decline = decline
        self.buckets = tuple(buckets)
        self.options = options
        self.last_run: dict[str, int] = {}
        self._override: Override | None = None
        self.training = False
        self.relower()

    @property
    def segments(self) -> Segments:
        """What the segments of the plan call."""
        return self._segments

    @property
    def source(self) -> str:
        """What runs between the segments, as Python code; on a processor C++ carries it out instead."""
        return python_source(self._code)

    @property
    def dynamic(self) -> DynamicModule:
        """The dynamic model that was lowered."""
        return self._source[0]

    def relower(self) -> "LoweredModule":
        """Take over the dynamic model's present weights, thresholds and enabled exits.

        Returns:
            self.

        Raises:
            LoweringError: The dynamic model is in training mode.
        """
        dyn = self.dynamic
        if dyn.training:
            raise LoweringError("the model is in training mode: call `dyn.eval()` before `lower`")
        _check_exits(dyn)
        self._disabled = disabled_decisions(dyn)
        self._batch_of = next((i, dim) for i, dim in enumerate(dyn.graph.batch_dims) if dim is not None)
        self._dtypes = [dyn.present(t.dtype) for t in dyn.graph.inputs]
        self._home = dyn.home
        graph = specialise(dyn.graph.fx, self._disabled)
        absorb_activations(graph, dyn)
        # One layout for the whole model: channels last where it convolves images.
        self._layout = self.snapshot and any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in dyn.modules())
        with self._uncast():
            self._take(make_plan(graph))
            if self.decline:
                losses = unprofitable(self.plan, self._segments, self.examples(16), self.carry_out)
                if losses:
                    self._take(make_plan(graph, dense=losses))
        return self

    def _uncast(self) -> contextlib.AbstractContextManager[object]:
        """Outside of `torch.autocast`, if compiled: segments have their dtypes, and so has what runs between them."""
        cast = self.snapshot and torch.is_autocast_enabled(self._home.type)
        return torch.autocast(self._home.type, enabled=False) if cast else _NOTHING

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        modules = {segment: segment_module(segment, self.dynamic) for segment in plan.segments()}
        if self.backend == "eager":
            # Not the modules themselves: fx and torch would look for hooks and rewrite errors in every call.
            self._segments: Segments = {s: live(module, self.dynamic).forward for s, module in modules.items()}
        else:
            self._segments = compile_segments(modules, self.examples(), self.options)
        fresh, lent = compare(plan, self._segments, self.dynamic, self.examples)
        self._code = write_program(plan, self._segments, fresh, lent)
        self._program = self.carry_out(self._code)
        # For each leaf of the output its position among the values of the program, or -1 and what it always is.
        place = {node: i for i, node in enumerate(plan.root.outputs)}
        leaves: Any = plan.graph.output_node().args[0]
        self._leaves = [(place[v], None) if isinstance(v, fx.Node) else (-1, v) for v in leaves]

    def carry_out(self, code: Code) -> Program:
        """What runs instructions: C++ where the segments are that too, else Python."""
        compiled = [segment for segment in self._segments.values() if is_compiled(segment)]
        native = compiled and not self.buckets and all(segment.native for segment in compiled)
        return (native_program(code) if native else None) or python_program(code)

    def examples(self, batch: int = 4) -> dict[fx.Node, Any]:
        """A value for every value that crosses a border of the plan, in the layout that it has.

        Args:
            batch: Number of samples.

        Returns:
            Values of one dense run; of exits and gates all that they return.
        """
        wanted = {n for block in self.plan.blocks() for n in (*block.inputs, *block.outputs)}
        wanted.update(n for s in self.plan.segments() for n in (*s.inputs, *s.outputs))
        wanted.update(n for unit in self.plan.demand.units for n in (unit.decision, *unit.selects))
        wanted.update([module for n in wanted if (module := decider(n))])
        values: dict[fx.Node, Any] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n in wanted:
                    values[n] = value
                return value

        inputs = [self._laid_out(t) for t in self.dynamic.examples(batch)]
        with torch.no_grad():
            Recorder(self.dynamic, graph=self.plan.graph).run(*inputs)
        return values

    def _cast(self, tensor: Tensor, position: int) -> Tensor:
        """An input as the programs were compiled for; they do not look at it, but read and write where it says."""
        wanted = self._dtypes[position]
        if tensor.device != self._home or tensor.layout is not torch.strided:
            name, layout = self.dynamic.graph.signature.names[position], str(tensor.layout).removeprefix("torch.")
            found = f"a {layout} tensor on {tensor.device}"
            raise ArgumentError(name, found=found, expected=f"a strided one on {self._home}, where the model is")
        if tensor.dtype == wanted:
            return tensor
        if tensor.is_floating_point() or wanted.is_floating_point or wanted == torch.bool:
            name = self.dynamic.graph.signature.names[position]
            raise ArgumentError(name, found=str(tensor.dtype), expected=f"{wanted}, which the model was lowered for")
        return tensor.to(wanted)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        if self._layout and tensor.dim() == 4 and tensor.is_floating_point():
            dense = tensor.contiguous(memory_format=torch.channels_last)
            # Of one channel both layouts are the same memory; the strides tell eager mode which one is meant.
            _, channels, height, width = dense.shape
            return dense.as_strided(dense.shape, (height * width, 1, width, 1)) if channels == 1 else dense
        return tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run; the arguments and the structure of the output are the static model's."""
        graph = self.dynamic.graph
        inputs = graph.bind(args, kwargs)
        position, dim = self._batch_of
        count = inputs[position].shape[dim]
        if not self.snapshot:
            # The live model may have been moved or cast.
            self._home = self.dynamic.home
            self._dtypes = [self.dynamic.present(t.dtype) for t in graph.inputs]
        inputs = [self._cast(t, i) for i, t in enumerate(inputs)]
        if not self.snapshot and (disabled_decisions(self.dynamic) != self._disabled or self.dynamic.training):
            self.relower()
        if count == 0:
            self.last_run = {"always": 0}
            return graph.signature.unflatten(_empty(self.plan.graph, self.dynamic, inputs[0].device))
        run = Run(count, self._override, self.buckets)
        with torch.no_grad() if torch.is_grad_enabled() else _NOTHING, self._uncast():
            values = self._program([self._laid_out(t) for t in inputs], count, None, run)
        self.__dict__["last_run"] = run.rows  # past nn.Module, which would look whether it is a parameter
        return graph.signature.unflatten([values[i] if i >= 0 else constant for i, constant in self._leaves])

    def warmup(self, batch_sizes: Iterable[int] = (1, 2, 16)) -> "LoweredModule":
        """Compile what calls of these batch sizes will need, so that none of them waits.

        Args:
            batch_sizes: Numbers of samples.

        Returns:
            self.

        Raises:
            ArgumentError: A batch size below 1.
        """
        wanted = sizes("batch_sizes", batch_sizes)
        if not wanted:
            raise ArgumentError("batch_sizes", found="none", expected="one at least")
        for segment in self._segments.values():
            warm = getattr(segment, "warmup", None)
            if warm is not None:
                # A segment may see any part of a batch: a single row, or several.
                warm(sorted({1, *wanted}))
        return self

    def train(self, mode: bool = True) -> "LoweredModule":
        """Refused for training: train the dynamic model and lower again.

        Raises:
            LoweringError: `mode` is True.
        """
        if mode:
            raise LoweringError("a lowered model does not train: train the dynamic model, then `fast.relower()`")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoweredModule":
        """A copy lowers a copy of the dynamic model."""
        return LoweredModule(
            copy.deepcopy(self.dynamic, memo),
            backend=self.backend,
            decline=self.decline,
            buckets=self.buckets,
            options=self.options,
        )

    def _apply(self, *_: object, **__: object) -> "LoweredModule":
        """Refused: what was compiled keeps its device and dtype.

        Raises:
            LoweringError: Always.
        """
        raise LoweringError("a lowered model is not moved or cast: move or cast the dynamic model, then `relower()`")

    def inspect(self) -> str:
        """The plan in words: blocks, segments, conditionals."""
        lines: list[str] = []

        def visit(block: Block, indent: int) -> None:
            for step in block.steps:
                pad = "  " * indent
                if isinstance(step, Conditional):
                    for number, arm in enumerate(step.arms):
                        if arm is not None:
                            word = "where" if number else "where not"
                            lines.append(f"{pad}{word} {step.unit.name}:")
                            visit(arm, indent + 1)
                else:
                    flops = sum(n.meta.get("flops", 0.0) for n in step.nodes)
                    lines.append(f"{pad}segment of {len(step.nodes)} operations, {flops / 1e6:.2f} MFLOPs")

        visit(self.plan.root, 0)
        lines += [f"dense: {name}, since {why}" for name, why in self.plan.dense.items()]
        return "\n".join(lines)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, snapshot={self.snapshot}, conditionals={len(self.plan.demand.units)}"


def lower(
    dyn: DynamicModule,
    backend: str = "inductor",
    *,
    decline: bool | None = None,
    buckets: Sequence[int] = (),
    **options: Any,
) -> LoweredModule:
    """Make a dynamic model skip for real: per sample, inside a batch.

    Args:
        dyn: The dynamic model, in eval mode.
        backend: "inductor" compiles each segment, frozen, with a dynamic batch: a snapshot of the weights; "eager"
            runs the segments as they are, on the live weights: what the reference computes, up to the rounding by
            which an operation on fewer rows may differ.
        decline: Run a conditional densely where its overhead (count, gather, scatter), measured here at a batch of 16,
            exceeds all that its arms cost; `plan.dense` says which and by how much. Default: for "inductor".
        buckets: Fill the rows of a part of a batch up to the next of these sizes, so that a program made for one size
            (a CUDA graph) serves many.
        options: Options of the backend: `cudagraphs=True` for "inductor" on a GPU, with which the next call
            overwrites the results of the one before: clone what is kept; `settings={...}` of `torch._inductor.config`.

    Returns:
        A module that is called as the static model is, from several threads too. As in eager mode, an output that the
        static model hands through from its input may be that very tensor.

    Raises:
        ArgumentError: No backend of that name, no dynamic model, or a bucket below 1.
        LoweringError: The model is in training mode.
    """
    if not isinstance(dyn, DynamicModule):
        raise ArgumentError("dyn", found=type(dyn).__name__, expected="what `dyncompile.dynamize` returned")
    if backend not in BACKENDS:
        raise ArgumentError("backend", found=repr(backend), expected=f"one of {BACKENDS}")
    buckets = sizes("buckets", buckets)
    unknown = sorted(set(options) - _OPTIONS[backend])
    if unknown:
        raise ArgumentError("options", found=unknown, expected=f"of {backend!r}: {sorted(_OPTIONS[backend])}")
    decline = backend == "inductor" if decline is None else decline
    return LoweredModule(dyn, backend=backend, decline=decline, buckets=buckets, options=options)


def _check_exits(dyn: DynamicModule) -> None:
    """Refuse thresholds and temperatures that nobody can mean."""
    for name, module in dyn.exits.items():
        threshold, temperature = float(module.get_buffer("threshold")), float(module.get_buffer("temperature"))
        if not 0 <= threshold <= 1:
            raise ArgumentError(f"exits.{name}.threshold", found=threshold, expected="a number in [0, 1]")
        if not 0 < temperature < math.inf:
            raise ArgumentError(f"exits.{name}.temperature", found=temperature, expected="a number above 0")


def _empty(graph: fx.Graph, dyn: DynamicModule, device: torch.device) -> list[Any]:
    """The output for a batch of no samples."""
    leaves: Any = graph.output_node().args[0]

    def empty(leaf: Any) -> Any:
        if not is_tensor(leaf):
            return leaf
        found: Spec = spec(leaf)
        return torch.empty(found.at(0), dtype=dyn.present(found.dtype), device=device)

    return [empty(leaf) for leaf in leaves]


__all__ = ["BACKENDS", "LoweredModule", "lower"]
