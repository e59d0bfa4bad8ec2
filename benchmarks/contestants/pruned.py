"""The static model with half of its weights set to zero, by magnitude, over the whole model, without training on.

What `torch.nn.utils.prune` gives for nothing. Torch's kernels multiply by zeros as by any number, so neither time nor
the FLOPs that run change; half of the multiplications are without effect.
"""

import dataclasses
from typing import ClassVar

from torch import nn
from torch.nn.utils import prune

from benchmarks.contestants.contestant import Contestant, Forms
from benchmarks.contestants.static import Static
from benchmarks.tasks import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned(Contestant):
    """Magnitude pruning.

    Args:
        amount: Share of the weights that are set to zero.
    """

    amount: float = 0.5

    family: ClassVar[str] = "static"
    note: ClassVar[str] = "weights are zero, and multiplied all the same"

    @property
    def name(self) -> str:
        return f"static, pruned {self.amount:.0%}"

    def model(self, run: Run) -> nn.Module:
        model = Static().model(run)
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear | nn.LSTM)]
        weights = [(m, name) for m in layers for name, p in m.named_parameters(recurse=False) if p.dim() > 1]
        prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=self.amount)
        for module, name in weights:
            prune.remove(module, name)
        return model.eval()

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        return Static().forms(model, run, compilers=compilers)
