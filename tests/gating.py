"""A model with a decision about every row of a sample and a route, for tests of what reads both."""

import dataclasses

import torch
from torch import nn

from dyncompile.nn import Gate, build_estimator
from dyncompile.ops import SELECT, SWITCH
from dyncompile.passes import Pass, Site
from dyncompile.passes.base import find


class Rows(nn.Module):
    """A norm over the three rows of each sample, then one over the samples."""

    def __init__(self):
        super().__init__()
        self.rows, self.large, self.fc = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        rows = self.rows(x.flatten(0, 1))
        return self.fc(self.large(rows.unflatten(0, (x.shape[0], 3)).sum(1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Pass):
    """A decision about every row, and a route of two arms: the value before the norm, and behind it."""

    name = "toy"

    def sites(self, graph):
        for node in graph.fx.nodes:
            if node.target in ("rows", "large"):
                yield Site(name=str(node.target), node=node.name)

    def rewrite(self, graph, site):
        norm = find(graph, site.node)
        routes = 2 if site.name == "large" else 0
        gate = Gate(nn.Linear(4, routes or 1), estimator=build_estimator("gumbel"), routes=routes, standardise=False)
        gate.policy = First(routes)
        gate.offset.zero_()
        before = norm.args[0]
        decision, _ = graph.insert(f"gates.{site.name}", gate, [before], ("decision", "probability"))
        users = list(norm.users)
        with graph.fx.inserting_after(max(norm, decision)):
            args = (decision, [before, norm], 0) if routes else (decision, norm, before)
            select = graph.fx.call_function(SWITCH if routes else SELECT, args)
        for user in users:
            user.replace_input_with(norm, select)


class First(nn.Module):
    """Whether the first channel is positive: a logit, or those of two arms."""

    def __init__(self, routes):
        super().__init__()
        self.routes = routes

    def forward(self, x):
        return torch.stack([-x[:, 0], x[:, 0]], -1) if self.routes else x[:, 0]
