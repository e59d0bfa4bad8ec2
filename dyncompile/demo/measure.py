"""Wall clock of models on the same inputs, in the same run, taking turns."""

import copy
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.table import Table
from torch import Tensor, nn

import dyncompile as dc
from dyncompile.errors import DataError

Call = Callable[[Tensor], Tensor]


def has_compiler() -> bool:
    """Whether inductor finds a C++ compiler to make processor code with."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def static_forms(model: nn.Module, *, images: bool = True) -> dict[str, Call]:
    """The ways to run a static model: eager, channels-last, inductor, inductor frozen.

    Each holds a copy of the model, in eval mode. Channels-last only for images `[N, C, H, W]`;
    inductor only where `has_compiler`. Compiled forms compile at their first call at each shape.
    """
    model = copy.deepcopy(model).eval()
    forms: dict[str, Call] = {"eager": model}
    if images:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        forms["eager channels-last"] = lambda x: last(x.contiguous(memory_format=torch.channels_last))
    if has_compiler():
        forms["inductor"] = torch.compile(copy.deepcopy(model), dynamic=False)
        forms["inductor frozen"] = torch.compile(copy.deepcopy(model), dynamic=False, options={"freezing": True})
    return forms


@torch.no_grad()
def take_turns(calls: Mapping[str, Call], batches: list[Tensor], *, repeats: int = 5) -> dict[str, float]:
    """Median seconds that each call takes for all batches.

    The calls take turns, so that a change in the machine's load meets all of them; a first round,
    which compiles, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            _synchronize(batches[0])
            start = time.perf_counter()
            for batch in batches:
                call(batch)
            _synchronize(batches[0])
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def fastest(model: nn.Module, inputs: Tensor, *, repeats: int = 5) -> tuple[str, Call]:
    """Name and call of the form of a static model that takes the least time for a batch."""
    forms = static_forms(model, images=inputs.ndim == 4)
    times = take_turns(forms, [inputs], repeats=repeats)
    name = min(times, key=times.__getitem__)
    return name, forms[name]


def bench(dyn: dc.DynamicModule, inputs: Tensor, *, batch_size: int, repeats: int, backend: str) -> Table:
    """Time a dynamic model, lowered, against every form of its static one, on whole batches.

    Raises:
        DataError: There are fewer inputs than one batch.
    """
    batches = [batch for batch in inputs.split(batch_size) if len(batch) == batch_size]
    if not batches:
        raise DataError("data", found=f"{len(inputs)} inputs", expected=f"{batch_size} or more")
    fast = dc.lower(dyn, backend=backend)
    fast.warmup([batch_size])
    forms = static_forms(dyn.static(), images=inputs.ndim == 4)
    times = take_turns({**forms, "dynamic, lowered": fast}, batches, repeats=repeats)
    with torch.no_grad():
        cost = torch.cat([dyn.trace(batch).cost for batch in batches]).mean().item()
    twin = min(times[form] for form in forms)
    table = Table(
        title=f"{len(batches)} batches of {batch_size}",
        caption=f"counted cost {cost:.3f}; time ratios are to the fastest static form",
    )
    table.add_column("model")
    table.add_column("ms per batch", justify="right")
    table.add_column("time ratio", justify="right")
    for name, seconds in sorted(times.items(), key=lambda item: item[1]):
        milliseconds = f"{1e3 * seconds / len(batches):.2f}"
        table.add_row(name, milliseconds, f"{seconds / twin:.3f}")
    return table
