"""Feed-forward layers of a graph: projections, what acts on each neuron alone, and a projection that reads them.

A projection is a linear layer, a convolution that looks at one position (ConvNeXt), or whatever turns out to be
`x @ weight + bias` (GPT-2 in transformers). One module may make several of them, as a gated layer packs them:
`a, b = both(x).chunk(2, -1)`.
"""

import copy
import dataclasses
import itertools
import math
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from dyncompile.capture import modes
from dyncompile.demand import stands_in
from dyncompile.errors import ArgumentError
from dyncompile.graph import Graph, is_tensor, spec
from dyncompile.kinds import CONVOLUTIONS, LINEARS, POINTWISE, kind_of

_TRIED: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A layer whose outputs each are a weighted sum of the inputs, or some of its outputs.

    Attributes:
        node: Calls the layer.
        module: The layer.
        channel_dim: Where x and the outputs have their channels; 1, or -1.
        transposed: The parameter lies as `[D, H]`; else as `[H, D, ...]`.
        cut: Which of the outputs.
        views: The nodes that cut them out, in order.
    """

    node: Node
    module: nn.Module
    channel_dim: int
    transposed: bool = False
    cut: slice = dataclasses.field(default_factory=lambda: slice(None))
    views: tuple[Node, ...] = ()

    @property
    def weight(self) -> torch.Tensor:
        """`[H, D, ...]`."""
        weight = self.module.get_parameter("weight")
        return (weight.t() if self.transposed else weight)[self.cut]

    @property
    def biased(self) -> bool:
        """Whether it has a bias, `[H]`."""
        return self.module.bias is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward:
    """`second(act(first(x)))`, or gated: `second(act(first(x)) * other(x))`.

    Attributes:
        source: x, `[..., D]`, or `[N, D, ...]` of convolutions.
        firsts: What projections make of x for the hidden neurons; several in a gated layer.
        between: What acts on each neuron alone, in order.
        hidden: The neurons, `[..., H]` or `[N, H, ...]`.
        second: The projection that reads them.
        channel_dim: Where x, the neurons and what comes out have their channels, counted from the front.
        projections: Of `firsts` and `second`, in order.
    """

    source: Node
    firsts: tuple[Node, ...]
    between: tuple[Node, ...]
    hidden: Node
    second: Node
    channel_dim: int
    projections: dict[Node, Projection]

    @property
    def neurons(self) -> int:
        """H."""
        return spec(self.hidden).shape[self.channel_dim]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of them, in order."""
        made = itertools.chain.from_iterable((p.node, *p.views) for p in self.projections.values())
        return (*dict.fromkeys(node for node in made if node is not self.second), *self.between, self.second)


def feed_forward_layers(graph: Graph) -> Iterator[FeedForward | tuple[Node, str]]:
    """Every feed-forward layer, in order; and the projections that nearly are the second one of one, and why not."""
    for node in graph.fx.nodes:
        if projection(graph, node) is None:
            continue
        try:
            found = feed_forward(graph, node)
        except ArgumentError as error:
            yield node, str(error)
        else:
            if found is not None:
                yield found


def feed_forward(graph: Graph, second: Node) -> FeedForward | None:
    """The feed-forward layer whose second layer a node is.

    Returns:
        None where it reads no activations at all.

    Raises:
        ArgumentError: It reads activations, and something stands against splitting their neurons.
    """
    between, firsts = _behind(graph, second)
    if not between or not firsts:
        return None
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    firsts.sort(key=order.__getitem__)
    projections = {node: made for node in (*firsts, second) if (made := _projected(graph, node)) is not None}
    dims = {made.channel_dim for made in projections.values()}
    if len(dims) > 1:
        raise _no(second, "a convolution together with a linear layer")
    found = FeedForward(
        source=projections[firsts[0]].node.all_input_nodes[0],
        firsts=tuple(firsts),
        between=tuple(sorted(between, key=order.__getitem__)),
        hidden=second.all_input_nodes[0],
        second=second,
        channel_dim=dims.pop() % len(spec(second).shape),
        projections=projections,
    )
    for node, made in projections.items():
        if not _plain(made):
            raise _no(made.node, "a weight that is computed, or hooks")
        if made.node.args[0] is not found.source and node is not second:
            raise _no(made.node, f"another input than `{projections[firsts[0]].node}` has")
    for node in (*firsts, *between):
        if spec(node).shape != spec(found.hidden).shape:
            raise _no(node, f"shape {list(spec(node).shape)} beside hidden neurons {list(spec(found.hidden).shape)}")
    for node in found.nodes[:-1]:
        stranger = next((user for user in node.users if user not in found.nodes), None)
        if stranger is not None:
            raise _no(node, f"neurons that `{stranger}` reads too")
    return found


def idle_in_evaluation(graph: Graph, node: Node) -> bool:
    """Whether a layer does nothing in evaluation: dropout, or the identity."""
    idle = nn.Identity | nn.modules.dropout._DropoutNd | modes.Dropout
    return isinstance(graph.module_of(node), idle)


def _behind(graph: Graph, second: Node) -> tuple[list[Node], list[Node]]:
    """What acts on each neuron alone between the second layer and the projections before it, and those.

    Raises:
        ArgumentError: Behind an activation, or just before it, stands what does not act on each neuron alone.
    """
    between: list[Node] = []
    firsts: list[Node] = []
    active = False
    queue, seen = list(second.all_input_nodes), set(second.all_input_nodes)
    while queue:
        node = queue.pop(0)
        if _projected(graph, node) is not None:
            firsts.append(node)
            continue
        if gate := _gated_by(node):
            raise _no(node, f"what `{gate}` decides about already")
        idle = idle_in_evaluation(graph, node)
        if not idle and not _acts_alone(graph, node):
            if active or any(_activates(graph, source) for source in node.all_input_nodes):
                raise _no(node, "what does not act on each neuron alone")
            return [], []
        active = active or not idle
        between.append(node)
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return (between, firsts) if active else ([], [])


