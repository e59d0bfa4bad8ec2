"""Shape, batch dim and FLOPs of every node, found by running a graph on fake tensors."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dyncompile.capture.canonical import where
from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.errors import MixedSamplesError
from dyncompile.ops import arms_of, check_arms, is_select

_PROBES = (3, 5)


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """Shape of a tensor as a function of the batch size.

    Attributes:
        shape: Sizes for a batch of one.
        dtype: Element type.
        batch_dim: The dim that grows with the batch; None if none does.
        rows: How many entries of that dim belong to one sample.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_dim: int | None

    @property
    def rows(self) -> int:
        """Entries of the batch dim that belong to one sample."""
        return 1 if self.batch_dim is None else self.shape[self.batch_dim]

    def at(self, batch: int) -> tuple[int, ...]:
        """Sizes for a batch of `batch` samples."""
        return tuple(s * batch if i == self.batch_dim else s for i, s in enumerate(self.shape))


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """An integer as a function of the batch size: `slope * batch + offset`."""

    slope: int
    offset: int


def spec(node: fx.Node) -> Spec:
    """Shape of a node's single tensor."""
    found = node.meta["spec"]
    if not isinstance(found, Spec):
        raise TypeError(f"{node.format_node()} is no single tensor")
    return found


def is_tensor(node: object) -> bool:
    """Whether a node's value is a single tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("spec"), Spec)


def probe(root: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor], batch_dims: Sequence[int | None]) -> None:
    """Note `spec` and `flops` in the `meta` of every node that has none yet.

    These nodes, and no others, run in eval mode on fake tensors at two batch sizes: a dim that moves is a batch dim.

    Args:
        root: Owns what the nodes name.
        graph: The nodes.
        inputs: Example inputs.
        batch_dims: For each input its batch dim, or None.

    Raises:
        MixedSamplesError: A size is not proportional to the batch.
    """
    needed = _needed(graph)
    new = [node for node in needed if "flops" not in node.meta]
    called = {root.get_submodule(str(node.target)): None for node in needed if node.op == "call_module"}
    modes = {module: module.training for owner in called for module in owner.modules()}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    try:
        for module in modes:
            module.training = False
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            runs = []
            for batch in _PROBES:
                sized = (_sized(t, d, batch) for t, d in zip(inputs, batch_dims, strict=True))
                run = _Probe(root, dict(zip(placeholders, sized, strict=True)), batch)
                run.over(needed, count=batch == _PROBES[0])
                runs.append(run)
    finally:
        for module, training in modes.items():
            module.training = training
    first, second = runs
    for node in new:
        node.meta["flops"] = first.flops[node] / first.batch
        node.meta["spec"] = pytree.tree_map(
            lambda a, b, node=node: _compare(node, a, b),
            first.values[node],
            second.values[node],
            is_leaf=lambda value: value is None,
        )


def _sized(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    shape = [batch if i == dim else size for i, size in enumerate(tensor.shape)]
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


class _Probe:
    """Runs the nodes that are new; the values of the others are made from what is known of them."""

    def __init__(self, root: nn.Module, inputs: Mapping[fx.Node, Tensor], batch: int) -> None:
        self.root = root
        self.device = next((t.device for t in root.parameters()), torch.device("cpu"))
        self.inputs = inputs
        self.batch = batch
        self.values: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, float] = {}

    def over(self, nodes: Sequence[fx.Node], *, count: bool) -> None:
        """Find the values of some nodes, in order, and count FLOPs."""
        with flop_counter() if count else nullcontext() as counter:
            before = 0
            for node in nodes:
                known = self._known(node) if "flops" in node.meta else None
                self.values[node] = self._run(node) if known is None else known
                if counter is not None and known is None:
                    after = counter.get_total_flops()
                    self.flops[node] = after - before
                    before = after
                    self._count_recurrent(node)

    def _run(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self.inputs[n]
        if n.op == "get_attr":
            return functools.reduce(getattr, str(n.target).split("."), self.root)
        if is_select(n):
            # Operators broadcast; lowering runs one arm in place of the other.
            check_arms([self.values[arm] for arm in arms_of(n)])
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self.values.__getitem__)
        if n.op == "output":
            return args[0]
        if n.op == "call_module":
            return self.root.get_submodule(str(n.target))(*args, **kwargs)
        if n.op == "call_method":
            owner, *rest = args
            return getattr(owner, str(n.target))(*rest, **kwargs)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def _known(self, n: fx.Node) -> Any:
        """A value like the one that a node has, made without running it; None if that cannot be."""
        known, tree = pytree.tree_flatten(n.meta["spec"])
        if n.op in ("placeholder", "get_attr", "output") or None in known:
            return None
        return tree.unflatten(
            torch.empty(found.at(self.batch), dtype=found.dtype, device=self.device)
            if isinstance(found, Spec)
            else found.slope * self.batch + found.offset
            for found in known
        )

    def _count_recurrent(self, n: fx.Node) -> None:
        if n.op == "call_module":
            args = fx.node.map_arg(n.args, self.values.__getitem__)
            found = _recurrent_flops(self.root.get_submodule(str(n.target)), args, self.values[n])
            self.flops[n] = self.flops[n] if found is None else found


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """The new nodes, and those whose values they are found from, in order."""
    needed = {node for node in graph.nodes if "flops" not in node.meta}
    queue = list(needed)
    while queue:
        node = queue.pop()
        if "flops" in node.meta and None not in pytree.tree_leaves(node.meta["spec"]):
            continue
        queue.extend(source for source in node.all_input_nodes if source not in needed)
        needed.update(node.all_input_nodes)
    return sorted(needed)


def flop_counter() -> FlopCounterMode:
    """Counts FLOPs (a multiply-add is two) as torch does, and the kernels that torch leaves out."""
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten.mkldnn_rnn_layer: lambda x, *weights, **_: _recurrent_kernel_flops(x, weights[:2]),
        aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent_kernel_flops(x, weights),
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """FLOPs of queries `[N, H, L, D]` with keys `[N, H, S, D]`, and of those weights with values `[N, H, S, V]`."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent_kernel_flops(x: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """FLOPs of a kernel that multiplies each step of `[L, N, D]`, or of packed `[steps, D]`, by every weight."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def module_flops(build: Callable[[], nn.Module], inputs: Sequence[fx.Node]) -> float:
    """FLOPs per sample of a module that would read some nodes, counted without its weights.

    Args:
        build: Makes it.
        inputs: What it would read, propagated.
    """
    with torch.device("meta"):
        module = build().eval()
        values = [torch.empty(spec(node).shape, dtype=spec(node).dtype) for node in inputs]
    dtype = next((value.dtype for value in values if value.is_floating_point()), torch.get_default_dtype())
    with flop_counter() as counter, torch.no_grad():
        module.to(dtype)(*values)
    return float(counter.get_total_flops())


