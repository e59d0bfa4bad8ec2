"""Errors for the user: which argument, what was found, what would do."""

import importlib
from functools import partial
from types import ModuleType
from typing import Any


class DyncompileError(Exception):
    """Base of every error that dyncompile raises on purpose."""


class ArgumentError(DyncompileError, ValueError):
    """An argument has a value that cannot be used.

    Args:
        argument: Name of the argument, as the caller writes it.
        found: What was passed, in words or as a value.
        expected: What would do.
    """

    def __init__(self, argument: str, *, found: object, expected: str) -> None:
        self.argument = argument
        self.found = found
        self.expected = expected
        super().__init__(f"`{argument}`: found {found}; expected {expected}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way back from a DataLoader's worker."""
        rebuild = partial(type(self), found=str(self.found), expected=self.expected)
        return rebuild, (self.argument,)


class DataError(ArgumentError):
    """Data that cannot be trained on or calibrated with."""


class UnknownStrategyError(ArgumentError):
    """No pass of that name is registered."""


class CaptureError(DyncompileError):
    """The model cannot be brought into a graph; the message says where it stopped."""


class ExampleInputsError(CaptureError):
    """The model stops on its example inputs."""


class MixedSamplesError(CaptureError):
    """The model mixes the samples of a batch, so no part of a batch can be run alone."""


class PassError(DyncompileError):
    """A rewriting pass was refused or produced an illegal graph."""


class InexactError(PassError):
    """A rewriting pass changed what the model computes before any training."""


class CalibrationError(DyncompileError):
    """Thresholds cannot be calibrated with the data and guarantee asked for."""


class UnreachableTargetError(CalibrationError):
    """No admissible thresholds reach the target; the message gives the best reachable."""


class LoweringError(DyncompileError):
    """The dynamic model cannot be lowered as asked."""


class ExportError(DyncompileError):
    """The dynamic model cannot be exported as asked."""


class InvalidExportError(ExportError):
    """The exported file does not run, or does not compute what the model does."""


class BaselineError(DyncompileError):
    """The baseline of a check is missing, corrupt or too new."""


class RecipeError(DyncompileError):
    """A saved model is corrupt, truncated, too new or made for another model."""


class MissingExtraError(DyncompileError, ImportError):
    """An optional dependency is absent."""


def require(module: str, *, extra: str) -> Any:
    """Import an optional dependency.

    Args:
        module: Dotted name of the module to import.
        extra: The extra of dyncompile that installs it.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        imported: ModuleType = importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"`{module}` is needed here and is not installed: pip install 'dyncompile[{extra}]'"
        ) from error
    return imported
