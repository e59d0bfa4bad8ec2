"""What a contestant is: a trained model, the ways to run it, and what it costs by count."""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.tasks import Run, trained_once
from dyncompile.shapes import flop_counter

Call = Callable[[Tensor], Tensor]

Forms = dict[str, Callable[[], Call]]
"""Ways to run a model, each made when it is asked for."""

BATCH = 250
"""Samples at a time where nothing is timed."""


class Contestant(ABC):
    """One way to answer the same task. Subclasses are frozen dataclasses.

    Attributes:
        family: What tables and pictures put together.
        note: What a reader should know of it; "" for nothing.
        together: Whether a batch is decided about as a whole, so that answers hang on how large it is.
        smallest: Batch size from which on it is another contestant than those before it.
    """

    family: ClassVar[str]
    note: ClassVar[str] = ""
    together: ClassVar[bool] = False
    smallest: ClassVar[int] = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """As in tables and pictures."""

    @abstractmethod
    def model(self, run: Run) -> nn.Module:
        """The trained model in eval mode: as it was kept, or else trained now and kept."""

    @abstractmethod
    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:
        """The ways to run it, of which the fastest counts at each batch size; without `compilers` only eager ones."""

    def cost(self, model: nn.Module, run: Run) -> float:
        """FLOPs a sample, counted; 1.0 is the static model."""
        return flops(model, run) / flops(run.build(), run)

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@torch.no_grad()
def flops(model: nn.Module, run: Run) -> float:
    """FLOPs that a model takes for a sample, whatever the sample."""
    with flop_counter() as counter:
        model.eval()(run.splits.test.tensors[0][:1])
    return float(counter.get_total_flops())


def trained(run: Run, name: str, epochs: int, *, width: float = 1.0, half: bool = False) -> nn.Module:
    """A static model in eval mode, trained or as it was kept."""
    model = run.build(width=width, half=half)
    return trained_once(model, run.folder / f"{name}.safetensors", lambda: run.fit(model, epochs))


def laid_out(model: nn.Module, *, images: bool) -> Forms:
    """A model that is not compiled: as it is, and channels-last where it reads images."""

    def channels_last() -> Call:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda x: last(x.contiguous(memory_format=torch.channels_last))

    found: Forms = {"eager": lambda: model}
    if images:
        found["eager channels-last"] = channels_last
    return found


__all__ = ["BATCH", "Call", "Contestant", "Forms", "flops", "laid_out", "trained"]
