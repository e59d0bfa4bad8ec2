"""What a report shows beside the settings: where each sample left, and the extreme inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dyncompile.calibration.knobs import Knobs
from dyncompile.calibration.risk import Array
from dyncompile.calibration.usage import Usage
from dyncompile.module import DynamicModule


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An input that is an image.

    Attributes:
        image: `[C, H, W]`, C 1 or 3.
        leave: Index of the exit it leaves at; E for the end.
        label: Its class; None where it has not exactly one.
        predicted: The class that the dynamic model gives it; None likewise.
        cost: What it costs, 1.0 = static model.
    """

    image: NDArray[np.float32]
    leave: int
    label: int | None
    predicted: int | None
    cost: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the calibration saw.

    Attributes:
        dyn: The model that was calibrated.
        leave: For each held-out sample the index of the exit it leaves at, `[M]`; E for the end.
        labels: Class of each held-out sample, `[M]`; None where samples have not exactly one.
        hardest: Of all samples those that the exits are least sure of, hardest first; without exits, those that cost
            most with gates as trained.
        easiest: Those that they are surest of, or that cost least, easiest first.
        costs: Cost of each held-out sample, `[M]`; None where it is that of the exit it leaves at.
        decisions: What gates decided about them, by name, `[M]` or `[M, r]`.
        knobs: The bias of each group of gates.
        usage: What gates did, for pictures; None without gates.
    """

    dyn: DynamicModule
    leave: NDArray[np.intp]
    labels: NDArray[np.intp] | None
    hardest: tuple[Picture, ...] = ()
    easiest: tuple[Picture, ...] = ()
    costs: Array | None = None
    decisions: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    knobs: Knobs = ()
    usage: Usage | None = None


class Gallery:
    """Keeps the images that are easiest and hardest, while the data pass by.

    Args:
        count: How many of either.
    """

    def __init__(self, count: int = 12) -> None:
        self.count = count
        self._kept: list[tuple[float, int, NDArray[np.float32]]] = []
        self._seen = 0

    def add(self, inputs: Sequence[Tensor], ease: Tensor, counted: Tensor) -> None:
        """Look at one batch.

        Args:
            inputs: `[N, ...]` each (`batch_first`); the first of shape `[N, C, H, W]`, C 1 or 3, is kept from.
            ease: `[N, ...]`, such as confidences, averaged for each sample.
            counted: Which samples are looked at, `[N]`; the others have no index.
        """
        ease = ease[counted].float().flatten(1).mean(1)
        images = [x for x in inputs if _are_images(x)]
        if images:
            shown = images[0][counted.to(images[0].device)]
            order = ease.argsort().tolist()
            for i in {*order[: self.count], *order[-self.count :]}:
                image = shown[i].detach().float().cpu().numpy().copy()
                self._kept.append((float(ease[i]), self._seen + i, image))
            self._kept.sort(key=lambda kept: kept[:2])
            del self._kept[self.count : -self.count]
        self._seen += len(ease)

    def ends(self) -> tuple[list[tuple[int, NDArray[np.float32]]], ...]:
        """Index among all samples and image `[C, H, W]`: the hardest, and the easiest."""
        kept = [(index, image) for _, index, image in self._kept]
        half = min(self.count, len(kept) // 2)
        return kept[:half], kept[len(kept) - half :][::-1]


def left_at(confidence: NDArray[np.float32], thresholds: Sequence[float], enabled: Sequence[bool]) -> NDArray[np.intp]:
    """Index of the first enabled exit whose threshold the confidence `[N, E]` reaches; else E."""
    fires = (confidence >= np.array(thresholds, dtype=np.float32)) & np.array(enabled, dtype=bool)
    ends = np.ones((len(fires), 1), dtype=bool)
    index: NDArray[np.intp] = np.concatenate([fires, ends], 1).argmax(1)
    return index


def _are_images(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[1] in (1, 3) and min(tensor.shape[2:]) > 1
