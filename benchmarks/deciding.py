"""Knobs of a dynamic model, set so that a share of the samples decides each way."""

import torch
from torch import Tensor

import dyncompile as dc
from dyncompile.nn import Exit, Gate


def exits(dyn: dc.DynamicModule) -> dict[str, Exit]:
    """The exits of a model."""
    return {name: module for name, module in dyn.exits.items() if isinstance(module, Exit)}


def gates(dyn: dc.DynamicModule) -> dict[str, Gate]:
    """The gates of a model."""
    return {name: module for name, module in dyn.gates.items() if isinstance(module, Gate)}


def enable(dyn: dc.DynamicModule) -> None:
    """Let every exit and gate decide."""
    for module in (*dyn.exits.values(), *dyn.gates.values()):
        module.get_buffer("enabled").fill_(True)


@torch.no_grad()
def settle(dyn: dc.DynamicModule, x: Tensor, share: float) -> float:
    """Let each exit take a share of the samples, and each gate leave out a share of its rows; the counted cost.

    A threshold lies between the values of two samples: on one of them rounding would decide.
    """
    for exit_ in exits(dyn).values():
        exit_.threshold.fill_(1.0)
    for gate in gates(dyn).values():
        gate.bias.fill_(100.0)
    trace = dyn.trace(x)
    if share:
        for name, exit_ in exits(dyn).items():
            exit_.threshold.fill_(_between(trace.confidence[name], 1 - share))
        for name, gate in gates(dyn).items():
            gate.bias.fill_(-_between(torch.logit(trace.probabilities[name].double()).flatten(), share))
    return float(dyn.trace(x).cost.mean())


def knobs(dyn: dc.DynamicModule) -> dict[str, float]:
    """Thresholds of exits and biases of gates, as an exported file names them."""
    thresholds = {f"exits.{name}.threshold": float(exit_.threshold) for name, exit_ in exits(dyn).items()}
    return thresholds | {f"gates.{name}.bias": float(gate.bias) for name, gate in gates(dyn).items()}


def _between(values: Tensor, share: float) -> float:
    ordered = values.flatten().sort().values
    cut = min(max(round(share * len(ordered)), 1), len(ordered) - 1)
    return float((ordered[cut - 1].double() + ordered[cut].double()) / 2)
