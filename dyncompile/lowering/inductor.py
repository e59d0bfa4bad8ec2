"""Segments compiled by inductor: weights frozen, batch dynamic, called without guards.

A segment goes through `torch._inductor.compile_fx` directly, and the program that inductor
generated is called as it is: without the wrappers of AOTAutograd and the guards of dynamo, which
exist for what a segment never does (autograd, mutation, Python control flow).

Three things are done that inductor leaves undone when the batch is symbolic:

- Convolution weights are packed for the example's batch. Inductor packs them in every call as soon
  as a size is symbolic, which doubles the time of a ResNet-18 at batch 1; so does AOTInductor.
- What tracing assumed of the batch size is kept and looked at: a program serves the batch sizes for
  which it holds. What was assumed to choose the eager kernel of a convolution is left out, as that
  kernel does not run.
- Every tensor at a border is dense: channels-last where it is so in eager mode, else row-major.
  Nothing is converted between segments.

Segments of equal structure are not merged, but their kernels are: inductor keys compiled C++ and
Triton by source, and frozen weights are arguments of a kernel. Left to share would be the
generation of Python code, about a tenth of a warm compile. The graph is traced and
folded for each set of weights.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.constant_folding import replace_node_with_constant
from torch._inductor.freezing_utils import is_frozen_param
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from dyncompile.errors import ArgumentError, LoweringError

_SMALL = 1 << 14
"""Weights up to which a linear layer is not worth a call of oneDNN."""


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

    Raises:
        ArgumentError: `inputs` does not fit `example_inputs`.
        LoweringError: The segment computes something that is tied to the example's batch size.
    """
    return CompiledSegment(segment, example_inputs, inputs, cudagraphs=cudagraphs, settings=settings)


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
        symbol: The batch size, a sympy symbol.
        guards: What was assumed of it, sympy relations.
    """

    run: Callable[[list[Any]], Sequence[Tensor]]
    symbol: Any
    guards: tuple[Any, ...]

    def serves(self, batch: int) -> bool:
        return all(guard.subs(self.symbol, batch) for guard in self.guards)


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
    ) -> None:
        self._batch_of, batch = _batch(example_inputs, inputs)
        self._examples = [torch.empty_like(t, device="meta") for t in example_inputs]
        self._devices = [t.device for t in example_inputs]
        self._inputs = tuple(inputs)
        self.formats = [_memory_format(t) for t in example_inputs]
        self.output_formats: list[torch.memory_format] = []
        self._cudagraphs = cudagraphs
        self._settings = dict(settings or {})
        # Constants of a program lie in this copy, so the user's weights may change or go.
        self._segment: nn.Module | None = copy.deepcopy(segment).eval()
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
        for tensor, layout in zip(tensors, self.formats, strict=True):
            arguments.append(tensor.contiguous(memory_format=layout))
        return tuple(self.serve(batch)(arguments))

    def warmup(self, batch_sizes: Iterable[int]) -> None:
        """Compile what these batch sizes need and nothing has yet."""
        for batch in batch_sizes:
            self.serve(batch)

    def serve(self, batch: int) -> Callable[[list[Any]], Sequence[Tensor]]:
        """The program for a batch size.

        It takes a list of the batch size and the tensors, laid out as `formats` says, and empties it; its outputs are
        laid out as `output_formats` says. `serving` holds those that were asked for before.
        """
        if batch in self.serving:
            return self.serving[batch]
        program = next((p for p in self._programs if p.serves(batch)), None)
        if program is None:
            program = self._compile(max(batch, 2))
            self._programs.append(program)
            if not program.guards:
                self._segment = None  # no other program will be needed
        self.serving[batch] = program.run
        return program.run

    def _compile(self, hint: int) -> _Program:
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

        entry = _Entry(cast("nn.Module", self._segment), self.output_formats)
        code: list[Any] = []

        def keep(gm: fx.GraphModule, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            if len(inputs) != len(fakes):
                raise LoweringError(
                    "the segment changes or returns one of its own parameters or buffers, so it cannot be frozen"
                )
            _pack_convolutions(gm, {symbol: hint})
            _tell_scalars_apart(gm)
            code.append(compile_fx_inner(gm, inputs, *args, **kwargs))
            return code[0]

        patches = {
            **self._settings,
            "freezing": True,
            "freezing_discard_parameters": False,
            "triton.cudagraphs": self._cudagraphs,
            # `lower` compares what a program returns with eager mode, once, so no call has to look at it again.
            "size_asserts": False,
            "alignment_asserts": False,
        }
        with torch.no_grad(), config.patch(patches), tracing(TracingContext(fake_mode)):
            compile_fx(cast("fx.GraphModule", entry), fakes, inner_compile=keep)
        if symbol in env.replacements:
            raise LoweringError(f"the segment computes something tied to the example's batch size, {hint}")
        guards = tuple(guard.expr for guard in env.guards if not _picks_eager_kernel(guard))
        return _Program(run=code[0].current_callable, symbol=symbol, guards=guards)


class _Entry(nn.Module):
    """The segment as inductor sees it: batch size first, a flat list of dense tensors out.

    Not a GraphModule: inductor would fold batch norm into modules after it has read their weights.
    """

    def __init__(self, segment: nn.Module, formats: list[torch.memory_format]) -> None:
        super().__init__()
        self.segment = segment
        self.formats = formats
        if isinstance(segment, fx.GraphModule):
            for node in segment.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
                weight: Any = node.args[1]
                groups = node.args[6] if len(node.args) > 6 else 1
                frozen = weight.op == "get_attr"
                if groups == 1 and frozen and operator.attrgetter(str(weight.target))(segment).shape[1] == 1:
                    node.target = _convolve_one
            segment.recompile()
        for owner in list(segment.modules()):
            if isinstance(owner, _OneChannelConv | _SmallLinear):
                continue  # of an earlier program of this segment
            for name, child in owner.named_children():
                if child._forward_hooks or child._forward_pre_hooks:
                    continue
                if type(child) is nn.Conv2d and child.in_channels == 1:
                    setattr(owner, name, _OneChannelConv(child))
                elif type(child) is nn.Linear and child.weight.numel() <= _SMALL:
                    setattr(owner, name, _SmallLinear(child))

    def forward(self, _: int, *tensors: Tensor) -> list[Tensor]:
        outputs = pytree.tree_leaves(self.segment(*tensors))
        for output in outputs:
            if not isinstance(output, Tensor):
                raise LoweringError(f"a segment returns tensors only, not {output!r}")
        self.formats[:] = [_memory_format(t) for t in outputs]
        return [t.contiguous(memory_format=layout) for t, layout in zip(outputs, self.formats, strict=True)]


class _OneChannelConv(nn.Module):
    """A convolution of one channel, computed with a second channel of zeros.

    Of one channel row-major and channels-last are the same memory. With a symbolic batch inductor takes such an input
    for row-major and oneDNN does not; what follows would run row-major at best, and fail an assertion at worst.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        conv = self.convolution
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return conv(x)  # type: ignore[no-any-return]
        return _convolve_one(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def _convolve_one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    _: int = 1,
) -> Tensor:
    """`conv2d` of one channel, for `_OneChannelConv` and where a model calls the function itself; of one group."""
    wide = nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).contiguous(memory_format=torch.channels_last)
    weight = nn.functional.pad(weight, (0, 0, 0, 0, 0, 1))
    return nn.functional.conv2d(wide, weight, bias, stride, padding, dilation)


