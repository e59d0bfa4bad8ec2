"""The models that are measured, with their exits, and a smaller static model beside each."""

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

import dyncompile as dc
from dyncompile.demo.models import ResNet, resnet20
from dyncompile.nn import Exit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model to measure.

    Attributes:
        build: Makes the static model.
        smaller: Makes a static model of about half the compute.
        pixels: Side of the input image.
        exits: As `dyncompile.passes.early_exit` takes them.
        batch_sizes: To measure at.
    """

    build: Callable[[], nn.Module]
    smaller: Callable[[], nn.Module]
    pixels: int
    exits: int | Sequence[str] = 3
    batch_sizes: tuple[int, ...] = (1, 16, 64)

    def static(self, device: str) -> nn.Module:
        """The static model, always with the same weights."""
        torch.manual_seed(0)
        return self.build().eval().to(device)

    def dynamic(self, device: str) -> dc.DynamicModule:
        """The dynamic model, all exits enabled and none sure enough to fire."""
        dyn = dc.dynamize(
            self.static(device),
            "early_exit",
            example_inputs=self.inputs(2, device),
            exits=self.exits,
            head="linear",
        ).eval()
        for exit_ in exits(dyn).values():
            exit_.enabled.fill_(True)
            exit_.threshold.fill_(1.0)
        return dyn

    def inputs(self, batch: int, device: str) -> Tensor:
        """Images `[batch, 3, pixels, pixels]`."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, 3, self.pixels, self.pixels, generator=generator).to(device)


def exits(dyn: dc.DynamicModule) -> dict[str, Exit]:
    """The exits of a dynamic model."""
    return {name: cast("Exit", module) for name, module in dyn.exits.items()}


def torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not fit the installed torch.

    Its Python part registers fake kernels for two of them, and fails where those are unknown.
    """
    import importlib

    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        return importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []


def _resnet18() -> nn.Module:
    model: nn.Module = torchvision().models.resnet18(num_classes=10)
    return model


def _resnet10() -> nn.Module:
    resnet = torchvision().models.resnet
    model: nn.Module = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return model


def _vit(depth: int) -> nn.Module:
    torchvision()
    import timm

    model: nn.Module = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=10, depth=depth)
    return model


_STAGES = ("layer1", "layer2", "layer3")

CASES = {
    "resnet18-64": Case(build=_resnet18, smaller=_resnet10, pixels=64, exits=_STAGES),
    "resnet18-112": Case(build=_resnet18, smaller=_resnet10, pixels=112, exits=_STAGES),
    "resnet20": Case(build=resnet20, smaller=lambda: ResNet(8), pixels=32),
    "vit": Case(build=lambda: _vit(12), smaller=lambda: _vit(6), pixels=64),
}

QUICK = {
    "resnet20-tiny": Case(
        build=lambda: ResNet(8, width=8),
        smaller=lambda: ResNet(8, width=4),
        pixels=16,
        exits=("blocks.0",),
        batch_sizes=(1, 4),
    )
}
