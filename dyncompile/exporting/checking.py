"""What an exported file gives, against what the dynamic model gives."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from dyncompile.capture.check import distance, same
from dyncompile.errors import InvalidExportError, require
from dyncompile.module import DynamicModule

Arrays = Mapping[str, np.ndarray]

Run = Callable[[Arrays], Arrays]
"""A model in onnxruntime: from inputs to outputs, by name."""


def session(path: Path) -> Any:
    """A session of onnxruntime on the processor.

    Raises:
        InvalidExportError: onnxruntime refuses the file.
    """
    runtime = require("onnxruntime", extra="export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InvalidExportError(f"onnxruntime refuses what was exported: {error}") from error


def running(loaded: Any) -> Run:
    """A session as a function."""
    names = [output.name for output in loaded.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        return dict(zip(names, loaded.run(names, dict(inputs)), strict=True))

    return run


def on_arrays(run: Run) -> Callable[[Mapping[str, Tensor]], Arrays]:
    """The same from tensors; numpy has no bfloat16, and then the processor's onnxruntime has not either."""
    return lambda inputs: run({name: tensor.numpy() for name, tensor in inputs.items()})


def compare(run: Callable[[Mapping[str, Tensor]], Mapping[str, Any]], dyn: DynamicModule) -> None:
    """Run an exported model on the example inputs, at their batch size and two others.

    Args:
        run: The exported model: from inputs on the processor to outputs, tensors or arrays, by name.
        dyn: What it was exported from.

    Raises:
        InvalidExportError: It fails, or an output or decision differs.
    """
    position = dyn._batched()
    example = dyn.graph.inputs[position].shape[dyn.graph.batch_dims[position] or 0]
    for batch in dict.fromkeys((int(example), 1, int(example) + 3)):
        inputs = dyn.examples(batch)
        names = dyn.graph.signature.names
        try:
            found = run({name: t.cpu() for name, t in zip(names, inputs, strict=True)})
        except Exception as error:
            raise InvalidExportError(f"the exported model fails at batch size {batch}: {error}") from error
        if why := differences(found, dyn, inputs):
            raise InvalidExportError(f"the exported model computes something else at batch size {batch}: {why}")


def differences(found: Mapping[str, Any], dyn: DynamicModule, inputs: list[Tensor]) -> str:
    """In what an exported model's outputs and decisions differ from the dynamic model's; empty if in nothing.

    Args:
        found: Its outputs by name.
        dyn: The dynamic model, in eval mode.
        inputs: What both were given.
    """
    signature = dyn.graph.signature
    args, kwargs = signature.call_arguments(inputs)
    with torch.no_grad():
        trace = dyn.trace(*args, **kwargs)
    for name, leaf in zip(signature.output_names, pytree.tree_leaves(trace.output), strict=True):
        if isinstance(leaf, Tensor):
            value = torch.as_tensor(found[name])
            if not same(value, leaf.cpu()):
                return f"output `{name}` {distance(value, leaf.cpu())}"
    for name, decision in trace.decisions.items():
        if (array := found.get(f"decisions.{name}")) is not None:
            value, wanted = torch.as_tensor(array), decision.cpu().long().flatten()
            wrong = (value >= 0) & (value != wanted)
            if bool(wrong.any()):
                return f"decision `{name}` of rows {wrong.nonzero().flatten().tolist()[:5]}"
    return ""
