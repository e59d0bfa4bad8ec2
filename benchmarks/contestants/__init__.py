"""What a user could pick instead, and dyncompile: one idea a file, all on the same trained task."""

from benchmarks.contestants.cond import Cond
from benchmarks.contestants.contestant import Call, Contestant, Forms
from benchmarks.contestants.dynamic import Dynamic
from benchmarks.contestants.earlyon import Earlyon
from benchmarks.contestants.handwritten import Dropping, Handwritten
from benchmarks.contestants.masked import Masked
from benchmarks.contestants.one_by_one import OneByOne
from benchmarks.contestants.pruned import Pruned
from benchmarks.contestants.quantised import Quantised
from benchmarks.contestants.static import FORMS, Static
from benchmarks.tasks import Task


def contestants(task: Task, *, curves: bool = True) -> list[Contestant]:
    """Everything that is compared on a task; the first ones are the forms of the static model.

    Args:
        task: Which.
        curves: Exits are calibrated for several costs.
    """
    found: list[Contestant] = [Static(form=form) for form in FORMS if task.images or form == FORMS[0]]
    found += [Static(width=0.75), Static(width=0.5)]
    if task.depths(task.sizes["full"].depth) < task.sizes["full"].depth:
        found.append(Static(half=True))
    found += [Pruned(), Quantised()]
    for strategy in task.strategies:
        found += Dynamic(strategy=strategy).curve() if curves else [Dynamic(strategy=strategy)]
    if "early_exit" in task.strategies:
        found += [Earlyon(), Handwritten(), Dropping(), Cond()]
    if "layer_skip" in task.strategies:
        found.append(Masked())
    found.append(OneByOne(strategy=task.strategies[-1]))
    return found


__all__ = ["Call", "Contestant", "Forms", "contestants"]
