"""`torch.compile(model, backend="dyncompile")`: any model that calls `select` or `switch` skips, sample by sample.

Dynamo hands over a graph in which these are nodes. It goes the way of any model: capture, demand, plan, lowering. What
cannot (training, a batch size that the graph is tied to, samples that are mixed) is compiled densely by inductor.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyncompile.errors import DyncompileError
from dyncompile.ops import SELECT, SWITCH

Compiled = Callable[..., Any]

_DECIDING = {SELECT, SWITCH, torch.ops.dyncompile.select, torch.ops.dyncompile.switch}


def dyncompile_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """Compile what dynamo traced: a backend of `torch.compile`, registered as `dyncompile`.

    A graph with a `select` or `switch` whose decision is boolean or an integer route is lowered when it is first called
    without gradients; its weights are a snapshot, taken anew when they change. With gradients the dense reference runs,
    compiled by inductor, as does a graph without such a node.

    Args:
        gm: The graph; parameters are inputs or attributes.
        example_inputs: As dynamo gives them.
        mode: As for inductor: "reduce-overhead" records CUDA graphs.
        options: As for inductor, whose settings they are.
    """
    if not any(node.op == "call_function" and node.target in _DECIDING for node in gm.graph.nodes):
        dense: Compiled = _dense(gm, example_inputs, mode, options)
        return dense
    return _Skipping(gm, example_inputs, mode, options)


def _dense(gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None) -> Any:
    from torch._dynamo.backends.inductor import inductor
    from torch._inductor import config

    patches = dict(options or {})
    if mode is not None:
        patches.update(torch._inductor.list_mode_options(mode))
    with config.patch(patches):
        return inductor(gm, example_inputs)


class _Skipping:
    """Runs a graph lowered where no gradient is wanted, dense where one is; either is made when first needed."""

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
    ) -> None:
        self.gm, self.examples, self.mode, self.options = gm, example_inputs, mode, options
        self.dense: Compiled | None = None
        self.lowered: Any = None
        self.refused = False
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.weights = [i for i, n in enumerate(placeholders) if _is_weight(n)]
        sizes = {i for i, value in enumerate(example_inputs) if not isinstance(value, Tensor)}
        self.data = [i for i in range(len(placeholders)) if i not in sizes and i not in set(self.weights)]
        self.versions: list[int] | None = None

    def __call__(self, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if self.refused or wanted:
            return self._densely(args)
        weights = [args[i] for i in self.weights]
        versions = [-1 if w.is_inference() else w._version for w in weights]
        if versions != self.versions:
            self._lower(args)
            self.versions = versions
        if self.lowered is None:
            return self._densely(args)
        return self.lowered(*(args[i] for i in self.data))

    def _densely(self, args: tuple[Any, ...]) -> Any:
        if self.dense is None:
            self.dense = _dense(self.gm, self.examples, self.mode, self.options)
        return self.dense(*args)

    def _lower(self, args: tuple[Any, ...]) -> None:
        from dyncompile.capture import capture
        from dyncompile.conversion import describe
        from dyncompile.lowering import lower
        from dyncompile.module import DynamicModule

        inputs = tuple(args[i] for i in self.data)
        module = _closed(self.gm, self.weights, self.data, args)
        try:
            with torch.no_grad():
                first = next(i for i, value in enumerate(module(*inputs)) if value.is_floating_point())
            graph = capture(module, inputs, prediction=str(first))
            dyn = DynamicModule(graph, describe(graph, module, "torch.compile")).eval()
            self.lowered = lower(dyn, cudagraphs=self.mode == "reduce-overhead")
        except Exception as error:  # noqa: BLE001 - whatever torch raises on a graph that is tied to a size
            self.refused = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"backend 'dyncompile' compiles densely: {reason}", stacklevel=2)


def _is_weight(node: fx.Node) -> bool:
    """Whether an input is a parameter or buffer that dynamo lifted."""
    value = node.meta.get("example_value")
    return isinstance(value, nn.Parameter) or "_parameters_" in node.name or "_buffers_" in node.name


def _closed(gm: fx.GraphModule, weights: list[int], data: list[int], args: tuple[Any, ...]) -> fx.GraphModule:
    """A graph with its weights as attributes and its sizes read off its tensors: a module of the data alone."""
    root = nn.Module()
    for name, child in gm.named_children():
        root.add_module(name, child)
    for name, tensor in (*gm.named_parameters(recurse=False), *gm.named_buffers(recurse=False)):
        root.register_buffer(name, tensor.detach())
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for i in data:
        mapping[placeholders[i]] = graph.placeholder(f"input{i}")
    for i in weights:
        root.register_buffer(f"weight{i}", args[i].detach())
        mapping[placeholders[i]] = graph.get_attr(f"weight{i}")
    for node in placeholders:
        if node not in mapping:
            mapping[node] = _size(graph, mapping, node)
    for node in gm.graph.nodes:
        if node not in mapping:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    return fx.GraphModule(root, graph)


def _size(graph: fx.Graph, mapping: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """A size that dynamo passes beside the tensors, read off one of them."""
    wanted = node.meta["example_value"].node.expr
    for other, tensor in mapping.items():
        for dim, size in enumerate(getattr(other.meta.get("example_value"), "shape", ())):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                return graph.call_method("size", (tensor, dim))
    raise DyncompileError(f"no input has the size `{node.name}`")


__all__ = ["dyncompile_backend"]
