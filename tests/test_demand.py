"""Demand and cost on random graphs, against brute force over every combination of decisions."""

import itertools
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from dyncompile.cost import cost_model, exit_costs
from dyncompile.demand import analyse, decision_name, specialise
from dyncompile.ops import SELECT, SWITCH, arms_of, decision_of, is_select

WAYS = {"d0": 2, "d1": 2, "d2": 2, "r": 3}
ASSIGNMENTS = [dict(zip(WAYS, values, strict=True)) for values in itertools.product(*map(range, WAYS.values()))]


class Builder:
    """A graph of one input, three binary decisions and a route of three ways."""

    def __init__(self):
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.decisions = {name: self.op(self.x, named=name) for name in WAYS}

    def op(self, *args, named=None):
        node = self.graph.call_function(operator.add, (*args, *args)[:2])
        node.meta["flops"] = float(len(self.graph.nodes))
        if named:
            node.meta.update(decision=named, route=named == "r")
        return node

    def select(self, name, *arms):
        if name == "r":
            node = self.graph.call_function(SWITCH, (self.decisions[name], list(arms), 0))
        else:
            node = self.graph.call_function(SELECT, (self.decisions[name], *arms[:2]))
        node.meta["flops"] = 1.0
        return node

    def finish(self, *outputs):
        self.graph.output(tuple(outputs))
        for node in self.graph.nodes:
            node.meta.setdefault("flops", 0.0)
        return self.graph


def needed(graph, assignment):
    """Every node that the output needs when the decisions are known: the oracle."""
    found, queue = set(), list(graph.output_node().all_input_nodes)
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        if is_select(node):
            arm = arms_of(node)[assignment[decision_name(decision_of(node))]]
            queue.extend((decision_of(node), arm))
        else:
            queue.extend(node.all_input_nodes)
    return found


def holds(guard, assignment):
    return all(assignment[unit.name] == arm for unit, arm in guard)


def counted(graph, assignment):
    return sum(node.meta["flops"] for node in needed(graph, assignment))


# A tree of expressions: each value is read once, so what is needed is a conjunction of decisions.
_LEAF = st.just("x")
TREES = st.recursive(
    _LEAF,
    lambda tree: st.one_of(
        st.tuples(st.just("op"), tree, tree),
        st.tuples(st.sampled_from(sorted(WAYS)), tree, tree, tree),
        st.tuples(st.just("diamond"), st.sampled_from(sorted(WAYS)), tree, tree, tree),
    ),
    max_leaves=8,
)


def build_tree(builder, tree):
    if tree == "x":
        return builder.op(builder.x)
    kind, *rest = tree
    if kind == "op":
        return builder.op(*(build_tree(builder, part) for part in rest))
    if kind == "diamond":  # two selects of one decision, side by side, that share the arms' source
        name, *parts = rest
        arms = [build_tree(builder, part) for part in parts]
        twins = [builder.op(arm) for arm in arms]
        return builder.op(builder.select(name, *arms), builder.select(name, *twins))
    return builder.select(kind, *(build_tree(builder, part) for part in rest))


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_in_a_tree_a_node_is_needed_exactly_where_its_guard_holds(tree):
    builder = Builder()
    graph = builder.finish(build_tree(builder, tree))
    guards = analyse(graph).guards
    for assignment in ASSIGNMENTS:
        wanted = needed(graph, assignment)
        for node in graph.nodes:
            if node in guards and node.op == "call_function" and "decision" not in node.meta:
                assert holds(guards[node], assignment) == (node in wanted), (node, guards[node], assignment)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_expected_cost_of_a_tree_equals_enumeration(tree):
    builder = Builder()
    graph = builder.finish(build_tree(builder, tree))
    # Decisions are shared by any selects, so none is ever spared here: they cost nothing in this test.
    for node in builder.decisions.values():
        node.meta["flops"] = 0.0
    model = cost_model(graph)
    static = sum(node.meta["flops"] for node in graph.nodes)
    hard = {
        name: torch.tensor([a[name] for a in ASSIGNMENTS]).to(torch.int64 if name == "r" else torch.bool)
        for name in WAYS
    }
    expected = torch.tensor([counted(graph, a) for a in ASSIGNMENTS]) / static
    torch.testing.assert_close(model.expected(hard).expand(len(ASSIGNMENTS)), expected, rtol=1e-5, atol=1e-6)
    p = {"d0": 0.3, "d1": 0.6, "d2": 0.9}
    route = [0.2, 0.5, 0.3]
    soft = {name: torch.tensor([value]) for name, value in p.items()} | {"r": torch.tensor([route])}
    chances = [math.prod(p[n] if a[n] else 1 - p[n] for n in p) * route[a["r"]] for a in ASSIGNMENTS]
    total = sum(chance * cost for chance, cost in zip(chances, expected.tolist(), strict=True))
    assert float(model.expected(soft)) == pytest.approx(total, rel=1e-5)


