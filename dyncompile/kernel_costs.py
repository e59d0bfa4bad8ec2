"""Seconds, measured: what takes less time of two ways to run the same is told by the clock, once on each device."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCosts:
    """Seconds that the kernels of a module take.

    Attributes:
        call: However little they do.
        unit: More for each unit of their work: a part of a sample, or a step of it.
        gathered: The same where samples are gathered first and results put back.
    """

    call: float
    unit: float
    gathered: float


FREE = KernelCosts(call=0.0, unit=1.0, gathered=1.0)
"""Nothing that a sample skips is run to save a call."""

_assumed: ContextVar[KernelCosts | None] = ContextVar("assumed", default=None)


def kernel_costs(
    known: dict[Hashable, KernelCosts], key: Hashable, x: Tensor, measure: Callable[[], KernelCosts]
) -> KernelCosts:
    """What is assumed; else what is known where a tensor lies, in its dtype; else measured now, and noted.

    Args:
        known: What was measured before.
        key: What else it hangs on.
        x: One of those that the kernels read.
        measure: Runs them.
    """
    if (costs := _assumed.get()) is not None:
        return costs
    place = (key, x.device, x.dtype, torch.get_num_threads())
    if place not in known:
        with _disable_current_modes(), torch.no_grad():  # nobody counts these
            known[place] = measure()
    return known[place]


@contextlib.contextmanager
def assumed(costs: KernelCosts) -> Iterator[None]:
    """Other costs than those of the device, while the context is open, in this thread."""
    token = _assumed.set(costs)
    try:
        yield
    finally:
        _assumed.reset(token)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    """The shortest of a few runs: the one that least else disturbed."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


__all__ = ["FREE", "KernelCosts", "assumed", "kernel_costs", "seconds"]
