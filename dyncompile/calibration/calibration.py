"""`calibrate`: set the exits and gates of a dynamic model so that its risk or its cost is as asked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from dyncompile.calibration.certify import Setting, choose_among
from dyncompile.calibration.evidence import Evidence, Picture, left_at
from dyncompile.calibration.knobs import OPEN, trained_groups, turned
from dyncompile.calibration.losses import NAMED, Loss, resolve
from dyncompile.calibration.result import Calibration, GateSetting
from dyncompile.calibration.risk import Array
from dyncompile.calibration.scores import Recording, Run, record
from dyncompile.calibration.search import cost_at
from dyncompile.calibration.target import Indices, Target, split
from dyncompile.calibration.temperature import TEMPERATURES, fit_temperatures
from dyncompile.calibration.usage import Usage, decisions_by_group, work
from dyncompile.errors import ArgumentError
from dyncompile.module import DynamicModule, Unit
from dyncompile.values import whole

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
    """Set threshold, temperature and enabled of every exit, and the knob of every group of gates, all jointly.

    The gates that one pass inserted share a knob, a bias on their logits. The data pass once; of a model with gates
    every batch is run at each knob setting of a grid (see `dyncompile.calibration.knobs.grid`). A random part of the
    data, 30 %, gives the grid, the temperatures and a path of candidates (a knob setting with a threshold for each
    exit), from the safest to the cheapest; the rest is held out. With `max_drop`, the cheapest candidate is taken of
    those that the held-out samples certify: over the draw of the data, the risk of the result exceeds `max_drop` with
    probability at most `1 - confidence`. This holds for any model and any number of samples, as long as the data are
    independent draws of what the model will meet, and the model was not trained on them. With `max_cost`, the safest
    candidate within the budget is taken and its risk bounded. With both, the risk comes first, and it is an error where
    the cheapest certified candidate is over the budget. An exit that does not pay is disabled, and gates that do not
    pay are switched off, which leaves them open for every sample.

    Risk is relative to the static model: full depth, all gates open, the weights as they are. Gates open, gates as
    trained and exits off are always among the candidates, so any part of the model that cannot be trusted falls back to
    the static one. The static model as a whole is chosen only for a `max_cost` that it meets: where `max_drop` leaves
    nothing that saves anything, it is an error, and `dyn` is as it was, as on every error.

    Args:
        dyn: A dynamic model with exits, gates or both. Gates that were never trained (`finetune(target_cost=)`) stay
            switched off, with a warning.
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
        ArgumentError: A value is out of range, the model has neither exits nor gates that were trained.
        DataError: The data are empty, without any label, hold NaN or do not fit the model.
        CalibrationError: Too few samples for the guarantee (the message says how many are needed),
            or the model gives NaN.
        UnreachableTargetError: No thresholds or knobs reach the target; the message gives the best
            reachable.
    """
    if max_drop is None and max_cost is None:
        max_drop = _DEFAULT_DROP
    target = Target(max_drop=max_drop, max_cost=max_cost, confidence=confidence, method=method)
    if unit not in {"flops", "time"}:
        raise ArgumentError("unit", found=repr(unit), expected="'flops' or 'time'")
    whole("seed", seed, least=0)
    groups = trained_groups(dyn) if len(getattr(dyn, "gates", ())) else {}
    if not groups and not len(getattr(dyn, "exits", ())):
        expected = "dynamize(model, strategy='early_exit'), or another strategy"
        raise ArgumentError("dyn", found="a model without exits and gates", expected=expected)
    recording = record(
        dyn,
        data,
        resolve(risk, task=dyn.task),
        named=risk in NAMED.values() or not callable(risk),
        batch_size=batch_size,
        device=device,
        progress=progress,
        groups=groups,
        seed=seed,
        design_all=method == "greedy",
    )
    design, held_out = split(
        len(recording.runs[0].losses),
        target,
        binary=recording.runs[0].binary,
        seed=seed,
        seen=recording.seen,
        among=recording.among,
    )
    settings = [_setting(dyn, run, design, groups, unit) for run in recording.runs]
    calibration, index = choose_among(settings, target, design=design, held_out=held_out, unit=unit, seed=seed)
    run, knobs = recording.runs[index], recording.runs[index].knobs
    with turned(dyn, groups, knobs):
        evidence = _evidence(dyn, recording, run, settings[index], calibration, held_out, groups)
    rates = {} if evidence.usage is None else evidence.usage.rates
    owned = {} if evidence.usage is None else evidence.usage.groups
    gates = tuple(
        GateSetting(
            name=name,
            gates=gates,
            bias=bias,
            enabled=bias < OPEN,
            rates={decision: rates[decision] for decision in owned.get(name, ())},
        )
        for (name, gates), bias in zip(groups.items(), knobs, strict=True)
    )
    calibration = dataclasses.replace(calibration, gates=gates)
    calibration.apply(dyn)
    return dataclasses.replace(calibration, evidence=evidence)


def _setting(dyn: DynamicModule, run: Run, design: Indices, groups: Mapping[str, Sequence[str]], unit: Unit) -> Setting:
    """One knob setting, its temperatures fitted on the design samples."""
    fitted, temperatures = np.zeros(len(run.exits), dtype=np.intp), None
    if run.nll is not None:
        fitted = fit_temperatures(run.nll[design])
        temperatures = [TEMPERATURES[index] for index in fitted]
    known: dict[tuple[bool, ...], Array] = {}

    def cost_of(enabled: tuple[bool, ...]) -> Array:
        names = [name for name, on in zip(run.exits, enabled, strict=True) if on]
        if not run.decisions:
            with turned(dyn, {}, ()):
                costs = dyn.exit_costs(names, unit=unit)
            return np.array([costs.get(name, np.nan) for name in (*run.exits, "final")])
        if enabled not in known:
            with turned(dyn, groups, run.knobs):
                known[enabled] = _costs(dyn, run, names, unit)
        return known[enabled]

    return Setting(scores=run.at(fitted), cost_of=cost_of, temperatures=temperatures, knobs=run.knobs)


def _costs(dyn: DynamicModule, run: Run, names: Sequence[str], unit: Unit) -> Array:
    """Cost of each sample by where it leaves, given what gates decided about it, `[N, E + 1]`."""
    model = dyn.cost_model(names, unit=unit)
    decided = {name: torch.from_numpy(value) for name, value in run.decisions.items()}
    samples = len(run.losses)
    costs = np.full((samples, len(run.exits) + 1), np.nan)
    for column, place in enumerate((*run.exits, "final")):
        if place in names or place == "final":
            left = {name: torch.full((samples,), name == place) for name in names}
            costs[:, column] = model.expected({**decided, **left}).double().numpy()
    return costs


def _evidence(
    dyn: DynamicModule,
    recording: Recording,
    run: Run,
    setting: Setting,
    calibration: Calibration,
    held_out: Indices,
    groups: Mapping[str, Sequence[str]],
) -> Evidence:
    """Where samples left, the extreme ones, and what gates did."""
    thresholds, enabled = calibration.thresholds.values(), calibration.enabled.values()
    leave = left_at(setting.scores.confidence, list(thresholds), list(enabled))
    costs = cost_at(setting.cost_of(tuple(enabled)), leave)
    labels, predicted = recording.labels, run.predicted
    hardest, easiest = (
        tuple(
            Picture(
                image=image,
                leave=int(leave[i]),
                label=None if labels is None else int(labels[i]),
                predicted=None if predicted is None else int(predicted[i, leave[i]]),
                cost=float(costs[i]),
            )
            for i, image in end
        )
        for end in recording.gallery.ends()
    )
    held_labels = None if labels is None else labels[held_out]
    usage = None
    if groups:
        decided = {name: value[held_out] for name, value in run.decisions.items()}
        ran = work(dyn, decided, leave[held_out], [name for name, on in calibration.enabled.items() if on])
        examples = recording.examples.of(held_out)
        usage = Usage(ran=ran, groups=decisions_by_group(dyn, groups, ran), labels=held_labels, examples=examples)
    return Evidence(
        dyn=dyn,
        leave=leave[held_out],
        labels=held_labels,
        hardest=hardest,
        easiest=easiest,
        costs=costs[held_out],
        decisions={name: value[held_out] for name, value in run.decisions.items()},
        knobs=run.knobs,
        usage=usage,
    )
