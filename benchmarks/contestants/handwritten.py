"""An early exit as people write it: a loop that returns as soon as the whole batch is sure.

Layers, heads, temperatures and thresholds are those that dyncompile trained and calibrated. At batch 1 it decides as
they do; a larger batch leaves at its hardest sample.
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
    """

    def __init__(self, static: nn.Module, exits: dict[int, Exit]) -> None:
        super().__init__()
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
        for place, block in enumerate(blocks):
            x = block(x)
            if place in self.thresholds:
                logits = cast("Tensor", self.heads[str(place)](x))
                sure = F.softmax(logits / self.temperatures[place], 1).amax(1) >= self.thresholds[place]
                if bool(sure.all()):
                    return logits
        if isinstance(model, ResNet):
            return cast("Tensor", model.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        assert isinstance(model, VisionTransformer)
        return cast("Tensor", model.fc(model.norm(x.mean(1))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handwritten(Contestant):
    """A loop written by hand."""

    family: ClassVar[str] = "mechanism"
    together: ClassVar[bool] = True
    note: ClassVar[str] = "a batch leaves at its hardest sample"

    @property
    def name(self) -> str:
        return "early exit by hand"

    def model(self, run: Run) -> nn.Module:
        return Dynamic(strategy="early_exit").model(run)

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        loop = Loop(_dynamic(model).static(), enabled_exits(_dynamic(model), run)).eval()
        found = laid_out(loop, images=run.task.images)
        if compilers:
            found["inductor, broken at each look"] = partial(torch.compile, loop, dynamic=False)
        return found

    def cost(self, model: nn.Module, run: Run) -> float:
        return counted(model, run)


def enabled_exits(dyn: dc.DynamicModule, run: Run) -> dict[int, Exit]:
    """The exits that calibration left on, by the number of the block before them."""
    places = [int(path.rpartition(".")[2]) for path in exit_paths(run)]
    exits = [cast("Exit", exit_) for exit_ in dyn.exits.values()]
    return {place: exit_ for place, exit_ in zip(places, exits, strict=True) if bool(exit_.enabled)}


def _dynamic(model: nn.Module) -> dc.DynamicModule:
    assert isinstance(model, dc.DynamicModule)
    return model