def _recurrent_flops(module: nn.Module | None, args: tuple[Any, ...], value: Any) -> int | None:
    """FLOPs of a recurrent layer, of whose kernels `torch.utils.flop_counter` knows some and not others.

    Its products, once a step: two a weight.
    """
    if isinstance(module, nn.RNNBase):
        weights = list(module.parameters())
    elif isinstance(module, RecurrentLayer):
        weights = list(args[2:])
    else:
        return None
    sequence = value[0]
    sequence = sequence.data if isinstance(sequence, nn.utils.rnn.PackedSequence) else sequence
    steps = math.prod(sequence.shape[:-1])
    return 2 * steps * sum(w.numel() for w in weights if w.dim() == 2)


def _compare(node: fx.Node, first: Any, second: Any) -> Any:
    small, large = _PROBES
    if isinstance(first, Tensor):
        moved = [i for i, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)) if a != b]
        if not moved:
            return Spec(tuple(first.shape), first.dtype, None)
        dim = moved[0]
        if len(moved) > 1 or first.shape[dim] * large != second.shape[dim] * small or first.shape[dim] % small:
            raise mixed(
                node,
                f"its shape is {list(first.shape)} for {small} samples and {list(second.shape)} for {large}",
            )
        shape = list(first.shape)
        shape[dim] //= small
        return Spec(tuple(shape), first.dtype, dim)
    if isinstance(first, int) and not isinstance(first, bool):
        slope = (second - first) // (large - small)
        return Size(slope, first - slope * small)
    return None


def mixed(node: fx.Node, why: str) -> MixedSamplesError:
    """The error for a node that mixes the samples of a batch."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return MixedSamplesError(
        f"`{name}` ({node.name}) mixes the samples of a batch: {why}{where(node)}; "
        "a part of a batch can be run only if each sample's output depends on that sample alone "
        "(where the batch is not dim 0 of an input, pass batch_dims)"
    )
