"""One pass of the data through a dynamic model: what every exit would do with every sample."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from dyncompile.calibration.certify import Scores
from dyncompile.calibration.evidence import Gallery
from dyncompile.calibration.losses import Loss
from dyncompile.calibration.risk import Array
from dyncompile.calibration.temperature import (
    TEMPERATURES,
    mean_of_labelled,
    negative_log_likelihood,
)
from dyncompile.data import IGNORE_INDEX, Batch, Inputs, as_loader, call, find_device
from dyncompile.errors import ArgumentError, CalibrationError, DataError, require
from dyncompile.module import DynamicModule, Trace
from dyncompile.nn.criteria import classes_first
from dyncompile.nn.exits import Exit


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Scores at every temperature of the grid, from which the fitted ones are taken.

    Attributes:
        exits: Names of the exits, E of them, in order of execution.
        confidence: `[N, E, T]`; T is 1 where temperatures are not fitted.
        nll: Negative log-likelihood of the labels, `[N, E, T]`; None where temperatures are not
            fitted.
        losses: Losses by exit and at the end, `[N, E + 1]`.
        correct: Share of right labels by exit and at the end, `[N, E + 1]`; None in regression.
        binary: Whether losses are 0 or 1 by definition.
        labels: Class of each sample, `[N]`; None where samples have not exactly one.
        predicted: Predicted class by exit and at the end, `[N, E + 1]`; None likewise.
        gallery: The images that the exits are surest and least sure of.
    """

    exits: tuple[str, ...]
    confidence: NDArray[np.float32]
    nll: NDArray[np.float32] | None
    losses: Array
    correct: Array | None
    binary: bool
    labels: NDArray[np.intp] | None
    predicted: NDArray[np.intp] | None
    gallery: Gallery

    def at(self, temperatures: NDArray[np.intp]) -> Scores:
        """Scores with one temperature of the grid per exit, `[E]`."""
        return Scores(
            exits=self.exits,
            confidence=np.take_along_axis(self.confidence, temperatures[None, :, None], 2)[..., 0],
            losses=self.losses,
            correct=self.correct,
            binary=self.binary,
        )


def record(
    dyn: DynamicModule,
    data: Any,
    loss: Loss,
    *,
    named: bool,
    batch_size: int,
    device: torch.device | str | None,
    progress: bool,
) -> Recording:
    """Run the data through `dyn.trace` once, in eval mode, and leave `dyn` as it was.

    Samples all of whose labels are -100 are left out: no risk can be told of them.

    Args:
        dyn: A dynamic model with exits.
        data: What `dyncompile.data.as_loader` takes.
        loss: The loss to record.
        named: Whether it is one of this package's own, whose values for targets `[N]` are 0 or 1.
        batch_size: Samples per batch.
        device: Where to run; None for where the model is.
        progress: Show a progress bar.

    Raises:
        DataError: The data are empty, hold NaN, or do not fit the model.
        CalibrationError: A prediction or confidence is not finite, or a confidence outside [0, 1].
        ArgumentError: The loss is not `[N]` in [0, 1].
    """
    loader = as_loader(data, batch_size=batch_size, batch_dims=dyn.recipe.batch_dims)
    rows: list[dict[str, Tensor]] = []
    flat = True
    unlabelled = 0
    gallery = Gallery()
    with _running(dyn, device) as where, torch.no_grad():
        for inputs, targets in _shown(loader, progress=progress):
            moved: tuple[Inputs, Tensor] = tree_map(
                lambda leaf: leaf.to(where) if isinstance(leaf, Tensor) else leaf, (inputs, targets)
            )
            scored = _score(dyn, *moved, loss)
            kept = _labelled(targets) if dyn.task == "classification" else torch.ones(len(targets), dtype=torch.bool)
            rows.append({name: column[kept] for name, column in scored.items()})
            unlabelled += len(kept) - int(kept.sum())
            gallery.add(moved[0], scored["confidence"], kept)
            flat = flat and targets.ndim == 1
    columns = {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]} if rows else {}
    if not columns or not len(columns["losses"]):
        found = f"{unlabelled} samples without any label" if unlabelled else "no samples"
        raise DataError("data", found=found, expected="at least one that is labelled" if unlabelled else "at least one")
    if unlabelled:
        warnings.warn(f"calibration leaves out {unlabelled} samples without any label", stacklevel=3)
    return Recording(
        exits=tuple(dyn.exits),
        confidence=columns["confidence"].astype(np.float32),
        nll=columns.get("nll"),
        losses=columns["losses"].astype(np.float64),
        correct=columns["correct"].astype(np.float64) if "correct" in columns else None,
        binary=named and flat,
        labels=columns.get("labels"),
        predicted=columns.get("predicted"),
        gallery=gallery,
    )


