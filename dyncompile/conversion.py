"""`dynamize`: capture a static model, rewrite it, hand out the dynamic one."""

import copy
import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dyncompile.capture import capture
from dyncompile.capture.examples import CALL, infer_inputs
from dyncompile.errors import ArgumentError, ExampleInputsError
from dyncompile.features import class_dim
from dyncompile.graph import Graph, spec
from dyncompile.module import DynamicModule
from dyncompile.passes import Pass, Refusal, Site, resolve
from dyncompile.recipe import Recipe, Step, class_name, encode_option, floating_dtype, state_shapes


def dynamize(
    model: nn.Module,
    strategy: str | Pass | Sequence[str | Pass] = "early_exit",
    *,
    example_inputs: Any = None,
    batch_dims: Mapping[str, int | None] | None = None,
    prediction: str | None = None,
    prediction_only: bool = False,
    task: str | None = None,
    inplace: bool = False,
    **options: Any,
) -> DynamicModule:
    """Turn a static model into a dynamic one.

    Args:
        model: Any module that `torch.export` takes. Left as it was: mode, device, dtype, flags, hooks, weights. Or a
            dynamic model: a copy of it gets further passes, as trained exits behind trained gates.
        strategy: Name of a pass, a pass object, or a list of either, in order.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments; inferred where the
            model tells (timm `default_cfg`, Hugging Face `dummy_inputs`, the first layer).
        batch_dims: Batch dim of an input by name, where it is not dim 0; None for an input without one.
        prediction: Name of the output leaf that is the prediction; default `logits`, else the only floating leaf.
        prediction_only: Return the prediction alone and drop the other leaves of the output.
        task: "classification" or "regression"; default by the prediction's shape: one value
            in place of classes (`[N, 1]`, `[N, L, 1]`, `[N, 1, H, W]`) is a regression.
        inplace: Take the model's own modules instead of copies.
        options: Options of the pass, where `strategy` names one: `exits=4, head="conv"`.

    Returns:
        The dynamic model, exact at birth: its output is the static model's until training and calibration.

    Raises:
        ArgumentError: An argument that does not fit; the message says what would do.
        CaptureError: The model cannot be captured.
        PassError: No site, or an order that is not legal.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> dyn = dynamize(model, "early_exit", exits=1)
        >>> list(dyn.exits)
        ['exit0']
    """
    if isinstance(model, DynamicModule):
        given = {
            "example_inputs": example_inputs is not None,
            "batch_dims": batch_dims is not None,
            "prediction": prediction is not None,
            "prediction_only": prediction_only,
            "task": task is not None,
            "inplace": inplace,
        }
        if wrong := [name for name, is_given in given.items() if is_given]:
            raise ArgumentError(wrong[0], found="a value", expected="none: a dynamic model has it already")
        return _extend(model, resolve(strategy, options, ran=[step.strategy for step in model.recipe.steps]))
    passes = resolve(strategy, options)
    graph, recipe = begin(
        model,
        example_inputs=example_inputs,
        batch_dims=batch_dims,
        prediction=prediction,
        prediction_only=prediction_only,
        task=task,
        inplace=inplace,
    )
    return rewrite(graph, recipe, passes)


