"""Save a dynamic model as recipe and weights; load it by replaying on the static model.

A folder holds `recipe.json` and `model.safetensors`: the state of the dynamic model and, under
`example_inputs.`, the inputs that the static model is captured with again, with what it then has
to give. Nothing is pickled.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dyncompile.capture import capture
from dyncompile.capture.check import same, undisturbed
from dyncompile.drafts import flush
from dyncompile.errors import ArgumentError, DyncompileError, RecipeError
from dyncompile.graph import Graph
from dyncompile.module import DynamicModule
from dyncompile.passes import Pass, Site, available
from dyncompile.passes.base import GROUP
from dyncompile.recipe import (
    VERSION,
    Recipe,
    Step,
    TensorName,
    decode,
    decode_option,
    encode,
    floating_dtype,
    state_shapes,
)

RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"

_INPUTS = "example_inputs."
_OUTPUT = "example_output"
_ALIASES = "aliases"
# Capture compares a model with itself; here devices, dtypes and versions of torch may differ.
_SLACK = 25


def save(dyn: DynamicModule, folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Save a dynamic model.

    Written all at once: whatever stops it, the folder holds the model that was there before, or
    this one. It also holds the example inputs (three samples) that the model was captured with.

    Args:
        dyn: A dynamic model, on any device, in any mode.
        folder: Where to; made if it is not there. A model saved there before is replaced.
        force: Also replace a `recipe.json` or `model.safetensors` that `save` did not write.

    Raises:
        ArgumentError: `folder` is a file, or holds such files of another program.
        RecipeError: An option, argument or state that cannot be written.
    """
    if not isinstance(dyn, DynamicModule):
        raise ArgumentError("dyn", found=type(dyn).__name__, expected="what dynamize or load returns")
    folder = _path(folder)
    _check_free(folder, force=force)
    for step in dyn.recipe.steps:
        for option, value in step.options.items():
            try:
                decode_option(value)
            except RecipeError as error:
                raise RecipeError(f"option `{option}` of `{step.strategy}` cannot be saved: {error}") from error
    signature = dyn.graph.signature
    names = iter(signature.names)
    leaves = [
        signature.constants[i] if i in signature.constants else TensorName(next(names))
        for i in range(signature.spec.num_leaves)
    ]
    called = pytree.tree_unflatten(leaves, signature.spec)
    arguments = {name: encode(value) for name, value in called.items()}
    inputs = dict(zip(signature.names, dyn.graph.inputs, strict=True))
    examples = {f"{_INPUTS}{name}": tensor for name, tensor in inputs.items()}
    examples[_OUTPUT] = _prediction(dyn, inputs)
    tensors, aliases = _entries(dyn, examples)

    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{WEIGHTS}.{os.getpid()}"
    draft = folder / f".{RECIPE}.{os.getpid()}"
    try:
        try:
            save_file(tensors, staged, {_ALIASES: json.dumps(aliases)})
        except SafetensorError as error:
            raise RecipeError(f"the weights cannot be written: {error}") from error
        digest = _digest(staged)
        recipe = dyn.recipe.model_copy(update={"arguments": arguments, "by_name": signature.by_name, "weights": digest})
        draft.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
        # The recipe names its weights by hash. So the moment it is replaced decides which model
        # the folder holds, and weights that wait for their final name are found by that hash.
        waiting = _waiting(folder, digest)
        staged.replace(waiting)
        flush(waiting, draft, folder)
        draft.replace(folder / RECIPE)
        flush(folder)
        waiting.replace(folder / WEIGHTS)
        flush(folder)
    finally:
        staged.unlink(missing_ok=True)
        draft.unlink(missing_ok=True)
    for name in (RECIPE, WEIGHTS):
        for left in folder.glob(f".{name}.*"):  # by saves that were killed
            left.unlink(missing_ok=True)


