"""`dyncompile passes`: the techniques that are installed."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def passes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the registered passes, built-in and of other packages, with the paper (arXiv id) of each.

    Other packages register theirs in the entry-point group `dyncompile.passes`.
    """
    from dyncompile.passes import registered

    found = registered()
    if as_json:
        rows = [
            {
                "name": one.name,
                "package": one.package,
                "version": one.version,
                "summary": one.kind.summary if one.kind else None,
                "paper": one.kind.paper if one.kind else None,
                "broken": one.broken or None,
            }
            for one in found
        ]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("pass", "what it does", "arXiv", "package"):
        table.add_column(column, overflow="fold", no_wrap=column in ("pass", "arXiv"))
    for one in found:
        what = one.kind.summary if one.kind else f"broken: {one.broken}"
        table.add_row(one.name, what, one.kind.paper if one.kind else "", f"{one.package} {one.version}")
    Console().print(table, highlight=False, markup=False)
