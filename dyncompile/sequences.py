"""Recurrent stacks of a graph, and what is computed for each of their frames."""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from dyncompile.capture.check import resize, same, undisturbed
from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.graph import Graph, Size, Spec, is_tensor, spec

_RESHAPES = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.clone.default,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One recurrent layer of a graph.

    Attributes:
        node: Calls it.
        form: What it computes.
        x: The sequence that it reads.
        state: The states before the first step, as they are passed; None for zeros.
        weights: Paths of its weights, in torch's order.
        real: Of packed sequences which steps are there, `[N * T]`; None if all are.
    """

    node: fx.Node
    form: RecurrentLayer
    x: fx.Node
    state: Any
    weights: tuple[str, ...]
    real: fx.Node | None = None

    @property
    def steps(self) -> int:
        """Length of the sequence."""
        return spec(self.x).shape[1 if self.form.batch_first else 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """What is computed for each frame by itself before a recurrent layer.

    Attributes:
        frames: `[N * T, ...]`, what it reads.
        features: `[N * T, D]`, what it gives.
        reader: The node that makes a sequence of the features.
    """

    frames: fx.Node
    features: fx.Node
    reader: fx.Node


@dataclasses.dataclass(frozen=True)
class Results:
    """What a layer returns, taken apart.

    Attributes:
        parts: For the sequence and each final state, the nodes that hold it.
        pairs: Nodes that hold the final states as one pair, and are read whole.
        last: The last of all these in the graph.
    """

    parts: list[list[fx.Node]]
    pairs: list[fx.Node]
    last: fx.Node

    def replace(self, by: list[fx.Node | None], but: fx.Node) -> None:
        """Let every reader, save one, read other values: one for each part that there is."""
        for nodes, new in zip(self.parts, by, strict=True):
            for node in nodes:
                assert new is not None
                node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not but)
                new.meta.setdefault("path", node.meta.get("path", ()))
                if node.meta.pop("final", False):
                    new.meta["final"] = True
        states = tuple(by[1:])

        def split(node: fx.Node) -> Any:
            return states if node in self.pairs else node

        for pair in self.pairs:
            for user in [user for user in pair.users if user.target is not operator.getitem]:
                user.args = fx.map_arg(user.args, split)
                user.kwargs = fx.map_arg(user.kwargs, split)


def layer_at(graph: Graph, node: fx.Node) -> Layer | None:
    """The recurrent layer that a node calls; None if it calls none, or one that is not torch's own."""
    module = graph.module_of(node)
    args = list(node.args)
    if isinstance(module, RecurrentLayer):
        paths = tuple(str(weight.target) for weight in args[2:])  # type: ignore[union-attr]
        real: Any = node.kwargs.get("real")
        return Layer(node=node, form=module, x=args[0], state=args[1], weights=paths, real=real)  # type: ignore[arg-type]
    if type(module) not in (nn.LSTM, nn.GRU, nn.RNN):
        return None
    assert isinstance(module, nn.RNNBase)
    x = args[0] if args else node.kwargs["input"]
    state = args[1] if len(args) > 1 else node.kwargs.get("hx")
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    paths = tuple(f"{node.target}.{name}" for name in names)
    return Layer(node=node, form=RecurrentLayer(module), x=x, state=state, weights=paths)  # type: ignore[arg-type]


def stacks(graph: Graph) -> Iterator[list[fx.Node]]:
    """Recurrent layers, those of one stack together, in order of execution."""
    seen: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node in seen or not isinstance(graph.module_of(node), nn.RNNBase | RecurrentLayer):
            continue
        stack = [node]
        while (above := _above(graph, stack[-1])) is not None:
            stack.append(above)
        seen.update(stack)
        yield stack


