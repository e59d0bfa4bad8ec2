"""The report: one HTML page that needs nothing but itself."""

from dyncompile.reporting.page import Measurement, write_report

__all__ = ["Measurement", "write_report"]
