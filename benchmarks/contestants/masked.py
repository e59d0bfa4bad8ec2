"""SkipNet's official mechanism: every block is computed, and its output masked by the gate (arXiv 1711.09485).

As in the code that its authors published (ucbdrive/skipnet), on the blocks and gates that dyncompile trained: in
evaluation `mask * block(x) + (1 - mask) * x`, for the whole batch. What is counted is what the gates say.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from benchmarks.contestants.contestant import Contestant, Forms, laid_out
from benchmarks.contestants.dynamic import Dynamic, counted
from benchmarks.tasks import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(Contestant):
    """Compute and mask."""

    family: ClassVar[str] = "mechanism"
    note: ClassVar[str] = "computes all that it says it skips"

    @property
    def name(self) -> str:
        return "SkipNet, computes and masks"

    def model(self, run: Run) -> nn.Module:
        return Dynamic(strategy="layer_skip").model(run)

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        # The reference of a dynamic model is just that: dense, with a select behind each block.
        found = laid_out(model, images=run.task.images)
        if compilers:
            found["inductor"] = partial(torch.compile, model, dynamic=False)
        return found

    def cost(self, model: nn.Module, run: Run) -> float:
        return counted(model, run)
