"""An early exit as people write it: a loop that returns as soon as the whole batch is sure, or drops who is sure.

Layers, heads, temperatures and thresholds are those that dyncompile trained and calibrated. At batch 1 it decides as
they do; a larger batch leaves at its hardest sample, or loses the rows of those who are sure after each look.
"""

import dataclasses
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompile as dc
from benchmarks.contestants.contestant import Contestant, Forms, laid_out
from benchmarks.contestants.dynamic import Dynamic, counted, exit_paths
from benchmarks.tasks import Run
from dyncompile.demo.models import ResNet, VisionTransformer
from dyncompile.nn import Exit


class Loop(nn.Module):
    """Blocks one after the other, with a look at how sure a head is after some.

    Args:
        static: A ResNet or a vision transformer of the demo.
        exits: By the number of the block before them.
        drops: Rows of samples that are sure are dropped.
    """

    def __init__(self, static: nn.Module, exits: dict[int, Exit], *, drops: bool) -> None:
        super().__init__()
        self.drops = drops
        assert isinstance(static, ResNet | VisionTransformer)
        self.static = static
        self.heads = nn.ModuleDict({str(place): exit_.head for place, exit_ in exits.items()})
        self.thresholds = {place: float(exit_.threshold) for place, exit_ in exits.items()}
        self.temperatures = {place: float(exit_.temperature) for place, exit_ in exits.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, K]`."""
        model = self.static
        if isinstance(model, ResNet):
            x, blocks = F.relu(model.bn(model.conv(x))), list(model.blocks)
        else:
            assert isinstance(model, VisionTransformer)
            x, blocks = model.patches(x).flatten(2).transpose(1, 2) + model.position, list(model.layers)
        found, rows = None, torch.arange(len(x), device=x.device)
        for place, block in enumerate(blocks):
            x = block(x)
            if place in self.thresholds:
                logits = cast("Tensor", self.heads[str(place)](x))
                sure = F.softmax(logits / self.temperatures[place], 1).amax(1) >= self.thresholds[place]
                if self.drops and bool(sure.any()):
                    found = logits.new_zeros(len(rows), logits.shape[1]) if found is None else found
                    found[rows[sure]] = logits[sure]
                    x, rows = x[~sure], rows[~sure]
                    if not len(x):
                        return found
                elif not self.drops and bool(sure.all()):
                    return logits
        if isinstance(model, ResNet):
            last = model.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        else:
            assert isinstance(model, VisionTransformer)
            last = model.fc(model.norm(x.mean(1)))
        if found is None:
            return cast("Tensor", last)
        found[rows] = last
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handwritten(Contestant):
    """A loop written by hand."""

    family: ClassVar[str] = "mechanism"
    together: ClassVar[bool] = True
    note: ClassVar[str] = "a batch leaves at its hardest sample"
    drops: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "early exit by hand"

    def model(self, run: Run) -> nn.Module:
        return Dynamic(strategy="early_exit").model(run)

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        loop = Loop(_dynamic(model).static(), enabled_exits(_dynamic(model), run), drops=self.drops).eval()
        found = laid_out(loop, images=run.task.images)
        if compilers:
            found["inductor, broken at each look"] = partial(torch.compile, loop, dynamic=self.drops)
        return found

    def cost(self, model: nn.Module, run: Run) -> float:
        return counted(model, run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropping(Handwritten):
    """The same, for batches: rows of samples that are sure are dropped."""

    together: ClassVar[bool] = False
    note: ClassVar[str] = ""
    drops: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "early exit by hand, dropping rows"


def enabled_exits(dyn: dc.DynamicModule, run: Run) -> dict[int, Exit]:
    """The exits that calibration left on, by the number of the block before them."""
    places = [int(path.rpartition(".")[2]) for path in exit_paths(run)]
    exits = [cast("Exit", exit_) for exit_ in dyn.exits.values()]
    return {place: exit_ for place, exit_ in zip(places, exits, strict=True) if bool(exit_.enabled)}


def _dynamic(model: nn.Module) -> dc.DynamicModule:
    assert isinstance(model, dc.DynamicModule)
    return model
