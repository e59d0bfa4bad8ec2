"""One pass of the data through a dynamic model: what every exit would do with every sample at every knob setting."""

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from dyncompile.calibration.knobs import Knobs, grid, turned
from dyncompile.calibration.losses import Loss
from dyncompile.calibration.risk import Array
from dyncompile.calibration.target import Indices, designed
from dyncompile.calibration.temperature import (
    TEMPERATURES,
    mean_of_labelled,
    negative_log_likelihood,
)
from dyncompile.calibration.usage import Examples, batch_first
from dyncompile.data import IGNORE_INDEX, Batch, Inputs, as_loader, call, find_device
from dyncompile.errors import ArgumentError, CalibrationError, DataError, require
from dyncompile.module import DynamicModule, Trace
from dyncompile.nn.criteria import classes_first
from dyncompile.nn.exits import Exit

_PROBED = 256
"""Samples, at least, that are held back at first, and of which those to design on tell which knobs to try."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Scores at one setting of the gates' knobs, at every temperature of the grid.

    Attributes:
        knobs: The bias of each group of gates; empty for a model without gates.
        exits: Names of the exits, E of them, in order of execution.
        confidence: `[N, E, T]`; T is 1 where temperatures are not fitted.
        nll: Negative log-likelihood of the labels, `[N, E, T]`; None where temperatures are not
            fitted.
        losses: Losses by exit and at the end, `[N, E + 1]`.
        correct: Share of right labels by exit and at the end, `[N, E + 1]`; None in regression.
        binary: Whether losses are 0 or 1 by definition.
        predicted: Predicted class by exit and at the end, `[N, E + 1]`; None where samples have not exactly one.
        decisions: What gates decided, by name, `[N]` or `[N, r]`: bool, or the arm of a route.
    """

    knobs: Knobs
    exits: tuple[str, ...]
    confidence: NDArray[np.float32]
    nll: NDArray[np.float32] | None
    losses: Array
    correct: Array | None
    binary: bool
    predicted: NDArray[np.intp] | None
    decisions: Mapping[str, NDArray[Any]]

    def at(self, temperatures: NDArray[np.intp]) -> Scores:
        """Scores with one temperature of the grid per exit, `[E]`."""
        return Scores(
            exits=self.exits,
            confidence=np.take_along_axis(self.confidence, temperatures[None, :, None], 2)[..., 0],
            losses=self.losses,
            correct=self.correct,
            binary=self.binary,
        )


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The scores of all samples, by knob setting.

    Attributes:
        runs: At each knob setting; the first has all gates open: its end is the static model.
        labels: Class of each sample, `[N]`; None where samples have not exactly one.
        gallery: The images that are easiest and hardest.
        examples: Some inputs, for pictures of what gates do.
        seen: Samples that knobs were chosen on, which must not be held out; empty without gates.
        among: How many samples, from the first, those were drawn from.
    """

    runs: tuple[Run, ...]
    labels: NDArray[np.intp] | None
    gallery: Gallery
    examples: Examples
    seen: Indices
    among: int


def record(
    dyn: DynamicModule,
    data: Any,
    loss: Loss,
    *,
    named: bool,
    batch_size: int,
    device: torch.device | str | None,
    progress: bool,
    groups: Mapping[str, Sequence[str]],
    seed: int = 0,
    design_all: bool = False,
) -> Recording:
    """Run the data through `dyn.trace`, in eval mode, and leave `dyn` as it was.

    The data pass once; of a model with gates every batch is run at each knob setting. Samples all of whose labels are
    -100 are left out: no risk can be told of them.

    Args:
        dyn: A dynamic model with exits or gates.
        data: What `dyncompile.data.as_loader` takes.
        loss: The loss to record.
        named: Whether it is one of this package's own, whose values for targets `[N]` are 0 or 1.
        batch_size: Samples per batch.
        device: Where to run; None for where the model is.
        progress: Show a progress bar.
        groups: Gates that share a knob, by group.
        seed: Of the draw of the samples that knobs are chosen on.
        design_all: No sample is held out, so knobs may be chosen on all.

    Raises:
        DataError: The data are empty, hold NaN, or do not fit the model.
        CalibrationError: A prediction or confidence is not finite, or a confidence outside [0, 1].
        ArgumentError: The loss is not `[N]` in [0, 1].
    """
    loader = as_loader(data, batch_size=batch_size, batch_dims=dyn.recipe.batch_dims)
    tape = _Tape(dyn, loss, groups)
    with running(dyn, device) as where, torch.no_grad():
        batches = _shown(loader, progress=progress)
        if groups:
            tape.probe(batches, where, seed=seed, design_all=design_all)
        for inputs, targets in batches:
            tape.add(inputs, targets, where)
    return tape.recording(named=named)


class _Tape:
    """Takes in batch after batch."""

    def __init__(self, dyn: DynamicModule, loss: Loss, groups: Mapping[str, Sequence[str]]) -> None:
        self.dyn = dyn
        self.loss = loss
        self.groups = groups
        self.settings: list[Knobs] = [()]
        self.rows: list[list[dict[str, Tensor]]] = []
        self.flat = True
        self.unlabelled = 0
        self.gallery = Gallery()
        self.examples = Examples()
        self.seen: Indices = np.zeros(0, dtype=np.intp)
        self.among = 0

    def probe(self, batches: Iterator[Batch], where: torch.device, *, seed: int, design_all: bool) -> None:
        """Choose knob settings on a random part of the first samples, as large as that to design on; then record all.

        They are drawn before the number of samples is known, and `target.split` designs on them. So no held-out sample
        has a say in what is tried, and the data need to be read but once.
        """
        kept: list[tuple[Inputs, Tensor, Tensor]] = []
        while self.among < _PROBED and (batch := next(batches, None)) is not None:
            labelled = self._counted(batch[1])
            kept.append((*batch, labelled))
            self.among += int(labelled.sum())
        count = self.among if design_all else designed(self.among)
        self.seen = np.random.default_rng(seed).permutation(self.among)[:count]
        chosen = torch.zeros(self.among, dtype=torch.bool)
        chosen[torch.from_numpy(self.seen)] = True
        looked: list[tuple[Inputs, Tensor]] = []
        for inputs, _, labelled in kept:
            here = torch.zeros(len(labelled), dtype=torch.bool)
            here[labelled], chosen = chosen[: int(labelled.sum())], chosen[int(labelled.sum()) :]
            looked.append((inputs, here))
        self.settings = grid(self.dyn, self.groups, looked, where)
        for inputs, targets, _ in kept:
            self.add(inputs, targets, where)

    def add(self, inputs: Inputs, targets: Tensor, where: torch.device) -> None:
        """Record one batch at every setting."""
        moved: tuple[Inputs, Tensor] = tree_map(
            lambda leaf: leaf.to(where) if isinstance(leaf, Tensor) else leaf, (inputs, targets)
        )
        kept = self._counted(targets)
        final: Tensor | None = None
        row: list[dict[str, Tensor]] = []
        for knobs in self.settings:
            with turned(self.dyn, self.groups, knobs):
                scored, final = _score(self.dyn, *moved, self.loss, final)
            row.append(scored)
        self.rows.append([{name: column[kept] for name, column in scored.items()} for scored in row])
        self.unlabelled += len(kept) - int(kept.sum())
        # With gates as trained, if there are any: what costs much then is hard, where no exit says so.
        shown = row[min(1, len(row) - 1)]
        samples = batch_first(self.dyn, moved[0])
        self.gallery.add(samples, shown["confidence"] if len(self.dyn.exits) else -shown["cost"][:, None], kept)
        if self.groups:
            self.examples.add(samples, kept)
        self.flat = self.flat and targets.ndim == 1

    def _counted(self, targets: Tensor) -> Tensor:
        """Which samples have a label at all, `[N]`, on the CPU."""
        if self.dyn.task != "classification":
            return torch.ones(len(targets), dtype=torch.bool)
        return (targets != IGNORE_INDEX).reshape(len(targets), -1).any(1).cpu()

    def recording(self, *, named: bool) -> Recording:
        """What was recorded."""
        if not self.rows or not any(len(row[0]["losses"]) for row in self.rows):
            found = f"{self.unlabelled} samples without any label" if self.unlabelled else "no samples"
            expected = "at least one that is labelled" if self.unlabelled else "at least one"
            raise DataError("data", found=found, expected=expected)
        if self.unlabelled:
            warnings.warn(f"calibration leaves out {self.unlabelled} samples without any label", stacklevel=4)
        has_labels = "labels" in self.rows[0][0]
        return Recording(
            runs=tuple(self._run(index, binary=named and self.flat) for index in range(len(self.settings))),
            labels=torch.cat([row[0]["labels"] for row in self.rows]).numpy() if has_labels else None,
            gallery=self.gallery,
            examples=self.examples,
            seen=self.seen,
            among=self.among,
        )

    def _columns(self, index: int) -> dict[str, NDArray[Any]]:
        first = self.rows[0][index]
        return {name: torch.cat([row[index][name] for row in self.rows]).numpy() for name in first}

    def _run(self, index: int, *, binary: bool) -> Run:
        columns = self._columns(index)
        return Run(
            knobs=self.settings[index],
            exits=tuple(self.dyn.exits),
            confidence=columns["confidence"].astype(np.float32),
            nll=columns.get("nll"),
            losses=columns["losses"].astype(np.float64),
            correct=columns["correct"].astype(np.float64) if "correct" in columns else None,
            binary=binary,
            predicted=columns.get("predicted"),
            decisions={k.removeprefix(_DECISION): v for k, v in columns.items() if k.startswith(_DECISION)},
        )


_DECISION = "decision of "


def _score(
    dyn: DynamicModule, inputs: Inputs, targets: Tensor, loss: Loss, static: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Scores of one batch, on the CPU, and the static model's prediction, which is that of the first setting."""
    exits = {name: module for name, module in dyn.exits.items() if isinstance(module, Exit)}
    with _given(exits) as given:
        trace = call(dyn.trace, inputs)
    predictions = {**{name: trace.exits[name] for name in exits}, "final": trace.final}
    for name, prediction in predictions.items():
        if not bool(prediction.isfinite().all()):
            raise CalibrationError(f"the prediction of {name!r} is NaN or infinite")
    static = trace.final if static is None else static
    if dyn.task == "classification":
        dim = _class_dim(exits, trace.final, targets)
        *logits, reference = [classes_first(prediction, dim) for prediction in (*predictions.values(), static)]
        _check_labels(logits[-1], targets)
        right = [mean_of_labelled((p.argmax(1) == targets).float(), targets) for p in logits]
        columns = {"correct": torch.stack(right, 1)}
        if exits:
            columns["nll"] = torch.stack([_likelihoods(p, targets) for p in logits[:-1]], 1)
            columns["confidence"] = _confidences(exits, trace, given)
        if targets.ndim == 1:
            columns["labels"] = targets
            columns["predicted"] = torch.stack([p.argmax(1) for p in logits], 1)
    else:
        logits, reference = list(predictions.values()), static
        columns = {}
        if exits:
            columns["confidence"] = torch.stack([trace.confidence[n] for n in exits], 1)[..., None]
    columns["losses"] = torch.stack([_loss(loss, p, targets, reference) for p in logits], 1)
    confidence = columns.setdefault("confidence", torch.zeros(len(targets), 0, 1, device=targets.device))
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise CalibrationError("a confidence is NaN or outside [0, 1]: check the exits' criterion")
    columns["cost"] = trace.cost
    for name, value in trace.decisions.items():
        if name not in exits:
            columns[_DECISION + name] = value if value.dtype == torch.bool else value.to(torch.uint8)
    return {name: column.cpu() for name, column in columns.items()}, static


