"""What the page shows as pictures: the frontier as SVG, inputs as PNG, and the colours of depth."""

import base64
import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dyncompile.calibration.result import Calibration
from dyncompile.errors import require

INK, MUTED, RULE, ACCENT = "#1c2430", "#66707f", "#e3e7ec", "#e4572e"

_WINDOW = 10.0  # points of accuracy below the chosen one that the frontier shows
_DEPTHS = ("#8fd6c4", "#4db2bd", "#2f7fb5", "#3d539f", "#2c2c63")


def depth_colours(count: int) -> list[str]:
    """`count` colours from light (leaves early) to dark (runs to the end)."""
    known = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _DEPTHS])
    at = np.linspace(0, len(known) - 1, count) if count > 1 else np.array([0.0])
    mixed = [np.interp(at, range(len(known)), known[:, channel]) for channel in range(3)]
    return ["#" + "".join(f"{round(value):02x}" for value in rgb) for rgb in zip(*mixed, strict=True)]


def is_dark(colour: str) -> bool:
    """Whether text on a colour `#rrggbb` should be white."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 150


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The look of the page's figures."""
    matplotlib = require("matplotlib", extra="report")
    style = {
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.color": RULE,
        "svg.fonttype": "none",
        "svg.hashsalt": "dyncompile",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    with matplotlib.rc_context(style):
        yield


def as_svg(figure: Any) -> str:
    """A matplotlib figure as SVG to stand in HTML."""
    text = io.StringIO()
    with styled():
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(text.getvalue())


def frontier(calibration: Calibration) -> str:
    """Accuracy (1 - risk where it is not defined) over expected cost, as SVG to stand in HTML."""
    figures = require("matplotlib.figure", extra="report")
    with styled():
        figure = figures.Figure(figsize=(5.2, 3.7), layout="constrained")
        _draw(figure.add_subplot(), calibration)
    return as_svg(figure)


def _draw(axes: Any, calibration: Calibration) -> None:
    def quality(point: Any) -> float:
        value: float = 1 - point.risk if point.accuracy is None else point.accuracy
        return 100 * value

    points = sorted(calibration.frontier, key=lambda point: point.cost)
    axes.plot([p.cost for p in points], [quality(p) for p in points], color=RULE, zorder=1)
    kinds = (False, "considered", "#b6bec9"), (True, "certified", _DEPTHS[2])
    for certified, label, colour in kinds:
        drawn = [p for p in points if p.certified is certified]
        if drawn:
            axes.scatter(
                [p.cost for p in drawn], [quality(p) for p in drawn],
                s=26, color=colour, label=label, linewidths=0, zorder=2,
            )  # fmt: skip
    static = calibration.static_accuracy
    if static is not None:
        axes.axhline(100 * static, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.plot(1, 100 * static, "s", color=INK, markersize=6, label="static model", zorder=3)
    axes.plot(
        calibration.cost, quality(calibration), "*", color=ACCENT, markersize=17,
        markeredgecolor="white", label="chosen", zorder=4,
    )  # fmt: skip
    # What lies far below the choice would squeeze what lies near it.
    lowest = quality(calibration) - _WINDOW
    if min(quality(p) for p in points) < lowest:
        axes.set_ylim(bottom=lowest)
    axes.set_ylim(top=min(100.5, axes.get_ylim()[1]))
    axes.set_xlim(0, max(1.05, *(p.cost for p in points)))
    axes.set_xlabel("expected cost (1 = static model)")
    axes.set_ylabel("accuracy, %" if calibration.accuracy is not None else "100 % − risk")
    axes.grid(visible=True, axis="y")
    axes.tick_params(length=0)
    axes.legend(loc="best", frameon=False, labelcolor=INK)


def _inline(svg: str) -> str:
    """An SVG document as an element of HTML: no prolog, no namespaces, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    return svg.replace("'DejaVu Sans'", "system-ui")


def thumbnail(image: NDArray[np.float32]) -> str:
    """An image `[C, H, W]`, C 1 or 3, of any range, as the address of an inlined PNG."""
    images = require("matplotlib.image", extra="report")
    low, high = float(np.nanmin(image)), float(np.nanmax(image))
    scaled = np.nan_to_num((image - low) / ((high - low) or 1.0)).clip(0, 1)
    pixels = np.repeat(scaled, 3, 0) if len(scaled) == 1 else scaled
    file = io.BytesIO()
    images.imsave(file, pixels.transpose(1, 2, 0), format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
