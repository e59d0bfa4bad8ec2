"""Recurrent layers that skip steps."""

from dyncompile.errors import ExportError
from dyncompile.exporting.scope import Scope
from dyncompile.lowering.plan import Segment
from dyncompile.module import DynamicModule


def write_recurrent(step: Segment, dyn: DynamicModule, scope: Scope) -> None:
    raise ExportError("no")
