"""Arguments that commands share, and what they mean."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dyncompile.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dyncompile.passes import Pass

Model = Annotated[
    str,
    typer.Argument(
        help="The static model: package.module:factory or file.py:factory, a callable that returns an nn.Module.",
        show_default=False,
    ),
]
Option = Annotated[
    list[str],
    typer.Option(
        "--option",
        "-o",
        help="Option of the technique, such as exits=4 or head=conv; with several techniques early_exit.exits=4.",
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(help="Shape of one input, such as 3,224,224; inferred where left out."),
]


def read_model(spec: str) -> "nn.Module":
    """The model that a factory makes.

    Raises:
        ArgumentError: No such factory, it fails, or it makes something else.
    """
    from torch import nn

    from dyncompile.demo.factory import make

    return make(spec, nn.Module, argument="model")


def read_example(shape: str | None) -> "tuple[Tensor, ...] | None":
    """Two samples of a shape, if one is given.

    Raises:
        ArgumentError: No positive sizes.
    """
    import torch

    if shape is None:
        return None
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split(",")]
    if min(sizes) < 1:
        expected = "positive sizes without the batch, such as 3,224,224"
        raise ArgumentError("input_shape", found=repr(shape), expected=expected)
    return (torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0)),)


def read_passes(strategies: list[str], options: list[str]) -> "list[list[Pass]]":
    """For each strategy its passes, in order.

    Args:
        strategies: Each names passes, joined by commas: registered ones, or `file.py:Class`.
        options: `name=value` where there is one pass, else `pass.name=value`.

    Raises:
        ArgumentError: A strategy, option or value that does not fit.
        PassError: An order that is not legal.
    """
    from dyncompile.demo.factory import make
    from dyncompile.passes import Pass, resolve

    chains = [[name.strip() for name in strategy.split(",")] for strategy in strategies]
    given = _options(options, sorted({name for chain in chains for name in chain}))

    def named(name: str) -> Pass:
        if ":" in name:
            return make(name, Pass, argument="strategy", options=given[name])  # type: ignore[type-abstract]
        return resolve(name, given[name])[0]

    return [resolve([named(name) for name in chain], {}) for chain in chains]


def _options(options: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Options by the pass that they belong to."""
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in options:
        left, equals, value = option.partition("=")
        owner, _, name = left.rpartition(".")
        if not equals:
            raise ArgumentError("option", found=repr(option), expected="name=value")
        if not owner and len(names) > 1:
            expected = f"the pass before it, such as {names[0]}.{option}"
            raise ArgumentError("option", found=f"{option!r} with {len(names)} passes", expected=expected)
        if owner and owner not in given:
            raise ArgumentError("option", found=repr(option), expected=f"one of {names} before the last dot")
        try:
            given[owner or names[0]][name] = json.loads(value)
        except json.JSONDecodeError:
            given[owner or names[0]][name] = value
    return given
