"""Run a part of a graph on fewer channels: parts of the same weights; nothing is copied but norms with statistics."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from dyncompile.channels import sizes_argument
from dyncompile.graph import Graph, attribute, is_tensor, spec
from dyncompile.kinds import BATCH_NORMS, CONVOLUTIONS, DROPOUTS, LINEARS, POINTWISE, POOLS, kind_of, tail_of
from dyncompile.narrowable import Region
from dyncompile.nn.channelwise import entries_of, masked
from dyncompile.nn.narrow import ArmBatchNorm, ArmDropout, ArmStatistics, private_norm

aten = torch.ops.aten

_CHANNELS_SECOND = (*CONVOLUTIONS, *BATCH_NORMS, nn.GroupNorm, nn.PReLU)
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


class _Copy:
    """Copies the nodes of a region, narrower. What a cut keeps of a dim is up to the two kinds of copy."""

    def __init__(self, graph: Graph, found: Region) -> None:
        self.graph = graph
        self.found = found
        self.values: dict[Node, Node] = {}
        self.changed: set[Node] = set()

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Append an operation."""
        raise NotImplementedError

    def _attribute(self, path: str) -> Node:
        """A parameter or buffer of the model."""
        raise NotImplementedError

    def _width(self, node: Node) -> tuple[int, Any] | None:
        """The dim along which a value is narrowed, and what is kept of it; None if it is not."""
        raise NotImplementedError

    def _sliced(self, value: Node, *cuts: tuple[int, Any] | None) -> Node:
        """What cuts leave of a tensor."""
        raise NotImplementedError

    def _count(self, kept: Any) -> Any:
        """How many entries a cut keeps."""
        raise NotImplementedError

    def _scaled(self, number: int, kept: Any, whole: int) -> Any:
        """`number` of the whole, scaled to what is kept."""
        raise NotImplementedError

    def _entering(self, source: Node, x: Node) -> Node:  # noqa: ARG002 - for the copy that masks
        """Narrowed channels, as the layer that mixes them reads them."""
        return x

    def _unparametrised(self, path: str, name: str, module: nn.Module, x: Node, *rest: Any, **options: Any) -> Node:
        """A layer without parameters; the name is one of its own."""
        raise NotImplementedError

    def _unchanged(self, node: Node, module: nn.Module, x: Node) -> Node:
        """A layer of full width."""
        raise NotImplementedError

    def _norm(self, node: Node, module: nn.modules.batchnorm._BatchNorm, x: Node) -> Node:
        """A batch norm."""
        raise NotImplementedError

    def _part(self, path: str, *cuts: tuple[int, Any] | None) -> Node | None:
        """A parameter or buffer, cut along some dims; None if the model has none of that name."""
        if attribute(self.graph.root, path) is None:
            return None
        return self._sliced(self._attribute(path), *cuts)

    def _read(self, node: Node) -> Node:
        """What the copy reads in place of a node."""
        if node.op == "get_attr":
            return self._sliced(self._attribute(str(node.target)), self._width(node))
        return self.values.get(node, node)

    def _cut(self, node: Node, dim: int) -> tuple[int, Any] | None:
        """How a value is narrowed, if it is along this dim."""
        cut = self._width(node)
        return cut if cut is not None and cut[0] == dim else None

    def _copy(self, node: Node) -> Node:
        module = self.graph.module_of(node)
        if any(source in self.changed for source in node.all_input_nodes):
            self.changed.add(node)
        return self._again(node) if module is None else self._layer(node, module)

    def _again(self, node: Node) -> Node:
        mapped = {source: self._read(source) for source in node.all_input_nodes}
        args: Any = torch.fx.map_arg(node.args, lambda n: mapped[n])
        kwargs: Any = torch.fx.map_arg(node.kwargs, lambda n: mapped[n])
        cut = self._width(node) if is_tensor(node) else None
        if cut is not None and (where := sizes_argument(node)) is not None:
            index, first = where
            sizes = list(args[index])
            if 0 <= cut[0] - first < len(sizes) and sizes[cut[0] - first] == spec(node).shape[cut[0]]:
                sizes[cut[0] - first] = self._count(cut[1])
            args = (*args[:index], sizes, *args[index + 1 :])
        return self._emit(node.target, *args, **kwargs)

    def _layer(self, node: Node, module: nn.Module) -> Node:
        source: Node = node.args[0]  # type: ignore[assignment]
        x = self._read(source)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return self._ended(node, module, self._norm(node, module, x))
        if kind_of(module) in (*DROPOUTS, *POINTWISE, *POOLS):
            return self._unparametrised(str(node.target), node.name, module, x, *node.args[1:], **node.kwargs)
        channels = 1 if isinstance(module, _CHANNELS_SECOND) else len(spec(node).shape) - 1
        made, read = self._cut(node, channels), self._cut(source, channels)
        if (made, read) == (None, None):
            return self._unchanged(node, module, x)
        along = getattr(module, "groups", 1) > 1 or isinstance(module, nn.GroupNorm | nn.PReLU)
        if read is not None and not along:
            self.changed.add(node)  # it mixes the channels, so all that follows sees other values
            x = self._entering(source, x)
        return self._ended(node, module, self._narrow(node, module, x, made and made[1], read and read[1]))

    def _ended(self, node: Node, module: nn.Module, x: Node) -> Node:
        """What a norm runs on what it normalised."""
        for name in tail_of(module):
            child = module.get_submodule(name)
            x = self._unparametrised(f"{node.target}.{name}", f"{node.name}_{name}", child, x)
        return x

    def _narrow(self, node: Node, module: Any, x: Node, made: Any, read: Any) -> Node:
        """A layer with parameters, from some of the input channels to some of the output channels."""
        rows = None if made is None else (0, made)
        if isinstance(module, nn.PReLU):
            own = rows if module.num_parameters > 1 else None
            return self._emit(aten.prelu.default, x, self._part(f"{node.target}.weight", own))
        columns = None if read is None or kind_of(module) not in (*CONVOLUTIONS, *LINEARS) else (1, read)
        groups = getattr(module, "groups", 1)
        if groups > 1:
            columns = None
            groups = groups if made is None else self._scaled(groups, made, module.out_channels)
        weight, bias = self._part(f"{node.target}.weight", rows, columns), self._part(f"{node.target}.bias", rows)
        if isinstance(module, nn.Linear):
            return self._emit(aten.linear.default, x, weight, bias)
        if isinstance(module, nn.LayerNorm):
            shape = list(module.normalized_shape) if made is None else [self._count(made)]
            return self._emit(aten.layer_norm.default, x, shape, weight, bias, module.eps)
        if isinstance(module, nn.GroupNorm):
            groups = module.num_groups if made is None else self._scaled(module.num_groups, made, module.num_channels)
            return self._emit(aten.group_norm.default, x, groups, weight, bias, module.eps)
        kind = getattr(aten, f"conv{len(module.kernel_size)}d")
        named = isinstance(module.padding, str)
        padding: Any = module.padding if named else list(module.padding)
        geometry = (list(module.stride), padding, list(module.dilation), groups)
        return self._emit(kind.padding if named else kind.default, x, weight, bias, *geometry)


