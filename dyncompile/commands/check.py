"""`dyncompile check`: whether rewriting a model by some strategies keeps what every conversion keeps."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dyncompile.commands.arguments import Model, Option, Shape, read_example, read_model, read_passes
from dyncompile.errors import ArgumentError, DyncompileError, require

if TYPE_CHECKING:
    from dyncompile.checking import Baseline, Report, Settings


def check(
    model: Model,
    strategy: Annotated[
        list[str],
        typer.Option(
            help="Technique, or several joined by commas; repeat to check more conversions. "
            "A pass of your own, not installed: file.py:Class."
        ),
    ] = ["early_exit"],  # noqa: B006 - typer copies it
    option: Option = [],  # noqa: B006
    input_shape: Shape = None,
    example_inputs: Annotated[
        str | None,
        typer.Option(help="file.py:factory of the inputs: a tensor, a tuple, or a dict; two samples or more."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="File of sites and costs to compare with, such as dyncompile.lock.json.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write the baseline, for conversions of which no check failed.")
    ] = False,
    batch_size: Annotated[list[int], typer.Option(min=1, help="Batch size to check at; repeat for more.")] = [  # noqa: B006
        1,
        2,
        7,
        33,
    ],
    backend: Annotated[
        list[str],
        typer.Option(
            help="How segments run: eager or inductor; repeat for both. Inductor compiles every segment, for minutes."
        ),
    ] = ["eager"],  # noqa: B006
    export: Annotated[bool, typer.Option(help="Write an ONNX file and run it.")] = True,
    json: Annotated[
        Path | None, typer.Option(help="File to write the results to as JSON; - is standard output.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(help="File for the results as JUnit XML; needs the extra `check`.")
    ] = None,
    github: Annotated[
        bool | None,
        typer.Option(help="Annotate failures for GitHub.", show_default="where GITHUB_ACTIONS=true"),
    ] = None,
) -> None:
    """Check that a model can be rewritten by some strategies, and that nothing is lost by it.

    Before training it computes what the static model does, to the bit;
    a gradient reaches every new parameter; lowered, it gives what the
    reference gives, with its own decisions and with drawn ones; it runs
    the operations that are planned and no others; an ONNX file gives the
    same in onnxruntime (skipped without the extra `export`, or where ONNX
    has no counterpart); sites and costs are those of the baseline.

    Exit codes: 0, no check failed; 1, one did; 2, bad usage or malformed
    input: nothing was checked, and no file was written.
    """
    piped = json is not None and str(json) == "-"
    console = Console(stderr=piped)
    # What the model's own code prints does not get between the lines of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if piped else contextlib.nullcontext():
        try:
            settings = _settings(batch_size, backend, export=export)
            before = _baseline(baseline, update=update)
            _check_outputs(baseline, json, junit)
            if junit is not None:
                require("junitparser", extra="check")
            strategies = read_passes(strategy, option)
            static = read_model(model)
            inputs = _inputs(input_shape, example_inputs)
        except (DyncompileError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None

        from dyncompile.checking import check as run
        from dyncompile.checking import compare, formats
        from dyncompile.demo.factory import origin

        annotated = os.environ.get("GITHUB_ACTIONS") == "true" if github is None else github
        file, line = origin(model)
        reports: list[Report] = []
        with console.status("") as status:
            conversions = run(
                static,
                strategies,
                name=model,
                example_inputs=inputs,
                settings=settings,
                started=lambda strategy, check: status.update(f"{strategy}: {check}"),
            )
            for report in conversions:
                if before is not None and not update:
                    advice = f"if this is meant, run again with --update and commit {baseline}"
                    compare(report, before.find(report.model, report.strategy), advice=advice)
                console.print(formats.table(report), highlight=False)
                console.print(formats.summary(report), highlight=False, style="dim")
                console.print()
                for annotation in formats.annotations(report, file, line) if annotated else ():
                    console.print(annotation, highlight=False, soft_wrap=True, markup=False)
                reports.append(report)
    if baseline is not None and before is not None and update:
        _update(baseline, before, reports, console)
    if junit is not None:
        junit.write_text(formats.to_junit(reports), encoding="utf-8")
    if piped:
        typer.echo(formats.to_json(reports), nl=False)
    elif json is not None:
        json.write_text(formats.to_json(reports), encoding="utf-8")
    failed = sum(len(report.failed) for report in reports)
    console.print(f"{failed} of {sum(len(r.results) for r in reports)} checks failed" if failed else "no check failed")
    if failed:
        raise typer.Exit(1)


def _settings(batches: list[int], backends: list[str], *, export: bool) -> "Settings":
    from dyncompile.checking import Settings
    from dyncompile.lowering.lowered import BACKENDS

    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise ArgumentError("backend", found=repr(unknown[0]), expected=f"one of {BACKENDS}")
    return Settings(batches=tuple(sorted(set(batches))), backends=tuple(dict.fromkeys(backends)), export=export)


def _baseline(path: Path | None, *, update: bool) -> "Baseline | None":
    from dyncompile.checking import Baseline

    if path is None:
        if update:
            raise ArgumentError("update", found="no --baseline", expected="--baseline FILE, which it writes")
        return None
    return Baseline() if update and not path.exists() else Baseline.read(path)


def _check_outputs(*paths: Path | None) -> None:
    """Refuse, before anything runs, what could not be written after it."""
    files = [path.absolute() for path in paths if path is not None and str(path) != "-"]
    for path in files:
        if path.is_dir() or not path.parent.is_dir():
            found = f"{path}, a folder" if path.is_dir() else f"{path}, whose folder is not there"
            raise ArgumentError("file", found=found, expected="a file in a folder that is there")
        if files.count(path) > 1:
            raise ArgumentError("file", found=f"{path} twice", expected="a file of its own for each output")


def _inputs(shape: str | None, spec: str | None) -> Any:
    from dyncompile.demo.factory import make

    if spec is None:
        return read_example(shape)
    if shape is not None:
        raise ArgumentError("input_shape", found="--example-inputs too", expected="one of the two")
    return make(spec, object, argument="example_inputs")


def _update(path: Path, before: "Baseline", reports: "list[Report]", console: Console) -> None:
    now, kept = before, []
    for report in reports:
        if report.passed and report.snapshot is not None:
            now = now.updated(report.model, report.strategy, report.snapshot)
        else:
            kept.append(report.strategy)
    if now != before or not path.exists():
        now.write(path)
    console.print(f"{path}: {'unchanged' if now == before else 'written'}", highlight=False)
    if kept:
        console.print(f"left as it was for {', '.join(kept)}, of which a check failed", highlight=False)
