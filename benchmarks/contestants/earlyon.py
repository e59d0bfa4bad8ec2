"""earlyon 0.3.0 (PyPI), the other package that gives an existing model exits: with the exits that dyncompile trained.

As in `benchmarks.peer`: the same layers, heads, temperatures and thresholds. It cannot be compiled.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

import dyncompile as dc
from benchmarks.contestants.contestant import Call, Contestant, Forms
from benchmarks.contestants.dynamic import Dynamic, counted, exit_paths
from benchmarks.peer import LAYOUTS, as_a_batch, laid_out, one_by_one, wrap
from benchmarks.tasks import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Earlyon(Contestant):
    """Another package."""

    family: ClassVar[str] = "mechanism"
    together: ClassVar[bool] = True
    note: ClassVar[str] = "a batch leaves at its hardest sample, or samples go one by one; cannot be compiled"

    @property
    def name(self) -> str:
        return "earlyon 0.3.0"

    def model(self, run: Run) -> nn.Module:
        return Dynamic(strategy="early_exit").model(run)

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:  # noqa: ARG002 - it is not compiled
        assert isinstance(model, dc.DynamicModule)
        if importlib.util.find_spec("earlyon") is None:
            return {}
        shape = tuple(run.splits.test.tensors[0].shape[1:])
        found: Forms = {}

        def make(memory_format: torch.memory_format, way: Callable[[nn.Module, Tensor], Tensor]) -> Call:
            wrapped = wrap(model, exit_paths(run), shape).to(memory_format=memory_format)  # type: ignore[call-overload]
            return partial(laid_out, partial(way, wrapped), memory_format)

        for layout, memory_format in LAYOUTS.items():
            if memory_format == torch.contiguous_format or run.task.images:
                for way, call in (("as a batch", as_a_batch), ("one by one", one_by_one)):
                    found[f"{layout}, {way}"] = partial(make, memory_format, call)
        return found

    def cost(self, model: nn.Module, run: Run) -> float:
        return counted(model, run)
