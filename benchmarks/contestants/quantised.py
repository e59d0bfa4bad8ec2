"""The static model with linear and recurrent layers quantised to eight bits, dynamically: one call, no calibration.

What `torch.ao.quantization.quantize_dynamic` gives for nothing. It has no convolutions, so of a ResNet it quantises the
classifier alone. Cost is counted in FLOPs, as if nothing were quantised.
"""

import copy
import dataclasses
import warnings
from typing import ClassVar

import torch
from torch import nn

from benchmarks.contestants.contestant import Contestant, Forms, laid_out
from benchmarks.contestants.static import Static
from benchmarks.tasks import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantised(Contestant):
    """Dynamic quantisation."""

    family: ClassVar[str] = "static"
    note: ClassVar[str] = "linear and recurrent layers only; cost counted as if in floats"

    @property
    def name(self) -> str:
        return "static, quantised dynamically"

    def model(self, run: Run) -> nn.Module:
        model = copy.deepcopy(Static().model(run))
        # The fused path of a transformer layer reads weights that a quantised layer does not have.
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch points to another package for it
            found: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, torch.qint8)
        return found.eval()

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:  # noqa: ARG002 - it is not compiled
        return laid_out(model, images=run.task.images)

    def cost(self, model: nn.Module, run: Run) -> float:  # noqa: ARG002 - its kernels are unknown to the counter
        return 1.0
