"""`calibrate`: set the exits of a dynamic model so that its risk or its cost is as asked."""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch

from dyncompile.calibration.certify import Indices, Scores, Target, choose, split
from dyncompile.calibration.evidence import Evidence, Picture, left_at
from dyncompile.calibration.losses import NAMED, Loss, resolve
from dyncompile.calibration.result import Calibration
from dyncompile.calibration.risk import Array
from dyncompile.calibration.scores import Recording, record
from dyncompile.calibration.temperature import TEMPERATURES, fit_temperatures
from dyncompile.errors import ArgumentError
from dyncompile.module import DynamicModule

_DEFAULT_DROP = 0.01


def calibrate(
    dyn: DynamicModule,
    data: Any,
    *,
    max_drop: float | None = None,
    max_cost: float | None = None,
    confidence: float = 0.95,
    method: Literal["ltt", "ucb", "greedy"] = "ltt",
    risk: str | Loss = "accuracy_drop",
    unit: Literal["flops", "time"] = "flops",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Set threshold, temperature and enabled of every exit, all jointly.

    The data pass through the model once. A random part of them, 30 %, gives the temperatures and a
    path of threshold vectors, from the safest to the cheapest; the rest is held out. With
    `max_drop`, the cheapest vector is taken of those that the held-out samples certify: over the
    draw of the data, the risk of the result exceeds `max_drop` with probability at most `1 -
    confidence`. This holds for any model and any number of samples, as long as the data are
    independent draws of what the model will meet, and the model was not trained on them. With
    `max_cost`, the safest vector within the budget is taken and its risk bounded. With both, the
    risk comes first, and it is an error where the cheapest certified vector is over the budget. An
    exit that does not pay is disabled. On an error `dyn` is as it was.

    Args:
        dyn: A dynamic model with exits.
        data: A DataLoader, a dataset or a pair of arrays; see `dyncompile.data.as_loader`.
            It must be unseen: neither trained on nor used to stop training (`patience`). Samples
            all of whose labels are -100 are left out, with a warning.
        max_drop: Largest risk, in (0, 1). With the default `risk` also the largest loss of
            accuracy, as a share of all samples: 0.01 is one point. Default: 0.01 where `max_cost`
            is not given.
        max_cost: Largest expected cost per sample, 1.0 = the static model.
        confidence: Probability with which the risk is held, in (0, 1).
        method: "ltt" tests by exact binomial p-values where the loss is 0 or 1, else by those of
            Hoeffding and Bentkus (Learn then Test, arXiv 2110.01052); "ucb" by the betting upper
            confidence bound of risk-controlled early exits (arXiv 2405.20915), which is sharper for
            losses that vary little; "greedy" holds the risk on the data themselves and guarantees
            nothing.
        risk: "accuracy_drop" (the static model is right and the dynamic one wrong), "disagreement"
            (they differ), or any `loss(prediction, targets, final) -> [N]` in [0, 1] (see
            `dyncompile.calibration.losses`).
        unit: Count cost in "flops" or in measured "time".
        batch_size: Samples per batch, where `data` is not a DataLoader.
        device: Where to run; None for where the model is. The model is moved back afterwards.
        seed: Seed of the division of the data. Same seed, same result.
        progress: Show a progress bar on a terminal.

    Returns:
        The settings, their cost, risk and bound, and the frontier they were taken from.

    Raises:
        ArgumentError: A value is out of range, or the model has no exits.
        DataError: The data are empty, without any label, hold NaN or do not fit the model.
        CalibrationError: Too few samples for the guarantee (the message says how many are needed),
            or the model gives NaN.
        UnreachableTargetError: No thresholds reach the target; the message gives the best
            reachable.
    """
    if max_drop is None and max_cost is None:
        max_drop = _DEFAULT_DROP
    target = Target(max_drop=max_drop, max_cost=max_cost, confidence=confidence, method=method)
    if unit not in {"flops", "time"}:
        raise ArgumentError("unit", found=repr(unit), expected="'flops' or 'time'")
    exits = list(getattr(dyn, "exits", ()))
    if not exits:
        raise ArgumentError("dyn", found="a model without exits", expected="dynamize(model, strategy='early_exit')")
    recording = record(
        dyn,
        data,
        resolve(risk, task=dyn.task),
        named=risk in NAMED.values() or not callable(risk),
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    design, held_out = split(len(recording.losses), target, binary=recording.binary, seed=seed)
    fitted, temperatures = np.zeros(len(exits), dtype=np.intp), None
    if recording.nll is not None:
        fitted = fit_temperatures(recording.nll[design])
        temperatures = [TEMPERATURES[index] for index in fitted]

    def cost_of(enabled: tuple[bool, ...]) -> Array:
        names = [name for name, on in zip(exits, enabled, strict=True) if on]
        costs = dyn.exit_costs(names, unit=unit)
        return np.array([costs.get(name, np.nan) for name in (*exits, "final")])

    scores = recording.at(fitted)
    calibration = choose(
        scores,
        cost_of,
        target,
        design=design,
        held_out=held_out,
        temperatures=temperatures,
        unit=unit,
        seed=seed,
    )
    evidence = _evidence(dyn, recording, scores, calibration, held_out)
    calibration.apply(dyn)
    return dataclasses.replace(calibration, evidence=evidence)


def _evidence(
    dyn: DynamicModule,
    recording: Recording,
    scores: Scores,
    calibration: Calibration,
    held_out: Indices,
) -> Evidence:
    """Where samples left, and the extreme ones."""
    thresholds, enabled = calibration.thresholds.values(), calibration.enabled.values()
    leave = left_at(scores.confidence, list(thresholds), list(enabled))
    labels, predicted = recording.labels, recording.predicted
    hardest, easiest = (
        tuple(
            Picture(
                image=image,
                leave=int(leave[i]),
                label=None if labels is None else int(labels[i]),
                predicted=None if predicted is None else int(predicted[i, leave[i]]),
            )
            for i, image in end
        )
        for end in recording.gallery.ends()
    )
    return Evidence(
        dyn=dyn,
        leave=leave[held_out],
        labels=None if labels is None else labels[held_out],
        hardest=hardest,
        easiest=easiest,
    )