def _above(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The next layer of the same stack: it reads the sequence, through dropout or not."""
    if not isinstance(graph.module_of(node), RecurrentLayer):
        return None
    stack, _, layer = node.meta["path"][-1].rpartition(".")
    wanted = f"{stack}.{int(layer) + 1}"
    readers = [user for part in node.users if part.args[1] == 0 for user in part.users]
    readers += [user for reader in readers if isinstance(graph.module_of(reader), nn.Dropout) for user in reader.users]
    for reader in readers:
        if isinstance(graph.module_of(reader), RecurrentLayer) and reader.meta["path"][-1] == wanted:
            return reader
    return None


def gather(graph: Graph, layer: Layer) -> Results:
    """Bring what takes a layer's results apart next to it."""
    nested = layer.form.mode == "LSTM" and not isinstance(graph.module_of(layer.node), RecurrentLayer)
    parts: list[list[fx.Node]] = [[] for _ in range(3 if layer.form.mode == "LSTM" else 2)]
    pairs: list[fx.Node] = []
    last = layer.node
    for user in list(layer.node.users):
        last.append(user)
        last = user
        index = int(user.args[1])  # type: ignore[arg-type]
        if not nested or index == 0:
            parts[index].append(user)
            continue
        items = [item for item in user.users if item.target is operator.getitem]
        if len(items) < len(user.users):
            pairs.append(user)
        for item in items:
            last.append(item)
            last = item
            parts[1 + int(item.args[1])].append(item)  # type: ignore[arg-type]
    for i in (1, 2) if pairs else ():
        if not parts[i]:
            with graph.fx.inserting_after(last):
                last = graph.fx.call_function(operator.getitem, (pairs[0], i - 1))
            parts[i].append(last)
    return Results(parts, pairs, last)


def backbone(graph: Graph, layer: Layer) -> Backbone | str | None:
    """What is computed for each frame by itself before a layer.

    Args:
        graph: Propagated, its rows marked.
        layer: Of which stack the first.

    Returns:
        The backbone; why what is computed there cannot be skipped; or None where nothing is.
    """
    path = [layer.x]
    while not _per_frame(path[-1], layer.steps):
        if path[-1].target not in _RESHAPES or not is_tensor(path[-1].args[0]):
            if not flops_between(graph, None, path[-1]):
                return None
            return f"`{path[-1].name}` has no row for each frame, those of a sample next to each other"
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    features = frames = path[-1]
    while (before := graph.dominators.get(frames)) is not None and _per_frame(before, layer.steps):
        frames = before
    if not flops_between(graph, frames, features):
        return None
    readers = [layer.node, *path[:-1]]
    for node, reader in zip(path, readers, strict=True):
        for other in _readers(node):
            if other is not reader:
                return f"`{node.name}` is also read by `{other.name}`"
    if len(spec(features).shape) != 2:
        return f"`{features.name}` is no vector for each frame"
    if not _independent(graph, frames, features):
        return f"`{features.name}` of one frame depends on other frames"
    return Backbone(frames=frames, features=features, reader=readers[-1])


def defer(reader: fx.Node, layer: fx.Node, decision: fx.Node) -> None:
    """Move what lies between a backbone and the layer that alone reads it behind a decision that comes later."""
    while reader is not layer and reader < decision:
        [following] = _readers(reader)
        layer.prepend(reader)
        reader = following


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    return (user for user in node.users if not isinstance(user.meta.get("spec"), Size))


def _per_frame(node: fx.Node, steps: int) -> bool:
    """Whether a value has a row for each frame, those of a sample next to each other."""
    found = node.meta.get("spec")
    return isinstance(found, Spec) and found.batch_dim == 0 and found.rows == steps > 1 and node.meta["sliceable"]


def flops_between(graph: Graph, frames: fx.Node | None, features: fx.Node) -> float:
    """FLOPs per sample between two nodes of the trunk, or from the inputs on."""
    inside: set[fx.Node] = set()
    queue = [features]
    while queue:
        node = queue.pop()
        if node not in inside and node is not frames:
            inside.add(node)
            queue.extend(node.all_input_nodes)
    return sum(graph.flops(node) for node in inside)


class _Disturbed(fx.Interpreter):
    """Runs a graph with the first frame of each sample changed."""

    def __init__(self, graph: Graph, frames: fx.Node, kept: fx.Node, *, disturb: bool) -> None:
        super().__init__(graph.root, graph=graph.fx)
        self.frames, self.kept, self.disturb = frames, kept, disturb
        self.value: torch.Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self.frames and self.disturb:
            value = value.unflatten(0, (-1, spec(n).rows)).clone()
            value[:, 0] = value[:, 0].flip(-1) * 2 + 1
            value = value.flatten(0, 1)
        if n is self.kept:
            self.value = value
        return value


def _independent(graph: Graph, frames: fx.Node, features: fx.Node) -> bool:
    """Whether the features of each frame are made from that frame alone."""
    inputs = resize(graph.inputs, graph.batch_dims, 2)
    values = []
    for disturb in (False, True):
        with undisturbed(graph.root), torch.no_grad():
            graph.root.eval()
            run = _Disturbed(graph, frames, features, disturb=disturb)
            run.run(*inputs)
        assert run.value is not None
        values.append(run.value.unflatten(0, (-1, spec(features).rows))[:, 1:])
    return same(values[0], values[1], slack=0.01)