def load(folder: str | os.PathLike[str], model: nn.Module) -> DynamicModule:
    """Load a dynamic model.

    A recipe may name functions to import (a criterion of your own), as a configuration file may:
    load what you trust.

    Args:
        folder: What `save` wrote.
        model: The static model, of the same architecture. Its weights do not matter, and it is
            left as it was.

    Returns:
        The dynamic model, with the saved weights, thresholds, temperatures and enabled flags, on
        the device and in the dtype and mode of `model`.

    Raises:
        RecipeError: The folder or a file in it is missing, corrupt, truncated, too new or foreign;
            or `model` has another architecture: the message says which entries of its state differ.
    """
    if isinstance(model, DynamicModule) or not isinstance(model, nn.Module):
        raise ArgumentError("model", found=type(model).__name__, expected="the static model, a torch.nn.Module")
    folder = _path(folder)
    recipe = _read_recipe(folder)
    weights = _find_weights(folder, recipe)
    _check_state(folder, recipe, model)
    state = _read_weights(weights)
    inputs = {name.removeprefix(_INPUTS): state.pop(name) for name in list(state) if name.startswith(_INPUTS)}
    expected = state.pop(_OUTPUT, None)
    if expected is None or not expected.is_floating_point():
        raise RecipeError(f"{weights} is not what dyncompile.save wrote: it has no `{_OUTPUT}`")
    try:
        graph = _recapture(recipe, model, _moved(inputs, recipe, model))
        _replay(recipe, graph)
        dyn = DynamicModule(graph, recipe)
    except Exception as error:  # a recipe that was edited, or a pass of another version, may stop anywhere
        made = f"made for `{recipe.model}` with torch {recipe.torch}"
        raise RecipeError(f"{folder}: the recipe, {made}, cannot be replayed: {_reason(error)}") from error
    try:
        dyn.load_state_dict(state)
    except RuntimeError as error:
        raise RecipeError(f"{weights}: the weights do not fit the recipe: {error}") from error
    actual = _prediction(dyn, inputs)
    coarser = max(actual.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if not same(actual.to(coarser), expected.to(actual.device, coarser), slack=_SLACK):
        raise RecipeError(
            f"{folder}: the `model` given has the state of `{recipe.model}` but computes something "
            "else: with the saved weights, its output for the example inputs is another"
        )
    return dyn


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DyncompileError) else f"{type(error).__name__}: {error}"


def _path(folder: object) -> Path:
    if isinstance(folder, str) or (isinstance(folder, os.PathLike) and isinstance(os.fspath(folder), str)):
        return Path(folder)
    raise ArgumentError("folder", found=repr(folder), expected="a path")


def _prediction(dyn: DynamicModule, inputs: Mapping[str, Tensor]) -> Tensor:
    """Full-depth prediction for the example inputs, in evaluation."""
    moved = _moved(inputs, dyn.recipe, dyn)
    signature = dyn.graph.signature
    args, kwargs = signature.call_arguments([moved[name] for name in signature.names])
    with undisturbed(dyn), torch.no_grad():
        return dyn.eval().trace(*args, **kwargs).final


def _moved(inputs: Mapping[str, Tensor], recipe: Recipe, model: nn.Module) -> dict[str, Tensor]:
    """Example inputs where the model is now, in its present dtype if they had its dtype then."""
    home = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    then, now = getattr(torch, recipe.dtype, None), getattr(torch, floating_dtype(model))
    return {k: t.to(home, now if t.dtype == then else t.dtype) for k, t in inputs.items()}


# --- writing -------------------------------------------------------------------------------------