def _score(dyn: DynamicModule, inputs: Inputs, targets: Tensor, loss: Loss) -> dict[str, Tensor]:
    """Scores of one batch, on the CPU."""
    exits = {name: module for name, module in dyn.exits.items() if isinstance(module, Exit)}
    trace = call(dyn.trace, inputs)
    predictions = {**{name: trace.exits[name] for name in exits}, "final": trace.final}
    for name, prediction in predictions.items():
        if not bool(prediction.isfinite().all()):
            raise CalibrationError(f"the prediction of {name!r} is NaN or infinite")
    if dyn.task == "classification":
        dim = next(iter(exits.values())).class_dim
        logits = [classes_first(prediction, dim) for prediction in predictions.values()]
        _check_labels(logits[-1], targets)
        right = [mean_of_labelled((p.argmax(1) == targets).float(), targets) for p in logits]
        columns = {
            "correct": torch.stack(right, 1),
            "nll": torch.stack([_likelihoods(p, targets) for p in logits[:-1]], 1),
            "confidence": _confidences(exits, trace),
        }
        if targets.ndim == 1:
            columns["labels"] = targets
            columns["predicted"] = torch.stack([p.argmax(1) for p in logits], 1)
    else:
        logits = list(predictions.values())
        columns = {"confidence": torch.stack([trace.confidence[n] for n in exits], 1)[..., None]}
    columns["losses"] = torch.stack([_loss(loss, p, targets, logits[-1]) for p in logits], 1)
    confidence = columns["confidence"]
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise CalibrationError("a confidence is NaN or outside [0, 1]: check the exits' criterion")
    return {name: column.cpu() for name, column in columns.items()}


def _labelled(targets: Tensor) -> Tensor:
    """Which samples have a label at all, `[N]`, on the CPU."""
    return (targets != IGNORE_INDEX).reshape(len(targets), -1).any(1).cpu()


def _likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood at every temperature, `[N, T]`."""
    return torch.stack([negative_log_likelihood(logits, targets, t) for t in TEMPERATURES], 1)


def _confidences(exits: Mapping[str, Exit], trace: Trace) -> Tensor:
    """Confidence at every temperature, by the exits' own method, `[N, E, T]`."""
    columns: list[Tensor] = []
    for index, (name, module) in enumerate(exits.items()):
        earlier = [trace.exits[other] for other in list(exits)[:index]]
        before = module.temperature.clone()
        try:
            column = []
            for temperature in TEMPERATURES:
                module.temperature.fill_(temperature)
                column.append(module.confidence_of(trace.exits[name], earlier).float())
        finally:
            module.temperature.copy_(before)
        columns.append(torch.stack(column, 1))
    return torch.stack(columns, 1)


def _check_labels(logits: Tensor, targets: Tensor) -> None:
    shape, classes = (logits.shape[0], *logits.shape[2:]), logits.shape[1]
    if targets.shape != shape or targets.is_floating_point():
        raise DataError(
            "data",
            found=f"targets of shape {list(targets.shape)} and {targets.dtype}",
            expected=f"integer labels of shape {list(shape)}",
        )
    labels = targets[targets != IGNORE_INDEX]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            "data",
            found=f"labels from {int(labels.min())} to {int(labels.max())}",
            expected=f"labels in [0, {classes})",
        )


def _loss(loss: Loss, prediction: Tensor, targets: Tensor, final: Tensor) -> Tensor:
    values: Any = loss(prediction, targets, final)
    if not isinstance(values, Tensor) or values.shape != (len(prediction),):
        found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ArgumentError("risk", found=found, expected="a tensor [N], one loss per sample")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ArgumentError("risk", found="values that are NaN or outside [0, 1]", expected="in [0, 1]")
    return values.double()


@contextmanager
def _running(dyn: DynamicModule, device: torch.device | str | None) -> Iterator[torch.device]:
    """Evaluation mode on a device; afterwards each module is where and as it was."""
    home = next((p.device for p in (*dyn.parameters(), *dyn.buffers())), torch.device("cpu"))
    where = home if device is None else find_device(device)
    modes = [(module, module.training) for module in dyn.modules()]
    try:
        dyn.eval()
        if where != home:
            dyn.to(where)
        yield where
    finally:
        if where != home:
            dyn.to(home)
        for module, training in modes:
            module.training = training


def _shown(loader: DataLoader[Batch], *, progress: bool) -> Iterator[Batch]:
    """The loader's batches, with a bar on a terminal's standard error."""
    bar = require("rich.progress", extra="all")
    console = require("rich.console", extra="all").Console(stderr=True)
    total = None if isinstance(loader.dataset, IterableDataset) else len(loader)
    shown = progress and console.is_terminal
    with bar.Progress(console=console, transient=True, disable=not shown) as running:
        yield from running.track(loader, total=total, description="calibrating")
