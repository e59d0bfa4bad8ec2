"""The tasks that contestants are trained on, at four scales: data, static models, schedules.

- `full`: what the figures are meant for. About a day on two cores.
- `medium`: models of the size of the demo's, on 20,000 images: three hours on one core.
- `small`: a smaller part of the data and narrow models, which train in about half an hour on one busy core. It shows
  that all contestants run and are compared on one task.
- `quick`: digits, one epoch. Does everything run?

Whoever reads the figures must know that none but those of `full` are of models trained on all of the data.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.recordings import hapt
from dyncompile.demo.datasets import Images, load
from dyncompile.demo.models import ResNet, VisionTransformer
from dyncompile.demo.train import Augmented, Schedule, train
from dyncompile.drafts import drafted
from dyncompile.errors import ArgumentError

SCALES = ("full", "medium", "small", "quick")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Inputs `[N, ...]` with labels `[N]`.

    Attributes:
        images: With what static models are trained; None for sequences.
        train: What weights are fitted on, augmented.
        validation: Held out of training; watched while it goes on.
        calibration: Held out of training and not watched; thresholds are chosen on it.
        test: Looked at to measure.
        describe: In words.
    """

    train: Dataset[tuple[Tensor, ...]]
    validation: TensorDataset
    calibration: TensorDataset
    test: TensorDataset
    describe: str
    images: Images | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large and how long.

    Attributes:
        width: Of the static model.
        depth: Of the static model.
        epochs: Of training the static model that is converted.
        tuning: Epochs of fine-tuning; static contestants are trained for both together.
        samples: To train on; None for all.
    """

    width: int
    depth: int
    epochs: int
    tuning: int
    samples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set with a family of static models.

    Attributes:
        name: As on the command line.
        title: As over a table.
        sizes: By scale.
        make: Builds a model of a width and a depth, for the inputs and classes of some splits.
        read: Reads the splits, for a scale.
        widths: Multiples of this are legal widths.
        depths: The depth of half of the layers, given the depth.
        strategies: What of dyncompile enters: name in tables -> passes, each with its options, joined by "+".
        images: Whether channels-last is worth trying.
        schedule: Changes to the schedule of training.
    """

    name: str
    title: str
    sizes: dict[str, Sizes]
    make: Callable[[int, int, tuple[int, ...]], nn.Module]
    read: Callable[[str, Sizes, Path | None], Splits]
    widths: int
    depths: Callable[[int], int]
    strategies: tuple[str, ...]
    images: bool = True
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A task at a scale, with its data read: what contestants are given.

    Attributes:
        task: Which.
        scale: One of `SCALES`.
        cache: Folder for what was trained.
        splits: The data.
    """

    task: Task
    scale: str
    cache: Path
    archive: Path | None = None

    @functools.cached_property
    def splits(self) -> Splits:
        """The data, read when first asked for."""
        return self.task.read(self.scale, self.sizes, self.archive)

    @property
    def sizes(self) -> Sizes:
        """How large and how long at this scale."""
        return self.task.sizes[self.scale]

    @property
    def folder(self) -> Path:
        """Where what was trained is kept.

        Raises:
            ArgumentError: It holds models of other sizes.
        """
        folder = self.cache / f"{self.task.name}-{self.scale}"
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "sizes.txt"
        if not note.exists():
            note.write_text(f"{self.sizes}", encoding="utf-8")
        if (found := note.read_text(encoding="utf-8")) != str(self.sizes):
            raise ArgumentError("--cache", found=f"{folder} with {found}", expected=f"{self.sizes}, or another folder")
        return folder

    def build(self, *, width: float = 1.0, half: bool = False) -> nn.Module:
        """A static model, untrained: of a share of the width, or of half of the layers."""
        sizes = self.sizes
        whole = max(round(sizes.width * width / self.task.widths), 1) * self.task.widths
        depth = self.task.depths(sizes.depth) if half else sizes.depth
        torch.manual_seed(0)
        return self.task.make(whole, depth, tuple(self.splits.test.tensors[0].shape[1:]))

    def fit(self, model: nn.Module, epochs: int) -> nn.Module:
        """Train a static model in place, and return it in eval mode."""
        if self.splits.images is None:
            return _fit_sequences(model, self, epochs).eval()
        common = {"epochs": epochs, "batch_size": 128, "learning_rate": 0.1}
        return train(model, self.splits.images, Schedule(**{**common, **self.task.schedule}))


def trained_once(model: nn.Module, path: Path, fit: Callable[[], object]) -> nn.Module:
    """A static model in eval mode, with the weights of a file, or trained by `fit` and kept in that file."""
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    fit()
    with drafted(path) as draft:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, draft)
    return model.eval()


def _fit_sequences(model: nn.Module, run: Run, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for x, labels in DataLoader(run.splits.train, batch_size=64, shuffle=True, generator=generator):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
    return model


# --- images -----------------------------------------------------------------------------------------


def _images(scale: str, sizes: Sizes, archive: Path | None) -> Splits:  # noqa: ARG001 - recordings need one
    images = load("digits" if scale == "quick" else "fashion-mnist")
    inputs, labels = (tensor[: sizes.samples] for tensor in images.train.tensors)
    kept = TensorDataset(inputs, labels)
    held = images.calibration.tensors
    half = len(held[0]) // 2
    return Splits(
        train=Augmented(kept, mirror=images.mirror),
        validation=TensorDataset(*(tensor[:half] for tensor in held)),
        calibration=TensorDataset(*(tensor[half:] for tensor in held)),
        test=TensorDataset(*(tensor[: 96 if scale == "quick" else None] for tensor in images.test.tensors)),
        describe=f"{images.name}: {len(kept)} images to train, {len(images.test)} in the test set",
        images=dataclasses.replace(images, train=kept),
    )


def _resnet(width: int, depth: int, shape: tuple[int, ...]) -> nn.Module:
    return ResNet(depth, width=width, classes=10, in_channels=shape[0])


def _vit(width: int, depth: int, shape: tuple[int, ...]) -> nn.Module:
    return VisionTransformer(
        shape[-1], patch=shape[-1] // 4, width=width, depth=depth, heads=4, classes=10, in_channels=shape[0]
    )


# --- sequences --------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """An LSTM over sequences `[N, T, D]` of one length; its output at the last step is classified.

    Args:
        channels: D.
        width: Of the LSTM.
        layers: Of the LSTM.
        classes: How many.
    """

    def __init__(self, channels: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(channels, width, layers, batch_first=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, K]`."""
        return self.fc(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


def _recordings(scale: str, sizes: Sizes, archive: Path | None) -> Splits:
    if scale == "quick":
        # Is anything louder at the end than at the start?
        x = torch.randn(512, 16, 6, generator=torch.Generator().manual_seed(0))
        labels = (x[:, 8:].abs().sum((1, 2)) > x[:, :8].abs().sum((1, 2))).long()
        parts = [TensorDataset(x[start:stop], labels[start:stop]) for start, stop in ((0, 256), (256, 384), (384, 512))]
        name = "noise"
    else:
        if archive is None:
            raise ArgumentError("--hapt", found="nothing", expected="the archive that benchmarks.recordings names")
        data = hapt(archive)
        parts = [TensorDataset(p.tensors[0], p.tensors[2]) for p in (data.train, data.validation, data.test)]
        name = data.name
    fitted, held, test = parts
    fitted = TensorDataset(*(tensor[: sizes.samples] for tensor in fitted.tensors))
    half = len(held) // 2
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    return Splits(
        train=fitted,
        validation=TensorDataset(*(tensor[order[:half]] for tensor in held.tensors)),
        calibration=TensorDataset(*(tensor[order[half:]] for tensor in held.tensors)),
        test=test,
        describe=f"{name}: {len(fitted)} windows to train, {len(test)} to test, of other people",
    )


def _lstm(width: int, depth: int, shape: tuple[int, ...]) -> nn.Module:
    return Sequences(shape[-1], width, depth, 6)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="fashion-resnet",
            title="Fashion-MNIST, ResNet",
            sizes={
                "full": Sizes(width=32, depth=20, epochs=8, tuning=8),
                "medium": Sizes(width=16, depth=20, epochs=12, tuning=6, samples=20_000),
                "small": Sizes(width=16, depth=14, epochs=3, tuning=2, samples=4000),
                "quick": Sizes(width=8, depth=8, epochs=1, tuning=1, samples=256),
            },
            make=_resnet,
            read=_images,
            widths=2,
            depths=lambda depth: 6 * max((depth - 2) // 12, 1) + 2,
            strategies=("early_exit", "layer_skip", "channel_gate", "layer_skip+early_exit"),
        ),
        Task(
            name="fashion-vit",
            title="Fashion-MNIST, ViT",
            sizes={
                "full": Sizes(width=192, depth=8, epochs=12, tuning=8),
                "medium": Sizes(width=96, depth=6, epochs=10, tuning=8, samples=20_000),
                "small": Sizes(width=64, depth=6, epochs=3, tuning=2, samples=4000),
                "quick": Sizes(width=32, depth=2, epochs=1, tuning=1, samples=256),
            },
            make=_vit,
            read=_images,
            widths=8,
            depths=lambda depth: max(depth // 2, 1),
            strategies=("early_exit", "layer_skip", "neuron_gate", "layer_skip+early_exit"),
            schedule={"learning_rate": 2e-3, "weight_decay": 0.05, "optimizer": "adamw"},
        ),
        Task(
            name="hapt-lstm",
            title="HAPT, LSTM",
            sizes={
                "full": Sizes(width=256, depth=1, epochs=12, tuning=10),
                "medium": Sizes(width=128, depth=1, epochs=10, tuning=8),
                "small": Sizes(width=64, depth=1, epochs=6, tuning=5),
                "quick": Sizes(width=16, depth=1, epochs=1, tuning=1),
            },
            make=_lstm,
            read=_recordings,
            widths=8,
            depths=lambda depth: depth,
            strategies=("frame_skip",),
            images=False,
        ),
    )
}
