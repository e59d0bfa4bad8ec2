"""Values that a user passes, checked where they enter: a mistake is told by the argument's name."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from dyncompile.errors import ArgumentError


def whole(argument: str, value: Any, *, least: int) -> int:
    """A whole number from `least` on.

    Raises:
        ArgumentError: It is none.

    >>> whole("epochs", 3, least=1)
    3
    """
    if isinstance(value, int | Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    raise ArgumentError(argument, found=repr(value), expected=f"a whole number, at least {least}")


def positive(argument: str, value: Any) -> float:
    """A finite number above 0.

    Raises:
        ArgumentError: It is none.
    """
    if _is_number(value) and 0 < value < math.inf:
        return float(value)
    raise ArgumentError(argument, found=repr(value), expected="a number above 0")


def share(argument: str, value: Any) -> float:
    """A number in [0, 1].

    Raises:
        ArgumentError: It is none.
    """
    if _is_number(value) and 0 <= value <= 1:
        return float(value)
    raise ArgumentError(argument, found=repr(value), expected="a number in [0, 1]")


def not_negative(argument: str, values: Iterable[Any]) -> None:
    """Check that all are numbers from 0 on.

    Raises:
        ArgumentError: They are not.
    """
    found = [value for value in values if not (_is_number(value) and 0 <= value < math.inf)]
    if found:
        raise ArgumentError(argument, found=repr(found[0]), expected="numbers that are not negative")


def sizes(argument: str, values: Any) -> list[int]:
    """Whole numbers from 1 on, ascending, each once.

    Raises:
        ArgumentError: There is another among them, or it is no sequence of them.

    >>> sizes("buckets", (8, 2, 8))
    [2, 8]
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ArgumentError(argument, found=repr(values), expected="several whole numbers, such as [1, 16]")
    return sorted({whole(argument, value, least=1) for value in values})


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
