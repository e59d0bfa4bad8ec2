"""A model exported by stages: an ONNX file for each segment, and the control flow in a manifest that the host follows.

Needs numpy, pydantic and onnxruntime.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from dyncompile.errors import ArgumentError, ExportError, require

VERSION = 1
MANIFEST = "manifest.json"

Array = np.ndarray[Any, Any]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Value(_Model):
    """A tensor between segments.

    Attributes:
        dtype: In numpy's words.
        shape: Of one sample.
        batch_dim: Which dim the samples lie along; None if the value is the same for all.
    """

    dtype: str
    shape: list[int]
    batch_dim: int | None

    @property
    def rows(self) -> int:
        """Entries of the batch dim that belong to a sample."""
        return 1 if self.batch_dim is None else self.shape[self.batch_dim]


class SegmentStep(_Model):
    """Run a file.

    Attributes:
        file: Its name; its inputs and outputs have the names of the values.
        inputs: What it reads.
        outputs: What it gives.
    """

    kind: Literal["segment"] = "segment"
    file: str
    inputs: list[str]
    outputs: list[str]


class ConditionalStep(_Model):
    """Run each arm on the rows that take it.

    Attributes:
        name: The decision's.
        decision: The value that decides: a bool, or the number of an arm.
        rows: How many decisions a sample has.
        arms: What each arm runs; None where it runs nothing.
        selects: For each value that is chosen the value of each arm.
    """

    kind: Literal["conditional"] = "conditional"
    name: str
    decision: str
    rows: int
    arms: list["BlockSteps | None"]
    selects: dict[str, list[str]]


class BlockSteps(_Model):
    """Steps under one guard.

    Attributes:
        name: The guard in words.
        inputs: Values from outside.
        outputs: Values that are read outside.
        steps: In order.
    """

    name: str
    inputs: list[str]
    outputs: list[str]
    steps: list[Annotated[SegmentStep | ConditionalStep, pydantic.Field(discriminator="kind")]]


class Manifest(_Model):
    """How the files of a folder make a model.

    Attributes:
        format: Tells a manifest from other JSON.
        version: Of the format.
        inputs: The model's inputs, in order: by their names the values that they are.
        outputs: The model's outputs, likewise; or a constant.
        values: Every value.
        decisions: For each decision the value that holds it.
        exits: The model's exits, in order; those that were disabled have no decision.
        root: What always runs.
        metadata: Recipe, costs and calibration.
    """

    format: Literal["dyncompile-stages"] = "dyncompile-stages"
    version: int = VERSION
    inputs: dict[str, str]
    outputs: dict[str, str | int | float | bool | None]
    values: dict[str, Value]
    decisions: dict[str, str]
    exits: list[str]
    root: BlockSteps
    metadata: dict[str, str] = {}


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ExportError: It is missing, malformed or too new.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{folder}: no {MANIFEST} in it: not a folder that dyncompile exported") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is corrupt or truncated: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ExportError(f"{path} has format version {version}; this dyncompile reads up to {VERSION}: upgrade it")
    try:
        return Manifest.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ExportError(f"{path} is corrupt: `{place}`: {first['msg']}") from error


class StagedModel:
    """Runs a folder that `export(..., routing="stages")` wrote.

    Attributes:
        manifest: What the folder says.
        last_run: Rows that ran in the last call, by region.

    Args:
        folder: Where the files are.
        providers: Of onnxruntime.
        options: `onnxruntime.SessionOptions` of every file.

    Raises:
        ExportError: The folder is not what `export` wrote.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: Any = None,
    ) -> None:
        runtime = require("onnxruntime", extra="export")
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.last_run: dict[str, int] = {}
        self._sessions = {}
        for step in _segments(self.manifest.root):
            path = folder / step.file
            if path.parent != folder or not path.is_file():
                raise ExportError(f"{folder}: no file {step.file} in it, which its manifest names")
            try:
                self._sessions[step.file] = runtime.InferenceSession(str(path), options, providers=list(providers))
            except Exception as error:
                raise ExportError(f"onnxruntime refuses {path}: {error}") from error

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: By name.

        Returns:
            The outputs by name; `decisions.NAME` int64 for each decision, -1 for rows that did not come to it; and
            `exit`, the number of the exit that each sample took among the model's, how many these are where it
            took none.

        Raises:
            ArgumentError: An input is missing, or not one of the model's.
        """
        manifest = self.manifest
        if set(inputs) != set(manifest.inputs):
            raise ArgumentError("inputs", found=sorted(inputs), expected=f"{list(manifest.inputs)}")
        values = {manifest.inputs[name]: np.asarray(value) for name, value in inputs.items()}
        batched = next(v for v in manifest.inputs.values() if manifest.values[v].batch_dim is not None)
        batch = values[batched].shape[manifest.values[batched].batch_dim or 0] // manifest.values[batched].rows
        self.last_run = {}
        decisions = {n: np.full(batch * manifest.values[v].rows, -1) for n, v in manifest.decisions.items()}
        found = self._block(manifest.root, values, np.arange(batch), 1, decisions)
        outputs = {
            name: found[value] if isinstance(value, str) else np.asarray(value)
            for name, value in manifest.outputs.items()
            if value is not None
        }
        outputs |= {f"decisions.{name}": value for name, value in decisions.items()}
        if not decisions.keys().isdisjoint(manifest.exits):
            index = np.full(batch, len(manifest.exits))
            for number, name in reversed(list(enumerate(manifest.exits))):
                if name in decisions:
                    index[decisions[name] == 1] = number
            outputs["exit"] = index
        return outputs

    def _block(
        self, block: BlockSteps, values: dict[str, Array], index: Array, per: int, decisions: dict[str, Array]
    ) -> dict[str, Array]:
        """Run steps; `index` says which of all rows, of which a sample has `per`, these are."""
        self.last_run[block.name] = self.last_run.get(block.name, 0) + len(index)
        made = {value: name for name, value in self.manifest.decisions.items()}
        for step in block.steps:
            if isinstance(step, ConditionalStep):
                values.update(self._conditional(step, values, index, per, decisions))
                continue
            given = {name: values[name] for name in step.inputs}
            values.update(zip(step.outputs, self._sessions[step.file].run(step.outputs, given), strict=True))
            for name in set(step.outputs) & set(made):
                finer = _finer(index, self.manifest.values[name].rows // per)
                decisions[made[name]][finer] = values[name].astype(np.int64)
        return {name: values[name] for name in block.outputs}

    def _conditional(
        self, step: ConditionalStep, values: dict[str, Array], index: Array, per: int, decisions: dict[str, Array]
    ) -> dict[str, Array]:
        """Run what a decision controls; the values that it chooses."""
        decision = values[step.decision].astype(np.int64)
        whole, finer = len(decision), _finer(index, step.rows // per)
        results: dict[str, Array] = {}
        for arm, block in enumerate(step.arms):
            rows = np.flatnonzero(decision == arm)
            if not len(rows):
                continue
            every = len(rows) == whole
            found: dict[str, Array] = {}
            if block is not None:
                live = {n: values[n] if every else self._gather(n, values[n], rows, step.rows) for n in block.inputs}
                found = self._block(block, live, finer[rows], step.rows, decisions)
            for select, names in step.selects.items():
                name = names[arm]
                if every:
                    results[select] = found[name] if name in found else values[name]
                    continue
                part = found[name] if name in found else self._gather(name, values[name], rows, step.rows)
                self._scatter(select, results, part, rows, step.rows, whole)
        return results if whole else {select: self._nothing(select) for select in step.selects}

    def _nothing(self, name: str) -> Array:
        """A value without rows."""
        known = self.manifest.values[name]
        return np.empty([0 if i == known.batch_dim else size for i, size in enumerate(known.shape)], known.dtype)

    def _gather(self, name: str, value: Array, rows: Array, per: int) -> Array:
        known = self.manifest.values[name]
        if known.batch_dim is None:
            return value
        return value.take(_finer(rows, known.rows // per), axis=known.batch_dim)

    def _scatter(self, select: str, results: dict[str, Array], part: Array, rows: Array, per: int, count: int) -> None:
        known = self.manifest.values[select]
        dim, entries = known.batch_dim or 0, known.rows // per
        if select not in results:
            shape = list(part.shape)
            shape[dim] = count * entries
            results[select] = np.empty(shape, part.dtype)
        results[select][(slice(None),) * dim + (_finer(rows, entries),)] = part


def _finer(rows: Array, entries: int) -> Array:
    """Rows of which each holds several entries, as the entries."""
    return rows if entries == 1 else (rows[:, None] * entries + np.arange(entries)).ravel()


def _segments(block: BlockSteps) -> list[SegmentStep]:
    found: list[SegmentStep] = []
    for step in block.steps:
        if isinstance(step, SegmentStep):
            found.append(step)
        else:
            for arm in step.arms:
                found += _segments(arm) if arm else []
    return found
