"""Passes one after the other, in every order: what composes, what is refused and why, and that costs multiply."""

import itertools

import pytest
import torch
from test_passes import MODELS, REFUSED, drawn, enable

import dyncompile as dc
from dyncompile.errors import PassError
from dyncompile.passes import available
from dyncompile.shapes import flop_counter
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
    ("text", ("neuron_gate", "channel_gate")): r"`_modes.neurons0_mask` \(NeuronMask\) works across its channels",
    ("vectors", ("neuron_gate", "channel_gate")): r"`_modes.neurons0_mask` \(NeuronMask\) works across its channels",
    # Of two layers between input and output, all lies in the region of the gate: no value is on every path.
    ("vectors", ("channel_gate", "early_exit")): "`early_exit` .* found no site: the graph offers none",
    ("vectors", ("neuron_gate", "early_exit")): "found a head as dear as what an exit here could save",
}


def chain_id(value):
    return value if isinstance(value, str) else "-".join(value)


@pytest.mark.parametrize(("kind", "order"), PAIRS + TRIPLES, ids=chain_id)
def test_a_chain_composes_or_says_why_not(kind, order, device, monkeypatch):
    # Calls cost nothing here, so no step of a sequence is run to save one.
    monkeypatch.setattr("dyncompile.nn.ragged.CALL_FLOPS", 0.0)
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
    x = tuple(t.to(device) for t in inputs(7))
    assert torch.equal(dyn.eval()(*x), model.eval()(*x))

    fast = dc.lower(enable(dyn), backend="eager", decline=False)
    assert not fast.plan.dense
    for choice in ({}, drawn(dyn, lambda n: tuple(t.to(device) for t in inputs(n)), 7)):
        with torch.no_grad(), forced(dyn, choice), forced(fast, choice):
            trace = dyn.trace(*x)
            with flop_counter() as counter:
                output = fast(*x)
        torch.testing.assert_close(output, trace.output, rtol=1e-5, atol=1e-6)
        expected = float(trace.cost.double().sum()) * dyn.cost_model().static
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-5)
