"""Lowering compares every compiled segment with eager mode; decisions those that no rounding turns."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from exiting import Net
from torch import Tensor, nn

import dyncompile as dc
from dyncompile.errors import LoweringError

DIFFERS = "compiled, differs from eager mode at batch size 1"


def compile_wrongly(module: nn.Module, *_: object, what: str, **__: object) -> Callable[..., list[Tensor]]:
    """Wrong code, from a compiler's cache, say."""

    def run(*inputs: Tensor) -> list[Tensor]:
        kind = torch.bool if what == "decision" else torch.float32
        return [(~t if what == "decision" else t + 1) if t.dtype == kind else t for t in module(*inputs)]

    return run


def converted(strategy: str, device: torch.device) -> dc.DynamicModule:
    return dc.dynamize(Net(blocks=2).to(device), strategy, example_inputs=torch.randn(2, 3, 6, 6).to(device)).eval()


def check_lowering(dyn: dc.DynamicModule, monkeypatch: pytest.MonkeyPatch, what: str, *, found: bool) -> None:
    monkeypatch.setattr("dyncompile.lowering.inductor.compile_segment", partial(compile_wrongly, what=what))
    if not found:
        dc.lower(dyn, decline=False)
        return
    with pytest.raises(LoweringError, match=DIFFERS):
        dc.lower(dyn, decline=False)


@pytest.mark.parametrize("what", ["decision", "prediction"])
@pytest.mark.parametrize("distance", [0.2, 0.01])
def test_exits(device: torch.device, monkeypatch: pytest.MonkeyPatch, what: str, distance: float) -> None:
    dyn = converted("early_exit", device)
    for module in dyn.exits.values():
        module.enabled.fill_(module is dyn.exits["exit0"])
    exit0 = dyn.exits["exit0"]
    with torch.no_grad():
        exit0.head.project.weight.zero_()  # every sample is as sure as the others
        exit0.threshold.copy_(dyn.trace(*dyn.examples(1)).confidence["exit0"][0] + distance)
    check_lowering(dyn, monkeypatch, what, found=what == "prediction" or distance > 0.05)


@pytest.mark.parametrize("distance", [0.4, 0.01])
def test_gates(device: torch.device, monkeypatch: pytest.MonkeyPatch, distance: float) -> None:
    dyn = converted("layer_skip", device)
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
        gate.standardise = None
        nn.init.zeros_([layer for layer in gate.policy.modules() if isinstance(layer, nn.Linear)][-1].weight)
        gate.bias.copy_(distance - gate.offset)  # the logit of every sample is `distance`
    check_lowering(dyn, monkeypatch, "decision", found=distance > 0.05)
