"""A model as passes see it: flat FX nodes that know their shape, and the structure that can be asked of them."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dyncompile.capture.signature import Signature
from dyncompile.errors import MixedSamplesError

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """A residual branch: `add(output, shortcut)`.

    Attributes:
        add: The addition that joins.
        source: Where the branch leaves the trunk.
        output: What the branch adds.
        shortcut: What it is added to; `source` itself for an identity branch.
    """

    add: fx.Node
    source: fx.Node
    output: fx.Node
    shortcut: fx.Node

    @property
    def identity(self) -> bool:
        """The shortcut is the trunk itself, with nothing on it."""
        return self.shortcut is self.source


@dataclasses.dataclass
class Graph:
    """A captured model.

    Attributes:
        root: Owns every module, parameter and buffer that the nodes name.
        fx: The nodes; flat placeholders, and a tuple of leaves as output.
        signature: The calling convention.
        inputs: Example inputs, flat, on the model's device.
        batch_dims: For each input its batch dim, or None.
        mode: The mode it was exported in.
        task: "classification" or "regression".
        overwriting: Layers that were `inplace=True` before capture.
    """

    root: nn.Module
    fx: fx.Graph
    signature: Signature
    inputs: tuple[Tensor, ...]
    batch_dims: tuple[int | None, ...]
    mode: str = "train"
    task: str = "classification"
    overwriting: tuple[str, ...] = ()

    @property
    def placeholders(self) -> list[fx.Node]:
        """The flat inputs."""
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(iter(reversed(self.fx.nodes)))

    @property
    def prediction(self) -> fx.Node:
        """The leaf of the output that is the model's prediction."""
        return self.output.args[0][self.signature.prediction]  # type: ignore[index, return-value, no-any-return]

    @property
    def final(self) -> fx.Node:
        """The prediction of the full-depth path, behind every exit."""
        return next((node for node in self.fx.nodes if node.meta.get("final")), self.prediction)

    @property
    def main_input(self) -> fx.Node:
        """The first floating input that has a batch dim, else the first that has one."""
        batched = [p for p in self.placeholders if spec(p).batch_dim is not None]
        floating = [p for p in batched if spec(p).dtype.is_floating_point]
        return (floating or batched or self.placeholders)[0]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The layer that a `call_module` node calls."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    # --- shapes ----------------------------------------------------------------------------------

    def propagate(self) -> None:
        """Note shape, dtype and batch dim of every node, and the FLOPs it costs per sample.

        Raises:
            MixedSamplesError: A size is not proportional to the batch.
        """
        runs = [_probe(self, batch) for batch in _PROBES]
        for node in self.fx.nodes:
            first, second = (values[node] for values, _ in runs)
            node.meta["spec"] = pytree.tree_map(
                functools.partial(_compare, node), first, second, is_leaf=_is_none
            )
            node.meta["flops"] = runs[0][1].get(node, 0) / _PROBES[0]

    def flops(self, node: fx.Node) -> float:
        """FLOPs of a node per sample (a multiply-add is two), as `torch.utils.flop_counter` counts them."""
        return float(node.meta["flops"])

    def parameter_bytes(self, node: fx.Node) -> int:
        """Bytes of the parameters that a node reads."""
        module = self.module_of(node)
        tensors: list[Tensor] = [] if module is None else list(module.parameters())
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                tensors.append(attribute(self.root, str(source.target)))
        return sum(t.numel() * t.element_size() for t in tensors)

    # --- structure -------------------------------------------------------------------------------

    @functools.cached_property
    def trunk(self) -> nx.DiGraph:
        """Floating tensor nodes on a path from the main input to the prediction; masks and sizes are left out."""
        full = nx.DiGraph()
        main = self.main_input
        full.add_node(main)
        for node in self.fx.nodes:
            if not _floating(node) or node is main:
                continue
            sources = [source for source in node.all_input_nodes if _floating(source)]
            if not sources and self._embeds(node, main):
                sources = [main]
            full.add_edges_from((source, node) for source in sources)
        prediction = self.final
        if main not in full or prediction not in full:
            return nx.DiGraph()
        between = (nx.descendants(full, main) | {main}) & (
            nx.ancestors(full, prediction) | {prediction}
        )
        return full.subgraph(between).copy()  # type: ignore[no-any-return]

    def _embeds(self, node: fx.Node, main: fx.Node) -> bool:
        """Whether a node looks up features for the integers (or other non-features) of the main input."""
        lookup = isinstance(self.module_of(node), nn.Embedding | nn.EmbeddingBag)
        if not lookup and node.target is not torch.ops.aten.embedding.default:
            return main in node.all_input_nodes
        queue = [source for source in node.all_input_nodes if is_tensor(source)]
        while queue:
            source = queue.pop()
            if source is main:
                return True
            queue.extend(parent for parent in source.all_input_nodes if is_tensor(parent))
        return False

    @functools.cached_property
    def dominators(self) -> dict[fx.Node, fx.Node]:
        """The immediate dominator of each node of the trunk."""
        if self.main_input not in self.trunk:
            return {}
        found = dict(nx.immediate_dominators(self.trunk, self.main_input))
        found.pop(self.main_input, None)
        return found

    @functools.cached_property
    def cut_points(self) -> list[fx.Node]:
        """Nodes that every path from the main input to the prediction passes, in order, both ends left out."""
        chain = []
        node = self.dominators.get(self.final)
        while node is not None and node is not self.main_input:
            chain.append(node)
            node = self.dominators.get(node)
        return chain[::-1]

    @functools.cached_property
    def residual_branches(self) -> list[Branch]:
        """Additions on the chain of cut points whose two inputs have one shape, with the branch that they join."""
        chain = {*self.cut_points, self.final, self.main_input}
        found = []
        for node in self.fx.nodes:
            source = self.dominators.get(node)
            if node not in chain or source not in chain or not is_add(node):
                continue
            left, right = node.args[:2]
            if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
                continue
            if left not in self.trunk or right not in self.trunk or left is right:
                continue
            if spec(left) != spec(right):
                continue
            near = self._length(left, source) <= self._length(right, source)
            shortcut, output = (left, right) if near else (right, left)
            found.append(Branch(add=node, source=source, output=output, shortcut=shortcut))
        return found

    def _length(self, node: fx.Node, source: fx.Node) -> int:
        return int(nx.shortest_path_length(self.trunk, source, node))

    def invalidate(self) -> None:
        """Forget what was derived from the nodes, after they changed."""
        for name in ("trunk", "dominators", "cut_points", "residual_branches"):
            self.__dict__.pop(name, None)

    def channel_dim(self, node: fx.Node) -> int:
        """Which dim of a feature holds its channels: 1 for convolutional layouts, the last for tokens and `NHWC`."""
        rank = len(spec(node).shape)
        if rank <= 3:
            return rank - 1 if rank != 3 or not self._convolutional(node) else 1
        return 1 if self._convolutional(node) else rank - 1

    def _convolutional(self, node: fx.Node) -> bool:
        """Whether the nearest layer that tells, behind or else ahead of a node, keeps channels in dim 1."""
        width = spec(node).shape
        for step in (lambda n: n.all_input_nodes, lambda n: list(n.users)):
            queue, seen = [node], {node}
            while queue:
                current = queue.pop(0)
                module = self.module_of(current)
                if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
                    return True
                if isinstance(module, nn.Linear | nn.LayerNorm | nn.RNNBase | nn.Embedding):
                    return False
                for other in step(current):
                    same = isinstance(other.meta.get("spec"), Spec) and len(spec(other).shape) == len(width)
                    if other not in seen and same:
                        seen.add(other)
                        queue.append(other)
        return len(width) >= 4

    # --- change ----------------------------------------------------------------------------------

    def add_module(self, path: str, module: nn.Module) -> None:
        """Register a module at a dotted path of the root, making containers on the way; it takes the root's mode."""
        *parents, name = path.split(".")
        owner = self.root
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.ModuleDict() if parent in ("exits", "gates") else nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, module.train(self.root.training))

    def run(self, inputs: list[Tensor] | tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Run the nodes as they stand, dense."""
        return fx.Interpreter(self.root, graph=self.fx).run(*inputs)  # type: ignore[no-any-return]


def spec(node: fx.Node) -> Spec:
    """Shape of a node's single tensor."""
    found = node.meta["spec"]
    if not isinstance(found, Spec):
        raise TypeError(f"{node.format_node()} is no single tensor")
    return found


def is_tensor(node: object) -> bool:
    """Whether a node's value is a single tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("spec"), Spec)


def _floating(node: fx.Node) -> bool:
    """A node that carries features: floating, made from data; containers of them (an LSTM's tuple) count too."""
    if node.op in ("get_attr", "output"):
        return False
    leaves = pytree.tree_leaves(node.meta.get("spec"))
    return any(isinstance(leaf, Spec) and leaf.dtype.is_floating_point for leaf in leaves)


def is_add(node: fx.Node) -> bool:
    """An addition of two values, unscaled."""
    adds: tuple[Any, ...] = (torch.ops.aten.add.Tensor, operator.add, torch.add)
    return node.target in adds and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1


def attribute(root: nn.Module, path: str) -> Any:
    """The parameter or buffer at a dotted path."""
    return functools.reduce(getattr, path.split("."), root)


def _is_none(value: object) -> bool:
    return value is None


def _probe(graph: Graph, batch: int) -> tuple[dict[fx.Node, Any], dict[fx.Node, int]]:
    """Values and FLOPs of every node on fake tensors at one batch size, in eval mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = []
    for tensor, dim in zip(graph.inputs, graph.batch_dims, strict=True):
        shape = list(tensor.shape)
        if dim is not None:
            shape[dim] = batch
        with mode:
            inputs.append(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
    flops: dict[fx.Node, int] = {}
    values: dict[fx.Node, Any] = {}

    class Probe(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(n)
            flops[n] = counter.get_total_flops() + _recurrent_flops(graph.module_of(n), value)
            values[n] = value
            return value

    modes = {module: module.training for module in graph.root.modules()}
    graph.root.eval()
    try:
        with mode, torch.no_grad():
            Probe(graph.root, garbage_collect_values=False, graph=graph.fx).run(*inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    return values, flops


def _recurrent_flops(module: nn.Module | None, value: Any) -> int:
    """FLOPs of a recurrent layer, which `torch.utils.flop_counter` does not know: its products, once a step."""
    if not isinstance(module, nn.RNNBase):
        return 0
    sequence = value[0]
    sequence = sequence.data if isinstance(sequence, nn.utils.rnn.PackedSequence) else sequence
    steps = math.prod(sequence.shape[:-1])
    return 2 * steps * sum(p.numel() for name, p in module.named_parameters() if "weight" in name)


def _compare(node: fx.Node, first: Any, second: Any) -> Any:
    small, large = _PROBES
    if isinstance(first, Tensor):
        moved = [i for i, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)) if a != b]
        if not moved:
            return Spec(tuple(first.shape), first.dtype, None)
        dim = moved[0]
        if len(moved) > 1 or first.shape[dim] * large != second.shape[dim] * small or first.shape[dim] % small:
            raise mixed(node, f"its shape is {list(first.shape)} for {small} samples and {list(second.shape)} for {large}")
        shape = list(first.shape)
        shape[dim] //= small
        return Spec(tuple(shape), first.dtype, dim)
    if isinstance(first, int) and not isinstance(first, bool):
        slope = (second - first) // (large - small)
        return Size(slope, first - slope * small)
    return None


def mixed(node: fx.Node, why: str) -> MixedSamplesError:
    """The error for a node that mixes the samples of a batch."""
    from dyncompile.capture.canonical import where

    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return MixedSamplesError(
        f"`{name}` ({node.name}) mixes the samples of a batch: {why}{where(node)}; "
        "a model can be run on a part of a batch only if each sample's output depends on that sample alone"
    )


def walk(tree: Any) -> Iterator[fx.Node]:
    """Every node in a nested argument."""
    found: list[fx.Node] = []
    fx.map_arg(tree, found.append)
    yield from found


def program(graph: fx.Graph) -> Callable[..., Any]:
    """Compile the nodes to one Python function of (root, *inputs).

    The function reads modules and parameters off `root` at every call, so moving, casting or loading the root's
    state needs no recompilation.
    """
    import linecache

    code = graph.python_code("self")
    name = f"<dyncompile graph {id(code):x}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    namespace = dict(code.globals)
    exec(compile(code.src, name, "exec"), namespace)
    return namespace["forward"]  # type: ignore[no-any-return]
