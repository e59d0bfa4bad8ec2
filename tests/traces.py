"""Traces of gates made by hand, shared by the tests of what gates are trained for."""

import torch

from dyncompile.module import Trace

N, K = 8, 4
LABELS = torch.arange(N) % K


def traced(decisions, probabilities, owners, routes=None, **parts):
    final = parts.get("final", torch.zeros(N, K))
    cost = parts.get("cost", torch.ones(N))
    return Trace(final, final, {}, {}, decisions, probabilities, cost, owners, routes or {})


def leaf(*shape):
    return torch.rand(shape).requires_grad_()


def several_gates():
    """Two binary gates, a route, a policy of two decisions, tokens, and a decision of the user's own."""
    route = torch.softmax(torch.randn(N, 3), -1).requires_grad_()
    policy = leaf(N, 2)
    p = {"gate0": leaf(N), "gate1": leaf(N), "level": route, "policy": policy, "tokens": leaf(N, 5)}
    decisions = {
        "gate0": p["gate0"],
        "gate1": p["gate1"],
        "level": route,
        "block0": policy[:, 0],
        "block1": policy[:, 1],
        "tokens": p["tokens"],
        "own": torch.rand(N),
    }
    owners = {name: name for name in decisions} | {"block0": "policy", "block1": "policy", "own": ""}
    return traced(decisions, p, owners, {"level": 3})
