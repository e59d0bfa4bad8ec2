"""Train a static classifier of images: what the demo converts, and what it compares with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dyncompile.demo.datasets import Images


def multiplies_in_bfloat16() -> bool:
    """Whether the processor has instructions for it; torch computes in bfloat16 on any other too, at half the speed."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def training_layout(model: nn.Module) -> torch.memory_format:
    """Channels last, which trains fastest, but where oneDNN writes behind a buffer of its own.

    So does its weight gradient of a strided 1x1 convolution that has fewer input channels than a vector has floats:
    the process dies, now or later (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    narrow = any(
        isinstance(layer, nn.Conv2d)
        and layer.weight.device.type == "cpu"
        and layer.in_channels // layer.groups < 16
        and max(layer.kernel_size) == 1
        and max(layer.stride) > 1
        for layer in model.modules()
    )
    return torch.contiguous_format if narrow else torch.channels_last


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a static model is trained: under a one-cycle learning rate.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Samples per step.
        learning_rate: Highest rate of the cycle.
        weight_decay: L2 penalty.
        autocast: Multiply in bfloat16, where the processor can.
        optimizer: "sgd", with momentum, or "adamw", for transformers.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    autocast: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images `[C, H, W]` shifted at random by up to a twelfth, and mirrored where that is fair."""

    def __init__(self, images: TensorDataset, *, mirror: bool) -> None:
        self.images = images
        self.mirror = mirror
        self.reach = images.tensors[0].shape[-1] // 12

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[index]
        height, width = image.shape[-2:]
        top, left = torch.randint(0, 2 * self.reach + 1, (2,)).tolist()
        flip = self.mirror and torch.rand(()).item() < 0.5
        image = F.pad(image, [self.reach] * 4, mode="replicate")
        image = image[:, top : top + height, left : left + width]
        return (image.flip(-1) if flip else image), label


def train(
    model: nn.Module,
    images: Images,
    schedule: Schedule,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    title: str = "static",
) -> nn.Module:
    """Train a classifier in place, on the device where it is, and return it in eval mode.

    The same seed gives the same weights on the same machine.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    layout = training_layout(model)
    model = model.train().to(memory_format=layout)  # type: ignore[call-overload]
    loader = DataLoader(
        Augmented(images.train, mirror=images.mirror),
        batch_size=schedule.batch_size,
        shuffle=True,
        drop_last=len(images.train) > schedule.batch_size,
    )
    steps = schedule.epochs * len(loader)
    optimizer = _optimizer(model, schedule)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, total_steps=steps)
    task = progress.add_task(f"train {title}", total=steps) if progress else None
    for _ in range(schedule.epochs):
        for batch, labels in loader:
            inputs = batch.to(device, memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=schedule.autocast):
                loss = F.cross_entropy(model(inputs), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if progress and task is not None:
                progress.advance(task)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval()


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), weight_decay=schedule.weight_decay)
    return torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=schedule.weight_decay, nesterov=True)


@torch.no_grad()
def accuracy(call: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, *, batch_size: int = 64) -> float:
    """Share of the inputs `[N, C, H, W]` that a classifier, in eval mode, labels as `[N]` says."""
    predicted = [call(part).argmax(1) for part in torch.split(inputs, batch_size)]
    return (torch.cat(predicted) == labels).float().mean().item()
