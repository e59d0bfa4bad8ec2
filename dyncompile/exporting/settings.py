"""Thresholds, temperatures and biases of an exported file: changed in the file, without another export."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dyncompile.errors import ArgumentError, ExportError, require
from dyncompile.exporting.stages import MANIFEST

Value = float | bool

KNOBS_KEY = "dyncompile.knobs"
"""The entry of a file's metadata that lists its knobs."""


def set_knobs(path: str | os.PathLike[str], values: Mapping[str, Value]) -> dict[str, Value]:
    """Change knobs of an exported ONNX model, all at once: whatever stops it, the file holds either all or none.

    Args:
        path: A file or, exported by stages, a folder.
        values: By name: `exit2` is the exit's threshold, `gate3` the gate's bias; `exit2.temperature`, `exit2.enabled`
            and so on name another.

    Returns:
        What every knob of the file is now, by its full name.

    Raises:
        ArgumentError: No such knob, or a value that it cannot have.
        ExportError: Not an ONNX file that dyncompile wrote, or one that may not be written to.
    """
    path = Path(path).resolve()
    if path.is_dir() and not (path / MANIFEST).is_file():
        raise ExportError(f"{path}: no {MANIFEST} in it: not a folder that dyncompile exported")
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    models = {file: _load(file) for file in files}
    found: dict[str, list[Any]] = {}
    for model in models.values():
        for name, tensor in _knobs(model):
            found.setdefault(name, []).append(tensor)
    if not found:
        ours = any(entry.key == KNOBS_KEY for model in models.values() for entry in model.metadata_props)
        why = "no exit or gate was enabled when it was exported" if ours else "dyncompile did not export it"
        raise ExportError(f"{path} has no thresholds: {why}")
    changed: dict[str, Value] = {}
    for name, value in values.items():
        full = _full(name, found)
        if full in changed:
            raise ArgumentError("knob", found=f"{full!r} twice", expected="one value for each")
        changed[full] = value
    for name, value in changed.items():
        for tensor in found[name]:
            _set(name, tensor, value)
    drafts = {}
    try:
        for file, model in models.items():
            if any(name in changed for name, _ in _knobs(model)):
                if not os.access(file, os.W_OK):
                    raise ExportError(f"{file} is read-only")
                drafts[file] = file.with_name(f".{file.name}.{os.getpid()}")
                drafts[file].write_bytes(model.SerializeToString())
                shutil.copymode(file, drafts[file])
        for file, draft in drafts.items():
            draft.replace(file)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    return {name: _value(tensors[0]) for name, tensors in found.items()}


def _load(path: Path) -> Any:
    onnx = require("onnx", extra="export")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such file") from error
    except Exception as error:
        raise ExportError(f"{path} is no ONNX model: {error}") from error
    if not model.graph.node:
        raise ExportError(f"{path} is no ONNX model: it holds no operation")
    return model


def _knobs(model: Any) -> Iterator[tuple[str, Any]]:
    names: list[str] = []
    for entry in model.metadata_props:
        if entry.key == KNOBS_KEY:
            names = json.loads(entry.value)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            yield tensor.name, tensor


def _full(name: str, found: Mapping[str, object]) -> str:
    """A knob's name in the file."""
    options = (name, *(f"{kind}.{name}{knob}" for kind, default in (("exits", ".threshold"), ("gates", ".bias"))
                       for knob in ("", default)))  # fmt: skip
    for option in options:
        if option in found:
            return option
    short = sorted(full.split(".", 1)[1] for full in found)
    raise ArgumentError("knob", found=repr(name), expected=f"one of {short}")


def _set(name: str, tensor: Any, value: Value) -> None:
    helper = require("onnx", extra="export").numpy_helper
    dtype = helper.to_array(tensor).dtype
    kind = name.rpartition(".")[2]
    given: Any = value
    number = not isinstance(given, bool) and isinstance(given, int | float)
    with np.errstate(over="ignore"):
        # What the file will hold: a number that is too small for its dtype is zero there.
        array = np.asarray(given if number or isinstance(given, bool) else math.nan, dtype)
    if dtype == np.bool_:
        fits, expected = isinstance(given, bool), "true or false"
    elif not number or not np.isfinite(array):
        fits, expected = False, "a finite number"
    elif kind == "threshold":
        fits, expected = bool(0 <= array <= 1), "a number in [0, 1]"
    elif kind == "temperature":
        fits, expected = bool(array > 0), "a temperature above 0"
    else:
        fits, expected = True, ""
    if not fits:
        raise ArgumentError(name, found=repr(value), expected=expected)
    tensor.CopyFrom(helper.from_array(array, tensor.name))


def _value(tensor: Any) -> Value:
    value: Value = require("onnx", extra="export").numpy_helper.to_array(tensor).item()
    return value
