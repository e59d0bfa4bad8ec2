"""What was found, for a person, a program, a CI server, and GitHub."""

import json
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from dyncompile.checking.result import Report
from dyncompile.errors import require

_SHOWN = {"passed": ("✓", "green"), "failed": ("✗", "bold red"), "skipped": ("–", "yellow")}


def table(report: Report) -> Table:
    """One conversion as a table."""
    shown = Table(
        title=f"{report.model}, {report.strategy}",
        title_justify="left",
        title_style="bold",
        caption=_summary(report),
        caption_justify="left",
        box=None,
        pad_edge=False,
        show_header=False,
    )
    shown.add_column("status")
    shown.add_column("check", overflow="fold")
    shown.add_column("seconds", justify="right", no_wrap=True)
    for result in report.results:
        sign, style = _SHOWN[result.status]
        text = Text(result.check)
        if result.message:
            text.append(f"\n{result.message}", style="default" if result.status == "failed" else "dim")
        shown.add_row(Text(sign, style=style), text, f"{result.seconds:.1f} s" if result.seconds else "")
    return shown


def _summary(report: Report) -> str:
    if report.snapshot is None:
        return ""
    found = report.snapshot
    places = f"sites: {len(found.sites)}, places refused: {len(found.refused)}"
    return f"{places}; {found.flops / 1e6:.2f} MFLOPs per sample in the static model"


def to_json(reports: Sequence[Report]) -> str:
    """All conversions as JSON."""
    found = {
        "format": "dyncompile-check",
        "version": 1,
        "passed": all(report.passed for report in reports),
        "conversions": [report.model_dump(mode="json") for report in reports],
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def to_junit(reports: Sequence[Report]) -> str:
    """All conversions as JUnit XML: a suite for each, a case for each check.

    Raises:
        MissingExtraError: The extra `check` is not installed.
    """
    junit = require("junitparser", extra="check")
    file = junit.JUnitXml("dyncompile check")
    for report in reports:
        suite = junit.TestSuite(f"{report.model} {report.strategy}")
        for result in report.results:
            case = junit.TestCase(result.check, f"{report.model}.{report.strategy}", result.seconds)
            if result.status != "passed":
                kind = junit.Failure if result.status == "failed" else junit.Skipped
                case.result = [kind(result.message, result.status)]
            suite.add_testcase(case)
        file.add_testsuite(suite)
    file.update_statistics()
    return str(file.tostring().decode())


def annotations(report: Report, file: str, line: int) -> Iterable[str]:
    """Workflow commands of GitHub that show each failure at a line of a file.

    Args:
        report: One conversion.
        file: Relative to the repository.
        line: Of the factory.
    """
    for result in report.failed:
        title = _property(f"dyncompile {report.strategy}: {result.check}")
        yield f"::error file={_property(file)},line={line},title={title}::{_message(result.message)}"


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
