"""Thresholds with a guarantee: temperatures, joint search, risk control."""

from dyncompile.calibration.calibration import calibrate
from dyncompile.calibration.losses import accuracy_drop, disagreement, excess_error
from dyncompile.calibration.result import Calibration, ExitSetting, FrontierPoint

__all__ = [
    "Calibration",
    "ExitSetting",
    "FrontierPoint",
    "accuracy_drop",
    "calibrate",
    "disagreement",
    "excess_error",
]
