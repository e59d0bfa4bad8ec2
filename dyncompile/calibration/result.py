"""What a calibration found: printable, plottable, JSON, and applicable to a dynamic model."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from dyncompile.calibration.evidence import Evidence
from dyncompile.errors import ArgumentError, require

if TYPE_CHECKING:
    from rich.table import Table

    from dyncompile.module import DynamicModule
    from dyncompile.reporting import Measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitSetting:
    """One exit's setting and what it does to the held-out samples.

    Attributes:
        name: Name of the exit in `dyn.exits`.
        threshold: The exit fires where its confidence is at least this, in [0, 1].
        temperature: Temperature of its prediction.
        enabled: Whether it is used; an exit that does not pay is not.
        cost: Cost of a sample that leaves here, 1.0 = static model; None where it is not enabled. Where gates decide
            too, the mean over those that do, or if nobody does over all.
        share: Share of the samples that leave here.
        accuracy: Accuracy on the samples that leave here; None where none does or where it is not
            defined.
    """

    name: str
    threshold: float
    temperature: float
    enabled: bool
    cost: float | None
    share: float
    accuracy: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateSetting:
    """The setting of all gates that one pass inserted, and what they do to the held-out samples.

    Attributes:
        name: Name of the pass.
        gates: Names of the gates in `dyn.gates`.
        bias: The knob: added to the gates' logits in evaluation; larger computes more, 0 is as trained.
        enabled: Whether they are used. Gates that do not pay are switched off, which leaves them open for every sample.
        rates: By decision, the share of the samples (of a route the mean level, k / (K - 1) for arm k) for which what
            it controls runs: that no exit let go before, nor another gate passed by. Empty where they are off.
    """

    name: str
    gates: tuple[str, ...]
    bias: float
    enabled: bool
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def knob(self) -> str:
        """The knob in words."""
        if not self.enabled:
            return "off, all open"
        return f"{self.bias:+.3g}" if self.bias else "0, as trained"

    @property
    def rate(self) -> str:
        """The mean of the rates, in words."""
        return f"{sum(self.rates.values()) / len(self.rates):.0%}" if self.rates else "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """A candidate (knobs and a threshold vector) that the search considered, measured on the held-out samples.

    Attributes:
        cost: Expected cost per sample, 1.0 = static model.
        risk: Mean loss.
        accuracy: Accuracy of the dynamic model; None where it is not defined.
        certified: Whether it passed the test against `max_drop`.
    """

    cost: float
    risk: float
    accuracy: float | None
    certified: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Thresholds for every exit and knobs for every group of gates, and what is known about them.

    Attributes:
        exits: Settings by exit, in order of execution.
        gates: Settings by group of gates, in order of execution.
        final: What becomes of the samples that no exit takes.
        cost: Expected cost per sample, 1.0 = static model.
        risk: Mean loss of the held-out samples.
        bound: The expected loss is at most this with probability `confidence` over the draw of the
            calibration data; None for "greedy", which guarantees nothing.
        accuracy: Accuracy of the dynamic model on the held-out samples; None where it is not
            defined.
        static_accuracy: That of the full-depth model, all gates open, on the same samples.
        frontier: The candidates from which this was taken, from the safest to the cheapest.
        method: "ltt", "ucb" or "greedy".
        unit: What cost was counted in, "flops" or "time".
        max_drop: The risk asked for.
        max_cost: The cost asked for.
        confidence: Probability with which the bound holds.
        design_samples: Samples that temperatures and candidates were chosen on.
        held_out_samples: Samples that the candidates were tested and measured on.
        seed: Seed of the split between them.
        evidence: What a report shows beside all this; not part of the result's value.
    """

    exits: tuple[ExitSetting, ...]
    final: ExitSetting
    cost: float
    risk: float
    bound: float | None
    accuracy: float | None
    static_accuracy: float | None
    frontier: tuple[FrontierPoint, ...]
    method: str
    unit: str
    max_drop: float | None
    max_cost: float | None
    confidence: float
    design_samples: int
    held_out_samples: int
    seed: int
    gates: tuple[GateSetting, ...] = ()
    evidence: Evidence | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold by exit."""
        return {setting.name: setting.threshold for setting in self.exits}

    @property
    def knobs(self) -> dict[str, float]:
        """Bias by group of gates: `{"layer_skip": 0.4}`."""
        return {setting.name: setting.bias for setting in self.gates}

    @property
    def temperatures(self) -> dict[str, float]:
        """Temperature by exit."""
        return {setting.name: setting.temperature for setting in self.exits}

    @property
    def enabled(self) -> dict[str, bool]:
        """Whether each exit is used."""
        return {setting.name: setting.enabled for setting in self.exits}

    def apply(self, dyn: "DynamicModule") -> None:
        """Set the buffers of a dynamic model's exits and gates, all or none.

        Args:
            dyn: A dynamic model with exits and gates of these names. Gates that the calibration left out, since they
                were not trained, must be switched off.

        Raises:
            ArgumentError: Its exits or gates have other names, a threshold is outside [0, 1], a
                temperature not positive or a knob not finite.
        """
        from dyncompile.calibration.knobs import OPEN, gate_groups, turn

        names = [setting.name for setting in self.exits]
        exits: Any = getattr(dyn, "exits", None)
        if exits is None:
            raise ArgumentError("dyn", found=f"a {type(dyn).__name__}", expected="a dynamic model")
        if set(exits) != set(names):
            found = f"the exits {', '.join(exits) or 'none'}"
            raise ArgumentError("dyn", found=found, expected=", ".join(names) or "no exits")
        own = {setting.name: setting.gates for setting in self.gates}
        named = {name for names in own.values() for name in names}
        counted = {name for name, gate in dyn.gates.items() if name in named or bool(gate.enabled)}
        groups = {group: tuple(n for n in names if n in counted) for group, names in gate_groups(dyn).items()}
        groups = {group: names for group, names in groups.items() if names}
        if groups != own:
            raise ArgumentError("dyn", found=f"the gates {_listed(groups)}", expected=_listed(own))
        for setting in self.exits:
            if not 0 <= setting.threshold <= 1:
                raise ArgumentError(f"threshold of {setting.name}", found=setting.threshold, expected="in [0, 1]")
            if not 0 < setting.temperature < math.inf:
                raise ArgumentError(
                    f"temperature of {setting.name}",
                    found=setting.temperature,
                    expected="above 0 and finite",
                )
        for group in self.gates:
            if not math.isfinite(group.bias):
                raise ArgumentError(f"knob of {group.name}", found=group.bias, expected="a finite number")
        for setting in self.exits:
            module = exits[setting.name]
            module.threshold.fill_(setting.threshold)
            module.temperature.fill_(setting.temperature)
            module.enabled.fill_(setting.enabled)
        knobs = {group.name: group.bias if group.enabled else OPEN for group in self.gates}
        turn(dyn, groups, tuple(knobs[name] for name in groups))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the evidence, as values that JSON can hold."""
        values = dataclasses.asdict(dataclasses.replace(self, evidence=None))
        del values["evidence"]
        return values

    def table(self) -> "Table":
        """A rich table of the exits, of gates in its caption; without exits, of the gates."""
        from rich.table import Table

        table = Table(title=self._title(), caption=self._summary())
        if not self.exits:
            return self._of_gates(table)
        for heading in ("exit", "threshold", "temperature", "cost", "leave here", "accuracy there"):
            table.add_column(heading, justify="left" if heading == "exit" else "right")
        for row in (*self.exits, self.final):
            used = row.enabled and row is not self.final
            table.add_row(
                row.name,
                f"{row.threshold:.4f}" if used else "" if row.enabled else "off",
                f"{row.temperature:.2f}" if used else "",
                "" if row.cost is None else f"{row.cost:.3f}",
                (f"{row.share:.1%}" if row.share else "nobody") if row.enabled else "",
                "" if row.accuracy is None else f"{row.accuracy:.2%}",
            )
        return table

    def _of_gates(self, table: "Table") -> "Table":
        for heading in ("gates", "knob", "run on average"):
            table.add_column(heading, justify="left" if heading == "gates" else "right")
        for group in self.gates:
            table.add_row(f"{group.name} ({len(group.gates)})", group.knob, group.rate)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100).print(self.table())
        return text.getvalue().rstrip()

    def plot(self, target: Any = None) -> Any:
        """Draw accuracy (or 1 - risk where it is not defined) over cost, with the chosen point.

        Args:
            target: Path of the picture to write, or matplotlib axes to draw on; None for new axes.

        Returns:
            The matplotlib axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        path = target if isinstance(target, (str, PathLike)) else None
        axes = None if path is not None else target
        if axes is None:
            figure_module = require("matplotlib.figure", extra="report")
            axes = figure_module.Figure(layout="constrained").add_subplot()
        points = sorted(self.frontier, key=lambda point: point.cost)
        for certified, label in ((False, "considered"), (True, "certified")):
            drawn = [point for point in points if point.certified is certified]
            if drawn:
                axes.plot(
                    [point.cost for point in drawn],
                    [_quality(point.accuracy, point.risk) for point in drawn],
                    ".",
                    label=label,
                )
        if self.static_accuracy is not None:
            axes.axhline(self.static_accuracy, color="gray", linestyle=":", label="static model")
        axes.plot(self.cost, _quality(self.accuracy, self.risk), "*", markersize=14, label="chosen")
        axes.set_xlabel(f"expected cost ({self.unit}, 1 = static model)")
        axes.set_ylabel("1 - risk" if self.accuracy is None else "accuracy")
        axes.legend()
        if path is not None:
            axes.figure.savefig(path)
        return axes

    def report(
        self,
        path: "str | PathLike[str]",
        *,
        measurements: "Mapping[str, Measurement] | None" = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Write the calibration as a self-contained HTML page.

        Args:
            path: File to write.
            measurements: Models that were measured, by name, the static twin first; see
                `dyncompile.reporting.write_report`.
            classes: Names of the classes.

        Raises:
            MissingExtraError: jinja2 or matplotlib is not installed.
        """
        from dyncompile.reporting import write_report

        write_report(self, path, measurements=measurements, classes=classes)

    def _title(self) -> str:
        asked = [] if self.max_drop is None else [f"risk <= {self.max_drop:g}"]
        asked += [] if self.max_cost is None else [f"cost <= {self.max_cost:g}"]
        return f"{self.method}: {', '.join(asked)}"

    def _summary(self) -> str:
        lines = []
        if self.exits:
            lines += [f"{group.name}: knob {group.knob}, {group.rate} run on average" for group in self.gates]
        lines.append(f"expected cost {self.cost:.3f} ({self.unit}), risk {self.risk:.4f}")
        if self.accuracy is not None and self.static_accuracy is not None:
            lines.append(f"accuracy {self.accuracy:.2%}, static {self.static_accuracy:.2%}")
        if self.bound is None:
            lines.append(f"no guarantee: measured on the {self.held_out_samples} samples tuned on")
        else:
            lines.append(f"risk at most {self.bound:.4f} with probability {self.confidence:g}")
            lines.append(f"designed on {self.design_samples} samples, measured on {self.held_out_samples} others")
        return "\n".join(lines)


def _quality(accuracy: float | None, risk: float) -> float:
    return 1 - risk if accuracy is None else accuracy


def _listed(groups: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(gates)}" for name, gates in groups.items()) or "none"
