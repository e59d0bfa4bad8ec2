"""What a model with gated neurons computes and runs: densely, in training, with other passes."""

import contextlib

import pytest
import torch
from feedforward import VARIANT, Encoder, converter, decisive, mlp, moved, tokens, vectors
from torch import fx, nn

import dyncompile as dc
from dyncompile.demand import specialise, stands_in
from dyncompile.errors import ArgumentError
from dyncompile.kernel_costs import FREE, assumed
from dyncompile.nn.neurons import GatedNeurons
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.passes.layer_skip import LayerSkip
from dyncompile.passes.neuron_gate import NeuronGate
from dyncompile.testing import forced
from dyncompile.training import GateSchedule


@pytest.fixture
def converted(device):
    return converter(device)


@VARIANT
def test_all_groups_are_the_whole(converted, kind, options):
    """What stands in for the layers, where it does not fall back on them."""
    model, dyn, inputs = converted(kind, **options)
    apart = specialise(dyn.graph.fx, {})
    assert all(n.args[0] is None for n in apart.nodes if stands_in(n))
    x = inputs(5)
    (found,) = fx.Interpreter(dyn, graph=apart).run(*x)
    torch.testing.assert_close(found, model(*x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, torch.zeros_like(found))


@VARIANT
def test_a_closed_group_does_not_matter(converted, kind, options):
    _, dyn, inputs = converted(kind, **options)
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    (path,) = [n for n, m in dyn.named_modules() if isinstance(m, GatedNeurons)][:1]
    gated = dyn.get_submodule(path)
    (call,) = [n for n in dyn.graph.fx.nodes if n.target == path]
    x = inputs(3)
    shut = torch.ones_like(dyn.trace(*x).decisions["neurons0"])
    shut.view(3, -1, 4)[..., 1] = False
    weight = dyn.get_parameter(call.args[3].target)
    members = range(gated.size, 2 * gated.size) if gated.order is None else gated.order[gated.size : 2 * gated.size]
    along = int(gated.transposed[0])
    for training in (False, True):
        dyn.train(training)
        with torch.no_grad(), forced(dyn, {"neurons0": shut, **{n: 1.0 for n in dyn.gates if n != "neurons0"}}):
            found = []
            for neuron in (int(members[0]), int((gated.order if gated.order is not None else range(99))[0])):
                kept = weight.clone()
                torch.manual_seed(2)
                before = dyn(*x)
                weight.select(along, neuron).mul_(float("nan") if not training and not found else 3.0)
                torch.manual_seed(2)
                found.append(torch.allclose(dyn(*x), before, atol=1e-6))
                weight.copy_(kept)
        assert found == [True, False]


# --- as the static model, and as its decisions say -------------------------------------------------


@VARIANT
def test_exact_at_birth(converted, kind, options):
    model, dyn, inputs = converted(kind, **options)
    for training in (False, True):
        model.train(training)
        dyn.train(training)
        for batch in (1, 2, 7):
            x = inputs(batch)
            torch.manual_seed(batch)
            expected = model(*x)
            for run in (dyn, lambda *x: dyn.trace(*x).output):
                torch.manual_seed(batch)
                assert torch.equal(run(*x), expected)


@VARIANT
def test_training_is_evaluation_with_the_same_decisions(converted, kind, options):
    _, dyn, inputs = converted(kind, **options)
    for module in dyn.modules():
        vars(module).update({name: 0.0 for name in ("p", "dropout") if isinstance(vars(module).get(name), float)})
    decisive(dyn)
    x = inputs(6)
    drawn = dyn.train().trace(*x)
    dyn.eval()
    dyn._override = lambda name, value: drawn.decisions[name].flatten() > 0.5
    chosen = dyn.trace(*x)
    dyn._override = None
    assert 0.1 < torch.cat([d.flatten() for d in drawn.decisions.values()]).mean() < 0.9
    torch.testing.assert_close(drawn.output, chosen.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.cost, chosen.cost)


def test_gradient_of_the_cost(converted):
    """Each decision costs what its group costs, whatever the others are."""
    _, dyn, inputs = converted("gated")
    costs = dyn.train().cost_model()
    for state in (0.0, 1.0):
        decision = torch.full((3, 4), state, requires_grad=True)
        costs.expected({"neurons0": decision}).sum().backward()
        group = 2 * (2 * 12 * 8) + 2 * 8 * 5
        torch.testing.assert_close(decision.grad, torch.full((3, 4), group / costs.static))
    decisive(dyn)
    trace = dyn.trace(*inputs(5))
    trace.output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in dyn.parameters())


