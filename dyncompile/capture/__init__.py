"""From an `nn.Module` to a canonical graph: export with layers kept whole, canonicalise, prove."""

import copy
import functools
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncompile.capture import canonical
from dyncompile.capture.check import check, resize, undisturbed
from dyncompile.capture.leaves import leaves_of, opaque, raise_leaves
from dyncompile.capture.signature import Signature
from dyncompile.errors import ArgumentError, CaptureError, DyncompileError
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
        batch_dims: Batch dim of an input by name, where it is not dim 0; None for an input without one.
        prediction: Name of the output leaf that is the prediction; default `logits`, else the only floating leaf.
        prediction_only: Drop the other leaves of the output.
        inplace: The graph's root is the model itself instead of a copy.

    Returns:
        The graph, equal to the model in eval mode and (`graph.mode == "train"`) in training mode.

    Raises:
        CaptureError: Export stops, or the graph differs from the model.
        MixedSamplesError: The model mixes the samples of a batch.
        ArgumentError: The inputs or the name of the prediction do not fit.
    """
    signature = Signature.of(model, args, kwargs or {})
    root = model if inplace else copy.deepcopy(model)
    _forget_cache(root)
    inputs = [t.detach() for t in signature.flatten(args, kwargs or {})]
    dims = _batch_dims(signature, inputs, batch_dims or {})
    examples = resize(tuple(inputs), dims, 3)
    attempt = functools.partial(
        _attempt, root, model, signature, examples, dims, prediction, prediction_only
    )
    try:
        graph = attempt(training=True)
    except DyncompileError as first:
        if isinstance(first, ArgumentError):
            raise
        try:
            graph = attempt(training=False)
        except DyncompileError:
            raise first from first.__cause__
        _log.warning("captured in eval mode only, because in training mode %s", first)
    return graph


def _attempt(
    root: nn.Module,
    model: nn.Module,
    signature: Signature,
    inputs: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    prediction: str | None,
    prediction_only: bool,
    *,
    training: bool,
) -> Graph:
    args, kwargs = signature.call_arguments(list(inputs))
    with undisturbed(root):
        root.train(training)
        with torch.no_grad():
            signature = signature.with_output(root(*args, **kwargs), prediction)
            leaves = leaves_of(root, lambda: root(*args, **kwargs))
        exported, calls = _export(root, leaves, args, kwargs, signature, dims)
    module = exported.module(check_guards=False)
    constants: dict[str, Tensor] = {}
    known = {name for name, _ in (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))}
    nodes = canonical.copy_graph(module, constants, known)
    mutating = raise_leaves(nodes, calls)
    canonical.functionalise(nodes, mutating)
    graph = Graph(root, nodes, signature, inputs, dims, "train" if training else "eval")
    graph.overwriting = tuple(sorted({str(node.target) for node in mutating}))
    for leaf in graph.overwriting:
        root.get_submodule(leaf).inplace = False  # type: ignore[assignment]
    for path, tensor in constants.items():
        owner, name = path.split(".")
        if owner not in root._modules:
            root.add_module(owner, nn.Module())
        root.get_submodule(owner).register_buffer(name, tensor, persistent=False)
    if training:
        for path, added in canonical.follow_mode(nodes).items():
            graph.add_module(path, added)
    canonical.unbake_devices(nodes, inputs[0].device)
    if prediction_only:
        graph.output.args = ((graph.prediction,),)
        graph.signature = graph.signature.only_prediction()
    graph.propagate()
    canonical.drop_noops(nodes, {n: n.meta["spec"] for n in nodes.nodes})
    nodes.lint()
    check(graph, model)
    return graph


def _export(
    root: nn.Module,
    leaves: dict[str, bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: Signature,
    dims: tuple[int | None, ...],
) -> tuple[torch.export.ExportedProgram, list[Any]]:
    queue = iter(dims)

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        dim = next(queue)
        return None if dim is None else {dim: torch.export.Dim.DYNAMIC}

    # Walk in the order of the forward's parameters, which is the order of the flat inputs.
    bound = signature.parameters.bind(*args, **kwargs).arguments
    shapes: Any = {name: pytree.tree_map(shape, value) for name, value in bound.items()}
    try:
        with opaque(root, leaves) as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                root, args, kwargs, dynamic_shapes=shapes, strict=False
            )
    except DyncompileError:
        raise
    except Exception as error:  # whatever the user's own forward or torch.export raises
        raise CaptureError(f"torch.export stopped: {_reason(error)}") from error
    return exported, calls


def _reason(error: Exception) -> str:
    """The first line of an error, and the line of the user's code it came from."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "dyncompile" not in f.filename]
    place = f", at {own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`" if own else ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0]}{place}"


def _batch_dims(
    signature: Signature, inputs: list[Tensor], given: Mapping[str, int | None]
) -> tuple[int | None, ...]:
    """The batch dim of every input: as given, else 0 where the leading size is the batch's."""
    unknown = set(given) - set(signature.names)
    if unknown:
        raise ArgumentError("batch_dims", found=sorted(unknown), expected=f"names among {list(signature.names)}")
    sizes = [t.shape[given.get(n) or 0] for n, t in zip(signature.names, inputs, strict=True) if given.get(n, 0) is not None and t.dim()]
    if not sizes:
        raise ArgumentError("example_inputs", found="no input with a batch dim", expected="at least one")
    batch = sizes[0]
    dims: list[int | None] = []
    for name, tensor in zip(signature.names, inputs, strict=True):
        if name in given:
            dims.append(given[name])
        else:
            dims.append(0 if tensor.dim() and tensor.shape[0] == batch else None)
    return tuple(dims)


def _forget_cache(root: nn.Module) -> None:
    """A generation cache is no output of a classifier: switch it off on the copy (Hugging Face `use_cache`)."""
    config = getattr(root, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]


__all__ = ["capture"]
