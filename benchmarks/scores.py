"""What is known of contestants on a task: the content of a scoreboard's JSON, and its tables."""

import statistics
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from benchmarks.harness import Table

BATCHES = (1, 16, 64, 256)


class Score(BaseModel):
    """One contestant.

    Attributes:
        name: As in tables and pictures.
        family: "static", "mechanism" or "dyncompile".
        note: What a reader should know of it.
        accuracy: On the test set, of samples that are alone or decided about one by one.
        together: The same at batch 64, where a batch is decided about as a whole; None where it makes no difference.
        cost: FLOPs a sample by count; 1.0 is the static model.
        forms: By batch size, the way to run it that was fastest.
        seconds: By batch size, of a call: mean over the inputs, median of the rounds.
        spread: By batch size, the distance of the rounds' quartiles.
        p50: Seconds within which half of the single samples are done.
        p95: The same for 95 %.
        compile: Seconds from the trained model to a result at every batch size, with empty caches.
        memory: Peak bytes of inference at batch 64, above what the process held before the model was made.
        weighed: The form that `compile` and `memory` are of.
    """

    name: str
    family: str
    note: str = ""
    accuracy: float
    together: float | None = None
    cost: float
    forms: dict[int, str] = {}
    seconds: dict[int, float] = {}
    spread: dict[int, float] = {}
    p50: float | None = None
    p95: float | None = None
    compile: float | None = None
    memory: float | None = None
    weighed: str | None = None

    def untimed(self) -> "Score":
        """Without what the clock says."""
        fresh: dict[str, object] = {"forms": {}, "seconds": {}, "spread": {}, "p50": None, "p95": None}
        unweighed: dict[str, object] = {} if self.weighed else {"compile": None, "memory": None}
        return self.model_copy(update=fresh | unweighed)

    def accuracy_at(self, batch: int) -> float:
        """Accuracy at a batch size."""
        return self.accuracy if batch == 1 or self.together is None else self.together

    def throughput(self, batch: int) -> float | None:
        """Samples a second."""
        return batch / self.seconds[batch] if batch in self.seconds else None


class Scoreboard(BaseModel):
    """All contestants on a task.

    Attributes:
        refused: Contestants that cannot do the task, and why.
    """

    kind: Literal["scoreboard"] = "scoreboard"
    name: str
    title: str
    command: str
    machine: dict[str, str]
    settings: dict[str, str]
    scores: list[Score] = []
    refused: dict[str, str] = {}

    def twin(self, batch: int) -> Score | None:
        """The fastest form of the static model: what all others are compared with; None where none was chosen."""
        forms = [score for score in self.scores if _is_form(score) and batch in score.seconds]
        return min(forms, key=lambda score: score.seconds[batch], default=None)

    def realised(self, score: Score, batch: int) -> float | None:
        """Saving by the clock over saving by count; None where nothing is saved by count, or there is no twin."""
        twin = self.twin(batch)
        if batch not in score.seconds or score.cost > 0.98 or twin is None:
            return None
        return (1 - score.seconds[batch] / twin.seconds[batch]) / (1 - score.cost)

    def frontier(self, batch: int) -> list[Score]:
        """Contestants that no other beats in both accuracy and time, the fastest first."""
        timed = sorted(
            (score for score in self.scores if batch in score.seconds),
            key=lambda score: (score.seconds[batch], -score.accuracy_at(batch)),
        )
        found: list[Score] = []
        for score in timed:
            if not found or score.accuracy_at(batch) > found[-1].accuracy_at(batch):
                found.append(score)
        return found

    def verdict(self, batch: int) -> str:
        """Whether dyncompile, and what combines strategies of it, is on the frontier, in words."""
        front = self.frontier(batch)
        own = [score for score in front if score.family == "dyncompile"]
        combined = [s for s in self.scores if s.family == "dyncompile" and " + " in s.name and batch in s.seconds]
        found = f"Batch {batch}: on the frontier of accuracy and time: {'; '.join(score.name for score in front)}."
        if not own:
            found += " Nothing of dyncompile is."
        if combined and not any(score in front for score in combined):
            best = max(combined, key=lambda score: score.accuracy_at(batch))
            faster = next(score for score in front if score.accuracy_at(batch) >= best.accuracy_at(batch))
            apart = best.seconds[batch] - faster.seconds[batch]
            clear = apart > (best.spread.get(batch, 0) + faster.spread.get(batch, 0)) / 2
            and_fast = "faster" if clear else "as fast, as far as the rounds' quartiles tell"
            found += (
                f" Combined strategies are not: {faster.name} is at least as accurate as {best.name}, and {and_fast}."
            )
        return found

    def noise(self) -> str:
        """How far the figures can be trusted, in words."""
        shares = {
            batch: statistics.median(s.spread[batch] / s.seconds[batch] for s in self.scores if batch in s.spread)
            for batch in BATCHES
            if any(batch in s.spread for s in self.scores)
        }
        apart = ", ".join(f"{share:.0%} at batch {batch}" for batch, share in shares.items())
        found = f"Quartiles of the rounds are {apart} of the median apart (the median over contestants)"
        if samples := int(self.settings.get("test samples", 0)):
            accuracy = max(score.accuracy for score in self.scores)
            error = (accuracy * (1 - accuracy) / samples) ** 0.5
            found += f"; accuracies are of one seed, with a standard error of {error:.2%}"
        return found + "."

    def table(self) -> Table:
        """Every contestant."""
        rows: list[list[str | int | float]] = []
        for score in self.scores:
            row: list[str | int | float] = [score.name, f"{score.accuracy:.2%}", _share(score.together), score.cost]
            row += [_ms(score.p50), _ms(score.p95)]
            row += [_round(score.throughput(batch)) for batch in BATCHES[1:]]
            row += ["" if (found := self.realised(score, b)) is None else f"{found:.2f}" for b in (1, 64)]
            row += [_mb(score.memory), "" if score.compile is None else f"{score.compile:.1f}"]
            rows.append([*row, score.forms.get(1, ""), score.forms.get(64, "")])
        notes = [f"{score.name}: {score.note}." for score in self.scores if score.note]
        notes += [f"{name}: left out, {why}." for name, why in self.refused.items()]
        return Table(
            title=self.title,
            columns=[
                "contestant",
                "accuracy",
                "as a batch of 64",
                "counted cost",
                "p50, ms",
                "p95, ms",
                *(f"samples/s at {batch}" for batch in BATCHES[1:]),
                "realised/counted at 1",
                "at 64",
                "peak MB",
                "compile s",
                "fastest as, at 1",
                "at 64",
            ],
            rows=rows,
            note=" ".join(notes),
        )

    def write(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _is_form(score: Score) -> bool:
    return score.family == "static" and score.name.startswith("static, ") and score.cost == 1 and not score.note


def _share(found: float | None) -> str:
    return "" if found is None else f"{found:.2%}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


def _mb(found: float | None) -> str:
    return "" if found is None else f"{found / 1e6:.0f}"


def _round(found: float | None) -> str:
    return "" if found is None else f"{found:.0f}"
