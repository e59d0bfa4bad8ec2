"""Passes one after the other, in every order: what composes, what is refused and why, and that costs multiply."""

import itertools

import pytest
import torch
from carrying_out import same_in_both
from test_passes import MODELS, REFUSED

import dyncompile as dc
from dyncompile.checking.contracts import exact_at_birth, lowered_equals_reference, lowered_runs, skips_as_planned
from dyncompile.checking.deciding import drawn, samples, settle, switch_on
from dyncompile.errors import PassError
from dyncompile.passes import available
from dyncompile.testing import forced

FITTING = {kind: [s for s in available() if (s, kind) not in REFUSED] for kind in MODELS}
PAIRS = [(kind, pair) for kind, fitting in FITTING.items() for pair in itertools.permutations(fitting, 2)]
TRIPLES = [("images", order) for order in itertools.permutations(("channel_gate", "layer_skip", "early_exit"))]
TRIPLES += [("text", order) for order in itertools.permutations(("neuron_gate", "layer_skip", "early_exit"))]
# What an earlier pass has done already, and what the later one says of it.
CLASHES = {
    ("images", ("layer_skip", "block_policy")): "the decision `gate0` skips it already",
    ("images", ("block_policy", "layer_skip")): "the decision `block0` skips it already",
    ("text", ("layer_skip", "block_policy")): "the decision `gate0` skips it already",
    ("text", ("block_policy", "layer_skip")): "the decision `block0` skips it already",
    (
        "text",
        ("neuron_gate", "channel_gate"),
    ): "neuron_gate, which has split the layer, works across its channels",
    (
        "vectors",
        ("neuron_gate", "channel_gate"),
    ): "neuron_gate, which has split the layer, works across its channels",
    # Of two layers between input and output, all lies in the region of the gate: no value is on every path.
    ("vectors", ("channel_gate", "early_exit")): "`early_exit` .* found no site: the graph offers none",
    ("vectors", ("neuron_gate", "early_exit")): "found a head as dear as what an exit here could save",
}


def chain_id(value):
    return value if isinstance(value, str) else "-".join(value)


@pytest.mark.parametrize(("kind", "order"), PAIRS + TRIPLES, ids=chain_id)
def test_a_chain_composes_or_says_why_not(kind, order, device):
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    model = make().to(device)
    example = tuple(t.to(device) for t in inputs(2))
    if (kind, order) in CLASHES:
        with pytest.raises(PassError, match=CLASHES[kind, order]):
            dc.dynamize(model, list(order), example_inputs=example)
        return
    dyn = dc.dynamize(model, list(order), example_inputs=example)
    assert [step.strategy for step in dyn.recipe.steps] == list(order)
    assert not exact_at_birth(model, dyn, (7,))

    settle(switch_on(dyn), dyn.examples(7))
    fast = dc.lower(dyn, backend="eager", decline=False)
    runs = list(lowered_runs(dyn, fast, (7,), slack=0.05))
    assert not lowered_equals_reference(runs)
    assert not skips_as_planned(fast, runs)
    args, kwargs = samples(dyn, 7, of=7)
    for choice in ({}, drawn(dyn, 7)):
        with forced(fast, choice):
            same_in_both(fast, *args, **kwargs)
