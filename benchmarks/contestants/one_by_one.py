"""The lowered model, one sample at a time: what a batch is worth where samples part ways."""

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from benchmarks.contestants.contestant import Call, Contestant, Forms
from benchmarks.contestants.dynamic import Dynamic, counted
from benchmarks.tasks import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneByOne(Contestant):
    """A loop over the samples of a batch."""

    strategy: str

    family: ClassVar[str] = "mechanism"

    @property
    def name(self) -> str:
        return f"{Dynamic(strategy=self.strategy).name}, one by one"

    def model(self, run: Run) -> nn.Module:
        return Dynamic(strategy=self.strategy).model(run)

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        (make,) = Dynamic(strategy=self.strategy).forms(model, run, compilers=compilers).values()

        def loop() -> Call:
            lowered = make()
            return lambda x: torch.cat([lowered(sample) for sample in x.split(1)])

        return {"lowered, one by one": loop}

    def cost(self, model: nn.Module, run: Run) -> float:
        return counted(model, run)
