"""Turn a trained static PyTorch model into a dynamic one that spends compute only where the input needs it."""

from typing import Any

from dyncompile.conversion import dynamize
from dyncompile.module import DynamicModule, Trace
from dyncompile.ops import select, switch

# What needs more than torch is imported when it is first used, so that `import dyncompile` stays lean.
_LAZY = {
    "Calibration": "dyncompile.calibration",
    "calibrate": "dyncompile.calibration",
    "export": "dyncompile.exporting",
    "finetune": "dyncompile.training",
    "load": "dyncompile.storage",
    "lower": "dyncompile.lowering",
    "save": "dyncompile.storage",
}

__all__ = [
    "Calibration",
    "DynamicModule",
    "Trace",
    "calibrate",
    "dynamize",
    "export",
    "finetune",
    "load",
    "lower",
    "save",
    "select",
    "switch",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dyncompile' has no attribute {name!r}")
