"""What onnxruntime ran, read from its profile."""

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime

_MATRICES = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")


def profiled(path, inputs, folder):
    """The outputs of a file by name, and what it ran: for each operation its kind, input shapes and output shapes.

    Args:
        path: An ONNX file.
        inputs: Tensors by name.
        folder: Where the profile goes.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {name: np.asarray(value) for name, value in inputs.items()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [
        (e["args"]["op_name"], _shapes(e["args"]["input_type_shape"]), _shapes(e["args"]["output_type_shape"]))
        for e in events
        if e["cat"] == "Node" and e["name"].endswith("_kernel_time")
    ]
    return dict(zip(names, outputs, strict=True)), ran


def _shapes(entries):
    return [shape for entry in entries for shape in entry.values()]


def flops(ran):
    """FLOPs of the convolutions and matrix products that ran; a multiply-add is two."""
    total = 0
    for kind, given, (made, *_) in [r for r in ran if r[2]]:
        if kind == "Conv":
            total += 2 * math.prod(made) * math.prod(given[1][1:])
        elif kind in _MATRICES:
            total += 2 * math.prod(made) * given[0][-1]
    return total
