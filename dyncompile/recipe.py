"""What was done to a model, as JSON: replay it, save it, load it."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from torch import nn

VERSION = 1


class Step(pydantic.BaseModel):
    """One pass: its name, options and sites."""

    model_config = pydantic.ConfigDict(extra="forbid")

    strategy: str
    options: dict[str, Any] = {}
    sites: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []


class Recipe(pydantic.BaseModel):
    """How a dynamic model was made from its static model.

    Attributes:
        version: Format of this recipe.
        dyncompile: Version of the package that wrote it.
        torch: Version of torch.
        model: Qualified class name of the static model.
        fingerprint: Hash over names, shapes and dtypes of the static model's state.
        mode: "train" or "eval": how the model was captured.
        task: "classification" or "regression".
        inputs: Where the example inputs came from.
        batch_dims: Batch dim of each input by name.
        prediction: Name of the output leaf that is the prediction.
        prediction_only: The other leaves of the output were dropped.
        steps: The passes, in order.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    format: Literal["dyncompile-recipe"] = "dyncompile-recipe"
    version: int = VERSION
    dyncompile: str
    torch: str
    model: str
    fingerprint: str
    mode: Literal["train", "eval"] = "train"
    task: Literal["classification", "regression"] = "classification"
    inputs: str
    batch_dims: dict[str, int | None] = {}
    prediction: str | None = None
    prediction_only: bool = False
    steps: list[Step] = []


def fingerprint(state: Mapping[str, Any]) -> str:
    """Hash of names, shapes and dtypes of a state: equal for the same architecture, whatever the weights."""
    text = "\n".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in sorted(state.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def class_name(model: nn.Module) -> str:
    """Qualified class name of a model."""
    return f"{type(model).__module__}.{type(model).__qualname__}"
