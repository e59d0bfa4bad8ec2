"""What every conversion keeps to, whatever the pass. Each contract tells what is wrong; nothing if it is kept."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncompile.capture.check import distance, same, undisturbed
from dyncompile.checking.deciding import BATCHES, drawn, samples
from dyncompile.kernel_costs import FREE, assumed
from dyncompile.lowering import LoweredModule
from dyncompile.module import DynamicModule, decision_routes
from dyncompile.shapes import flop_counter
from dyncompile.testing import forced

_ROUNDING = 1e-5


def exact_at_birth(static: nn.Module, dyn: DynamicModule, batches: Sequence[int] = BATCHES) -> str:
    """Before training a dynamic model computes what the static one does, to the bit, in eval and training mode.

    Args:
        static: The static model, or its capture without any pass.
        dyn: As `dynamize` returned it.
        batches: Batch sizes; 1 is left out in training, where batch norm takes none.
    """
    modes = (False, True) if dyn.graph.mode == "train" else (False,)
    for training, batch in ((training, batch) for training in modes for batch in batches):
        if training and batch == 1:
            continue
        args, kwargs = samples(dyn, batch, of=max(batches))
        expected, found = (_run(model, args, kwargs, training=training) for model in (static, dyn))
        for name, a, b in zip(dyn.graph.signature.output_names, expected, found, strict=True):
            if isinstance(a, Tensor) and not torch.equal(a, b):
                mode = "training" if training else "eval"
                return f"before training, output `{name}` {distance(b, a)} in {mode} mode at batch size {batch}"
    return ""


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> list[Any]:
    with undisturbed(model), torch.no_grad(), _no_fast_path():
        model.train(training)
        torch.manual_seed(0)
        return pytree.tree_leaves(model(*pytree.tree_map(_copied, args), **pytree.tree_map(_copied, kwargs)))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Transformer layers of torch compute as they were captured, not in the other way they have without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def gradient_reaches_every_parameter(static: nn.Module, dyn: DynamicModule) -> str:
    """A loss on the predictions and the expected cost has a gradient for every parameter.

    Every new one, which may not be zero, and every one of the static model that had one before. What lies in an arm
    that nobody takes at birth, such as the norms of a narrower width, must have it where arms are mixed in equal parts.

    Args:
        static: The static model, or its capture without any pass.
        dyn: The dynamic model.
    """
    args, kwargs = samples(dyn, 4)
    with undisturbed(static), torch.enable_grad():
        static.train()
        before = _gradients(_size(static(*args, **kwargs)), static)
    reached = _reached(dyn)
    known = {name for name, _ in static.named_parameters()}
    new = [name for name in reached if name not in known]
    if any(not _flows(reached[name]) for name in new):
        with _halved(dyn):
            taken = _reached(dyn)
        reached |= {name: taken[name] for name in new if _flows(taken[name])}
    cut = [name for name in new if reached[name] is None]
    if cut:
        why = "neither the predictions nor the expected cost hang on them differentiably"
        advice = "is their module used, and does a `detach`, a comparison or an argmax cut the way?"
        return f"no gradient reaches {_named(cut)}: {why}; {advice}"
    zero = [name for name in new if not _flows(reached[name])]
    if zero:
        return f"the gradient of {_named(zero)} is zero, whatever is decided: nothing would train them"
    lost = [name for name, gradient in before.items() if gradient is not None and reached.get(name) is None]
    return f"the static model's {_named(lost)} had a gradient and has none now" if lost else ""


@contextmanager
def _halved(dyn: DynamicModule) -> Iterator[None]:
    """In training each decision is a half, and each arm of a route has an equal share."""
    routes = decision_routes(dyn.graph.fx)
    before = dyn._override
    dyn._override = lambda name, value: torch.full_like(value, 1 / routes.get(name, 2))
    try:
        yield
    finally:
        dyn._override = before


def _reached(dyn: DynamicModule) -> dict[str, Any]:
    args, kwargs = samples(dyn, 4)
    with undisturbed(dyn), torch.enable_grad():
        dyn.train()
        trace = dyn.trace(*args, **kwargs)
        loss = trace.cost.mean() + sum(_size(value) for value in (trace.output, trace.final, *trace.exits.values()))
        return _gradients(loss, dyn)


def _flows(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().sum() > 0)


def _size(output: Any) -> Tensor:
    """A number that hangs on every floating value of an output."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([torch.zeros(()), *(leaf.float().square().mean().cpu() for leaf in leaves)]).sum()


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Any]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters or not loss.requires_grad:
        return dict.fromkeys(parameters)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))


