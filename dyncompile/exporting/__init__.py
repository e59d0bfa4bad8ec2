"""Export: a dynamic model as ONNX that skips in onnxruntime, or as a program of torch that loads without dyncompile."""

from dyncompile.exporting.files import export
from dyncompile.exporting.settings import set_knobs

__all__ = ["export", "set_knobs"]