def _class_dim(exits: Mapping[str, Exit], final: Tensor, targets: Tensor) -> int:
    if exits:
        return next(iter(exits.values())).class_dim
    from dyncompile.training.losses import class_dim

    return class_dim(final, targets, "data")


def _likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood at every temperature, `[N, T]`."""
    return torch.stack([negative_log_likelihood(logits, targets, t) for t in TEMPERATURES], 1)


@contextmanager
def _given(exits: Mapping[str, Exit]) -> Iterator[dict[str, Sequence[Tensor]]]:
    """What each exit is called with while the context is open."""
    given: dict[str, Sequence[Tensor]] = {}

    def note(name: str, _: Exit, inputs: Sequence[Tensor]) -> None:
        given[name] = inputs

    handles = [exit_.register_forward_pre_hook(functools.partial(note, name)) for name, exit_ in exits.items()]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _confidences(exits: Mapping[str, Exit], trace: Trace, given: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Confidence at every temperature, by the exits' own method, `[N, E, T]`."""
    columns: list[Tensor] = []
    for name, module in exits.items():
        earlier, mask = module.beside(given[name])
        before = module.temperature.clone()
        try:
            column = []
            for temperature in TEMPERATURES:
                module.temperature.fill_(temperature)
                column.append(module.confidence_of(trace.exits[name], earlier, mask).float())
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
    try:
        values: Any = loss(prediction, targets, final)
    except TypeError as error:
        expected = "a loss that is called with (prediction, targets, final)"
        raise ArgumentError("risk", found=f"one that stops: {error}", expected=expected) from error
    if not isinstance(values, Tensor) or values.shape != (len(prediction),):
        found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ArgumentError("risk", found=found, expected="a tensor [N], one loss per sample")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ArgumentError("risk", found="values that are NaN or outside [0, 1]", expected="in [0, 1]")
    return values.double()


@contextmanager
def running(dyn: DynamicModule, device: torch.device | str | None) -> Iterator[torch.device]:
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
