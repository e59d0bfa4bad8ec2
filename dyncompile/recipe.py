"""What was done to a model, as JSON: replay it, save it, load it."""

import dataclasses
import functools
import hashlib
import importlib
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from torch import Tensor, nn

from dyncompile.errors import RecipeError

VERSION = 1

_CALLABLE = "callable"
_TENSOR = "tensor"


class Step(pydantic.BaseModel):
    """One pass: its name, options and sites.

    Attributes:
        strategy: Name of the pass.
        options: Its options; a callable one as `{"callable": "module:qualname"}`.
        sites: Where it rewrote.
        refused: Where it did not, and why.
    """

    model_config = pydantic.ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    strategy: str
    options: dict[str, Any] = {}
    sites: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []


class Recipe(pydantic.BaseModel):
    """How a dynamic model was made from its static model.

    Attributes:
        format: Tells a recipe from other JSON.
        version: Version of the format.
        dyncompile: Version of the package that wrote it.
        torch: Version of torch.
        model: Qualified class name of the static model.
        state: Shape of each entry of the static model's state, such as `[64, 3, 7, 7]`.
        dtype: Floating dtype of the static model when it was captured, such as `float32`.
        mode: "train" or "eval": how the model was captured.
        task: "classification" or "regression".
        inputs: Where the example inputs came from.
        batch_dims: Batch dim of each input by name.
        prediction: Name of the output leaf that is the prediction.
        prediction_only: The other leaves of the output were dropped.
        steps: The passes, in order.
        arguments: How the model was called, as `encode` writes it; only in a saved recipe.
        by_name: It was called by keyword arguments alone; only in a saved recipe.
        weights: SHA-256 of the weights that belong to it; only in a saved recipe.
    """

    model_config = pydantic.ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    format: Literal["dyncompile-recipe"] = "dyncompile-recipe"
    version: int = VERSION
    dyncompile: str
    torch: str
    model: str
    state: dict[str, str]
    dtype: str
    mode: Literal["train", "eval"] = "train"
    task: Literal["classification", "regression"] = "classification"
    inputs: str
    batch_dims: dict[str, int | None] = {}
    prediction: str | None = None
    prediction_only: bool = False
    steps: list[Step] = []
    arguments: dict[str, Any] = {}
    by_name: bool = False
    weights: str = ""

    @property
    def fingerprint(self) -> str:
        """Hash over the names and shapes of the state: the same for any weights."""
        text = "\n".join(f"{name} {shape}" for name, shape in sorted(self.state.items()))
        return hashlib.sha256(text.encode()).hexdigest()


def state_shapes(model: nn.Module) -> dict[str, str]:
    """Shape of each tensor of a model's state, in words."""
    return {k: str(list(v.shape)) for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def floating_dtype(model: nn.Module) -> str:
    """The dtype of a model's first floating parameter or buffer; `float32` where there is none."""
    # One after the other, since the first parameter nearly always answers and an eager call asks.
    tensors = (t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
    return next((str(t.dtype).removeprefix("torch.") for t in tensors), "float32")


def class_name(model: nn.Module) -> str:
    """Qualified class name of a model."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


# --- options -------------------------------------------------------------------------------------


def encode_option(value: Any) -> Any:
    """An option of a pass as JSON: a callable by name, a tuple as a list, all else as it is.

    A callable that its name does not lead back to (a lambda, a local function, an instance) is
    named in angle brackets, which `decode_option` refuses.
    """
    if not callable(value):
        return list(value) if isinstance(value, tuple) else value
    module = str(getattr(value, "__module__", None))
    name = getattr(value, "__qualname__", type(value).__qualname__)
    try:
        importable = _imported(module, name) == value
    except (ImportError, AttributeError, ValueError):
        importable = False
    return {_CALLABLE: f"{module}:{name}" if importable else f"{module}:<{name}>"}


def decode_option(value: Any) -> Any:
    """The inverse of `encode_option`; a callable is imported.

    Raises:
        RecipeError: It cannot be imported.
    """
    if not isinstance(value, dict) or set(value) != {_CALLABLE}:
        return value
    module, _, name = str(value[_CALLABLE]).partition(":")
    advice = "it must be a function that a module defines under that name"
    try:
        found = _imported(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"`{module}:{name}` cannot be imported; {advice}") from error
    if not callable(found):
        raise RecipeError(f"`{module}:{name}` is a {type(found).__name__}; {advice}")
    return found


def _imported(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


# --- arguments -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorName:
    """Stands for a tensor in nested arguments.

    Attributes:
        name: The input's name.
    """

    name: str


def encode(value: Any) -> Any:
    """Nested arguments as JSON, with a `TensorName` in place of each tensor.

    Raises:
        RecipeError: Something that JSON has no place for.
    """
    if isinstance(value, TensorName):
        return {_TENSOR: value.name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [encode(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    raise RecipeError(
        f"an argument of the model holds a {type(value).__qualname__}, which cannot be saved; "
        "tensors, numbers, strings, None, tuples, lists and dicts with string keys can"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `encode`.

    Raises:
        RecipeError: No such tensor, or nothing that `encode` writes.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()), (None, None))
    if len(value) == 1 and kind == _TENSOR and content in tensors:
        return tensors[str(content)]
    if len(value) == 1 and kind == "tuple" and isinstance(content, list):
        return tuple(decode(item, tensors) for item in content)
    if len(value) == 1 and kind == "dict" and isinstance(content, dict):
        return {key: decode(item, tensors) for key, item in content.items()}
    raise RecipeError(f"the recipe's arguments hold {value}, which means nothing")
