"""A model as passes see it: flat FX nodes that know their shape, and the structure that can be asked of them."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx import Node

from dyncompile.capture.signature import Signature
from dyncompile.errors import ArgumentError
from dyncompile.shapes import Size, Spec, is_tensor, mixed, probe, spec

__all__ = ["Branch", "Graph", "Size", "Spec", "attribute", "is_add", "is_tensor", "mixed", "program", "spec"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """A residual branch: `add(output, shortcut)`.

    Attributes:
        add: The addition that joins.
        source: Where the branch leaves the trunk.
        output: What the branch adds.
        shortcut: What it is added to; `source` itself for an identity branch.
    """

    add: Node
    source: Node
    output: Node
    shortcut: Node

    @property
    def identity(self) -> bool:
        """The shortcut is the trunk itself, with nothing on it."""
        return self.shortcut is self.source


_DERIVED = ("trunk", "dominators", "cut_points", "residual_branches")


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

    def __post_init__(self) -> None:
        # For each input its name, its batch dim and the sizes before and after it. Made here: dynamo traces no
        # cached_property.
        self._named: dict[str, Node] = {}
        self._feeds: dict[Node, bool] = {}
        self._sizes: list[tuple[str, int | None, tuple[int, ...], tuple[int, ...]]] = []
        for name, tensor, dim in zip(self.signature.names, self.inputs, self.batch_dims, strict=True):
            shape = tuple(tensor.shape)
            before, after = (shape, ()) if dim is None else (shape[:dim], shape[dim + 1 :])
            self._sizes.append((name, dim, before, after))

    def __getstate__(self) -> dict[str, Any]:
        """Copies find out anew what hangs on nodes: fx copies its graph's nodes, and only there."""
        kept = {name: value for name, value in self.__dict__.items() if name not in _DERIVED}
        return {**kept, "_named": {}, "_feeds": {}}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The flat tensors of a call.

        Raises:
            ArgumentError: Another structure, or other sizes besides the batch, than were captured; or inputs that
                hold different numbers of samples.
        """
        tensors = self.signature.flatten(args, kwargs)
        batch = -1
        for tensor, (name, dim, before, after) in zip(tensors, self._sizes, strict=True):
            shape = tensor.shape
            if dim is None:
                fits = shape == before
            else:
                fits = shape[dim + 1 :] == after and shape[:dim] == before and len(shape) == dim + 1 + len(after)
            if not fits:
                wanted = [*before] if dim is None else [*before, "N", *after]
                raise ArgumentError(
                    name,
                    found=f"shape {list(shape)}",
                    expected=f"{wanted}, as captured; for another size, dynamize with example_inputs of that size",
                )
            if dim is not None:
                if batch not in (-1, shape[dim]):
                    raise ArgumentError(
                        name, found=f"{shape[dim]} samples", expected=f"as many as in the other inputs, {batch}"
                    )
                batch = shape[dim]
        return tensors

    @property
    def placeholders(self) -> list[Node]:
        """The flat inputs."""
        return list(self.fx.find_nodes(op="placeholder"))

    @property
    def output(self) -> Node:
        """The output node."""
        return self.fx.output_node()

    @property
    def prediction(self) -> Node:
        """The leaf of the output that is the model's prediction."""
        return self.output.args[0][self.signature.prediction]  # type: ignore[index, return-value]

    @property
    def final(self) -> Node:
        """The prediction of the full-depth path, behind every exit."""
        return next((node for node in reversed(self.fx.nodes) if node.meta.get("final")), self.prediction)

    @property
    def main_input(self) -> Node:
        """The first floating input that has a batch dim, else the first that has one."""
        batched = [p for p in self.placeholders if spec(p).batch_dim is not None]
        floating = [p for p in batched if spec(p).dtype.is_floating_point]
        return (floating or batched or self.placeholders)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the prediction, which what is inserted computes in."""
        return spec(self.final).dtype

    def module_of(self, node: Node) -> nn.Module | None:
        """The layer that a `call_module` node calls."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    # --- shapes ----------------------------------------------------------------------------------

    def propagate(self) -> None:
        """Note shape, dtype and batch dim of every new node, and the FLOPs it costs per sample.

        Raises:
            MixedSamplesError: A size is not proportional to the batch.
        """
        probe(self.root, self.fx, self.inputs, self.batch_dims)

    def flops(self, node: Node) -> float:
        """FLOPs of a node per sample (a multiply-add is two), as `dyncompile.shapes.flop_counter` counts them."""
        return float(node.meta["flops"])

    @property
    def total_flops(self) -> float:
        """FLOPs of the static model per sample."""
        return sum(self.flops(node) for node in self.fx.nodes if "inserted" not in node.meta)

    def parameter_bytes(self, node: Node) -> int:
        """Bytes of the parameters that a node reads."""
        module = self.module_of(node)
        tensors: list[Tensor] = [] if module is None else list(module.parameters())
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                tensors.append(attribute(self.root, str(source.target)))  # noqa: PERF401 - reads better
        return sum(t.numel() * t.element_size() for t in tensors)

    # --- structure -------------------------------------------------------------------------------

    def find(self, name: str) -> Node | None:
        """The node of a name; None if there is none."""
        node = self._named.get(name)
        if node is None or node._erased or node.name != name:
            self._named = {node.name: node for node in self.fx.nodes}
            node = self._named.get(name)
        return node

    @functools.cached_property
    def trunk(self) -> "nx.DiGraph[Node]":
        """Floating tensor nodes on a path from the main input to the prediction; masks and sizes are left out."""
        full: nx.DiGraph[Node] = nx.DiGraph()
        main = self.main_input
        full.add_node(main)
        for node in self.fx.nodes:
            full.add_edges_from((source, node) for source in self._carriers(node, main))
        prediction = self.final
        if main not in full or prediction not in full:
            return nx.DiGraph()
        between = (nx.descendants(full, main) | {main}) & (nx.ancestors(full, prediction) | {prediction})
        return full.subgraph(between).copy()

    def _carriers(self, node: Node, main: Node) -> list[Node]:
        """What a node takes features from: floating nodes, or the main input where it looks features up for that."""
        if not _floating(node) or node is main:
            return []
        sources = [source for source in node.all_input_nodes if _floating(source)]
        return sources or ([main] if self._embeds(node, main) else [])

    def _embeds(self, node: Node, main: Node) -> bool:
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
    def dominators(self) -> dict[Node, Node]:
        """The immediate dominator of each node of the trunk."""
        if self.main_input not in self.trunk:
            return {}
        found = dict(nx.immediate_dominators(self.trunk, self.main_input))
        found.pop(self.main_input, None)
        return found

    def dominator(self, node: Node) -> Node | None:
        """The immediate dominator of one node, found from what lies between the two alone.

        Back from the node, always from the latest of the values that are open: where one alone is open, every path
        has passed it.
        """
        main = self.main_input
        open_ = {source for source in self._carriers(node, main) if self._fed(source, main)}
        while len(open_) > 1:
            latest = max(open_)
            open_.remove(latest)
            open_.update(source for source in self._carriers(latest, main) if self._fed(source, main))
        return next(iter(open_), None)

    def _fed(self, node: Node, main: Node) -> bool:
        """Whether features of the main input reach a node; rewriting does not change that."""
        waiting = [node]
        while waiting:
            last = waiting[-1]
            sources = self._carriers(last, main)
            unknown = [source for source in sources if source not in self._feeds and source is not main]
            if last in self._feeds or not unknown:
                self._feeds.setdefault(last, last is main or any(s is main or self._feeds[s] for s in sources))
                waiting.pop()
            else:
                waiting.extend(unknown)
        return self._feeds[node]

    @functools.cached_property
    def cut_points(self) -> list[Node]:
        """Nodes that every path from the main input to the prediction passes, in order, both ends left out."""
        chain = []
        node = self.dominators.get(self.final)
        while node is not None and node is not self.main_input:
            chain.append(node)
            node = self.dominators.get(node)
        return chain[::-1]

    @functools.cached_property
    def residual_branches(self) -> list[Branch]:
        """Additions of what is computed from a value to that value, or, between cut points, to a projection of it.

        Both inputs have one shape. A projection inside of a branch is left out: there a sum of two values is as often
        no shortcut (Res2Net adds the parts of a split).
        """
        chain = {*self.cut_points, self.final, self.main_input}
        found = []
        for node in self.fx.nodes:
            source = self.dominators.get(node)
            if source is None or not is_add(node):
                continue
            left, right = node.args[:2]
            if not (isinstance(left, Node) and isinstance(right, Node)):
                continue
            if left not in self.trunk or right not in self.trunk or left is right:
                continue
            if spec(left) != spec(right):
                continue
            near = self._length(left, source) <= self._length(right, source)
            shortcut, output = (left, right) if near else (right, left)
            if shortcut is source or (node in chain and source in chain):
                found.append(Branch(add=node, source=source, output=output, shortcut=shortcut))
        return found

    def _length(self, node: Node, source: Node) -> int:
        return int(nx.shortest_path_length(self.trunk, source, node))

    def invalidate(self) -> None:
        """Forget what was derived from the nodes, after they changed."""
        for name in _DERIVED:
            self.__dict__.pop(name, None)

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

    def insert(
        self, path: str, module: nn.Module, inputs: Sequence[Node], taps: Sequence[str], **meta: Any
    ) -> list[Node]:
        """Call a new module behind its inputs, and take its outputs apart.

        Args:
            path: Where it is registered: `exits.exit0`, `gates.gate3`. The last part is the `owner` of its outputs.
            module: Returns a tuple; moved to the model's device and dtype.
            inputs: Nodes that it reads.
            taps: What each of its outputs is to a trace, in order: "exit", "confidence", "decision", "probability";
                "" for one that is not shown.
            meta: Further metadata of the outputs.

        Returns:
            A node for each tap. The one that decides also has the metadata `decision`, its public name.
        """
        owner = path.rpartition(".")[2]
        self.add_module(path, module.to(self.inputs[0].device, self.dtype))
        last = max((*inputs, self.placeholders[-1]))
        with self.fx.inserting_after(last):
            call = self.fx.create_node("call_module", path, tuple(inputs))
        parts: list[Node] = []
        for i, tap in enumerate(taps):
            with self.fx.inserting_after(parts[-1] if parts else call):
                part = self.fx.call_function(operator.getitem, (call, i))
            part.meta.update(meta, owner=owner)
            if tap:
                part.meta["tap"] = (tap, owner)
            if tap == "decision":
                part.meta["decision"] = owner
            parts.append(part)
        return parts

    def add_constant(self, path: str, tensor: Tensor) -> None:
        """Register a tensor that the model made itself, as a buffer that is not saved."""
        owner, name = path.split(".")
        if owner not in self.root._modules:
            self.root.add_module(owner, nn.Module())
        self.root.get_submodule(owner).register_buffer(name, tensor, persistent=False)

    def run(self, inputs: list[Tensor] | tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Run the nodes as they stand, dense."""
        return fx.Interpreter(self.root, graph=self.fx).run(*inputs)  # type: ignore[no-any-return]


def _floating(node: Node) -> bool:
    """A node that carries features: floating, made from data; containers of them (an LSTM's tuple) count too.

    A value that is the same for all samples carries none: rotary embeddings read the features for their dtype alone.
    """
    if node.op in ("get_attr", "output"):
        return False
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("spec")) if isinstance(leaf, Spec)]
    return any(leaf.dtype.is_floating_point and leaf.batch_dim is not None for leaf in leaves)


def is_add(node: Node) -> bool:
    """An addition of two values, unscaled."""
    adds: tuple[Any, ...] = (torch.ops.aten.add.Tensor, operator.add, torch.add)
    return bool(node.target in adds and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1)


def attribute(root: nn.Module, path: str) -> Any:
    """The parameter or buffer at a dotted path."""
    return functools.reduce(getattr, path.split("."), root)


def program(graph: fx.Graph) -> Callable[..., Any]:
    """Compile the nodes to one Python function of (root, *inputs).

    The function reads modules and parameters off `root` at every call, so moving, casting or
    loading the root's state needs no recompilation.
    """
    import linecache

    code = graph.python_code("self")
    name = f"<dyncompile graph {id(code):x}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    namespace = dict(code.globals)
    exec(compile(code.src, name, "exec"), namespace)  # noqa: S102 - fx generated it
    return namespace["forward"]  # type: ignore[no-any-return]
