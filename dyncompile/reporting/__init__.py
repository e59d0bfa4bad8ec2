"""The report: one HTML page that needs nothing but itself; and pictures of what gates do."""

from dyncompile.reporting.gates import gate_heatmap, kept_frames, observe, skip_patterns
from dyncompile.reporting.page import Measurement, write_report

__all__ = ["Measurement", "gate_heatmap", "kept_frames", "observe", "skip_patterns", "write_report"]
