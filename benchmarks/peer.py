"""earlyon 0.3.0 (PyPI), the other package that gives a model exits, on the same model with the same exits.

Made equal: earlyon wraps a copy of the same static model, hooks the same modules that dyncompile cuts after, and runs
copies of dyncompile's heads with the same weights, temperatures and thresholds. Its decision is dyncompile's (largest
softmax probability >= threshold), so nothing is forced: the first exit's threshold is the median confidence of a
batch of 32, the other exits' is 1. A test that the outputs agree, sample by sample, precedes the timing.

Eager is compared with eager in the same memory format, contiguous (as both come) and channels-last. A batch leaves
earlyon when its hardest sample may; samples can also be passed one by one, and the faster way counts. earlyon refuses
to be compiled, so dyncompile compiled is compared with it eager.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import dyncompile as dc
from benchmarks.cases import Case, exits
from benchmarks.harness import Table, Target, take_turns

BATCH = 32

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
WAYS = ("one by one", "as a batch")

Call = Callable[[Tensor], Tensor]


@torch.no_grad()
def compare(case: Case, *, rounds: int, device: str) -> tuple[Table, list[Target]]:
    """Time both packages at batch 1 and 32.

    Args:
        case: A convolutional model whose exits are module paths.
        rounds: To count.
        device: Where to run.
    """
    dyn = case.dynamic(device)
    inputs = case.inputs(BATCH, device)
    order = dyn.trace(inputs).confidence["exit0"].sort()
    # Between two samples in the middle: half of the batch leaves at the first exit.
    middle = order.values[BATCH // 2 - 1 : BATCH // 2 + 1].mean()
    exits(dyn)["exit0"].threshold.fill_(middle)
    stays, leaves = (inputs[order.indices[i]].unsqueeze(0) for i in (0, -1))

    assert not isinstance(case.exits, int)
    layers = [case.exits] if isinstance(case.exits, str) else list(case.exits)
    calls: dict[str, Call] = {}
    for layout, memory_format in LAYOUTS.items():
        moved = copy.deepcopy(dyn).to(memory_format=memory_format)  # type: ignore[call-overload]
        wrapped = wrap(dyn, layers, (3, case.pixels, case.pixels)).to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
        for name, call in (
            (_name("dyncompile", layout, "eager"), dc.lower(moved, "eager")),
            (_name("earlyon", layout, WAYS[0]), partial(one_by_one, wrapped)),
            (_name("earlyon", layout, WAYS[1]), partial(as_a_batch, wrapped)),
        ):
            calls[name] = partial(laid_out, call, memory_format)
    compiled = "dyncompile, compiled"
    calls[compiled] = dc.lower(dyn)
    for name, call in calls.items():
        if WAYS[1] not in name:
            torch.testing.assert_close(call(inputs), dyn(inputs), rtol=1e-3, atol=1e-4)

    table = Table(
        title="Against earlyon 0.3.0",
        columns=["what runs", "package", "ms", "iqr", "over dyncompile compiled"],
        rows=[],
        note="Same model, cut points, head weights, thresholds and decisions; see benchmarks/peer.py.",
    )
    targets: list[Target] = []
    for what, x in (
        ("batch 1, leaves at the first exit", leaves),
        ("batch 1, stays", stays),
        (f"batch {BATCH}, half leave at the first exit", inputs),
    ):
        repeats = max(1, 16 // len(x))
        times = take_turns(
            {n: partial(call, x) for n, call in calls.items()}, rounds=rounds, repeats=repeats, device=device
        )
        for name, timing in sorted(times.items(), key=lambda item: item[1].median):
            over = timing.over(times[compiled]).value
            table.rows.append([what, name, 1e3 * timing.median, 1e3 * timing.iqr, over])
        bound = 1.0 if len(x) == 1 else 2.0
        for layout in LAYOUTS:
            rival = min((times[_name("earlyon", layout, w)] for w in WAYS), key=lambda t: t.median)
            for mine in (_name("dyncompile", layout, "eager"), compiled):
                ratio = rival.over(times[mine])
                targets.append(
                    Target(
                        what=f"earlyon ({layout}) over {mine}, {what}",
                        found=ratio.value,
                        low=ratio.low,
                        high=ratio.high,
                        bound=bound,
                        at_least=True,
                    )
                )
    return table, targets


def _name(package: str, layout: str, way: str) -> str:
    return f"{package}, {layout}, {way}"


def laid_out(call: Call, memory_format: torch.memory_format, x: Tensor) -> Tensor:
    return call(x.contiguous(memory_format=memory_format))


def one_by_one(wrapped: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([wrapped(sample).prediction for sample in x.split(1)])


def as_a_batch(wrapped: Any, x: Tensor) -> Tensor:
    predictions: Tensor = wrapped.forward_inference_batched(x).predictions
    return predictions


def wrap(dyn: dc.DynamicModule, layers: Sequence[str], shape: tuple[int, ...]) -> nn.Module:
    """The static model of a dynamic one with the same exits, those that are enabled, wrapped by earlyon.

    Args:
        dyn: With linear heads.
        layers: The module that each of its exits follows.
        shape: Of a sample.
    """
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint  # type: ignore[import-untyped]

    given = {
        name: (exit_, layer)
        for (name, exit_), layer in zip(exits(dyn).items(), layers, strict=True)
        if bool(exit_.enabled)
    }
    heads = {name: copy.deepcopy(exit_.head) for name, (exit_, _) in given.items()}
    points = [
        ExitPoint(name, layer, exit_.head.project.in_features)  # type: ignore[union-attr]
        for name, (exit_, layer) in given.items()
    ]
    config = EarlyExitConfig(
        backbone="custom",
        num_classes=10,
        exit_points=points,
        confidence_thresholds=[float(exit_.threshold) for exit_, _ in given.values()],
        temperatures={**{n: float(e.temperature) for n, (e, _) in given.items()}, "final": 1.0},
    )
    wrapped = EarlyExitWrapper(dyn.static(), heads, nn.Identity(), config, input_shape=(1, *shape)).eval()
    with warnings.catch_warnings():
        # Its estimate of FLOPs, made once: it warns where a module is called twice, as ResNet's ReLU is.
        warnings.simplefilter("ignore", RuntimeWarning)
        wrapped.flops_estimate  # noqa: B018
    return cast("nn.Module", wrapped)