def _activates(graph: Graph, node: Node) -> bool:
    """Whether a node acts on each neuron of a projection alone."""
    sources = node.all_input_nodes
    while len(sources) == 1 and idle_in_evaluation(graph, node):
        (node,) = sources
        sources = node.all_input_nodes
    return len(sources) == 1 and _acts_alone(graph, node) and _projected(graph, sources[0]) is not None


def _gated_by(node: Node) -> str:
    """Name of the decision, of an earlier pass, that leaves a part of a value out."""
    if node.meta.get("training_only"):  # a mask of neurons or channels
        return next((str(n.meta["decision"]) for n in node.all_input_nodes if "decision" in n.meta), node.name)
    return next((name for source in node.all_input_nodes if (name := stands_in(source))), "")


def _no(node: Node, found: str) -> ArgumentError:
    return ArgumentError(f"{node}", found=found, expected="neurons that can be left out one by one")


def projection(graph: Graph, node: Node) -> Projection | None:
    """How a node's module projects; None if it is no projection."""
    module = graph.module_of(node)
    if isinstance(module, nn.Linear):
        return Projection(node=node, module=module, channel_dim=-1)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        batched = is_tensor(node) and len(spec(node).shape) == len(module.kernel_size) + 2
        at_one = batched and _looks_at_one_position(module)
        return Projection(node=node, module=module, channel_dim=1) if at_one else None
    if module is not None and len(node.all_input_nodes) == 1 and _multiplies(module):
        return Projection(node=node, module=module, channel_dim=-1, transposed=True)
    return None


def _projected(graph: Graph, node: Node) -> Projection | None:
    """The projection that a node is, or that it is a cut of: every output, or some of them at even distances."""
    views: list[Node] = []
    at = node
    while (made := projection(graph, at)) is None:
        if not _is_view(at) or len(at.all_input_nodes) != 1:
            return None
        views.insert(0, at)
        at = at.all_input_nodes[0]
    if not views:
        return made
    found = spec(at)
    shape, dim = found.at(3), made.channel_dim % len(found.shape)

    def viewed(value: Any) -> Any:
        values = {at: value}
        for view in views:
            args, kwargs = fx.node.map_arg((view.args, view.kwargs), values.__getitem__)
            values[view] = view.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]

    outputs = viewed(torch.arange(shape[dim]).view([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape))
    if not isinstance(outputs, torch.Tensor) or outputs.dim() != len(shape) or not outputs.numel():
        return None
    first, *others = outputs.movedim(dim, -1).flatten(0, -2)[0].tolist()
    cut = slice(first, others[-1] + 1 if others else first + 1, max(others[0] - first, 1) if others else 1)
    entries = torch.arange(math.prod(shape)).view(shape)
    if not torch.equal(viewed(entries), entries.movedim(dim, -1)[..., cut].movedim(-1, dim)):
        return None
    return dataclasses.replace(made, cut=cut, views=tuple(views))


def _is_view(node: Node) -> bool:
    """Whether a node only looks at a part of its input, or in another shape."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    alias = node.target._schema.returns[0].alias_info if node.target._schema.returns else None
    return alias is not None and not alias.is_write


def _looks_at_one_position(module: nn.modules.conv._ConvNd) -> bool:
    return (
        {*module.kernel_size, *module.stride, module.groups} == {1}
        and module.padding in ("valid", "same", (0,) * len(module.padding))
        and module.padding_mode == "zeros"
    )


def _multiplies(module: nn.Module) -> bool:
    """Whether a layer of two parameters gives `x @ weight + bias`; asked of the same ones again and again."""
    if module not in _TRIED:
        _TRIED[module] = _turns_out_to_multiply(module)
    return _TRIED[module]


def _turns_out_to_multiply(module: nn.Module) -> bool:
    if {name for name, _ in module.named_parameters()} != {"weight", "bias"} or any(True for _ in module.buffers()):
        return False
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    if weight.dim() != 2 or bias.shape != weight.shape[1:]:
        return False
    tried = copy.deepcopy(module)
    weight, bias = tried.get_parameter("weight"), tried.get_parameter("bias")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (weight, bias):  # its own may be nought, or symmetric
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(2, 3, len(weight), generator=generator).to(weight)
        try:
            y = tried(x)
        except Exception:  # noqa: BLE001 - whatever a layer raises that wants something else
            return False
        expected = x @ weight + bias
        rounding = 1e-2 * float(expected.abs().max())
        return isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=rounding)


def _plain(made: Projection) -> bool:
    """A projection that computes what its parameters say, and nothing else."""
    module = made.module
    own = made.transposed or kind_of(module) in (*CONVOLUTIONS, *LINEARS)
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return module._parameters.get("weight") is not None and own and not hooked


def _acts_alone(graph: Graph, node: Node) -> bool:
    """Whether an operation maps each entry of its inputs to one of its output, whatever the others are."""
    if not is_tensor(node) or not all(is_tensor(source) for source in node.all_input_nodes):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.pointwise in node.target.tags
    module = graph.module_of(node)
    return len(node.args) == 1 and kind_of(module) in POINTWISE