class Arm(_Copy):
    """Inserts a copy of a region on the first channels of each group.

    Args:
        graph: Changed in place.
        found: The region.
        parts: Of each group, how many parts are kept.
        owner: Path of the gate, which owns the arm's modules.
        label: Tells the arm's modules from those of others.
        norm: Norms that see other values at another width have statistics and parameters of their own ("switchable"),
            statistics alone ("recalibrated"), or those of the static layer ("shared").
    """

    def __init__(self, graph: Graph, found: Region, parts: Sequence[int], *, owner: str, label: str, norm: str) -> None:
        super().__init__(graph, found)
        self.parts = parts
        self.owner = owner
        self.label = label
        self.norm = norm
        self.place: Node = found.nodes[0]

    def insert(self, ends: dict[Node, Node]) -> dict[Node, Node]:
        """Insert the copy, each node behind its original.

        Args:
            ends: For each original what was last inserted behind it; brought up to date.

        Returns:
            The copy of each exit.
        """
        for node in self.found.nodes:
            self.place = ends.get(node, node)
            self.values[node] = new = self._copy(node)
            new.meta = {key: node.meta[key] for key in ("path", "stack_trace") if key in node.meta}
            ends[node] = self.place
        return {node: self.values[node] for node in self.found.exits}

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        op = "call_module" if isinstance(target, str) else "call_function"
        with self.graph.fx.inserting_after(self.place):
            self.place = self.graph.fx.create_node(op, target, args, kwargs)
        return self.place

    def _attribute(self, path: str) -> Node:
        with self.graph.fx.inserting_after(self.place):
            self.place = self.graph.fx.create_node("get_attr", path)
        return self.place

    def _width(self, node: Node) -> tuple[int, int] | None:
        return self.found.width(node, self.parts)

    def _sliced(self, value: Node, *cuts: tuple[int, int] | None) -> Node:
        for cut in cuts:
            if cut is not None:
                value = self._emit(aten.slice.Tensor, value, cut[0], 0, cut[1])
        return value

    def _count(self, kept: int) -> int:
        return kept

    def _scaled(self, number: int, kept: int, whole: int) -> int:
        return number * kept // whole

    def _unchanged(self, node: Node, module: nn.Module, x: Node) -> Node:  # noqa: ARG002 - as it is
        return self._emit(node.target, x, *node.args[1:], **node.kwargs)

    def _unparametrised(self, path: str, name: str, module: nn.Module, x: Node, *rest: Any, **options: Any) -> Node:
        if kind_of(module) not in DROPOUTS:
            return self._emit(path, x, *rest, **options)
        path = f"{self.owner}.{self.label}_{name}"
        self.graph.add_module(path, ArmDropout(module))
        return self._emit(path, self._part(f"{self.owner}.enabled"), x, *rest)

    def _norm(self, node: Node, module: nn.modules.batchnorm._BatchNorm, x: Node) -> Node:
        cut = self._cut(node, 1)
        path = f"{self.owner}.{self.label}_{node.name}"
        channels = module.num_features if cut is None else cut[1]
        if node in self.changed and self.norm == "switchable":
            self.graph.add_module(path, private_norm(module, channels))
            return self._emit(path, x)
        if node in self.changed and self.norm == "recalibrated":
            self.graph.add_module(path, ArmStatistics(module, channels))
            return self._emit(path, x, *(self._part(f"{node.target}.{name}") for name in ("weight", "bias")))
        self.graph.add_module(path, ArmBatchNorm(module.eps))
        return self._emit(path, x, *(self._part(f"{node.target}.{name}") for name in _STATISTICS))


