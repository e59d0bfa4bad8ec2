"""A capture proves itself before it is handed over."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyncompile.capture.signature import named_leaves
from dyncompile.errors import CaptureError
from dyncompile.graph import Graph, Spec, mixed

# Largest error allowed, relative to the largest output: the same operations in another order of accumulation.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Modes, buffers and random state are afterwards what they were."""
    modes = {m: m.training for m in module.modules()}
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        with torch.random.fork_rng(devices=_cuda_devices(module)):
            yield
    finally:
        for m, training in modes.items():
            m.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _cuda_devices(module: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)


def resize(inputs: tuple[Tensor, ...], batch_dims: tuple[int | None, ...], batch: int) -> tuple[Tensor, ...]:
    """Inputs of another batch size: rows are repeated, and floating ones disturbed so that no two are equal."""
    generator = torch.Generator().manual_seed(batch)
    sized = []
    for tensor, dim in zip(inputs, batch_dims, strict=True):
        if dim is None:
            sized.append(tensor)
            continue
        rows = torch.arange(batch, device=tensor.device) % tensor.shape[dim]
        repeated = tensor.detach().index_select(dim, rows)
        if repeated.is_floating_point() and repeated.numel():
            scale = float(tensor.detach().float().std(unbiased=False)) or 1.0
            noise = torch.randn(repeated.shape, generator=generator) * 0.1 * scale
            repeated = repeated + noise.to(repeated)
        sized.append(repeated)
    return tuple(sized)


def same(actual: Any, expected: Any, slack: float = 1.0) -> bool:
    """Whether two values agree to the tolerance of their dtype, NaN equal to NaN."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return bool(actual == expected)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(actual, expected)
    scale = float(expected.detach().abs().nan_to_num(posinf=0.0, neginf=0.0).max())
    bound = _TOLERANCE[expected.dtype] * max(scale, 1e-3) * slack
    return torch.allclose(actual, expected, rtol=0.0, atol=bound, equal_nan=True)


def check(graph: Graph, model: nn.Module) -> None:
    """Compare a capture with its model in both modes and at two batch sizes, and its samples with each other.

    Args:
        graph: The capture, propagated.
        model: The model that was captured; may share modules with the graph's root.

    Raises:
        CaptureError: Some output differs.
        MixedSamplesError: A sample's output depends on its neighbours.
    """
    for training in (False, True) if graph.mode == "train" else (False,):
        for batch in (3, 2):
            inputs = resize(graph.inputs, graph.batch_dims, batch)
            expected, actual = _both(graph, model, inputs, training)
            for name, a, b in zip(graph.signature.output_names, actual, expected, strict=True):
                if not same(a, b):
                    raise CaptureError(
                        f"the captured graph's `{name}` differs from the model's in "
                        f"{'training' if training else 'eval'} mode at batch size {batch}"
                    )
    mark_rows(graph)
    for leaf in graph.output.all_input_nodes:
        if not leaf.meta["sliceable"]:
            raise _culprit(graph, leaf)


def _both(
    graph: Graph, model: nn.Module, inputs: tuple[Tensor, ...], training: bool
) -> tuple[list[Any], list[Any]]:
    results = []
    for run in (lambda: _call(graph, model, inputs), lambda: list(graph.run(inputs))):
        with undisturbed(model), undisturbed(graph.root):
            model.train(training)
            graph.root.train(training)
            torch.manual_seed(0)
            results.append(run())
    return results[0], results[1]


def _call(graph: Graph, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """The model's own leaves, those that the graph has (a generation cache may have been switched off)."""
    args, kwargs = graph.signature.call_arguments(list(inputs))
    leaves = dict(named_leaves(model(*args, **kwargs)))
    return [leaves[name] for name in graph.signature.output_names]


class _Recorder(fx.Interpreter):
    """Keeps every node's value."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.root, garbage_collect_values=False, graph=graph.fx)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def mark_rows(graph: Graph) -> None:
    """Run three samples together and the middle one alone; note which values are *rows*: entry i of sample i.

    A value that is laid out differently (positions, samples not outermost within the batch dim) is no rows: lowering
    may use it but not gather it.
    """
    together = resize(graph.inputs, graph.batch_dims, 3)
    alone = tuple(
        t if dim is None else t.narrow(dim, 1, 1)
        for t, dim in zip(together, graph.batch_dims, strict=True)
    )
    recorders = []
    for inputs in (together, alone):
        with undisturbed(graph.root), torch.no_grad():
            graph.root.eval()
            recorder = _Recorder(graph)
            recorder.run(*inputs)
        recorders.append(recorder.values)
    for node in graph.fx.nodes:
        node.meta["sliceable"] = _sliceable(node, recorders[0][node], recorders[1][node])


def _sliceable(node: fx.Node, many: Any, one: Any) -> bool:
    found = node.meta.get("spec")
    if not isinstance(found, Spec):
        return True
    if found.batch_dim is None:
        return same(many, one, slack=5.0)
    return same(many.narrow(found.batch_dim, found.rows, found.rows), one, slack=5.0)


def _culprit(graph: Graph, leaf: fx.Node) -> Exception:
    """The first node, on the way to a leaf that mixes, whose inputs were still rows."""
    ancestors: set[fx.Node] = set()
    queue = [leaf]
    while queue:
        node = queue.pop()
        if node not in ancestors:
            ancestors.add(node)
            queue.extend(node.all_input_nodes)
    for node in graph.fx.nodes:
        if node in ancestors and not node.meta["sliceable"]:
            fresh = any(isinstance(i.meta.get("spec"), Spec) for i in node.all_input_nodes)
            if fresh and all(i.meta["sliceable"] for i in node.all_input_nodes):
                return mixed(node, "its output for one sample changes with the other samples")
    return mixed(leaf, "its output for one sample changes with the other samples")
