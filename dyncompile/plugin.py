"""`torch.compile(model, backend="dyncompile")`: any model that calls `select` or `switch` skips, sample by sample.

Dynamo hands over a graph in which these are nodes. It goes the way of any model: capture, demand, plan, lowering. What
cannot (training, a batch size that the graph is tied to, samples that are mixed) is compiled densely by inductor.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from dyncompile.errors import DyncompileError
from dyncompile.opening import with_batch_open
from dyncompile.ops import SELECT, SWITCH

if TYPE_CHECKING:
    from dyncompile.graph import Graph

Compiled = Callable[..., Any]

Key = tuple[int | float, ...]
"""Numbers and sizes that a lowered graph is tied to."""

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
    without gradients. It holds a snapshot of the weights, one for each module that shares the code, taken anew when
    autograd's version counter says that they changed: a write through `.data`, or to weights that were made in
    inference mode, goes unseen until `torch._dynamo.reset()`. Only the batch size is dynamic in it: where dynamo leaves
    other sizes or Python numbers open, it is lowered once for each that comes, up to
    `torch._dynamo.config.recompile_limit`. With gradients the dense reference runs, compiled by inductor, as does a
    graph without such a node, one that draws random numbers, and one that writes to its inputs or buffers.

    Args:
        gm: The graph; parameters are inputs or attributes.
        example_inputs: As dynamo gives them.
        mode: As for inductor: "reduce-overhead" records CUDA graphs.
        options: As for inductor, whose settings they are.

    Raises:
        RuntimeError: inductor has no such mode or option.
    """
    settings: dict[str, Any] = torch._TorchCompileInductorWrapper(mode, options, None).config
    if not any(node.op == "call_function" and node.target in _DECIDING for node in gm.graph.nodes):
        dense: Compiled = _dense(gm, example_inputs, settings)
        return dense
    return _Skipping(gm, example_inputs, settings)


def _dense(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: dict[str, Any]) -> Any:
    from torch._dynamo.backends.inductor import inductor
    from torch._inductor import config

    with config.patch(settings):
        return inductor(gm, example_inputs)


class _Snapshot:
    """Weights as they were when a graph was lowered, and what was lowered.

    Dynamo gives all modules of a class one graph, of which weights are inputs.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = [weakref.ref(w) for w in weights]
        self.states = _states(weights)
        self.lowered: dict[Key, Any] = {}

    def of(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the weights, and have not changed."""
        same = all(ref() is w for ref, w in zip(self.weights, weights, strict=True))
        return same and self.states == _states(weights)

    @property
    def dead(self) -> bool:
        """Whether a weight is gone."""
        return any(ref() is None for ref in self.weights)


def _states(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights]


