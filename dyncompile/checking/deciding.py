"""What a check runs: samples, with every decision switched on and about half of them taken, or drawn at random."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dyncompile.graph import spec
from dyncompile.module import DynamicModule, decision_nodes, decision_owners, decision_routes
from dyncompile.nn import Exit, Gate
from dyncompile.nn.gates import OPEN_LOGIT
from dyncompile.testing import made_within

BATCHES = (1, 2, 7, 33)


def samples(dyn: DynamicModule, batch: int, *, of: int = max(BATCHES)) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a model: the first samples of one set, so that knobs set between two of them stay there.

    Args:
        dyn: Whose example inputs are repeated and disturbed.
        batch: How many samples.
        of: How many the set has.
    """
    whole = zip(dyn.examples(max(of, batch)), dyn.graph.batch_dims, strict=True)
    inputs = [t if dim is None else t.narrow(dim, 0, batch).clone() for t, dim in whole]
    return dyn.graph.signature.call_arguments(inputs)


def switch_on(dyn: DynamicModule) -> DynamicModule:
    """Let everything decide, in eval mode; the bias takes an untrained gate, which starts open, to the middle."""
    for module in (*dyn.exits.values(), *dyn.gates.values()):
        module.get_buffer("enabled").fill_(True)
    for gate in dyn.gates.values():
        gate.get_buffer("bias").fill_(-OPEN_LOGIT)
    return dyn.eval()


@torch.no_grad()
def settle(dyn: DynamicModule, inputs: Sequence[Tensor]) -> None:
    """Set each threshold and bias so that about half of the samples take each arm, and none lies close to the border.

    Rounding may then not turn a decision. In order of execution: what decides sees what was decided before it.

    Args:
        dyn: In eval mode, switched on.
        inputs: Flat.
    """
    _Settling(dyn, graph=dyn.graph.fx).run(*inputs)


class _Settling(fx.Interpreter):
    """Runs what decides, sets its knob by what it found, and runs it again."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        tapped = {u.meta["tap"]: u.args[1] for u in n.users if u.target is operator.getitem and "tap" in u.meta}
        changed = [self._set(kind, owner, value[index]) for (kind, owner), index in tapped.items()]
        return super().run_node(n) if any(changed) else value

    def _set(self, kind: str, owner: str, found: Tensor) -> bool:
        module: Any = self.module
        if kind == "confidence" and isinstance(module.exits[owner], Exit):
            middle = _middle(found)
            module.exits[owner].threshold.fill_(1.0 if middle is None else middle)
            return True
        gate = module.gates[owner] if kind == "probability" else None
        if isinstance(gate, Gate) and not gate.routes:
            middle = _middle(torch.logit(found.double(), eps=1e-6))
            gate.bias.fill_(0.0 if middle is None else -middle)
            return True
        return False


def _middle(values: Tensor) -> float | None:
    """The middle of the widest gap between neighbours, in the middle half of all values; None if they are all alike."""
    ordered = values.flatten().double().sort().values
    count = len(ordered)
    part = ordered[count // 4 : count - count // 4] if count > 4 else ordered
    if len(part) < 2:
        return None
    gaps = part.diff()
    widest = int(gaps.argmax())
    if float(gaps[widest]) < 1e-6 * max(1.0, float(part.abs().max())):
        return None
    return float((part[widest] + part[widest + 1]) / 2)


def drawn(dyn: DynamicModule, batch: int) -> dict[str, Tensor]:
    """A random choice for each decision: one of its arms for each sample, or for each of a sample's rows.

    Args:
        dyn: Its decisions, but those that are made inside of what they control.
        batch: N.

    Returns:
        What `dyncompile.testing.forced` takes: `[N]` or `[N, r]`; the same for the same batch size.
    """
    generator = torch.Generator().manual_seed(batch)
    graph = dyn.graph.fx
    nodes, routes = decision_nodes(graph), decision_routes(graph)
    choice = {}
    for name in decision_owners(graph):
        if name not in made_within(dyn):
            rows = spec(nodes[name]).rows
            shape = (batch, rows) if rows > 1 else (batch,)
            arms = torch.randint(0, routes.get(name, 2), shape, generator=generator)
            choice[name] = arms if name in routes else arms.bool()
    return choice
