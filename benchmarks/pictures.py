"""Pictures of the scoreboard as SVG: accuracy over time, and growth. Readable on white and on black.

Nothing is drawn behind a picture, and every colour has enough contrast with both.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import Table
from benchmarks.scores import Score, Scoreboard
from dyncompile.errors import require

COLOURS = {"static": "#7b8794", "mechanism": "#b8791f", "dyncompile": "#e4572e"}
MARKS = {"static": "s", "mechanism": "^", "dyncompile": "o"}
INK = "#808a96"
_DASHED: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
_LEADER = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkB": 4, "shrinkA": 1}


def frontier(board: Scoreboard, batch: int) -> str:
    """Accuracy over the measured time of a sample, all contestants, with the frontier that none beats."""
    with _figure(7.6, 5.2) as (figure, axes):
        front = board.frontier(batch)
        shown = [score for score in board.scores if batch in score.seconds]
        for family, colour in COLOURS.items():
            own = [score for score in shown if score.family == family]
            places = [_place(score, batch) for score in own]
            if places:
                axes.scatter(*zip(*places, strict=True), s=42, c=colour, marker=MARKS[family], label=family, zorder=3)
                reach = [500 * score.spread.get(batch, 0.0) / batch for score in own]
                axes.errorbar(
                    *zip(*places, strict=True), xerr=reach, fmt="none", ecolor=colour, elinewidth=1, alpha=0.5
                )
        if front:
            steps = [_place(score, batch) for score in front]
            axes.plot(*zip(*steps, strict=True), **_DASHED)
        axes.set_xscale("log")
        axes.set_xlabel(f"milliseconds a sample, at batch {batch}" + (" (mean)" if batch == 1 else ""))
        axes.set_ylabel("accuracy on the test set, %")
        axes.margins(x=0.16, y=0.12)
        axes.xaxis.set_major_formatter(_plain)
        axes.xaxis.set_minor_formatter(_plain)
        axes.xaxis.set_minor_locator(require("matplotlib.ticker", extra="report").LogLocator(subs=(2.0, 5.0)))
        axes.legend(frameon=False, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        axes.set_title(board.title, color=INK, pad=30)
        _label(figure, axes, [(_place(s, batch), _short(s), COLOURS[s.family]) for s in shown])
        return _svg(figure)


def growth(table: Table) -> str:
    """Seconds to convert and to lower, and the overhead of a conditional, over size."""
    with _figure(9.0, 3.2, columns=3) as (figure, axes):
        sizes = [float(row[0]) for row in table.rows]
        wanted = ("convert, s", "lower, s", "overhead, us a conditional")
        for one, column in zip(axes, wanted, strict=True):
            values = [float(row[table.columns.index(column)]) for row in table.rows]
            one.plot(sizes, values, color=COLOURS["dyncompile"], marker="o", markersize=4)
            one.set_xscale("log")
            if column != wanted[-1]:
                one.set_yscale("log")
                # Linear growth through the last point.
                one.plot(sizes, [values[-1] * size / sizes[-1] for size in sizes], **_DASHED)
            else:
                one.axhline(30, **_DASHED)
                one.set_ylim(0, max(32, *values))
            one.set_xlabel(table.columns[0])
            one.set_ylabel(column)
        return _svg(figure)


def _place(score: Score, batch: int) -> tuple[float, float]:
    return 1e3 * score.seconds[batch] / batch, 100 * score.accuracy_at(batch)


def _short(score: Score) -> str:
    return score.name.removeprefix("dyncompile, ").removeprefix("static, ")


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


@contextmanager
def _figure(width: float, height: float, *, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    matplotlib = require("matplotlib", extra="report")
    figures = require("matplotlib.figure", extra="report")
    style = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "dyncompile",
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(1, columns)


def _label(figure: Any, axes: Any, labels: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Names beside their points, over neither another name nor a point; a line leads to those that are far off."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    points = [tuple(axes.transData.transform(place)) for place, _, _ in labels]
    box = axes.get_window_extent()
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for (x, y), (place, text, colour) in sorted(zip(points, labels, strict=True), key=lambda item: -item[0][1]):
        probe = axes.text(0, 0, text)
        extent = probe.get_window_extent()
        probe.remove()
        width, height = extent.width + 2, extent.height
        best = min(
            _candidates(x, y, width, height),
            key=lambda found: (
                _overlap(found, taken) + _outside(found, box, figure.bbox.width),
                _distance(found, x, y),
            ),
        )
        taken.append(best)
        left, low, right, high = best
        near = _distance(best, x, y) < 12 * scale
        middle = ((left + right) / 2, (low + high) / 2)
        label = axes.annotate(
            text,
            xy=place,
            xytext=axes.transData.inverted().transform(middle),
            ha="center",
            va="center",
            color=colour,
            arrowprops=None if near else _LEADER,
        )
        label.set_in_layout(False)  # places were found for the layout without them


Box = tuple[float, float, float, float]


def _candidates(x: float, y: float, width: float, height: float) -> Iterator[Box]:
    """Boxes around a point, near ones first."""
    for ring in range(14):
        gap = 9 + ring * 0.8 * height
        for dx in (gap, -gap - width, -width / 2):
            for dy in (-height / 2, gap - height / 2, -gap - height / 2):
                if dx == -width / 2 and dy == -height / 2:
                    continue
                yield x + dx, y + dy, x + dx + width, y + dy + height


def _overlap(box: Box, taken: Sequence[Box]) -> float:
    """Area that a box shares with others."""
    left, low, right, high = box
    return sum(
        max(0.0, min(right, other[2]) - max(left, other[0])) * max(0.0, min(high, other[3]) - max(low, other[1]))
        for other in taken
    )


def _outside(box: Box, axes: Any, width: float) -> float:
    left, low, right, high = box
    beyond: float = (
        max(0.0, axes.x0 - left) + max(0.0, right - width) + max(0.0, axes.y0 - low) + max(0.0, high - axes.y1 - 6)
    )
    return 1e3 * beyond


def _distance(box: Box, x: float, y: float) -> float:
    left, low, right, high = box
    dx, dy = max(left - x, 0.0, x - right), max(low - y, 0.0, y - high)
    return float((dx * dx + dy * dy) ** 0.5)


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Text without a family of its own takes the page's.
    return re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px system-ui, sans-serif", text.getvalue())
