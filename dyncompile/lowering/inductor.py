"""Segments compiled by inductor: weights frozen, batch dynamic, called without guards.

A segment goes through `torch._inductor.compile_fx` directly, and the program that inductor
generated is called as it is: without the wrappers of AOTAutograd and the guards of dynamo, which
exist for what a segment never does (autograd, mutation, Python control flow).

Five things are done that inductor leaves undone, at least when the batch is symbolic:

- Convolution weights are packed for the example's batch. Inductor packs them in every call as soon
  as a size is symbolic, which doubles the time of a ResNet-18 at batch 1; so does AOTInductor.
- What tracing assumed of the batch size is kept and looked at: a program serves the batch sizes for
  which it holds. What was assumed to choose the eager kernel of a convolution is left out, as that
  kernel does not run.
- Every tensor at a border is dense: channels-last where it is so in eager mode, else row-major.
  Nothing is converted between segments.
- A sum may be formed in the memory of an input (`dyncompile.lowering.overwriting`).
- Weights lie in large pages (`dyncompile.lowering.paging`).

Segments of equal structure share a program on the processor (`dyncompile.lowering.sharing`); each has
the constants that its own weights fold to. On a GPU they share kernels alone: inductor keys compiled
code by source.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from dyncompile.errors import ArgumentError, LoweringError
from dyncompile.lowering.entry import Entry, memory_format
from dyncompile.lowering.native import entry_point
from dyncompile.lowering.overwriting import overwrite_inputs
from dyncompile.lowering.paging import into_large_pages
from dyncompile.lowering.sharing import Folding, Tape, loaded, structure
from dyncompile.lowering.weights import pack_convolutions, separate


@dataclass(frozen=True, kw_only=True)
class SegmentInput:
    """How an input of a segment carries the batch.

    Attributes:
        batch_dim: Dimension that holds the batch; None if the input is the same for every batch.
        rows: Rows that a sample owns: the size of `batch_dim` is `rows` times the batch size.
    """

    batch_dim: int | None = 0
    rows: int = 1


def compile_segment(
    segment: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    inputs: Sequence[SegmentInput],
    *,
    cudagraphs: bool = False,
    settings: Mapping[str, Any] | None = None,
    like: "CompiledSegment | None" = None,
) -> "CompiledSegment":
    """Compile a straight-line segment for every batch size.

    The weights are read now and copied: the segment's modules are neither changed nor looked at
    again.

    Args:
        segment: Takes the tensors of `example_inputs`, returns a tuple of tensors.
        example_inputs: One tensor an input. Shapes, dtypes, devices and memory formats count, not
            values. Weights are packed for their batch size. Images and feature maps should be
            channels-last if the model convolves.
        inputs: How each input carries the batch.
        cudagraphs: Record and replay CUDA graphs, one a batch size. The next call then overwrites
            the outputs.
        settings: Of `torch._inductor.config`, such as `{"max_autotune": True}`.
        like: One of equal structure (`dyncompile.lowering.sharing`) with examples alike, whose programs are taken,
            with this segment's weights, where that can be done.

    Raises:
        ArgumentError: `inputs` does not fit `example_inputs`.
        LoweringError: The segment computes something that is tied to the example's batch size.
    """
    return CompiledSegment(segment, example_inputs, inputs, cudagraphs=cudagraphs, settings=settings, like=like)


def compile_module(
    module: nn.Module,
    example_inputs: Sequence[Tensor],
    inputs: Sequence[SegmentInput] | None = None,
    *,
    cudagraphs: bool = False,
) -> "CompiledSegment":
    """Compile a whole static model the way segments are: the static twin of a lowered model.

    Args:
        module: Any module that tensors go into; it is compiled in eval mode.
        example_inputs: As in `compile_segment`.
        inputs: As in `compile_segment`; by default the first dimension of every input is the batch.
        cudagraphs: As in `compile_segment`.

    Returns:
        A callable that returns the tensors of the module's output as a flat tuple.

    Raises:
        ArgumentError: `inputs` does not fit `example_inputs`.
        LoweringError: The model computes something that is tied to the example's batch size.
    """
    if inputs is None:
        inputs = [SegmentInput()] * len(example_inputs)
    return CompiledSegment(module, example_inputs, inputs, cudagraphs=cudagraphs)


@dataclass(frozen=True, kw_only=True)
class _Program:
    """What inductor made, and the assumptions under which it is right.

    Attributes:
        run: Takes a list of the batch size and the tensors, and empties it.
        inputs: How many tensors.
        wrapped: Whether the code that calls the kernels is C++, which reads the batch size from a tensor.
        symbol: The batch size, a sympy symbol.
        guards: What was assumed of it, sympy relations.
        only: The one batch size that it serves, where there is only one.
        source: The code of `run`.
        constants: Names under which the code reads what folding made of the weights.
        folding: How that was made; None where the program cannot be shared.
    """

    run: Callable[[list[Any]], Sequence[Tensor]]
    inputs: int
    wrapped: bool
    symbol: Any
    guards: tuple[Any, ...]
    only: int | None
    source: str
    constants: tuple[str, ...]
    folding: Folding | None

    def serves(self, batch: int) -> bool:
        if self.only is not None:
            return batch == self.only
        return all(guard.subs(self.symbol, batch) for guard in self.guards)

    @functools.cached_property
    def entry(self) -> tuple[int, list[Tensor]] | None:
        """Where it starts, and what it reads behind the batch size and the tensors; None if it is not C++."""
        return entry_point(self.run, 1 + self.inputs) if self.wrapped else None

    def at(self, batch: int) -> Callable[[list[Any]], Sequence[Tensor]]:
        """`run` for one batch size."""
        if not self.wrapped:
            return self.run
        # Else it would make a tensor of the number in every call, which takes longer than a small kernel.
        run, size = self.run, torch.tensor(batch)

        def sized(arguments: list[Any]) -> Sequence[Tensor]:
            arguments[0] = size
            return run(arguments)

        return sized

    def of(self, weights: Sequence[Tensor]) -> "_Program":
        """The same program of other weights."""
        assert self.folding is not None
        constants = dict(zip(self.constants, self.folding(weights), strict=True))
        into_large_pages(constants.values())
        return replace(self, run=loaded(self.source, constants))


class CompiledSegment:
    """A segment for every batch size from 1 on.

    Call it under `torch.inference_mode()` or `torch.no_grad()`. Inputs may have any strides; those
    laid out as the examples were are not copied. An output may share memory with an input.
    """

    def __init__(
        self,
        segment: nn.Module,
        example_inputs: Sequence[Tensor],
        inputs: Sequence[SegmentInput],
        *,
        cudagraphs: bool = False,
        settings: Mapping[str, Any] | None = None,
        like: "CompiledSegment | None" = None,
    ) -> None:
        self._batch_of, batch = _batch(example_inputs, inputs)
        self._examples = [torch.empty_like(t, device="meta") for t in example_inputs]
        self._devices = [t.device for t in example_inputs]
        self._on_cpu = all(device.type == "cpu" for device in self._devices)
        self._inputs = tuple(inputs)
        self.formats = [memory_format(t) for t in example_inputs]
        self.output_formats: list[torch.memory_format] = []
        self.overwrites: list[bool] = []
        self._cudagraphs = cudagraphs
        self._settings = dict(settings or {})
        # Constants of a program lie in this copy, so the user's weights may change or go.
        self._segment: nn.Module | None = copy.deepcopy(segment).eval()
        separate(self._segment)
        found = structure(self._segment) if isinstance(self._segment, fx.GraphModule) else None
        self._weights = found[1] if found else None
        self._like = like
        self._programs: list[_Program] = []
        self.serving: dict[int, Callable[[list[Any]], Sequence[Tensor]]] = {}
        self.warmup([max(batch, 2)])

    @property
    def programs(self) -> int:
        """How many were compiled: one, unless code depends on the range of the batch size."""
        return len(self._programs)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the segment.

        Args:
            tensors: In the order of the examples; of one batch size, at least 1.

        Returns:
            The segment's outputs, dense.
        """
        position, dim, rows = self._batch_of
        batch = tensors[position].shape[dim] // rows
        arguments: list[Any] = [batch]
        program = self.serve(batch)
        for tensor, layout, overwritten in zip(tensors, self.formats, self.overwrites, strict=True):
            if overwritten:
                arguments.append(tensor.clone(memory_format=layout))
            else:
                arguments.append(tensor.contiguous(memory_format=layout))
        return tuple(program(arguments))

    def warmup(self, batch_sizes: Iterable[int]) -> None:
        """Compile what these batch sizes need and nothing has yet."""
        for batch in batch_sizes:
            self.serve(batch)

    def serve(self, batch: int) -> Callable[[list[Any]], Sequence[Tensor]]:
        """The program for a batch size.

        It takes a list of the batch size and the tensors, laid out as `formats` says, and empties it; it writes into
        those that `overwrites` says. Its outputs are laid out as `output_formats` says. `serving` holds the programs
        that were asked for before.
        """
        if batch not in self.serving:
            self.serving[batch] = self._program(batch).at(batch)
        return self.serving[batch]

    @property
    def native(self) -> Callable[[int], tuple[int, Tensor, list[Tensor]]] | None:
        """For a batch size where its program starts, its first argument and its last ones; None if it is not C++."""
        return None if self._programs[0].entry is None else self._native

    def _native(self, batch: int) -> tuple[int, Tensor, list[Tensor]]:
        found = self._program(batch).entry
        assert found is not None
        return found[0], torch.tensor(batch), found[1]

    def _program(self, batch: int) -> _Program:
        """The program for a batch size, compiled if there is none yet."""
        program = next((p for p in self._programs if p.serves(batch)), None)
        if program is None:
            program = self._compile(max(batch, 2))
            if program.only is not None and all(other.only is not None for other in self._programs):
                self._programs.append(self._for_others(max(batch, 2)))
            self._programs.append(program)
            if not program.guards and program.only is None:
                self._segment = self._weights = self._like = None  # no other program will be needed
            program = next((p for p in self._programs if p.serves(batch)), program)
        return program

    def _for_others(self, batch: int) -> _Program:
        """A program for other batch sizes than one at which sizes that inductor compares are equal by chance.

        Raises:
            LoweringError: It is no chance: there are none.
        """
        tied = LoweringError(f"the segment computes something tied to the example's batch size, {batch}")
        try:
            program = self._compile(batch + 1)
        except Exception as error:  # what torch raises where shapes do not fit can be anything
            raise tied from error
        if program.only is not None:
            raise tied
        return program

    def _compile(self, hint: int) -> _Program:
        if self._like is not None:
            self._like.serve(hint)
            pattern = next(p for p in self._like._programs if p.serves(hint))
            if pattern.folding is not None and self._weights is not None:
                self.output_formats[:] = self._like.output_formats
                self.overwrites[:] = self._like.overwrites
                return pattern.of(self._weights)
        env = ShapeEnv()
        fake_mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        source = ConstantSource("batch")
        symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        batch: Any = env.create_symintnode(symbol, hint=hint, source=source)
        fakes = [batch]
        for example, device, given, layout in zip(
            self._examples, self._devices, self._inputs, self.formats, strict=True
        ):
            size: list[Any] = list(example.shape)
            if given.batch_dim is not None:
                size[given.batch_dim] = batch * given.rows
            with fake_mode:
                fake = torch.empty(size, dtype=example.dtype, device=device, memory_format=layout)
            fakes.append(fake)

        entry = Entry(cast("nn.Module", self._segment), self.output_formats)
        code: list[Any] = []
        held: dict[str, Any] = {}
        tape = Tape()

        def keep(gm: fx.GraphModule, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            if len(inputs) != len(fakes):
                raise LoweringError(
                    "the segment changes or returns one of its own parameters or buffers, so it cannot be frozen"
                )
            pack_convolutions(gm, {symbol: hint}, tape)
            _, *given = gm.graph.find_nodes(op="placeholder")
            # Callers are told once, of the first program.
            free = self.overwrites or [True] * len(given)
            found = overwrite_inputs(gm, [n for n, may in zip(given, free, strict=True) if may])
            self.overwrites = self.overwrites or [n in found for n in given]
            code.append(compile_fx_inner(gm, inputs, *args, **kwargs))
            held.update(code[0].constants or {})
            held.update({name: getattr(gm, path) for name, path in code[0].frozen_param_names.items()})
            return code[0]

        patches = {
            # Python would call each convolution through the dispatcher: tens of microseconds at batch 1.
            "cpp_wrapper": self._on_cpu,
            **self._settings,
            "freezing": True,
            "freezing_discard_parameters": False,
            # Else it writes scalars into its code (thresholds), which then is of this segment alone; and what it keeps
            # on disk under a key of frozen parameters leaves their values out.
            "always_keep_tensor_constants": True,
            "triton.cudagraphs": self._cudagraphs,
            # `lower` compares what a program returns with eager mode, once, so no call has to look at it again.
            "size_asserts": False,
            "alignment_asserts": False,
        }
        with torch.no_grad(), config.patch(patches), tracing(TracingContext(fake_mode)), tape.running():
            compile_fx(cast("fx.GraphModule", entry), fakes, inner_compile=keep)
        into_large_pages(constant for constant in held.values() if isinstance(constant, Tensor))
        guards = tuple(guard.expr for guard in env.guards if not _picks_eager_kernel(guard))
        return _Program(
            run=code[0].current_callable,
            inputs=len(self._inputs),
            wrapped=bool(patches["cpp_wrapper"]),
            symbol=symbol,
            guards=guards,
            only=hint if symbol in env.replacements else None,
            source=code[0].source_code,
            constants=tuple(held),
            folding=self._folding(tape, list(held.values())),
        )

    def _folding(self, tape: Tape, constants: list[Any]) -> Folding | None:
        """How the weights became the constants of a program that may be shared."""
        # On a GPU inductor wraps the code that it generates: it copies inputs that are not aligned.
        alike = self._on_cpu and all(isinstance(constant, Tensor) for constant in constants)
        return tape.folding(self._weights, constants) if alike and self._weights is not None else None


def _batch(examples: Sequence[Tensor], inputs: Sequence[SegmentInput]) -> tuple[tuple[int, int, int], int]:
    """Where to read the batch size, as (input, dimension, rows a sample), and the examples'."""
    if len(inputs) != len(examples):
        raise ArgumentError("inputs", found=f"{len(inputs)} entries", expected=f"{len(examples)}, one an example")
    found = [
        ((i, given.batch_dim, given.rows), divmod(example.shape[given.batch_dim], given.rows))
        for i, (example, given) in enumerate(zip(examples, inputs, strict=True))
        if given.batch_dim is not None
    ]
    sizes = {size for _, size in found}
    if len(sizes) != 1 or next(iter(sizes))[0] < 1 or next(iter(sizes))[1]:
        raise ArgumentError(
            "example_inputs",
            found=f"shapes {[tuple(t.shape) for t in examples]} with {list(inputs)}",
            expected="at least one batched input, and one batch size in all of them",
        )
    return found[0][0], found[0][1][0]


def _picks_eager_kernel(guard: Any) -> bool:
    """Whether a guard stems from choosing the kernel that a convolution would run in eager mode."""
    place = str(guard.sloc.framework_loc)
    return "fake_impls.py" in place and " in conv" in place
