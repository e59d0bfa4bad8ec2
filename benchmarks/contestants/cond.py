"""`torch.cond`: the early exits as one program with a branch in it, exported and compiled by AOTInductor.

A branch is taken for the whole batch: the rest runs as soon as one sample needs it.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import nn

import dyncompile as dc
from benchmarks.contestants.contestant import Call, Contestant, Forms
from benchmarks.contestants.dynamic import Dynamic, counted
from benchmarks.tasks import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cond(Contestant):
    """A single program with branches."""

    family: ClassVar[str] = "mechanism"
    together: ClassVar[bool] = True
    note: ClassVar[str] = "a branch runs for the whole batch as soon as one sample needs it"

    @property
    def name(self) -> str:
        return "torch.cond"

    def model(self, run: Run) -> nn.Module:
        return Dynamic(strategy="early_exit").model(run)

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        assert isinstance(model, dc.DynamicModule)

        def program() -> Call:
            path = dc.export(model, run.folder / "cond.pt2")
            return torch.export.load(path).module(check_guards=False)

        def compiled() -> Call:
            path = dc.export(model, run.folder / "cond.aoti.pt2")
            call: Call = torch._inductor.aoti_load_package(str(path))
            return call

        return {"AOTInductor": compiled} if compilers else {"program": program}

    def cost(self, model: nn.Module, run: Run) -> float:
        return counted(model, run)
