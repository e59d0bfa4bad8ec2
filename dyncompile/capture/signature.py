"""How a model is called: from the user's arguments to flat tensors and back to the user's structure of outputs."""

import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncompile.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """The calling convention that a captured model keeps.

    Attributes:
        parameters: The forward's own signature, to bind positional and keyword arguments alike.
        arguments: Names of the arguments that the example passed, in the forward's order.
        spec: Structure of those arguments.
        constants: Leaves that are no tensors, by position; calls must pass the same.
        names: A readable name for each tensor leaf, in order: `x`, `batch.0`, ...
        output: Structure of the output.
        output_names: A readable name for each leaf of the output.
        prediction: Which leaf of the output is the prediction.
        by_name: The example passed every argument by keyword; so do programs that are made of the model.
    """

    parameters: inspect.Signature
    arguments: tuple[str, ...]
    spec: pytree.TreeSpec
    constants: dict[int, Any]
    names: tuple[str, ...]
    output: pytree.TreeSpec | None = None
    output_names: tuple[str, ...] = ()
    prediction: int = 0
    by_name: bool = False

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Signature":
        """Read the signature off one call."""
        parameters = inspect.signature(model.forward)
        bound = _bind(parameters, args, kwargs, [])
        named, spec = pytree.tree_flatten_with_path(bound)
        constants = {i: v for i, (_, v) in enumerate(named) if not isinstance(v, Tensor)}
        names = tuple(_name(path) for path, value in named if isinstance(value, Tensor))
        if not names:
            raise ArgumentError("example_inputs", found="no tensor", expected="at least one tensor")
        return cls(
            parameters=parameters,
            arguments=tuple(bound),
            spec=spec,
            constants=constants,
            names=names,
            by_name=not args,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Signature":
        """Itself, since nothing in it changes; a copy of a `TreeSpec` warns of a class that torch retires."""
        return self

    @property
    def single(self) -> bool:
        """One argument that is a tensor: the call needs no flattening."""
        return len(self.arguments) == 1 and self.spec.num_leaves == 1 and not self.constants

    def flat(self) -> inspect.Signature:
        """The signature of a forward that takes the tensors alone, one by one."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [re.sub(r"\W", "_", name) for name in self.names]
        unique = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
        return inspect.Signature([inspect.Parameter(name, kind) for name in unique])

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of `names`.

        Raises:
            ArgumentError: The call has another structure, or other constants, than the captured
                one.
        """
        if self.single and not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            return [args[0]]
        leaves, spec = pytree.tree_flatten(_bind(self.parameters, args, kwargs, self.arguments))
        if spec != self.spec:
            raise ArgumentError(
                "inputs",
                found=f"arguments {_describe(spec)}",
                expected=f"those the model was captured with: {_describe(self.spec)}",
            )
        for i, value in self.constants.items():
            if isinstance(leaves[i], Tensor) or leaves[i] != value:
                raise ArgumentError(
                    "inputs",
                    found=f"{leaves[i]!r} as a constant argument",
                    expected=f"{value!r}, which was captured; capture again for another",
                )
        tensors = [leaf for i, leaf in enumerate(leaves) if i not in self.constants]
        for name, leaf in zip(self.names, tensors, strict=True):
            if not isinstance(leaf, Tensor):
                raise ArgumentError(name, found=repr(leaf), expected="a tensor, as captured")
        return tensors

    def call_arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the static model from flat tensors: the inverse of `flatten`."""
        queue = iter(tensors)
        leaves = [self.constants[i] if i in self.constants else next(queue) for i in range(self.spec.num_leaves)]
        values: dict[str, Any] = pytree.tree_unflatten(leaves, self.spec)
        bound = self.parameters.bind_partial()
        bound.arguments.update(values)
        args, kwargs = bound.args, bound.kwargs
        return ((), {**dict(zip(values, args, strict=False)), **kwargs}) if self.by_name else (args, kwargs)

    def unflatten(self, leaves: tuple[Any, ...] | list[Any]) -> Any:
        """The user's structure of outputs."""
        assert self.output is not None
        if self.output.is_leaf():
            return leaves[0]
        return pytree.tree_unflatten(list(leaves), self.output)

    def with_output(self, output: Any, prediction: str | None) -> "Signature":
        """The same signature, with the structure of one output.

        Args:
            output: What the model returned.
            prediction: Name of the leaf that is the prediction, a floating one if there is any; None takes `logits`,
                else the only floating leaf.

        Raises:
            ArgumentError: No leaf of that name, or several that could be meant.
        """
        named = named_leaves(output)
        names = tuple(name for name, _ in named)
        tensors = [i for i, (_, v) in enumerate(named) if isinstance(v, Tensor)]
        floating = [i for i in tensors if named[i][1].is_floating_point()]
        if prediction is not None:
            chosen = [i for i in floating or tensors if names[i] == prediction]
        else:
            chosen = [i for i in floating if names[i].split(".")[-1] == "logits"] or floating
        if len(chosen) != 1:
            raise ArgumentError(
                "prediction",
                found=repr(prediction) if prediction else f"{len(chosen)} floating leaves",
                expected=f"the name of one of {[names[i] for i in floating]}",
            )
        return dataclasses.replace(self, output=pytree.tree_structure(output), output_names=names, prediction=chosen[0])

    def only_prediction(self) -> "Signature":
        """The same signature for a model that returns its prediction alone."""
        name = self.output_names[self.prediction]
        return dataclasses.replace(self, output=pytree.tree_structure(0), output_names=(name,), prediction=0)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with a readable name: `logits`, `hidden_states.0`, `output` where there is one alone."""
    return [(_name(path) or "output", leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def _bind(
    parameters: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], captured: Collection[str]
) -> dict[str, Any]:
    """Arguments by name, in the forward's order: what was captured, and what is not at its default."""
    try:
        bound = parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError("inputs", found=str(error), expected=f"a call like {parameters}") from None
    given = {n for n, v in bound.arguments.items() if not _same(v, parameters.parameters[n].default)}
    bound.apply_defaults()
    return {n: v for n, v in bound.arguments.items() if n in given or (n in captured and v is not None)}


def _same(value: Any, default: Any) -> bool:
    # By type first: a tensor compares element by element, and 1 == True.
    return value is default or (
        type(value) is type(default) and isinstance(value, bool | int | float | str) and value == default
    )


def _name(path: pytree.KeyPath) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _describe(spec: pytree.TreeSpec) -> str:
    return str(pytree.tree_unflatten(["."] * spec.num_leaves, spec))