def begin(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    batch_dims: Mapping[str, int | None] | None = None,
    prediction: str | None = None,
    prediction_only: bool = False,
    task: str | None = None,
    inplace: bool = False,
) -> tuple[Graph, Recipe]:
    """Capture a model for rewriting; arguments and errors as for `dynamize`.

    Returns:
        The graph, and the recipe without any pass yet.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", found=type(model).__name__, expected="a torch.nn.Module")
    if isinstance(model, DynamicModule):
        raise ArgumentError("model", found="a dynamic model", expected="a static one")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("model", found="a scripted model", expected="the nn.Module that it was made from")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ArgumentError("model", found="what torch.compile returned", expected="its model, `model._orig_mod`")
    if isinstance(getattr(model, "dynamic", None), DynamicModule):
        raise ArgumentError("model", found="a lowered model", expected="the model it was lowered from, its `dynamic`")
    if task not in (None, "classification", "regression"):
        raise ArgumentError("task", found=repr(task), expected="'classification' or 'regression'")
    args, kwargs, origin = infer_inputs(model, example_inputs)
    try:
        graph = capture(
            model,
            args,
            kwargs,
            batch_dims=batch_dims,
            prediction=prediction,
            prediction_only=prediction_only,
            inplace=inplace,
        )
    except ExampleInputsError as error:
        if example_inputs is not None:
            raise
        found = f"None; inputs were taken from {origin}, but {error}"
        raise ArgumentError("example_inputs", found=found, expected=f"a call like {CALL}") from error
    inferred = _infer_task(graph)
    if task == "classification" and inferred == "regression":
        shape = list(spec(graph.prediction).shape)
        raise ArgumentError("task", found=f"'classification' of a prediction {shape}", expected="two classes or more")
    graph.task = task or inferred
    return graph, describe(graph, model, origin, prediction_only=prediction_only)


def rewrite(graph: Graph, recipe: Recipe, passes: Sequence[Pass]) -> DynamicModule:
    """Apply passes to a captured model, in order.

    Args:
        graph: Changed in place, and taken over by the dynamic model.
        recipe: Gets a step for each pass.
        passes: In an order that `resolve` has checked.

    Raises:
        PassError: No site, or a rewrite that is not legal.
    """
    _apply(graph, recipe, passes)
    return DynamicModule(graph, recipe)


def _extend(dyn: DynamicModule, passes: Sequence[Pass]) -> DynamicModule:
    """A copy with further passes."""
    made, now = dyn.recipe.dtype, floating_dtype(dyn)
    if now != made:
        raise ArgumentError("model", found=f"one cast to {now}", expected=f"{made}, as converted; cast it afterwards")
    grown = copy.deepcopy(dyn)
    sizes = zip(grown.graph.inputs, grown.graph.batch_dims, strict=True)
    batch = next(tensor.shape[dim] for tensor, dim in sizes if dim is not None)
    grown.graph.inputs = tuple(grown.examples(batch))  # on the device that the model now has
    _apply(grown.graph, grown.recipe, passes)
    grown.refresh()
    return grown


def _apply(graph: Graph, recipe: Recipe, passes: Sequence[Pass]) -> None:
    for item in passes:
        sites, refused = item.apply(graph, ran=[step.strategy for step in recipe.steps])
        recipe.steps.append(_step(item, sites, refused))


def describe(graph: Graph, model: nn.Module, origin: str, *, prediction_only: bool = False) -> Recipe:
    """The recipe of a capture, without any pass yet."""
    names = graph.signature.names
    return Recipe(
        dyncompile=importlib.metadata.version("dyncompile"),
        torch=str(torch.__version__),
        model=class_name(model),
        state=state_shapes(model),
        dtype=floating_dtype(model),
        mode="train" if graph.mode == "train" else "eval",
        task="regression" if graph.task == "regression" else "classification",
        inputs=origin,
        batch_dims=dict(zip(names, graph.batch_dims, strict=True)),
        prediction=graph.signature.output_names[graph.signature.prediction],
        prediction_only=prediction_only,
    )


def _infer_task(graph: Graph) -> str:
    shape = spec(graph.prediction).shape
    return "regression" if len(shape) < 2 or shape[class_dim(spec(graph.prediction))] == 1 else "classification"


def _step(item: Pass, sites: list[Site], refused: list[Refusal]) -> Step:
    return Step(
        strategy=item.name,
        options={name: encode_option(value) for name, value in item.options().items()},
        sites=[dataclasses.asdict(site) for site in sites],
        refused=[dataclasses.asdict(refusal) for refusal in refused],
    )


__all__ = ["begin", "describe", "dynamize", "rewrite"]
