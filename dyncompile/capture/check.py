"""A capture proves itself before it is handed over."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dyncompile.capture.signature import Signature, named_leaves
from dyncompile.errors import CaptureError
from dyncompile.graph import Graph
from dyncompile.shapes import Spec, mixed

# Largest error allowed, relative to the largest output: the same operations in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

Run = tuple[bool, tuple[Tensor, ...], int, list[Any]]
"""Training mode or not, inputs, their batch size, and the leaves of the output."""


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Modes, buffers and random state are afterwards what they were."""
    modes = {m: m.training for m in module.modules()}
    buffers = [(m, name, b) for m in modes for name, b in m._buffers.items()]
    values = [None if b is None else b.detach().clone() for _, _, b in buffers]
    try:
        with torch.random.fork_rng(devices=_cuda_devices(module)):
            yield
    finally:
        for m, training in modes.items():
            m.training = training
        with torch.no_grad():
            for (m, name, buffer), value in zip(buffers, values, strict=True):
                m._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


def _cuda_devices(module: nn.Module) -> list[torch.device]:
    tensors = (*module.parameters(), *module.buffers())
    return sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)


def fresh(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies of inputs, for a model that may write to them."""
    return [t.clone() for t in inputs]


def resize(
    inputs: tuple[Tensor, ...], batch_dims: tuple[int | None, ...], batch: int, seed: int = 0
) -> tuple[Tensor, ...]:
    """Inputs of another batch size: rows are repeated, and disturbed so that no two are equal.

    Floating ones get noise; of the others a repeated row is rolled, and one of its values changed.
    """
    generator = torch.Generator().manual_seed(batch + 100 * seed)
    sized = []
    for tensor, dim in zip(inputs, batch_dims, strict=True):
        if dim is None:
            sized.append(tensor)
            continue
        rows = tensor.detach().split(1, dim)
        count = len(rows)
        joined = torch.cat([_varied(rows[i % count], dim, i // count + seed) for i in range(batch)], dim)
        if joined.is_floating_point() and joined.numel():
            scale = float(tensor.detach().float().std(unbiased=False)) or 1.0
            noise = torch.randn(joined.shape, generator=generator) * 0.1 * scale
            joined = joined + noise.to(joined)
        sized.append(joined)
    return tuple(sized)


def _varied(row: Tensor, dim: int, times: int) -> Tensor:
    last = row.dim() - 1
    if not times or row.is_floating_point() or dim == last or row.shape[last] < 2:
        return row
    rolled = row.roll(times, last)
    rolled[..., 0] = rolled[..., 1]
    return rolled


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


def distance(actual: Tensor, expected: Tensor) -> str:
    """In what two values differ, as the end of a sentence."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"is {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}"
    return f"is off by up to {float((actual.double() - expected.double()).abs().max()):.2g}"


def expect(
    model: nn.Module,
    signature: Signature,
    inputs: tuple[Tensor, ...],
    batch_dims: tuple[int | None, ...],
    *,
    training: bool,
) -> list[Run]:
    """What the model itself returns, for `check`: at two batch sizes, in eval and training mode.

    Raises:
        CaptureError: The output has other leaves than the example's.
    """
    runs: list[Run] = []
    for mode in (False, True) if training else (False,):
        for batch in (3, 2):
            sized = resize(inputs, batch_dims, batch)
            args, kwargs = signature.call_arguments(fresh(sized))
            with undisturbed(model):
                model.train(mode)
                torch.manual_seed(0)
                leaves = named_leaves(model(*args, **kwargs))
            names = tuple(name for name, _ in leaves)
            if names != signature.output_names:
                raise CaptureError(
                    f"the model returns {list(signature.output_names)} in training mode and {list(names)} in eval mode"
                )
            values = [v.detach() if isinstance(v, Tensor) else v for _, v in leaves]
            runs.append((mode, sized, batch, values))
    return runs


def check(graph: Graph, expected: list[Run]) -> None:
    """Compare a capture with its model, and its samples with each other.

    Args:
        graph: The capture, propagated.
        expected: What `expect` noted.

    Raises:
        CaptureError: Some output differs.
        MixedSamplesError: A sample's output depends on its neighbours.
    """
    for run in expected:
        for name, equal in _compared(graph, run):
            if not equal:
                raise CaptureError(
                    f"the captured graph's `{name}` differs from the model's in "
                    f"{'training' if run[0] else 'eval'} mode at batch size {run[2]}"
                )
    mark_rows(graph)
    for leaf in graph.output.all_input_nodes:
        if not leaf.meta["sliceable"]:
            raise _culprit(graph, leaf)


def agrees(graph: Graph, run: Run) -> bool:
    """Whether a capture returns what its model returned in one run."""
    return all(equal for _, equal in _compared(graph, run))


def _compared(graph: Graph, run: Run) -> Iterator[tuple[str, bool]]:
    """For each leaf of the output its name, and whether it is the same."""
    training, inputs, _, leaves = run
    with undisturbed(graph.root):
        graph.root.train(training)
        torch.manual_seed(0)
        actual = graph.run(inputs)
    for name, a, b in zip(graph.signature.output_names, actual, leaves, strict=True):
        yield name, same(a, b)


class _Recorder(fx.Interpreter):
    """Keeps every node's value."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.root, garbage_collect_values=False, graph=graph.fx)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            self.values[n] = super().run_node(n)
        except Exception as error:  # whatever a layer raises on a batch of this size
            raise mixed(n, f"it fails on other batches than the example's ({error})") from error
        return self.values[n]


def mark_rows(graph: Graph) -> None:
    """Note which values are *rows*: entry i belongs to sample i and depends on it alone.

    Four samples run together, then the second with other neighbours, then the second alone. A value that is laid
    out differently (positions, samples not outermost within the batch dim) is no rows: lowering may use it but not
    gather it.
    """
    together = resize(graph.inputs, graph.batch_dims, 4)
    others = resize(graph.inputs, graph.batch_dims, 4, seed=1)
    second = [sample(t, dim, 1) for t, dim in zip(together, graph.batch_dims, strict=True)]
    disturbed = [
        t if dim is None else torch.cat([sample(o, dim, 0), s, sample(o, dim, 2, 2)], dim)
        for t, o, s, dim in zip(together, others, second, graph.batch_dims, strict=True)
    ]
    first, again, alone = (_record(graph, run) for run in (together, disturbed, second))
    for node in graph.fx.nodes:
        # The same kernels on the same row give the same bits, or nearly; another batch size may not.
        node.meta["sliceable"] = _agree(node, first, again, rows=True, slack=0.01) and _agree(
            node, first, alone, rows=False, slack=5.0
        )


def sample(tensor: Tensor, dim: int | None, index: int, count: int = 1) -> Tensor:
    """Some samples of an input, one after the other; an input without a batch dim as it is."""
    return tensor if dim is None else tensor.narrow(dim, index, count)


def _record(graph: Graph, inputs: Any) -> dict[fx.Node, Any]:
    with undisturbed(graph.root), torch.no_grad():
        graph.root.eval()
        recorder = _Recorder(graph)
        recorder.run(*inputs)
    return recorder.values


def _agree(
    node: fx.Node,
    many: dict[fx.Node, Any],
    other: dict[fx.Node, Any],
    *,
    rows: bool,
    slack: float,
) -> bool:
    """Whether the second sample's entries of a value are those of another run."""
    specs, tree = pytree.tree_flatten(node.meta.get("spec"))
    if not any(isinstance(found, Spec) for found in specs):
        return True
    for found, a, b in zip(specs, tree.flatten_up_to(many[node]), tree.flatten_up_to(other[node]), strict=True):
        if not isinstance(found, Spec):
            continue
        if not same(_rows(a, found), _rows(b, found) if rows else b, slack):
            return False
    return True


def _rows(tensor: Tensor, found: Spec) -> Tensor:
    """The second sample's entries of a value that was computed for several."""
    if found.batch_dim is None:
        return tensor
    return tensor.narrow(found.batch_dim, found.rows, found.rows)


def _culprit(graph: Graph, leaf: fx.Node) -> Exception:
    """The first node, on the way to a leaf that mixes, whose inputs were still rows."""
    why = "its output for one sample changes with the other samples"
    ancestors: set[fx.Node] = set()
    queue = [leaf]
    while queue:
        node = queue.pop()
        if node not in ancestors:
            ancestors.add(node)
            queue.extend(node.all_input_nodes)
    for node in graph.fx.nodes:
        if node in ancestors and not node.meta["sliceable"]:
            specs = [pytree.tree_leaves(i.meta.get("spec")) for i in node.all_input_nodes]
            reads = any(isinstance(s, Spec) for found in specs for s in found)
            if reads and all(i.meta["sliceable"] for i in node.all_input_nodes):
                return mixed(node, why)
    return mixed(leaf, why)