# --- options ---------------------------------------------------------------------------------------


def test_top_k_picks_k(converted):
    _, dyn, inputs = converted("encoder", per="token", top_k=2)
    decisive(dyn)
    for training in (False, True):
        trace = dyn.train(training).trace(*inputs(5))
        assert trace.decisions["neurons1"].shape == (5, 24)
        picked = trace.decisions["neurons1"].view(5, 6, 4).float()
        assert torch.equal(picked.sum(-1), torch.full((5, 6), 2.0))
        assert picked.mean((0, 1)).std() > 0
        torch.testing.assert_close(trace.cost, trace.cost[:1].expand(5))
    dyn.eval()
    trace = dyn.trace(*inputs(5))
    picked = trace.decisions["neurons1"].view(5, 6, 4)
    scores = trace.probabilities["neurons1"].view(5, 6, 4)
    best = scores.topk(2).indices.sort(-1).values
    certain = scores.max(-1).values < 1
    assert torch.equal(picked.nonzero()[:, 2].view(5, 6, 2)[certain], best[certain])


@pytest.mark.parametrize("estimator", ["gumbel", "straight_through", "semantic_hashing"])
def test_top_k_by_every_estimator(converted, estimator):
    _, dyn, inputs = converted("mlp", top_k=2, estimator=estimator)
    decisive(dyn)
    trace = dyn.train().trace(*inputs(64))
    picked = torch.stack(list(trace.decisions.values()), -1)
    assert ((picked >= 0) & (picked <= 1)).all()
    assert float(picked.detach().sum(-1).max()) <= 2 + 1e-5
    trace.output.square().mean().backward()
    assert dyn.gates["neurons0"].policy.inner.weight.grad.abs().sum() > 0


def test_padding_does_not_sway_a_gate(converted):
    _, dyn, inputs = converted("encoder")
    x, padding = inputs(4)
    changed = x + 5 * padding[..., None] * torch.randn_like(x)
    first, second = dyn.trace(x, padding), dyn.trace(changed, padding)
    assert padding.any()
    torch.testing.assert_close(first.probabilities["neurons0"], second.probabilities["neurons0"])


def test_a_token_decides_for_itself(converted):
    _, dyn, inputs = converted("images", per="token")
    decisive(dyn)
    (x,) = inputs(2)
    changed = x.clone()
    changed[1, 2, 3] += 3.0
    before, after = (dyn.trace(t).probabilities["neurons0"] for t in (x, changed))
    apart = (before != after).view(2, 12, 4).any(-1)
    assert apart.nonzero().tolist() == [[1, 11]]


# --- with other passes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [
        [NeuronGate(groups=4, hidden=4), LayerSkip(hidden=4), EarlyExit(exits=1)],
        [EarlyExit(exits=1), LayerSkip(hidden=4), NeuronGate(groups=4, hidden=4)],
        [NeuronGate(groups=4, hidden=4, per="token"), EarlyExit(exits=1)],
    ],
)
def test_composed(device, chain):
    model = Encoder().to(device).eval()
    x = moved(tokens(7), device)
    dyn = dc.dynamize(model, chain, example_inputs=x)
    assert torch.equal(dyn(*x), model(*x))
    assert {type(p).name for p in chain} == {n.meta["inserted"] for n in dyn.graph.fx.nodes if "inserted" in n.meta}
    decisive(dyn)
    dyn.exits["exit0"].enabled.fill_(True)
    dyn.exits["exit0"].threshold.fill_(0.4)
    fast = dc.lower(dyn, "eager")
    torch.testing.assert_close(fast(*x), dyn(*x), rtol=1e-5, atol=1e-6)
    assert "neurons0" in dyn.inspect()