class _SmallLinear(nn.Module):
    """A linear layer of few weights as inductor's own code, which fuses with what is around it.

    A call of oneDNN takes longer than its work there, and splits an exit's head into three kernels.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.biased = linear.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if x.dim() != 2 or x.device.type != "cpu":
            return self.linear(x)  # type: ignore[no-any-return]
        product = (x.unsqueeze(1) * weight).sum(-1)
        return product + bias if self.biased else product


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels-last where a tensor is that and no more than that, else row-major."""
    if not tensor.is_contiguous():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
        if last is not None and tensor.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


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


def _pack_convolutions(gm: fx.GraphModule, hint: dict[Any, int]) -> None:
    """Bring the frozen weights of oneDNN convolutions into the layout that its kernels read."""
    if not torch.backends.mkldnn.is_available():
        return

    def known(size: Any) -> int:
        return int(size.node.expr.subs(hint)) if isinstance(size, torch.SymInt) else size

    pack = torch.ops.mkldnn._reorder_convolution_weight.default
    convolution = torch.ops.mkldnn._convolution_pointwise.default
    with _disable_current_modes():
        for node in gm.graph.find_nodes(op="call_function", target=convolution):
            source, weight, _, *geometry = node.args[:7]
            if weight.op != "get_attr" or weight.meta["val"].device.type != "cpu":
                continue
            frozen = getattr(gm, weight.target)
            if frozen.is_mkldnn:
                continue
            arguments = (*geometry, [known(size) for size in source.meta["val"].shape])
            with gm.graph.inserting_before(node):
                packed = gm.graph.call_function(pack, (weight, *arguments))
            packed.meta["val"] = weight.meta["val"]
            node.replace_input_with(weight, packed)
            replace_node_with_constant(gm, packed, pack(frozen.detach(), *arguments))
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _tell_scalars_apart(gm: fx.GraphModule) -> None:
    """Let the key under which inductor keeps compiled code hold the values of frozen scalars.

    It writes them into the code (thresholds, temperatures), and takes two graphs for one that differ in them alone.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        if isinstance(value, Tensor) and value.dim() == 0 and is_frozen_param(value):
            del value._is_frozen_param  # type: ignore[attr-defined]


def _picks_eager_kernel(guard: Any) -> bool:
    """Whether a guard stems from choosing the kernel that a convolution would run in eager mode."""
    place = str(guard.sloc.framework_loc)
    return "fake_impls.py" in place and " in conv" in place
