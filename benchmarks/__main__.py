"""`python -m benchmarks`: list the parts of the scoreboard, run them, render what they found."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.parts import PARTS, Options, run, run_together
from benchmarks.tasks import SCALES
from dyncompile.data import find_device

ROOT = Path(__file__).parent.parent
RENDER = "render"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    parts: Annotated[list[str] | None, typer.Argument(help="names of parts; none: list them; or `render`")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="little of everything: does it run? No name: all")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="folder for JSON; none: benchmarks/results, if quick a folder in the cache")
    ] = None,
    cache: Annotated[Path, typer.Option(help="folder for what was trained")] = Path("benchmarks-cache"),
    scale: Annotated[str, typer.Option(help=f"of trained tasks: {', '.join(SCALES)}")] = "full",
    hapt: Annotated[Path | None, typer.Option(help="archive that benchmarks.recordings names")] = None,
) -> None:
    """Measure parts of the scoreboard, one after the other, and write a JSON file for each.

    With `--quick` as many at once as there are processors, for then no time counts.

    `render` writes benchmarks/RESULTS.md, its pictures and the README's tables from the JSON files of the repository.
    """
    unknown = sorted(set(parts or ()) - {*PARTS, RENDER})
    if unknown:
        raise typer.BadParameter(f"{unknown}; there are {[*PARTS, RENDER]}")
    if not parts and not quick:
        table = Table("part", "what it measures")
        for name, part in PARTS.items():
            table.add_row(name, part.summary)
        table.add_row(RENDER, "RESULTS.md, pictures and the README's tables, from the JSON files")
        Console().print(table)
        return
    find_device(device)  # `harness.told` says what is wrong with it
    if scale not in SCALES:
        raise typer.BadParameter(f"--scale {scale!r}; there are {list(SCALES)}")
    out = out or (cache / "quick" if quick else ROOT / "benchmarks" / "results")  # no toy among what is committed
    options = Options(quick=quick, device=device, out=out, cache=cache, scale=scale, hapt=hapt)
    chosen = parts or list(PARTS)
    measured = [name for name in chosen if name != RENDER]
    if quick and len(measured) > 1:
        run_together(measured, options)
    else:
        for name in measured:
            run(name, options)
    if RENDER in chosen:
        from benchmarks.render import render

        render(ROOT)


if __name__ == "__main__":
    harness.told(lambda: app(prog_name="python -m benchmarks"))