def _check_free(folder: Path, *, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ArgumentError("folder", found=f"{folder}, a file", expected="a folder")
    for name in (RECIPE, WEIGHTS):
        if (folder / name).is_dir():
            raise ArgumentError("folder", found=f"{folder / name}, a folder", expected="another folder")
    if force:
        return
    taken = [name for name in (RECIPE, WEIGHTS) if (folder / name).exists()]
    if not taken:
        return
    try:
        _read_recipe(folder)
    except RecipeError as error:
        raise ArgumentError(
            "folder",
            found=f"{' and '.join(taken)} not written by dyncompile, or unreadable ({error})",
            expected="another folder, or force=True to replace them",
        ) from error


def _entries(dyn: DynamicModule, examples: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and for each entry that is one of them again (tied weights) its name."""
    state = dyn.state_dict()
    clashes = state.keys() & examples.keys()
    if clashes:
        raise RecipeError(f"the model's state has the reserved name `{min(clashes)}`; rename it")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in {**state, **examples}.items():
        if not isinstance(value, Tensor):
            kind = type(value).__qualname__
            raise RecipeError(f"the state `{name}` is a {kind}; only tensors can be saved")
        where = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and where in first:
            aliases[name] = first[where]
            continue
        first[where] = name
        whole = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
        tensors[name] = value.detach() if whole else value.detach().contiguous().clone()
    return tensors, aliases


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _waiting(folder: Path, digest: str) -> Path:
    """Weights that are complete but have not yet replaced those before."""
    return folder / f".{WEIGHTS}.{digest}"


# --- reading -------------------------------------------------------------------------------------


def _read_recipe(folder: Path) -> Recipe:
    path = folder / RECIPE
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder")
    if not path.is_file():
        raise RecipeError(f"{folder}: no {RECIPE} in it: not a folder that dyncompile.save wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is corrupt or truncated: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "dyncompile-recipe":
        raise RecipeError(f'{path} is no recipe of dyncompile: it does not say `"format": "dyncompile-recipe"`')
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(
            f"{path} has format version {version}, of dyncompile {content.get('dyncompile')}; "
            f"this one reads up to {VERSION}: upgrade dyncompile"
        )
    try:
        return Recipe.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path} is corrupt: `{place}`: {first['msg']}") from error


def _find_weights(folder: Path, recipe: Recipe) -> Path:
    """The weights that belong to a recipe: under their own name, or waiting for it after a kill."""
    path, waiting = folder / WEIGHTS, _waiting(folder, recipe.weights)
    for candidate in (path, waiting):
        if candidate.is_file() and _digest(candidate) == recipe.weights:
            return candidate
    if not path.is_file():
        raise RecipeError(f"{folder}: no {WEIGHTS} beside the recipe")
    raise RecipeError(f"{path} is corrupt, truncated or not of this recipe: its SHA-256 differs")


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            aliases = json.loads(file.metadata()[_ALIASES])
            return state | {name: state[other] for name, other in aliases.items()}
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} is not what dyncompile.save wrote: {error}") from error


def _check_state(folder: Path, recipe: Recipe, model: nn.Module) -> None:
    """The static model must have the state that was captured: the same names, the same shapes."""
    found = state_shapes(model)
    differences = [
        *(f"`{k}` is missing" for k in recipe.state.keys() - found.keys()),
        *(f"`{k}` is not in the recipe" for k in found.keys() - recipe.state.keys()),
        *(f"`{k}` is {found[k]} instead of {v}" for k, v in recipe.state.items() if found.get(k, v) != v),
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5])
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise RecipeError(
            f"{folder}: made for `{recipe.model}`, of another architecture than the `model` given, "
            f"a {type(model).__qualname__}: {shown}{more}"
        )


def _recapture(recipe: Recipe, model: nn.Module, inputs: Mapping[str, Tensor]) -> Graph:
    arguments = {name: decode(value, inputs) for name, value in recipe.arguments.items()}
    bound = inspect.signature(model.forward).bind_partial()
    bound.arguments.update(arguments)
    args, kwargs = bound.args, bound.kwargs
    if recipe.by_name:
        args, kwargs = (), {**dict(zip(bound.arguments, args, strict=False)), **kwargs}
    graph = capture(
        model,
        args,
        kwargs,
        batch_dims=recipe.batch_dims,
        prediction=recipe.prediction,
        prediction_only=recipe.prediction_only,
    )
    if graph.mode != recipe.mode:
        raise RecipeError(f"the model was captured in {recipe.mode} mode, and now only in {graph.mode} mode")
    graph.task = recipe.task
    # Capture disturbs its examples; saved again and again, they would drift.
    graph.inputs = tuple(inputs[name] for name in graph.signature.names)
    return graph


def _replay(recipe: Recipe, graph: Graph) -> None:
    done: list[str] = []
    for step in recipe.steps:
        try:
            sites = [Site(**site) for site in step.sites]
        except TypeError as error:
            raise RecipeError(f"a site of `{step.strategy}` is malformed: {error}") from error
        _pass(step).apply(graph, ran=done, sites=sites)
        done.append(step.strategy)


def _pass(step: Step) -> Pass:
    known = available()
    if step.strategy not in known:
        raise RecipeError(
            f"the pass `{step.strategy}` is not installed: no package offers the entry point "
            f"`{step.strategy}` in the group `{GROUP}`"
        )
    options = {name: decode_option(value) for name, value in step.options.items()}
    try:
        return known[step.strategy](**options)
    except TypeError as error:
        raise RecipeError(f"the installed pass `{step.strategy}` has other options: {error}") from error