@st.composite
def dags(draw):
    builder = Builder()
    values = [builder.op(builder.x)]
    for _ in range(draw(st.integers(1, 12))):
        picks = [values[draw(st.integers(0, len(values) - 1))] for _ in range(3)]
        kind = draw(st.sampled_from(["op", *sorted(WAYS)]))
        values.append(builder.op(*picks[:2]) if kind == "op" else builder.select(kind, *picks))
    return builder.finish(values[-1], *(values[-2:-1] if draw(st.booleans()) else ()))


@settings(max_examples=200, deadline=None)
@given(dags())
def test_in_any_graph_what_is_needed_lies_under_its_guard(graph):
    demand = analyse(graph)
    ever = set()
    for assignment in ASSIGNMENTS:
        wanted = needed(graph, assignment)
        ever |= wanted
        for node in wanted:
            assert holds(demand.guards[node], assignment)
    live = {n for n in graph.nodes if n in demand.guards and n.op == "call_function"}
    assert {n for n in ever if n.op == "call_function"} <= live


@settings(max_examples=200, deadline=None)
@given(dags())
def test_regions_and_units_are_consistent(graph):
    demand = analyse(graph)
    listed = [node for region in demand.regions for node in region.nodes]
    assert len(listed) == len(set(listed))
    assert set(listed) == {n for n in demand.guards if n.op == "call_function"}
    names = [region.guard for region in demand.regions]
    for region in demand.regions:
        assert region.guard[:-1] in names or not region.guard
        for i, (unit, _) in enumerate(region.guard):
            assert unit.guard == region.guard[:i]
        assert all(demand.guards[node] == region.guard for node in region.nodes)
    for unit in demand.units:
        assert all(decision_of(s) is unit.decision and demand.guards[s] == unit.guard for s in unit.selects)
        # The decision is there before its selects' guard is entered deeper.
        decided = demand.guards[unit.decision]
        assert decided == unit.guard[: len(decided)]


@settings(max_examples=150, deadline=None)
@given(dags(), st.sampled_from(ASSIGNMENTS))
def test_known_decisions_leave_what_is_needed(graph, assignment):
    left = {node.name for node in specialise(graph, assignment).nodes if node.op == "call_function"}
    wanted = {node.name for node in needed(graph, assignment) if node.op == "call_function" and not is_select(node)}
    decisions = {n.name for n in graph.nodes if "decision" in n.meta}
    assert left - decisions == wanted - decisions


def test_a_golden_graph_of_two_exits():
    b = Builder()
    stem = b.op(b.x)
    body = b.op(stem)
    tail = b.op(body)
    graph = b.finish(b.select("d0", b.op(stem), b.select("d1", b.op(body), tail)))
    demand = analyse(graph)
    found = {region.name: [n.name for n in region.nodes if n.target is operator.add] for region in demand.regions}
    assert set(found) == {"always", "d0", "not d0", "not d0 & d1", "not d0 & not d1"}
    assert found["not d0 & not d1"] == [tail.name]
    assert stem.name in found["always"]
    assert body.name in found["not d0"]
    assert b.decisions["d1"].name in found["not d0"]
    costs = exit_costs(cost_model(graph), ["d0", "d1"])
    assert list(costs) == ["d0", "d1", "final"]
    static = sum(node.meta["flops"] for node in graph.nodes)
    for name, d0, d1 in (("d0", 1, 0), ("d1", 0, 1), ("final", 0, 0)):
        wanted = counted(graph, {"d0": d0, "d1": d1, "d2": 0, "r": 0})
        assert costs[name] == pytest.approx(wanted / static)


def test_expected_cost_is_differentiable():
    b = Builder()
    graph = b.finish(b.select("d0", b.op(b.x), b.op(b.op(b.x))))
    p = torch.tensor([0.25, 0.5], requires_grad=True)
    model = cost_model(graph)
    model.expected({"d0": p, "d1": p, "d2": p, "r": torch.ones(2, 3) / 3}).sum().backward()
    arms = arms_of(next(n for n in graph.nodes if is_select(n)))
    saved = arms[1].meta["flops"] - arms[0].meta["flops"] - arms[0].all_input_nodes[0].meta["flops"]
    torch.testing.assert_close(p.grad, torch.full((2,), saved / model.static))
