"""Batch norm statistics of what a norm sees in evaluation: the samples that reach it, and no others."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from dyncompile.data import as_loader
from dyncompile.demand import analyse
from dyncompile.module import DynamicModule
from dyncompile.training.policy import evaluating


def recalibrate_norms(
    dyn: DynamicModule,
    data: Any,
    *,
    reaching: bool = True,
    batch_size: int = 128,
    batches: int | None = None,
) -> dict[str, int]:
    """Estimate the running statistics of batch norms anew, from the decisions of evaluation.

    In training every norm sees every sample, since the dense reference computes both arms of a select. In evaluation a
    norm behind a gate sees the samples that the gate lets in, whose statistics may be others. Here the model runs as in
    evaluation, and each norm's mean and variance become those of the rows that its guard lets in, over all data; on the
    way each batch is normalised by its own statistics of these rows, as the statistics behind it are not known yet
    ("precise batch norm", arXiv 2105.07576, section 3). A norm that fewer than two values of a batch reach is run with
    the statistics it has, and one that no sample reaches keeps them.

    `finetune` does not do this by itself: joint training normalises by all samples, and the layers behind a norm have
    learned for that, so its own running statistics are the right ones as they are, and those of the samples let in
    would shift what the layers read. With `reaching=False` the statistics are of all samples as well, but behind the
    decisions of evaluation: for gates whose decisions were changed after training.

    Args:
        dyn: A dynamic model; afterwards in the modes in which it was.
        data: What `dyncompile.data.as_loader` takes; the labels are not read.
        reaching: Whether a norm counts the samples that reach it alone, or all.
        batch_size: Samples per batch, for data that is not a DataLoader. Larger is more exact.
        batches: How many to read; None: all.

    Returns:
        For each norm, by the path of its module, how many samples (or rows of samples) reached it.

    Raises:
        DataError: See `as_loader`.
    """
    loader = as_loader(data, batch_size=batch_size, batch_dims=dyn.recipe.batch_dims)
    norms = {module: path for path, module in dyn.named_modules() if _estimates(module)}
    device = next(dyn.parameters()).device
    with evaluating(dyn), torch.no_grad():
        seen = {norm: _Moments(norm) for norm in norms}
        running = _Masked(dyn, seen, reaching=reaching)
        with running.watching():
            for inputs, _ in itertools.islice(loader, batches):
                moved = tree_map_only(Tensor, lambda t: t.to(device), inputs)
                running.run(*_bound(dyn, moved))
        for moments in seen.values():
            moments.settle()
    return {path: seen[norm].reached for norm, path in norms.items()}


def _estimates(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None


def _bound(dyn: DynamicModule, inputs: Any) -> list[Tensor]:
    """Flat inputs of the graph for what a batch holds."""
    if isinstance(inputs, dict):
        return dyn.graph.bind((), inputs)
    return dyn.graph.bind(inputs if isinstance(inputs, tuple) else (inputs,), {})


Guard = list[tuple[fx.Node, int]]
"""Steps of (decision, arm)."""


class _Masked(fx.Interpreter):
    """Runs a dynamic model and knows at every node which samples need it."""

    def __init__(self, dyn: DynamicModule, seen: "dict[nn.Module, _Moments]", *, reaching: bool) -> None:
        graph, guards = _decided_first(dyn.graph.fx)
        super().__init__(dyn, graph=graph)
        self.guards = guards if reaching else {}
        self.seen = seen
        self.guard: Guard = []
        # Kept here, since guards need them after their last use in the graph.
        self.decisions: dict[fx.Node, Tensor] = {step[0]: torch.empty(0) for guard in guards.values() for step in guard}

    def run_node(self, n: fx.Node) -> Any:
        self.guard = self.guards.get(n, [])
        value = super().run_node(n)
        if n in self.decisions:
            self.decisions[n] = value
        return value

    def needed(self) -> Tensor | None:
        """Which samples, or rows of samples, the present node is needed for, `[M]` bool; None: all."""
        mask: Tensor | None = None
        for decision, arm in self.guard:
            taken = self.decisions[decision] == arm
            if mask is not None and len(mask) != len(taken):
                few, many = sorted((mask, taken), key=len)
                mask = few.repeat_interleave(len(many) // len(few)) & many
            else:
                mask = taken if mask is None else mask & taken
        return mask

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take in what reaches each norm, and let it normalise by that."""
        handles = [norm.register_forward_pre_hook(self._before) for norm in self.seen]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        mask = self.needed()
        if mask is not None:
            x = x[mask.repeat_interleave(len(x) // len(mask))]
        self.seen[norm].add(x)


def _decided_first(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, Guard]]:
    """A copy in which every node comes behind the decisions that it is needed under, and the guard of each node."""
    guards = analyse(graph).guards
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    waiting = [*reversed([*graph.nodes])]
    while waiting:
        node = waiting.pop()
        if node in mapping:
            continue
        before = [*node.all_input_nodes, *(unit.decision for unit, _ in guards.get(node, ()))]
        missing = [other for other in before if other not in mapping]
        if missing:
            waiting += [node, *reversed(missing)]
        else:
            mapping[node] = copied.node_copy(node, mapping.__getitem__)
    return copied, {
        mapping[node]: [(mapping[unit.decision], arm) for unit, arm in guard] for node, guard in guards.items()
    }


class _Moments:
    """Mean and variance of all that was added, in float64."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, _BatchNorm)
        self.norm = norm
        self.before = [self._statistics[0].clone(), self._statistics[1].clone()]
        self.reached = 0
        self.count = 0
        self.mean = torch.zeros_like(self._statistics[0], dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)  # of the distances from the mean

    @property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        return self.norm.running_mean, self.norm.running_var

    def add(self, x: Tensor) -> None:
        """Take in rows `[M, C, ...]`, and set the norm to their statistics."""
        values = x.double().movedim(1, 0).flatten(1)
        count = values.shape[1]
        self.reached += len(x)
        if count == 0:
            return
        mean = values.mean(1)
        squares = ((values - mean[:, None]) ** 2).sum(1)
        total = self.count + count
        apart = mean - self.mean
        self.squares += squares + apart**2 * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total
        if count > 1:
            self._set(mean, squares / count)
        else:
            self._set(*self.before)

    def settle(self) -> None:
        """Set the norm to the statistics of everything, the variance unbiased as in training."""
        if self.count > 1:
            self._set(self.mean, self.squares / (self.count - 1))
        else:
            self._set(*self.before)

    def _set(self, mean: Tensor, variance: Tensor) -> None:
        for statistic, value in zip(self._statistics, (mean, variance), strict=True):
            statistic.copy_(value)
