"""Static models: the one that all others are compared with, in each of its forms, and smaller ones trained the same.

They are trained for as many epochs as a dynamic model gets in two stages, static and fine-tuned.
"""

import copy
import dataclasses
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from benchmarks.contestants.contestant import Contestant, Forms, laid_out, trained
from benchmarks.forms import WHOLE, whole
from benchmarks.tasks import Run

FORMS = ("eager", "eager channels-last", "inductor", "inductor frozen", WHOLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Contestant):
    """A static model.

    Args:
        width: Share of the channels.
        half: Half of the layers.
        form: The only way to run it; None tries all.
    """

    width: float = 1.0
    half: bool = False
    form: str | None = None

    family: ClassVar[str] = "static"

    @property
    def name(self) -> str:
        size = "half depth" if self.half else f"width {self.width:g}" if self.width != 1 else ""
        return f"static{f', {size}' if size else ''}{f', {self.form}' if self.form else ''}"

    @property
    def smaller(self) -> bool:
        """Whether it is another model than the one all are compared with."""
        return self.half or self.width != 1

    def model(self, run: Run) -> nn.Module:
        epochs = run.sizes.epochs + run.sizes.tuning
        name = f"static-{self.width}{'-half' if self.half else ''}"
        return trained(run, name, epochs, width=self.width, half=self.half)

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        found = laid_out(model, images=run.task.images)
        # Inductor unrolls a recurrent layer step by step; torch's own kernel runs it whole.
        if compilers and run.task.images:
            for name, options in (("inductor", {}), ("inductor frozen", {"freezing": True})):
                found[name] = partial(torch.compile, copy.deepcopy(model), dynamic=False, options=options or None)
            found[WHOLE] = partial(whole, model, run.splits.test.tensors[0][:4])
        return found if self.form is None else {self.form: found[self.form]} if self.form in found else {}