class _Skipping:
    """Runs a graph lowered where no gradient is wanted, dense where one is; either is made when first needed."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], settings: dict[str, Any]) -> None:
        self.gm, self.settings = gm, settings
        self.dense: Compiled | None = None
        self.snapshots: dict[tuple[int, ...], _Snapshot] = {}
        self.batch_dims: list[int | None] | None = None
        self.refused = False
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.weights = [i for i, n in enumerate(placeholders) if _is_weight(n)]
        sizes = {i for i, value in enumerate(example_inputs) if not isinstance(value, Tensor)}
        self.numbers = [i for i, n in enumerate(placeholders) if i not in sizes and _is_number(n)]
        other = {*sizes, *self.weights, *self.numbers}
        self.data = [i for i in range(len(placeholders)) if i not in other]

    def __call__(self, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if self.refused or wanted:
            return self._densely(args)
        snapshot = self._snapshot([args[i] for i in self.weights])
        lowered = snapshot.lowered.get(self._key(args)) or self._lower(args, snapshot)
        return self._densely(args) if lowered is None else lowered(*(args[i] for i in self.data))

    def _snapshot(self, weights: list[Tensor]) -> _Snapshot:
        key = tuple(map(id, weights))
        found = self.snapshots.get(key)
        if found is None or not found.of(weights):
            self.snapshots = {k: s for k, s in self.snapshots.items() if not s.dead}
            found = self.snapshots[key] = _Snapshot(weights)
        return found

    def _key(self, args: tuple[Any, ...]) -> Key:
        """What a lowered graph is tied to: numbers, and sizes that are no batch size."""
        dims = self.batch_dims or [None] * len(self.data)
        sizes = (
            size
            for i, batch_dim in zip(self.data, dims, strict=True)
            for dim, size in enumerate(args[i].shape)
            if dim != batch_dim
        )
        return (*(args[i].item() for i in self.numbers), *sizes)

    def _densely(self, args: tuple[Any, ...]) -> Any:
        if self.dense is None:
            # Traced anew: dynamo has forgotten what its symbols stand for.
            reference = _taking_numbers(self.gm, self.numbers)
            self.dense = torch.compile(reference, options=self.settings)
        return self.dense(*(value.item() if i in self.numbers else value for i, value in enumerate(args)))

    def _lower(self, args: tuple[Any, ...], snapshot: _Snapshot) -> Any:
        """Lower the graph for what a call is tied to; None, and a word, where it has to be dense."""
        from dyncompile.conversion import describe
        from dyncompile.lowering import lower
        from dyncompile.module import DynamicModule

        if any(args[i].numel() == 0 for i in self.data):
            return None
        if len(snapshot.lowered) >= torch._dynamo.config.recompile_limit:
            _say(f"it is lowered for {len(snapshot.lowered)} combinations of sizes and numbers already")
            return None
        try:
            if why := _unfit(self.gm, args):
                raise DyncompileError(why)
            module = _closed(self.gm, self.weights, self.data, self.numbers, args)
            graph = _captured(module, tuple(args[i] for i in self.data))
            dyn = DynamicModule(graph, describe(graph, module, "torch.compile")).eval()
            lowered = lower(dyn, cudagraphs=self.settings.get("triton.cudagraphs", False), settings=self.settings)
        except Exception as error:  # noqa: BLE001 - whatever torch raises on a graph that is tied to a size
            self.refused = True
            _say((str(error).strip() or type(error).__name__).splitlines()[0])
            return None
        self.batch_dims = list(graph.batch_dims)
        snapshot.lowered[self._key(args)] = lowered
        return lowered


def _captured(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> "Graph":
    from dyncompile.capture import capture

    with torch.no_grad():
        outputs = list(enumerate(module(*inputs)))
    tensors = [(i, value) for i, value in outputs if isinstance(value, Tensor)]
    first = next((i for i, value in tensors if value.is_floating_point()), tensors[0][0])

    def attempt(module: fx.GraphModule) -> "Graph":
        # A GraphModule that is called prints where it fails, and a graph may be tied to its batch size.
        type(module).__call__ = nn.Module.__call__  # type: ignore[method-assign]
        return capture(module, inputs, prediction=str(first), inplace=True)

    try:
        return attempt(module)
    except DyncompileError as error:
        try:
            return attempt(with_batch_open(module, inputs[0].shape[0]))
        except DyncompileError:
            raise error from error.__cause__


def _unfit(gm: fx.GraphModule, args: tuple[Any, ...]) -> str:
    """Why a graph computes more than its outputs, found by running it on copies; empty if it does not."""
    with torch.inference_mode(mode=False), torch.no_grad():
        state = {n: t.detach().clone() for n, t in (*gm.named_parameters(), *gm.named_buffers())}
        copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
        cuda = sorted({t.device.index for t in copies if isinstance(t, Tensor) and t.device.type == "cuda"})
        with torch.random.fork_rng(devices=cuda):
            before = _random_state(cuda)
            torch.func.functional_call(gm, state, tuple(copies))
            if not all(map(torch.equal, before, _random_state(cuda))):
                return "it draws random numbers"
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        for name, value, now in zip(names, args, copies, strict=True):
            # Batch norm writes its statistics without a new version.
            if isinstance(value, Tensor) and (now._version or not bool(((now == value) | now.isnan()).all())):
                return f"it writes to `{name}`"
    return ""


def _random_state(cuda: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in cuda)]


def _say(reason: str) -> None:
    warnings.warn(f"backend 'dyncompile' compiles densely: {reason}", stacklevel=4)


def _is_number(node: fx.Node) -> bool:
    """Whether an input is a Python number in a tensor, as dynamo passes those that it leaves open."""
    return bool(node.users) and all(n.op == "call_method" and n.target == "item" for n in node.users)


def _is_weight(node: fx.Node) -> bool:
    """Whether an input is a parameter or buffer that dynamo lifted."""
    value = node.meta.get("example_value")
    return isinstance(value, nn.Parameter) or "_parameters_" in node.name or "_buffers_" in node.name


def _taking_numbers(gm: fx.GraphModule, numbers: list[int]) -> fx.GraphModule:
    """A graph that takes Python numbers where it took tensors of one."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    read = {node: placeholders[i] for i in numbers for node in placeholders[i].users}
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in read:
            mapping[node] = mapping[read[node]]
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    return fx.GraphModule(gm, graph)


def _closed(
    gm: fx.GraphModule, weights: list[int], data: list[int], numbers: list[int], args: tuple[Any, ...]
) -> fx.GraphModule:
    """A graph of the data alone: weights as attributes, numbers as they are, sizes read off the tensors."""
    root = nn.Module()
    for name, child in gm.named_children():
        root.add_module(name, copy.deepcopy(child))
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
    known = {node: args[i].item() for i in numbers for node in placeholders[i].users}
    skipped = {placeholders[i] for i in numbers}
    for node in placeholders:
        if node not in mapping and node not in skipped:
            mapping[node] = _size(graph, mapping, node)
    for node in gm.graph.nodes:
        if node not in mapping and node not in known and node not in skipped:
            mapping[node] = graph.node_copy(node, lambda n: known[n] if n in known else mapping[n])
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
