"""Thresholds and gates' knobs with a guarantee: temperatures, joint search, risk control."""

from dyncompile.calibration.calibration import calibrate
from dyncompile.calibration.losses import accuracy_drop, disagreement, excess_error
from dyncompile.calibration.result import Calibration, ExitSetting, FrontierPoint, GateSetting

__all__ = [
    "Calibration",
    "ExitSetting",
    "FrontierPoint",
    "GateSetting",
    "accuracy_drop",
    "calibrate",
    "disagreement",
    "excess_error",
]
