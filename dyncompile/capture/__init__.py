"""From an `nn.Module` to a canonical graph: export with layers whole, canonicalise, prove."""

import contextlib
import copy
import functools
import io
import logging
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyncompile.capture import canonical
from dyncompile.capture.check import Run, agrees, check, expect, fresh, resize, sample, undisturbed
from dyncompile.capture.functional import functionalise
from dyncompile.capture.leaves import (
    Call,
    calling,
    hookless,
    leaves_of,
    opaque,
    raise_leaves,
    swapped,
)
from dyncompile.capture.modes import follow_mode
from dyncompile.capture.packing import TakenOver, open_ended_error, short_rows, taking_over
from dyncompile.capture.recurrent import unstack
from dyncompile.capture.signature import Signature
from dyncompile.errors import ArgumentError, CaptureError, DyncompileError, ExampleInputsError
from dyncompile.graph import Graph

_log = logging.getLogger(__name__)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_dims: Mapping[str, int | None] | None = None,
    prediction: str | None = None,
    prediction_only: bool = False,
    inplace: bool = False,
) -> Graph:
    """Capture a model as a canonical graph over its own modules.

    Args:
        model: Any module that `torch.export` takes; left as it was unless `inplace`.
        args: Example positional inputs, any pytree of tensors and constants.
        kwargs: Example keyword inputs.
        batch_dims: Batch dim of an input by name, where it is not dim 0; None for an input without
            one.
        prediction: Name of the output leaf that is the prediction; default `logits`, else the only
            floating leaf.
        prediction_only: Drop the other leaves of the output.
        inplace: The graph's root is the model itself instead of a copy.

    Returns:
        The graph, equal to the model in eval mode and (`graph.mode == "train"`) in training mode.

    Raises:
        CaptureError: Export stops, or the graph differs from the model.
        MixedSamplesError: The model mixes the samples of a batch.
        ArgumentError: The inputs or the name of the prediction do not fit.
    """
    # torch.export hands out a GraphModule, which would lose them behind its own.
    if clashes := [n for n in model._modules if n == "meta" or hasattr(fx.GraphModule, n)]:
        raise CaptureError(f"the model's own `{clashes[0]}` has the name of an attribute of a GraphModule; rename it")
    signature = Signature.of(model, args, kwargs or {})
    root = model if inplace else _copied(model)
    _forget_cache(root)
    inputs = [t.detach() for t in signature.flatten(args, kwargs or {})]
    _check_values(model, signature, inputs)
    dims = _batch_dims(signature, inputs, {} if batch_dims is None else batch_dims)
    attempt = functools.partial(
        _attempt, root, signature, resize(tuple(inputs), dims, 3), dims, prediction, prediction_only
    )
    try:
        return attempt(training=True)
    except DyncompileError as first:
        try:
            graph = attempt(training=False)
        except DyncompileError:
            raise first from first.__cause__
        _log.warning("captured in eval mode only, because in training mode %s", first)
        return graph


def _attempt(
    root: nn.Module,
    signature: Signature,
    inputs: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    prediction: str | None,
    prediction_only: bool,
    *,
    training: bool,
) -> Graph:
    args, kwargs = signature.call_arguments(fresh(inputs))
    with taking_over() as taken:
        with undisturbed(root):
            root.train(training)
            try:
                outputs: list[Any] = []
                leaves = leaves_of(root, lambda: outputs.append(root(*args, **kwargs)))
            except DyncompileError:
                raise
            except Exception as error:  # whatever the user's own forward raises
                raise ExampleInputsError(f"the model stops on its example inputs: {_reason(error)}") from error
        signature = signature.with_output(outputs[0], prediction)
        short = _short_runs(root, signature, inputs, dims, taken)
        expected = expect(root, signature, inputs, dims, training=training)
        with undisturbed(root), taken.traced():
            root.train(training)
            exported, calls = _export(root, leaves, inputs, signature, dims)
    module = exported.module(check_guards=False)
    constants: dict[str, Tensor] = {}
    state = {
        *(name for name, _ in root.named_parameters(remove_duplicate=False)),
        *(name for name, _ in root.named_buffers(remove_duplicate=False)),
    }
    nodes = canonical.copy_graph(module, constants, state)
    mutating = raise_leaves(nodes, calls)
    nodes = functionalise(nodes, mutating, state)
    added: dict[str, nn.Module] = {}
    unstack(nodes, root, added)
    if training:
        follow_mode(nodes, added)
    canonical.unbake_devices(nodes, inputs[0].device)
    graph = Graph(root, nodes, signature, inputs, dims, "train" if training else "eval")
    graph.overwriting = tuple(sorted({str(node.target) for node in mutating}))
    for leaf in graph.overwriting:
        root.get_submodule(leaf).inplace = False  # type: ignore[assignment]
    try:
        for path, module_ in added.items():
            graph.add_module(path, module_)
        for path, tensor in constants.items():
            graph.add_constant(path, tensor)
        if prediction_only:
            graph.output.args = ((graph.prediction,),)
            expected, short = (
                [(*run[:3], [run[3][signature.prediction]]) for run in runs] for runs in (expected, short)
            )
            graph.signature = signature.only_prediction()
        graph.propagate()
        canonical.drop_noops(nodes)
        nodes.lint()
        if not all(agrees(graph, run) for run in short):
            raise open_ended_error()
        check(graph, expected)
    except DyncompileError:
        for name in ("_modes", "_constants"):
            root._modules.pop(name, None)
        for leaf in graph.overwriting:
            root.get_submodule(leaf).inplace = True  # type: ignore[assignment]
        raise
    return graph