class Body(_Copy):
    """A copy of a region as a function of the channels that it computes, which are known when it runs only.

    `module(index, open, *values)`: of the parts of the one group, `index` `[K]` says which ones run, and `open`
    `[N, K]` which of these each sample reads. In evaluation; without parameters, which are among the values.

    Args:
        graph: Left as it is.
        found: A region of one group.

    Attributes:
        module: Returns a tuple of the region's exits.
        values_read: What it takes after `index` and `open`: nodes, and paths of parameters and buffers.
    """

    def __init__(self, graph: Graph, found: Region) -> None:
        super().__init__(graph, found)
        self.out = torch.fx.Graph()
        self.index = self.out.placeholder("index")
        self.open = self._last = self.out.placeholder("open")
        self._inputs: dict[Node | str, Node] = {}
        self._indices: dict[int, Node] = {}
        self._owned = nn.Module()
        for node in found.nodes:
            self.values[node] = self._copy(node)
        self.out.output(tuple(self.values[node] for node in found.exits))
        self.values_read: list[Node | str] = list(self._inputs)
        self.module = torch.fx.GraphModule(self._owned, self.out, class_name="Channels")

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.out.create_node("call_module" if isinstance(target, str) else "call_function", target, args, kwargs)

    def _given(self, key: Node | str) -> Node:
        if key not in self._inputs:
            with self.out.inserting_after(self._last):
                self._last = self.out.placeholder(f"value{len(self._inputs)}")
            self._inputs[key] = self._last
        return self._inputs[key]

    def _attribute(self, path: str) -> Node:
        return self._given(path)

    def _read(self, node: Node) -> Node:
        found = super()._read(node)
        return self._given(node) if found is node else found

    def _width(self, node: Node) -> tuple[int, Node] | None:
        (group,) = self.found.groups
        if node not in group.dims:
            return None
        entries = group.kept(node, 1)
        if entries not in self._indices:
            self._indices[entries] = self.index
            if entries > 1:
                self._indices[entries] = self._emit(entries_of, self.index, entries)
        return group.dims[node], self._indices[entries]

    def _sliced(self, value: Node, *cuts: tuple[int, Node] | None) -> Node:
        for cut in cuts:
            if cut is not None:
                value = self._emit(aten.index_select.default, value, *cut)
        return value

    def _count(self, kept: Node) -> Node:
        return self._emit(aten.sym_size.int, kept, 0)

    def _scaled(self, number: int, kept: Node, whole: int) -> Node:
        count = self._count(kept)
        return count if number == whole else self._emit(_share, number, count, whole)

    def _entering(self, source: Node, x: Node) -> Node:
        (group,) = self.found.groups
        return self._emit(masked, x, self.open, group.kept(source, 1), group.dims[source], spec(source).batch_dim)

    def _unparametrised(self, path: str, name: str, module: nn.Module, x: Node, *rest: Any, **options: Any) -> Node:  # noqa: ARG002 - an own copy
        if kind_of(module) in DROPOUTS:
            return x
        self._owned.add_module(name, copy.deepcopy(module).eval())
        return self._emit(name, x, *rest, **options)

    def _unchanged(self, node: Node, module: nn.Module, x: Node) -> Node:
        return self._ended(node, module, self._narrow(node, module, x, None, None))

    def _norm(self, node: Node, module: nn.modules.batchnorm._BatchNorm, x: Node) -> Node:
        cut = self._cut(node, 1)
        along = None if cut is None else (0, cut[1])
        self._owned.add_module(node.name, ArmBatchNorm(module.eps).eval())
        return self._emit(node.name, x, *(self._part(f"{node.target}.{name}", along) for name in _STATISTICS))


def _share(number: int, count: int, whole: int) -> int:
    return number * count // whole
