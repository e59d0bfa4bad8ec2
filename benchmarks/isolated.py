"""What has to be measured in a process of its own: compile time with empty caches, and peak memory."""

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dyncompile as dc
from benchmarks.cases import CASES, QUICK
from benchmarks.forms import whole

LOWERED = "lowered"


def isolated(function: Callable[..., dict[str, float]], *args: Any, empty: bool = True) -> dict[str, float]:
    """Run a function of this module in a fresh process with one thread.

    Args:
        function: What to run.
        args: Its arguments.
        empty: Start with empty compiler caches.
    """
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory() as caches:
        os.environ["OMP_NUM_THREADS"] = "1"
        if empty:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        try:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                return pool.submit(function, *args).result()
        finally:
            os.environ.clear()
            os.environ |= kept


def compile_time(case: str, form: str, device: str) -> dict[str, float]:
    """Seconds to compile a model for all of its batch sizes.

    What a process pays once, whatever it compiles, is paid before: loading the compiler, finding out about the
    processor, precompiling headers.

    Args:
        case: Name of the model.
        form: `LOWERED`, or the static model as a whole.
        device: "cpu" or "cuda".
    """
    torch.set_num_threads(1)
    found = {**CASES, **QUICK}[case]
    _pay_once(device)
    with torch.no_grad():
        if form == LOWERED:
            dyn = found.dynamic(device)
            start = time.perf_counter()
            dc.lower(dyn).warmup(found.batch_sizes)
        else:
            model, inputs = found.static(device), found.inputs(4, device)
            start = time.perf_counter()
            call = whole(model, inputs)
            for batch in found.batch_sizes:
                call(found.inputs(batch, device))
        return {"seconds": time.perf_counter() - start}


def peak_memory(case: str, form: str, batch: int, device: str) -> dict[str, float]:
    """Peak memory in bytes (on a processor: Linux only).

    Returns:
        `process`: the largest resident size, compilation included; `inference`: the same during
        inference alone, above what the process held before the model was made; `tensors`: what
        torch allocates in a call, at its peak.
    """
    torch.set_num_threads(1)
    found = {**CASES, **QUICK}[case]
    inputs = found.inputs(batch, device)
    before = _resident("VmRSS")
    with torch.no_grad():
        if form == LOWERED:
            dyn = found.dynamic(device)
            call: Callable[..., Any] = dc.lower(dyn)
            del dyn
        else:
            model = found.static(device)  # kept, as a lowered model keeps the dynamic one
            call = whole(model, inputs)
        for _ in range(3):
            call(inputs)
        gc.collect()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            call(inputs)
            return {"tensors": float(torch.cuda.max_memory_allocated())}
        highest = _resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(3):
            call(inputs)
        peak = _resident("VmHWM")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            call(inputs)
    return {"process": highest, "inference": peak - before, "tensors": _allocated(trace)}


def footprint(name: str, form: str, place: tuple[str, str, str, str | None], compilers: bool) -> dict[str, float]:
    """Compile time and memory of a contestant of a scoreboard that is trained already (on a processor: Linux only).

    Args:
        name: Of the contestant.
        form: The way to run it.
        place: Name of the task, scale, folder of the cache, and of the archive of recordings.
        compilers: Whether forms are compiled.

    Returns:
        `compile`: seconds from the trained model to a result at every batch size; `memory`: peak bytes of inference at
        batch 64, above what the process held before the model was made.
    """
    from benchmarks.contestants import contestants
    from benchmarks.scores import BATCHES
    from benchmarks.tasks import TASKS, Run

    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 10_000
    task, scale, cache, archive = place
    run = Run(task=TASKS[task], scale=scale, cache=Path(cache), archive=None if archive is None else Path(archive))
    contestant = next(c for c in contestants(run.task) if c.name == name)
    inputs = run.splits.test.tensors[0]
    if compilers:
        _pay_once("cpu")
    gc.collect()
    before = _resident("VmRSS")
    model = contestant.model(run)
    with torch.no_grad():
        start = time.perf_counter()
        call = contestant.forms(model, run, compilers=compilers)[form]()
        for batch in BATCHES:
            call(inputs[:batch])
        seconds = time.perf_counter() - start
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(3):
            call(inputs[:64])
        return {"compile": seconds, "memory": _resident("VmHWM") - before}


def _pay_once(device: str) -> None:
    """What a process pays once, whatever it compiles: loading the compiler, the processor, precompiled headers."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8))
    whole(small.eval().to(device), torch.randn(4, 3, 4, 4, device=device))


def _resident(field: str) -> float:
    """A field of the process's memory status, in bytes.

    `getrusage` is of no use here: a process inherits the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(field))


def _allocated(trace: profile) -> float:
    """The largest sum of allocations less releases."""
    results: Any = trace.profiler.kineto_results if trace.profiler else None
    held = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)
