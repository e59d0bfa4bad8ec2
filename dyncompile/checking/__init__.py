"""Whether a conversion keeps its contracts: exact at birth, trainable, lowered and exported equal, where it was."""

from dyncompile.checking.baseline import Baseline, Snapshot
from dyncompile.checking.conversion import Settings, check, compare
from dyncompile.checking.result import Report, Result

__all__ = ["Baseline", "Report", "Result", "Settings", "Snapshot", "check", "compare"]
