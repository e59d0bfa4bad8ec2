"""Gather what a report shows, and write it."""

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dyncompile.calibration.evidence import Evidence, Picture
from dyncompile.calibration.knobs import gate_groups, turned
from dyncompile.calibration.result import Calibration
from dyncompile.cost import guard_probability
from dyncompile.demand import Region
from dyncompile.drafts import drafted
from dyncompile.errors import ArgumentError, require
from dyncompile.module import DynamicModule, Unit
from dyncompile.recipe import Recipe
from dyncompile.reporting.figures import INK, as_svg, depth_colours, frontier, is_dark, thumbnail
from dyncompile.reporting.gates import gate_heatmap, kept_frames, skip_patterns

_CLASSES_SHOWN = 24
_APART = 0.13  # of the width of the page


class Measurement(Protocol):
    """One model as it was measured.

    Attributes:
        accuracy: Share of the samples labelled right.
        cost: Counted compute per sample, 1.0 = the static model.
        seconds: Wall clock, the same samples for every model.
        form: How it was run: "inductor frozen", "lowered", ...
    """

    @property
    def accuracy(self) -> float: ...
    @property
    def cost(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def form(self) -> str: ...


def write_report(
    calibration: Calibration,
    path: str | os.PathLike[str],
    *,
    measurements: Mapping[str, Measurement] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write a calibration as one HTML page that refers to nothing outside itself.

    It shows the regions of the graph with their cost and the share of the samples that need them,
    accuracy over cost, who leaves where, what gates do (by class, in patterns, along sequences), the
    easiest and hardest inputs where they are images, the settings with their guarantee, the recipe,
    and measured beside counted savings.

    Args:
        calibration: What `dyncompile.calibrate` returned. Without its evidence the page has only
            the settings and the frontier.
        path: File to write; folders on the way are made.
        measurements: Models that were timed in one run, by name; the first is the static twin, to
            which the others are compared.
        classes: Names of the classes, in order.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        ArgumentError: Fewer names than classes, or a static twin that took no time.
    """
    jinja2 = require("jinja2", extra="report")
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError("path", found=repr(path), expected="a file to write, such as report.html")
    path = Path(path)
    if path.is_dir():
        raise ArgumentError("path", found=f"{path}, a folder", expected="a file to write, such as report.html")
    evidence = calibration.evidence
    names = [setting.name for setting in (*calibration.exits, calibration.final)]
    colours = dict(zip(names, depth_colours(len(names)), strict=True))
    context: dict[str, Any] = {
        "cal": calibration,
        "colours": colours,
        "frontier": frontier(calibration),
        "measured": _measured(measurements or {}),
        "style": _read("report.css"),
    }
    if evidence is not None:
        labels = _Classes(classes, evidence)
        with turned(evidence.dyn, gate_groups(evidence.dyn), evidence.knobs):
            regions = _regions(calibration, evidence, colours)
        context |= {
            "model": evidence.dyn.recipe.model.rpartition(".")[2],
            "strategies": [step.strategy for step in evidence.dyn.recipe.steps],
            "static_flops": evidence.dyn.cost_model().static,
            "regions": regions,
            "ticks": _ticks(regions),
            "classes": _by_class(calibration, evidence, labels),
            "gates": _gates(evidence, classes),
            "class_count": labels.count,
            "easiest": [_shown(p, names, labels) for p in evidence.easiest],
            "hardest": [_shown(p, names, labels) for p in evidence.hardest],
            "recipe": evidence.dyn.recipe,
            "paths": _paths(evidence.dyn),
            "recipe_json": _recipe_json(evidence.dyn.recipe),
        }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters.update(percent=_percent, flops=_flops, time=_time)
    text = environment.from_string(_read("report.html.j2")).render(context)
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _read(name: str) -> str:
    return importlib.resources.files("dyncompile.reporting").joinpath(name).read_text("utf-8")


# --- regions -------------------------------------------------------------------------------------


def _regions(calibration: Calibration, evidence: Evidence, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every region with its cost and the share of the held-out samples that need it.

    A region has the colour of the exit at which the samples leave that need no more than it.
    """
    unit: Unit = "time" if calibration.unit == "time" else "flops"
    model = evidence.dyn.cost_model([name for name, on in calibration.enabled.items() if on], unit=unit)
    total = sum(model.weights) or 1.0
    chain = [colours[s.name] for s in (*calibration.exits, calibration.final) if s.enabled]
    if len(chain) != len(model.regions):  # more than exits decide
        chain = depth_colours(len(model.regions))
    rows, start = [], 0.0
    for region, weight, colour in zip(model.regions, model.weights, chain, strict=True):
        needed = _needed(region, calibration, evidence)
        rows.append(
            {
                "depth": len(region.guard),
                "name": region.name.rpartition(" & ")[2],
                "path": region.name,
                "layers": _layers(region),
                "operations": len(region.nodes),
                "cost": weight,
                "needed": needed,
                "expected": weight * needed,
                "start": start / total,
                "width": weight / total,
                "colour": colour,
                "ink": "#fff" if is_dark(colour) else INK,
            }
        )
        start += weight
    return rows


def _ticks(regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decisions along the axis of compute, those left out that would touch another's name."""
    ticks: list[dict[str, Any]] = []
    for region in regions:
        at = region["start"]
        before = ticks[-1]["at"] if ticks else 0.0
        if region["depth"] and at - before > _APART and at < 1 - _APART:
            ticks.append({"at": at, "name": region["name"].removeprefix("not ")})
    return ticks


def _needed(region: Region, calibration: Calibration, evidence: Evidence) -> float:
    """Share of the held-out samples (or of their frames or tokens) for which the region's guard holds."""
    made = {name: torch.from_numpy(np.asarray(value)) for name, value in evidence.decisions.items()}
    for index, setting in enumerate(calibration.exits):
        made[setting.name] = torch.from_numpy(evidence.leave == index)
    holds = guard_probability(region.guard, made, len(evidence.leave))
    return float(holds.double().mean())


def _gates(evidence: Evidence, classes: Sequence[str] | None) -> dict[str, Any]:
    """Pictures of what gates did; empty where none is on."""
    usage = evidence.usage
    if usage is None or not usage.ran:
        return {}
    found = {
        "heatmap": gate_heatmap(usage, classes=classes),
        "patterns": skip_patterns(usage),
        "frames": kept_frames(usage),
    }
    return {name: as_svg(figure) for name, figure in found.items() if figure is not None}


def _layers(region: Region) -> str:
    """The first and the last layer of the static model in a region."""
    paths = [str(node.target) for node in region.nodes if node.op == "call_module" and not node.meta.get("inserted")]
    return " … ".join(dict.fromkeys((paths[0], paths[-1]))) if paths else ""


# --- samples -------------------------------------------------------------------------------------


class _Classes:
    """Names of the classes, given or their numbers."""

    def __init__(self, names: Sequence[str] | None, evidence: Evidence) -> None:
        seen = [] if evidence.labels is None else np.unique(evidence.labels).tolist()
        self.count = max(seen, default=-1) + 1
        self._names = names
        if names is not None and len(names) < self.count:
            found = f"{len(names)} names"
            raise ArgumentError("classes", found=found, expected=f"at least {self.count}")

    def __getitem__(self, label: int) -> str:
        return str(label) if self._names is None else str(self._names[label])


def _by_class(calibration: Calibration, evidence: Evidence, names: _Classes) -> list[dict[str, Any]]:
    """Where the samples of each class leave, cheapest class first."""
    if evidence.labels is None:
        return []
    settings = (*calibration.exits, calibration.final)
    costs = np.array([setting.cost or 0.0 for setting in settings])
    rows: list[dict[str, Any]] = []
    for label in np.unique(evidence.labels).tolist():
        leave = evidence.leave[evidence.labels == label]
        counts = np.bincount(leave, minlength=len(settings))
        shares = dict(zip((s.name for s in settings), (counts / len(leave)).tolist(), strict=True))
        cost = float((costs[leave] if evidence.costs is None else evidence.costs[evidence.labels == label]).mean())
        rows.append({"name": names[label], "count": len(leave), "shares": shares, "cost": cost})
    rows.sort(key=lambda row: row["cost"])
    if len(rows) > _CLASSES_SHOWN:
        half = _CLASSES_SHOWN // 2
        rows = [*rows[:half], {"between": len(rows) - 2 * half}, *rows[-half:]]
    return rows


def _shown(picture: Picture, names: list[str], labels: _Classes) -> dict[str, Any]:
    label = None if picture.label is None else labels[picture.label]
    predicted = None if picture.predicted is None else labels[picture.predicted]
    return {
        "image": thumbnail(picture.image),
        "leave": names[picture.leave],
        "label": label,
        "predicted": predicted,
        "cost": picture.cost,
        "small": max(picture.image.shape[1:]) < 64,
    }


# --- measurements, recipe, numbers ---------------------------------------------------------------


def _measured(measurements: Mapping[str, Measurement]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, row in measurements.items():
        twin = next(iter(measurements.values())).seconds
        if not twin > 0:
            found = f"{twin} s for the static twin"
            raise ArgumentError("measurements", found=found, expected="a time above 0")
        ratio = row.seconds / twin
        rows.append(
            {
                "name": name,
                "accuracy": row.accuracy,
                "cost": row.cost,
                "seconds": row.seconds,
                "form": row.form,
                "ratio": ratio,
                "realised": (1 - ratio) / (1 - row.cost) if row.cost < 1 else None,
            }
        )
    return rows


def _paths(dyn: DynamicModule) -> dict[str, str]:
    """The innermost module that each node came from."""
    return {n.name: path[-1] for n in dyn.graph.fx.nodes if (path := n.meta.get("path"))}


def _recipe_json(recipe: Recipe) -> str:
    return recipe.model_dump_json(indent=2, exclude={"state", "arguments", "weights"})


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}\u202f%"


def _flops(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOPs"
    return f"{value:.0f} FLOPs"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
