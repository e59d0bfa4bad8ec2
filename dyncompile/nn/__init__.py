"""What passes insert: exits, heads, criteria."""

from dyncompile.nn.criteria import CRITERIA, Criterion, certainty
from dyncompile.nn.exits import Exit
from dyncompile.nn.heads import Feature, Pool, build_head

__all__ = ["CRITERIA", "Criterion", "Exit", "Feature", "Pool", "build_head", "certainty"]
