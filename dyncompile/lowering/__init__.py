"""Make the selects lazy: plan, compile, run only what each sample needs."""

from dyncompile.lowering.lowered import LoweredModule, lower
from dyncompile.lowering.plan import Plan, make_plan

__all__ = ["LoweredModule", "Plan", "lower", "make_plan"]
