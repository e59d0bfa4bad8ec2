"""Pictures of what gates do: how often by class, in which patterns, and which frames of a sequence are kept."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dyncompile.calibration.knobs import gate_groups
from dyncompile.calibration.usage import Examples, Usage, batch_first, decisions_by_group, work
from dyncompile.data import as_loader, call
from dyncompile.errors import ArgumentError, require
from dyncompile.module import DynamicModule
from dyncompile.nn import Exit
from dyncompile.reporting.figures import INK, MUTED, RULE, styled
from dyncompile.values import whole

RAN = "#2f7fb5"
_PALE = "#eef2f6"
_CLASSES = 24
_BESIDE = 8
_CHANNELS = 6
_LEVEL = 16  # words that have room side by side


_ON = "gates that training switched on, and that calibration, which leaves off what does not pay, left on"


def observe(dyn: DynamicModule, data: Any, *, batch_size: int = 64, device: torch.device | str | None = None) -> Usage:
    """Run data through a dynamic model as it is set now, and note what ran.

    Args:
        dyn: A dynamic model with gates; afterwards in the mode in which it was.
        data: What `dyncompile.data.as_loader` takes.
        batch_size: Samples per batch, where `data` is not a DataLoader.
        device: Where to run; None for where the model is.

    Returns:
        What `gate_heatmap`, `skip_patterns` and `kept_frames` draw.

    Raises:
        ArgumentError: The model is no dynamic one, or has no gate that is on.
        DataError: See `as_loader`.
    """
    from dyncompile.calibration.scores import running

    if not isinstance(dyn, DynamicModule):
        raise ArgumentError("dyn", found=f"a {type(dyn).__name__}", expected="what dyncompile.dynamize returns")
    groups = gate_groups(dyn)
    if not any(bool(dyn.gates[name].enabled) for names in groups.values() for name in names):
        raise ArgumentError("dyn", found="a model without a gate that is on", expected=_ON)
    exits = [name for name, module in dyn.exits.items() if isinstance(module, Exit) and bool(module.enabled)]
    loader = as_loader(data, batch_size=batch_size, batch_dims=dyn.recipe.batch_dims)
    examples = Examples()
    rows: list[dict[str, NDArray[Any]]] = []
    labels: list[Tensor] = []
    with running(dyn, device) as where, torch.no_grad():
        for inputs, targets in loader:
            moved = tree_map_only(Tensor, lambda t: t.to(where), inputs)
            trace = call(dyn.trace, moved)
            made = {name: value.cpu().numpy() for name, value in trace.decisions.items()}
            fires = [made.pop(name) & (name in exits) for name in dyn.exits]
            ends = np.ones(len(targets), dtype=bool)
            rows.append(work(dyn, made, np.column_stack([*fires, ends]).argmax(1), exits))
            labels.append(targets)
            examples.add(batch_first(dyn, moved), torch.ones(len(targets), dtype=torch.bool))
    ran = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    single = all(t.ndim == 1 and not t.is_floating_point() for t in labels)
    count = sum(len(t) for t in labels)
    return Usage(
        ran=ran,
        groups=decisions_by_group(dyn, groups, ran),
        labels=torch.cat(labels).numpy() if single else None,
        examples=examples.of(np.arange(count)),
    )


# --- usage by class ------------------------------------------------------------------------------


def gate_heatmap(usage: Usage, *, classes: Sequence[str] | None = None) -> Any:
    """How often what each gate controls runs, for each class: dark runs often.

    Args:
        usage: What `observe` or a calibration's evidence gives.
        classes: Names of the classes, in order.

    Returns:
        A matplotlib figure; decisions from left to right in order of execution, one panel for each pass; classes from
        top to bottom, the one that uses most last. Of many, the ends are shown.

    Raises:
        ArgumentError: There are fewer names than classes.
        MissingExtraError: matplotlib is not installed.
    """
    _check(usage)
    highest = -1 if usage.labels is None else int(usage.labels.max())
    if classes is not None and len(classes) <= highest:
        raise ArgumentError(
            "classes", found=f"{len(classes)} names", expected=f"{highest + 1}, for labels up to {highest}"
        )
    groups = {name: made for name, made in usage.groups.items() if made}
    means = {name: np.nanmean(ran.reshape(len(ran), -1), 1) for name, ran in usage.ran.items()}
    rows = _rows(usage, means, classes)
    with styled():
        widths = [max(3, len(made)) for made in groups.values()]
        height = 0.9 + 0.26 * len(rows)
        figure = _figure(2.2 + 0.42 * sum(widths), height)
        panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=widths)[0]
        for index, (axes, (group, made)) in enumerate(zip(panels, groups.items(), strict=True)):
            values = np.array([[means[name][chosen].mean() for name in made] for _, chosen in rows])
            _cells(axes, values)
            axes.set_title(group.replace("_", " "), fontsize=10, color=INK, loc="left")
            axes.set_yticks(range(len(rows)), [label for label, _ in rows] if index == 0 else [""] * len(rows))
            axes.set_xticks(range(len(made)), made, rotation=50, ha="right", rotation_mode="anchor")
            if "all" in [label for label, _ in rows[1:]] or (len(rows) > 1 and rows[0][0] == "all"):
                axes.axhline(0.5, color="white", linewidth=4)
    return figure


def _rows(
    usage: Usage, means: dict[str, NDArray[np.float32]], classes: Sequence[str] | None
) -> list[tuple[str, NDArray[np.bool_]]]:
    """What the heat map has a row for: all samples, then each class, the one that uses least first."""
    everyone = np.ones(len(next(iter(means.values()))), dtype=bool)
    rows = [("all", everyone)]
    if usage.labels is None:
        return rows
    used = np.mean(list(means.values()), axis=0)
    apart = [(label, usage.labels == label) for label in np.unique(usage.labels).tolist()]
    apart.sort(key=lambda row: float(used[row[1]].mean()))
    if len(apart) > _CLASSES:
        apart = [*apart[: _CLASSES // 2], *apart[-_CLASSES // 2 :]]
    named = [(str(label) if classes is None else str(classes[label]), chosen) for label, chosen in apart]
    return rows + named


def _cells(axes: Any, values: NDArray[np.floating[Any]]) -> None:
    colours = require("matplotlib.colors", extra="report")
    scale = colours.LinearSegmentedColormap.from_list("ran", [_PALE, "#8fc3dd", RAN, "#1d3f66"])
    axes.imshow(values, cmap=scale, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.grid(visible=False, which="major")
    axes.tick_params(which="minor", length=0)
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5,
            color="white" if value > 0.55 else INK,
        )  # fmt: skip


# --- patterns ------------------------------------------------------------------------------------


def patterns(usage: Usage, count: int = 8) -> list[tuple[tuple[float, ...], NDArray[np.intp]]]:
    """The most frequent combinations of what ran, and the samples that had each.

    Args:
        usage: What gates did. Decisions by frame or token are left out.
        count: How many combinations at most.

    Returns:
        For each combination, most frequent first, the values of `Usage.ran` and the indices of the samples.
    """
    names = _whole(usage)
    if not names:
        return []
    table = np.stack([usage.ran[name] for name in names], axis=1)
    found, which, sizes = np.unique(table, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    order = sorted(range(len(found)), key=lambda i: (-sizes[i], found[i].tolist()))
    return [(tuple(found[i].tolist()), np.flatnonzero(which == i)) for i in order[:count]]


def skip_patterns(usage: Usage, *, count: int = 8) -> Any:
    """Which blocks ran together: the most frequent patterns, with inputs that had them where those are images.

    Args:
        usage: What `observe` or a calibration's evidence gives.
        count: How many patterns at most.

    Returns:
        A matplotlib figure, or None where every decision is one by frame or token. A row for each pattern: a filled
        square for what ran (of a route filled as far as its level), the share of the samples, example inputs.

    Raises:
        ArgumentError: `count` is none.
        MissingExtraError: matplotlib is not installed.
    """
    _check(usage)
    found = patterns(usage, whole("count", count, least=1))
    if not found:
        return None
    names = _whole(usage)
    samples = len(usage.ran[names[0]])
    pictures = {i: image for i, image in usage.examples.items() if image.ndim == 3}
    beside = _BESIDE if pictures else 0
    squares = 0.26 * len(names)
    with styled():
        figure = _figure(squares + 1.3 + 0.55 * beside, 0.6 + 0.55 * len(found))
        grid = figure.add_gridspec(len(found), 1 + beside, width_ratios=[squares + 0.9, *[0.5] * beside])
        for row, (pattern, members) in enumerate(found):
            axes = figure.add_subplot(grid[row, 0])
            _squares(axes, pattern, len(members) / samples)
            if row == 0:
                for column, name in enumerate(names):
                    axes.text(column + 0.1, 1.15, name, rotation=50, fontsize=8, color=MUTED, ha="left", va="bottom")
            shown = [pictures[i] for i in members.tolist() if i in pictures][:beside]
            for column, image in enumerate(shown):
                _picture(figure.add_subplot(grid[row, 1 + column]), image)
    return figure


def _squares(axes: Any, pattern: Sequence[float], share: float) -> None:
    patches = require("matplotlib.patches", extra="report")
    for column, value in enumerate(pattern):
        axes.add_patch(patches.Rectangle((column - 0.42, 0.08), 0.84, 0.84, facecolor=_PALE, edgecolor=RULE))
        axes.add_patch(patches.Rectangle((column - 0.42, 0.08), 0.84, 0.84 * value, facecolor=RAN, linewidth=0))
    axes.text(len(pattern) - 0.2, 0.5, f"{100 * share:.1f} %", ha="left", va="center", color=INK)
    axes.set_xlim(-0.6, len(pattern) + 2.6)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal", anchor="W")
    axes.axis("off")


def _picture(axes: Any, image: NDArray[np.float32], *, faded: bool = False) -> None:
    low, high = float(image.min()), float(image.max())
    pixels = ((image - low) / ((high - low) or 1.0)).transpose(1, 2, 0)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, 2)
    axes.imshow(1 - 0.25 * (1 - pixels) if faded else pixels, interpolation="nearest")
    axes.axis("off")


def _whole(usage: Usage) -> list[str]:
    """Decisions that are made once a sample."""
    return [name for name, ran in usage.ran.items() if ran.ndim == 1]


# --- frames --------------------------------------------------------------------------------------


def kept_frames(usage: Usage, *, decision: str | None = None, count: int = 4, words: Callable[[int], str] = str) -> Any:
    """Which frames of a sequence were kept, next to the sequence.

    Args:
        usage: What `observe` or a calibration's evidence gives.
        decision: Name of a decision by frame; default: the first that there are sequences of its length for.
        count: How many sequences, from the one of which least is kept to the one of which most is.
        words: What stands for a token, given its id.

    Returns:
        A matplotlib figure, or None where no decision is one by frame of an input that can be shown. Of a sequence
        `[T, ...]` the features that vary most are drawn as lines over its kept steps, shaded; of tokens `[T]` their
        words; of a video `[T, 1 or 3, H, W]` the frames, skipped ones faded.

    Raises:
        ArgumentError: There is no such decision, or none of it by frame; or `count` is none.
        MissingExtraError: matplotlib is not installed.
    """
    _check(usage)
    whole("count", count, least=1)
    by_frame = [name for name, ran in usage.ran.items() if ran.ndim == 2]
    if decision is not None and decision not in by_frame:
        raise ArgumentError("decision", found=repr(decision), expected=f"one by frame: {by_frame}")
    for name in by_frame if decision is None else [decision]:
        ran = usage.ran[name]
        shown = {i: x for i, x in usage.examples.items() if len(x) == len(ran[i])}
        if shown:
            break
    else:
        return None
    order = sorted(shown, key=lambda i: (float(np.nanmean(ran[i])), i))
    chosen = [order[round(place)] for place in np.linspace(0, len(order) - 1, min(count, len(order)))]
    chosen = list(dict.fromkeys(chosen))
    with styled():
        first = shown[chosen[0]]
        video, tokens = _is_video(first), first.ndim == 1
        draw = _strip if video else partial(_tokens, words=words) if tokens else _signal
        figure = _figure(10.0, 0.4 + (0.95 if video else 0.8 if tokens else 1.45) * len(chosen))
        panels = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
        for axes, sample in zip(panels, chosen, strict=True):
            label = "" if usage.labels is None else f"class {usage.labels[sample]}, "
            kept = ran[sample]
            axes.set_title(f"{label}{100 * np.nanmean(kept):.0f} % kept", fontsize=9, color=MUTED, loc="left", pad=3)
            there = ~np.isnan(kept)  # the rest is padding
            draw(axes, shown[sample][there], kept[there])
        if not video:
            panels[-1].set_xlabel("step")
    return figure


def _is_video(example: NDArray[np.float32]) -> bool:
    """Frames that are pictures: `[T, 1 or 3, H, W]`."""
    return example.ndim == 4 and example.shape[1] in (1, 3)


def _signal(axes: Any, sequence: NDArray[np.float32], kept: NDArray[np.float32]) -> None:
    sequence = sequence.reshape(len(sequence), -1)
    for step in np.flatnonzero(kept > 0).tolist():
        axes.axvspan(step - 0.5, step + 0.5, color=RAN, alpha=0.22, linewidth=0)
    spread = sequence.std(0)
    busiest = np.sort(np.argsort(-spread)[:_CHANNELS])
    for shade, channel in zip(np.linspace(0.15, 0.6, len(busiest)), busiest, strict=True):
        axes.plot(sequence[:, channel], color=str(shade), linewidth=0.9)
    axes.set_xlim(-0.5, len(sequence) - 0.5)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _tokens(
    axes: Any, sequence: NDArray[np.float32], kept: NDArray[np.float32], *, words: Callable[[int], str]
) -> None:
    for step, (token, here) in enumerate(zip(sequence.tolist(), (kept > 0).tolist(), strict=True)):
        if here:
            axes.axvspan(step - 0.5, step + 0.5, color=RAN, alpha=0.22, linewidth=0)
        axes.text(
            step, 0.5, words(int(token)), ha="center", va="center", fontsize=7.5, color=INK if here else MUTED,
            rotation=0 if len(sequence) <= _LEVEL else 90,
        )  # fmt: skip
    axes.set_xlim(-0.5, len(sequence) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _strip(axes: Any, video: NDArray[np.float32], kept: NDArray[np.float32]) -> None:
    patches = require("matplotlib.patches", extra="report")
    height, width = video.shape[-2:]
    low, high = float(video.min()), float(video.max())
    frames = ((video - low) / ((high - low) or 1.0)).transpose(0, 2, 3, 1)
    frames = np.repeat(frames, 3, 3) if frames.shape[3] == 1 else frames
    frames = np.where((kept > 0)[:, None, None, None], frames, 1 - 0.2 * (1 - frames))
    axes.imshow(np.concatenate(list(frames), axis=1), interpolation="nearest")
    for step in np.flatnonzero(kept > 0).tolist():
        corner = (step * width - 0.5, -0.5)
        axes.add_patch(patches.Rectangle(corner, width, height, fill=False, edgecolor=RAN, linewidth=2))
    axes.axis("off")


def _check(usage: object) -> None:
    if not isinstance(usage, Usage):
        raise ArgumentError(
            "usage", found=f"a {type(usage).__name__}", expected="what dyncompile.reporting.observe returns"
        )


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", extra="report").Figure(figsize=(width, height), layout="constrained")