def _short_runs(
    root: nn.Module,
    signature: Signature,
    inputs: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    taken: TakenOver,
) -> list[Run]:
    """What the model returns for batches in which no packed sequence fills the padding, where that can matter.

    In evaluation: a dropout behind would draw for other shapes.
    """
    if not taken.open_ended:
        return []
    runs: list[Run] = []
    batch = next(t.shape[d] for t, d in zip(inputs, dims, strict=True) if d is not None)
    for row in short_rows(taken, batch):
        alone = tuple(sample(t, dim, row) for t, dim in zip(inputs, dims, strict=True))
        try:
            runs += expect(root, signature, alone, dims, training=False)
        except DyncompileError:
            raise
        except Exception as error:  # whatever the user's own forward raises
            raise open_ended_error() from error
    return runs


def _export(
    root: nn.Module,
    leaves: dict[str, bool],
    inputs: tuple[Tensor, ...],
    signature: Signature,
    dims: tuple[int | None, ...],
) -> tuple[torch.export.ExportedProgram, list[Call]]:
    own = calling(root)

    def flat(*tensors: Tensor) -> Any:
        args, kwargs = signature.call_arguments(list(tensors))
        with swapped(root, own):
            return root(*args, **kwargs)

    flat.__signature__ = signature.flat()  # type: ignore[attr-defined]
    shapes = tuple(None if dim is None else {dim: torch.export.Dim.DYNAMIC} for dim in dims)
    try:
        with (
            swapped(root, hookless(flat)),
            opaque(root, leaves) as calls,
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),  # to which torch prints half a graph where it stops
        ):
            warnings.simplefilter("ignore")
            exported = torch.export.export(root, tuple(fresh(inputs)), dynamic_shapes=shapes, strict=False)
    except DyncompileError:
        raise
    except Exception as error:  # whatever the user's own forward or torch.export raises
        stopped = f"torch.export stopped: {_reason(error)}"
        if "specialized" in str(error):
            taken = [
                f"dim {dim} of `{name}`" for name, dim in zip(signature.names, dims, strict=True) if dim is not None
            ]
            stopped = (
                f"the batch was taken to be {', '.join(taken)}, and the model fixes its size; "
                f"where it is another dim of an input, pass batch_dims; there has to be one; {stopped}"
            )
        raise CaptureError(stopped) from error
    return exported, calls


def _reason(error: Exception) -> str:
    """The first line of an error, and the line of the user's code it came from."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if canonical.foreign(f.filename)]
    place = f", at {own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`" if own else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{place}"


def _check_values(model: nn.Module, signature: Signature, inputs: list[Tensor]) -> None:
    """Refuse example inputs that hold no values, or NaN."""
    tensors = (*model.parameters(), *model.buffers(), *inputs)
    if any(t.is_meta for t in tensors):
        raise ArgumentError("example_inputs", found="a model or inputs on `meta`", expected="both with values")
    for name, tensor in zip(signature.names, inputs, strict=True):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ArgumentError("example_inputs", found=f"NaN in `{name}`", expected="numbers")


def _batch_dims(signature: Signature, inputs: list[Tensor], given: Any) -> tuple[int | None, ...]:
    """The batch dim of every input: as given, else 0 where the leading size is the batch's."""
    ranks = {name: t.dim() for name, t in zip(signature.names, inputs, strict=True)}
    if not isinstance(given, Mapping):
        expected = f"a mapping from names among {list(signature.names)}"
        raise ArgumentError("batch_dims", found=repr(given), expected=expected)
    for name, dim in given.items():
        if name not in ranks:
            raise ArgumentError("batch_dims", found=repr(name), expected=f"names among {list(signature.names)}")
        if dim is not None and not (isinstance(dim, int) and 0 <= dim < ranks[name]):
            expected = f"a dim of an input with {ranks[name]} dims"
            raise ArgumentError(f"batch_dims[{name!r}]", found=dim, expected=expected)
    dims = [given.get(name, 0 if rank else None) for name, rank in ranks.items()]
    sizes = [t.shape[d] for t, d in zip(inputs, dims, strict=True) if d is not None]
    if not sizes:
        raise ArgumentError("example_inputs", found="no input with a batch", expected="one")
    if sizes[0] == 0:
        raise ArgumentError("example_inputs", found="an empty batch", expected="samples")
    return tuple(
        None if dim is not None and name not in given and tensor.shape[dim] != sizes[0] else dim
        for name, dim, tensor in zip(ranks, dims, inputs, strict=True)
    )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the model's own state raises
        raise CaptureError(
            f"the model cannot be copied: {_reason(error)}; pass inplace=True to convert it itself"
        ) from error


def _forget_cache(root: nn.Module) -> None:
    """A generation cache is no output of a classifier: switch it off (Hugging Face `use_cache`)."""
    config = getattr(root, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]


__all__ = ["capture"]
