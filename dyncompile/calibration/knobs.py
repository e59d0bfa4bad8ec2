"""One knob a group of gates: the bias that evaluation adds to their logits, and which biases are worth trying."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dyncompile.data import Inputs, call
from dyncompile.errors import ArgumentError
from dyncompile.module import DynamicModule
from dyncompile.nn.gates import Gate

OPEN = 1e4
"""The knob of gates that are switched off: open for every sample, as they would be at this bias."""

Knobs = tuple[float, ...]
"""The bias of each group, in order."""

_RUNS = 32
_LEVELS = 12
_STEPS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 512.0, 4096.0)
_SPLITS = 20
_FINEST = 1e-2


def gate_groups(dyn: DynamicModule) -> dict[str, tuple[str, ...]]:
    """The gates that share a knob: names of gates by the pass that inserted them, in order of execution."""
    groups: dict[str, list[str]] = {}
    for node in dyn.graph.fx.nodes:
        owner, _, name = str(node.target).partition(".")
        # What a gate holds beside its policy, such as the norms of a narrow arm, is called by itself too.
        called = node.op == "call_module" and owner == "gates" and name in dyn.gates
        if called and isinstance(dyn.gates[name], Gate):
            gates = groups.setdefault(str(node.meta["inserted"]), [])
            gates.extend([name] * (name not in gates))
    return {group: tuple(gates) for group, gates in groups.items()}


def trained_groups(dyn: DynamicModule) -> dict[str, tuple[str, ...]]:
    """Of `gate_groups` the gates that decide by what they have learnt; a warning names the others.

    Training switches gates on; those that a calibration switched off keep the knob `OPEN`. One that is as it was born
    is open for every sample and stays so.

    Raises:
        ArgumentError: None is trained, and the model has no exits.
    """
    groups = gate_groups(dyn)
    born = {n for names in groups.values() for n, g in zip(names, _gates(dyn, names), strict=True) if _is_born(g)}
    kept = {group: tuple(n for n in names if n not in born) for group, names in groups.items()}
    kept = {group: names for group, names in kept.items() if names}
    if born:
        there = ((group, ", ".join(n for n in names if n in born)) for group, names in groups.items())
        untrained = " and ".join(f"gates of {group} ({names})" for group, names in there if names)
        advice = "dc.finetune(dyn, ..., target_cost=0.6) trains them and switches them on"
        if not kept and not len(dyn.exits):
            found = f"{untrained} that are switched off, as before any training"
            raise ArgumentError("dyn", found=found, expected=f"trained gates: {advice}")
        warnings.warn(f"calibration leaves {untrained} switched off, as before any training: {advice}", stacklevel=3)
    return kept


def _is_born(gate: Gate) -> bool:
    return not bool(gate.enabled) and float(gate.bias) == 0


def turn(dyn: DynamicModule, groups: Mapping[str, Sequence[str]], knobs: Knobs) -> None:
    """Set the knob of every group; a group at `OPEN` is switched off, since a gate that is always open only costs."""
    for names, bias in zip(groups.values(), knobs, strict=True):
        for gate in _gates(dyn, names):
            gate.bias.fill_(bias)
            gate.enabled.fill_(bias < OPEN)


@contextlib.contextmanager
def turned(dyn: DynamicModule, groups: Mapping[str, Sequence[str]], knobs: Knobs) -> Iterator[None]:
    """Knobs set, and costs counted as in evaluation, for a while."""
    gates = [gate for names in groups.values() for gate in _gates(dyn, names)]
    before = [(gate, gate.bias.clone(), gate.enabled.clone()) for gate in gates]
    training = dyn.training
    dyn.training = False
    try:
        turn(dyn, groups, knobs)
        yield
    finally:
        dyn.training = training
        for gate, bias, enabled in before:
            gate.bias.copy_(bias)
            gate.enabled.copy_(enabled)


def grid(
    dyn: DynamicModule,
    groups: Mapping[str, Sequence[str]],
    batches: Sequence[tuple[Inputs, Tensor]],
    device: torch.device,
) -> list[Knobs]:
    """The knob settings to try: every combination of a few biases of each group.

    Each group has `OPEN`, 0 (as trained), and biases between which the cost of the given samples falls in even steps,
    down to where its gates are closed: 12 in all for one group, 5 each for two, 3 for three, 2 for more, so that about
    32 combinations are run at most (where there are more than five groups, each is either open or as trained alone).

    Args:
        dyn: In evaluation mode, on `device`.
        groups: As `gate_groups` gives them.
        batches: Inputs, and which of their samples may be looked at, `[N]` bool.
        device: Where to run.

    Returns:
        Knobs; first all groups at `OPEN`, then all at 0.
    """
    count = len(groups)
    levels = min(_LEVELS, int(_RUNS ** (1 / count) + 1e-9))
    opened, born = (OPEN,) * count, (0.0,) * count
    if levels < 2:
        apart = [tuple(OPEN if i == j else 0.0 for j in range(count)) for i in range(count)]
        return list(dict.fromkeys([opened, born, *apart]))
    columns = []
    samples = [part for inputs, chosen in batches if (part := _only(dyn, inputs, chosen)) is not None]
    for index in range(count):

        def cost_at(bias: float, index: int = index) -> float:
            with turned(dyn, groups, (*born[:index], bias, *born[index + 1 :])):
                return _mean_cost(dyn, samples, device)

        columns.append([OPEN, 0.0, *(spread(cost_at, levels - 2) if levels > 2 else ())])
    return list(dict.fromkeys([opened, born, *itertools.product(*columns)]))


def spread(cost_at: Callable[[float], float], count: int) -> list[float]:
    """Biases whose costs divide what lies between closed and open into even steps.

    Args:
        cost_at: Mean cost at a bias.
        count: How many biases at most, at least 1; the lowest closes every gate, the others lie above.

    Returns:
        Biases, ascending.
    """
    known = {bias: cost_at(bias) for bias in (-OPEN, *(-step for step in _STEPS), 0.0, *_STEPS)}
    for _ in range(_SPLITS):
        # Where the cost changes most from one known bias to the next, look between them.
        order = sorted(known)
        gaps = [(abs(known[b] - known[a]), a, b) for a, b in itertools.pairwise(order) if b - a > _FINEST]
        gap, low, high = max(gaps, default=(0.0, 0.0, 0.0))
        if gap == 0:
            break
        middle = (low + high) / 2
        known[middle] = cost_at(middle)
    lowest, highest = known[-OPEN], max(known.values())
    if highest - lowest < 1e-6:
        return []  # the gates do not listen to it
    found = []
    for step in range(count):
        wanted = lowest + (highest - lowest) * step / count
        found.append(min(known, key=lambda bias: (abs(known[bias] - wanted), bias)))
    return sorted(set(found) - {0.0})


def _only(dyn: DynamicModule, inputs: Inputs, chosen: Tensor) -> Inputs | None:
    """Some samples of a batch; None if there are none."""
    rows = chosen.nonzero().view(-1)
    tensors = call(lambda *args, **kwargs: dyn.graph.bind(args, kwargs), inputs)
    dims = {id(t): dim for t, dim in zip(tensors, dyn.graph.batch_dims, strict=True) if dim is not None}
    picked: Inputs = tree_map_only(
        Tensor, lambda t: t.index_select(dims[id(t)], rows.to(t.device)) if id(t) in dims else t, inputs
    )
    return picked if len(rows) else None


def _mean_cost(dyn: DynamicModule, batches: Sequence[Inputs], device: torch.device) -> float:
    costs = []
    for inputs in batches:
        moved: Any = tree_map_only(Tensor, lambda t: t.to(device), inputs)
        trace = call(dyn.trace, moved)
        gates = {name: value for name, value in trace.decisions.items() if name not in dyn.exits}
        ends = {name: torch.zeros(len(trace.cost), dtype=torch.bool, device=device) for name in dyn.exits}
        costs.append(dyn.cost_model([]).expected(gates | ends).double().expand(len(trace.cost)))
    return float(torch.cat(costs).mean()) if costs else math.nan


def _gates(dyn: DynamicModule, names: Sequence[str]) -> list[Gate]:
    found = [dyn.gates[name] for name in names]
    return [gate for gate in found if isinstance(gate, Gate)]