def _named(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One batch through a lowered model and through the dense reference.

    Attributes:
        batch: Number of samples.
        decided: Who decided, in words.
        difference: In what their outputs differ; empty if in nothing.
        flops: What the lowered model ran, as torch counts it; of compiled segments a part only.
        planned: What the plan says for the decisions that were taken.
        dense: What runs if nothing is skipped.
    """

    batch: int
    decided: str
    difference: str
    flops: float
    planned: float
    dense: float


def lowered_runs(
    dyn: DynamicModule, fast: LoweredModule, batches: Sequence[int] = BATCHES, *, slack: float = 1.0
) -> Iterator[Run]:
    """Run a lowered model beside its reference, with the model's own decisions and with drawn ones.

    Args:
        dyn: The reference, in eval mode.
        fast: Lowered from it, no decision declined.
        batches: Batch sizes.
        slack: Of the tolerance of `dyncompile.capture.check.same`, how much.
    """
    model = dyn.cost_model()
    for batch in batches:
        args, kwargs = samples(dyn, batch, of=max(batches))
        for decided, choice in (("the model's own decisions", {}), ("drawn decisions", drawn(dyn, batch))):
            with torch.no_grad(), assumed(FREE), forced(dyn, choice), forced(fast, choice):
                trace = dyn.trace(*args, **kwargs)
                with flop_counter() as counter:
                    output = fast(*args, **kwargs)
            yield Run(
                batch=batch,
                decided=decided,
                difference=_differs(dyn, output, trace.output, slack),
                flops=float(counter.get_total_flops()),
                planned=float(model.work(trace.decisions).expand(batch).double().sum()) * model.static,
                dense=sum(model.weights) * batch * model.static,
            )


def _differs(dyn: DynamicModule, output: Any, expected: Any, slack: float) -> str:
    leaves = zip(pytree.tree_leaves(output), pytree.tree_leaves(expected), strict=True)
    for name, (a, b) in zip(dyn.graph.signature.output_names, leaves, strict=True):
        if not same(a, b, slack):
            return f"output `{name}` {distance(a, b)}" if isinstance(a, Tensor) else f"output `{name}` is {a}, not {b}"
    return ""


def lowered_equals_reference(runs: Sequence[Run]) -> str:
    """What a lowered model returns is what the dense reference returns."""
    for run in runs:
        if run.difference:
            return f"lowered, {run.difference} at batch size {run.batch}, with {run.decided}"
    return ""


def skips_as_planned(fast: LoweredModule, runs: Sequence[Run]) -> str:
    """A lowered model in eager mode runs the operations that the plan says for the decisions taken, and skips some."""
    if fast.plan.dense:
        return "; ".join(f"`{name}` skips nothing, since {why}" for name, why in fast.plan.dense.items())
    for run in runs:
        if abs(run.flops - run.planned) > _ROUNDING * run.planned:
            ran, planned, dense = (f"{flops / 1e6:.3f}" for flops in (run.flops, run.planned, run.dense))
            counts = f"{ran} MFLOPs ran and {planned} are planned, of {dense} if nothing is skipped"
            return f"{counts}, at batch size {run.batch} with {run.decided}"
    if not any(run.planned < run.dense * (1 - _ROUNDING) for run in runs):
        return "no decision saves any operation: is what an arm alone needs computed outside of it too?"
    return ""


def exports(dyn: DynamicModule) -> None:
    """Write an ONNX file, run it by onnxruntime, and compare.

    Args:
        dyn: In eval mode.

    Raises:
        MissingExtraError: The extra `export` is not installed.
        ExportError: The model has something that ONNX has no counterpart for.
        InvalidExportError: The file does not run, or computes something else.
    """
    from dyncompile.exporting import export

    with tempfile.TemporaryDirectory() as folder:
        export(dyn, Path(folder) / "model.onnx", decisions=True)