def test_the_last_layer_may_be_split_behind_an_exit(device):
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.LayerNorm(12), *mlp()).to(device).eval()
    (x,) = moved(vectors(6), device)
    dyn = dc.dynamize(model, [EarlyExit(exits=["0"]), NeuronGate(groups=4, hidden=1)], example_inputs=x)
    assert torch.equal(dyn(x), model(x))
    decisive(dyn)
    trace = dyn.trace(x)
    assert torch.equal(trace.final, trace.output)


def test_an_empty_batch_passes(converted):
    for kind, options in (("images", {}), ("images", {"per": "token"}), ("pixels", {}), ("gated", {})):
        model, dyn, inputs = converted(kind, **options)
        decisive(dyn)
        (x,) = inputs(1)
        expected = model(x[:0])
        assert (
            dyn(x[:0]).shape == dyn.trace(x[:0]).output.shape == dc.lower(dyn, "eager")(x[:0]).shape == expected.shape
        )


@pytest.mark.parametrize("batch", [2, 512])
def test_autocast(batch, device):
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 3)).to(device).eval()
    x = torch.randn(batch, 256, device=device)
    dyn = dc.dynamize(model, NeuronGate(hidden=2), example_inputs=x[:2])
    dyn.gates["neurons0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager")
    mask = torch.rand(batch, 8, device=device) < 0.5
    with forced(dyn, {"neurons0": mask}):
        expected = dyn(x)
    with torch.autocast(x.device.type, torch.bfloat16), forced(fast, {"neurons0": mask}), torch.no_grad():
        torch.testing.assert_close(fast(x).float(), expected, rtol=0.05, atol=0.05)


def test_what_is_no_number_stays_in_closed_groups(converted):
    _, dyn, inputs = converted("mlp")
    dyn.gates["neurons0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager")
    x = inputs(4)
    mask = torch.zeros(4, 4, dtype=torch.bool, device=x[0].device)
    mask[0, 1] = mask[:, 0] = True
    with torch.no_grad():
        dyn.get_parameter("0.weight")[10:20] = float("inf")  # the neurons of group 1, which only one sample opens
        for calls in (contextlib.nullcontext(), assumed(FREE)):
            with forced(dyn, {"neurons0": mask}), forced(fast, {"neurons0": mask}), calls:
                found, expected = fast(*x), dyn(*x)
            assert expected[1:].isfinite().all()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_of_equal_logits_the_first_groups_are_picked(converted):
    _, dyn, inputs = converted("mlp", top_k=2)
    gate = dyn.gates["neurons0"]
    gate.enabled.fill_(True)
    torch.nn.init.zeros_(gate.policy.outer.weight)
    with torch.no_grad():
        gate.shift.zero_()
    assert dyn.trace(*inputs(3)).decisions["neurons0"].tolist() == 3 * [[True, True, False, False]]


def test_gates_that_open_a_fixed_number_are_trained_to_what_that_costs(converted):
    _, dyn, inputs = converted("mlp", top_k=2)
    with pytest.raises(
        ArgumentError, match=r"every gate opens a fixed number of parts; expected at least 0\.\d+, what"
    ):
        GateSchedule(dyn, target_cost=0.1)
    schedule = GateSchedule(dyn, target_cost=0.9)
    schedule.update(1.0)
    trace = dyn.eval().trace(*inputs(7))
    assert trace.cost.mean().item() == pytest.approx(schedule.target, abs=1e-3)
    assert schedule.target < 0.9
    assert trace.decisions["neurons0"].sum(-1).tolist() == 7 * [2]
    free = dc.dynamize(dyn.static(), [NeuronGate(hidden=2, top_k=2)], example_inputs=torch.randn(2, 12))
    assert free.gates["neurons0"].share == 0.25
