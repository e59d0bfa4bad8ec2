"""From the JSON files of the repository to RESULTS.md, its pictures, and what stands between markers in README.md.

A document has `<!-- benchmarks:NAME -->` before and `<!-- /benchmarks:NAME -->` behind what is written here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks import pictures
from benchmarks.harness import Report
from benchmarks.scores import Scoreboard
from dyncompile.errors import ArgumentError

FRONTIERS = (1, 64)
_INTRODUCTION = """# Results

Written by `python -m benchmarks render` from the JSON files in `results/`. Each part names the command that measured
it, the machine, and how busy that was. `python -m benchmarks` lists the parts.
"""


def render(root: Path) -> None:
    """Write the documents.

    Args:
        root: Of the repository: `benchmarks/results/*.json` are read.

    Raises:
        ArgumentError: A document lacks a marker.
    """
    folder = root / "benchmarks" / "results"
    parts = [_INTRODUCTION]
    for path in sorted(folder.glob("*.json")):
        found = read(path)
        heading = f"## {path.stem}\n\n"
        if isinstance(found, Scoreboard):
            for batch in measured(found):
                name = f"{path.stem}-{batch}.svg"
                (folder / name).write_text(pictures.frontier(found, batch), encoding="utf-8")
            parts.append(heading + scoreboard(found, "results/"))
        else:
            if path.stem == "growth":
                for table in found.tables[:2]:
                    name = f"growth-{_slug(table.columns[0])}.svg"
                    (folder / name).write_text(pictures.growth(table), encoding="utf-8")
            parts.append(heading + found.markdown())
    (root / "benchmarks" / "RESULTS.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    every = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    if "<!-- benchmarks:targets -->" in text:
        text = between(text, "targets", targets({n: found for n, found in every.items() if isinstance(found, Report)}))
    for name, found in every.items():
        if f"<!-- benchmarks:{name} -->" in text:
            shown = summary(found) if isinstance(found, Scoreboard) else overview(found)
            text = between(text, name, shown)
    readme.write_text(text, encoding="utf-8")


def read(path: Path) -> Report | Scoreboard:
    """What a JSON file holds."""
    content = path.read_text(encoding="utf-8")
    kind = Scoreboard if json.loads(content).get("kind") == "scoreboard" else Report
    return kind.model_validate_json(content)


def between(text: str, name: str, content: str) -> str:
    """A document with other content between the markers of a name.

    Raises:
        ArgumentError: The marker behind it is missing.

    >>> between("a <!-- benchmarks:x -->old<!-- /benchmarks:x --> b", "x", "new").split()
    ['a', '<!--', 'benchmarks:x', '-->', 'new', '<!--', '/benchmarks:x', '-->', 'b']
    """
    start, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
    if start not in text or end not in text:
        raise ArgumentError("document", found=f"no pair {start}, {end}", expected="both")
    head, _, rest = text.partition(start)
    return f"{head}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def measured(board: Scoreboard) -> list[int]:
    """The batch sizes, of those with a picture, that something was timed at."""
    return [batch for batch in FRONTIERS if any(batch in score.seconds for score in board.scores)]


def scoreboard(board: Scoreboard, folder: str) -> str:
    """The whole of a scoreboard: how it was measured, pictures, verdicts, table."""
    facts = {**board.machine, **board.settings}
    head = [f"`{board.command}`", "", *(f"- {key}: {value}" for key, value in facts.items())]
    shown = measured(board)
    images = [f"![Accuracy over time at batch {batch}]({folder}{board.name}-{batch}.svg)" for batch in shown]
    verdicts = [board.verdict(batch) for batch in shown]
    return "\n".join(head) + "\n\n" + "\n\n".join([*images, *verdicts, board.noise(), board.table().markdown()]) + "\n"


def summary(board: Scoreboard) -> str:
    """What the README shows: pictures and verdicts."""
    shown = measured(board)
    images = [f"![Accuracy over time at batch {batch}](benchmarks/results/{board.name}-{batch}.svg)" for batch in shown]
    facts = f"{board.settings['data']}; {board.settings['scale']}; {board.machine['processor']}. {board.noise()}"
    before = f", after `{board.settings['before']}`" if "before" in board.settings else ""
    how = f"{facts} `{board.command}`{before}; all figures: [RESULTS.md](benchmarks/RESULTS.md)."
    return "\n\n".join([*images, *(board.verdict(batch) for batch in shown), how])


def overview(report: Report) -> str:
    """What the README shows of a benchmark: its first table, and where it was measured."""
    table = report.tables[0].markdown().partition("\n\n")[2]
    load = report.machine["load before"]
    return f"{table} {report.machine['processor']}; load before: {load}. `{report.command}`"


def targets(reports: Mapping[str, Report]) -> str:
    """How many targets each benchmark meets, and which it misses by most."""
    rows = ["| benchmark | targets met | farthest from its bound |", "| --- | --- | --- |"]
    for name, report in reports.items():
        if not report.targets:
            continue
        met = sum(target.passed for target in report.targets)
        worst = min(report.targets, key=lambda target: target.margin)
        bound = f"{'at least' if worst.at_least else 'at most'} {worst.bound:g}"
        missed = "" if worst.passed else f"{worst.what}: {worst.found:.3g}, {bound}"
        rows.append(f"| {name} | {met} of {len(report.targets)} | {missed} |")
    return "\n".join(rows)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
