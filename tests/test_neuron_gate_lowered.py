"""What a model with gated neurons runs once it is lowered: the open groups alone."""

import pytest
import torch
from feedforward import VARIANT, converter, decisive
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.kernel_costs import FREE, assumed
from dyncompile.nn.neurons import GatheredNeurons
from dyncompile.testing import forced


@pytest.fixture
def converted(device):
    return converter(device)


BATCHES = pytest.mark.parametrize("batch", [1, 2, 7, 33])


@BATCHES
@VARIANT
def test_lowered_is_the_reference_and_runs_what_is_counted(converted, kind, options, batch):
    _, dyn, inputs = converted(kind, **options)
    x = inputs(batch)
    fast = dc.lower(dyn, "eager")
    assert fast.plan.demand.units == ()
    decisive(dyn)
    fast.relower()
    trace = dyn.trace(*x)
    torch.testing.assert_close(fast(*x), trace.output, rtol=1e-5, atol=1e-5)
    with FlopCounterMode(display=False) as counter, assumed(FREE):
        found = fast(*x)
    torch.testing.assert_close(found, trace.output, rtol=1e-5, atol=1e-5)
    assert fast.plan.dense == {}
    # The counter does not know the kernel that attention runs in evaluation on this device.
    assert counter.get_total_flops() <= float(trace.cost.sum()) * dyn.cost_model().static * 1.0001
    if kind in ("mlp", "gated", "images"):
        assert counter.get_total_flops() == pytest.approx(float(trace.cost.sum()) * dyn.cost_model().static)
    if batch == 33:
        shares = torch.cat([d.view(-1, 4) for d in trace.decisions.values()]).float().mean(0)
        assert ((shares > 0) & (shares < 1)).any()


@BATCHES
@pytest.mark.parametrize("kind", ["mlp", "gated", "images"])
def test_forced_groups(converted, kind, batch):
    _, dyn, inputs = converted(kind)
    dyn.gates["neurons0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager")
    x = inputs(batch)
    whole = dyn(*x)
    mask = torch.rand(batch, 4, device=whole.device) < 0.5
    mask[:, 1], mask[:, 2] = False, True
    for shares in ({"neurons0": mask}, {"neurons0": torch.zeros_like(mask)}, {"neurons0": 0.5}):
        with forced(dyn, shares):
            trace = dyn.trace(*x)
        with forced(fast, shares), FlopCounterMode(display=False) as counter, assumed(FREE):
            found = fast(*x)
        torch.testing.assert_close(found, trace.output, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, whole)
        assert fast.last_run["neurons0"] == int(trace.decisions["neurons0"].sum())
        assert counter.get_total_flops() == pytest.approx(float(trace.cost.sum()) * dyn.cost_model().static)
    with forced(fast, {"neurons0": 1.0}):
        torch.testing.assert_close(fast(*x), whole, rtol=1e-5, atol=1e-6)


def test_rows_with_every_group_have_the_value_of_the_layer_itself(converted):
    model, dyn, inputs = converted("encoder")
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    x = inputs(5)
    mask = torch.rand(5, 4, device=x[0].device) < 0.5
    mask[[1, 3]] = True
    with forced(dyn, dict.fromkeys(dyn.gates, mask)):
        found, expected = dyn(*x), model(*x)
        assert torch.equal(found[mask.all(1)], expected[mask.all(1)])
        assert not torch.allclose(found[~mask.all(1)], expected[~mask.all(1)])


def negated_in_place(dyn, name):
    with torch.no_grad():
        dyn.get_parameter(name).data.mul_(-1)  # unseen by torch's count of versions


def negated_by_another(dyn, name):
    owner, _, leaf = name.rpartition(".")
    setattr(dyn.get_submodule(owner), leaf, nn.Parameter(-dyn.get_parameter(name).detach()))


def negated_by_assignment(dyn, name):
    negated = {key: -value if key == name else value for key, value in dyn.state_dict().items()}
    dyn.load_state_dict(negated, assign=True)


CHANGES = [negated_in_place, negated_by_another, negated_by_assignment]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("split", ["contiguous", "cluster"])
def test_changed_weights_are_read(converted, split, change):
    """The compiled form keeps them, in another layout."""
    _, dyn, inputs = converted("mlp", split=split)
    decisive(dyn)
    fast = dc.lower(dyn, "eager")
    x = inputs(3)
    before = fast(*x)
    change(dyn, "3.weight")
    torch.testing.assert_close(fast(*x), dyn(*x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fast(*x), before)


@VARIANT
def test_frozen_weights_run_by_another_kernel(converted, kind, options, device):
    """As in compiled segments; on the processor it runs beneath what counts FLOPs."""
    _, dyn, inputs = converted(kind, **options)
    decisive(dyn)
    fast = dc.lower(dyn, "eager")

    def flops(*x):
        with FlopCounterMode(display=False) as counter, assumed(FREE):
            torch.testing.assert_close(fast(*x), dyn(*x), rtol=1e-4, atol=1e-5)
        return counter.get_total_flops()

    batches = [inputs(batch) for batch in (1, 7)]
    before = [flops(*x) for x in batches]
    parts = [part for run in fast.segments.values() for part in run.__self__.modules()]
    for part in parts:
        if isinstance(part, GatheredNeurons):
            part.freeze()
    for x, live in zip(batches, before, strict=True):
        assert flops(*x) < live if device.type == "cpu" else flops(*x) == live


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "encoder"])
def test_compiled_segments(converted, kind):
    _, dyn, inputs = converted(kind, split="cluster")
    decisive(dyn)
    fast = dc.lower(dyn, "inductor", decline=False)
    for batch in (1, 7):
        x = inputs(batch)
        found = fast(*x)
        torch.testing.assert_close(found, dyn(*x), rtol=1e-4, atol=1e-5)
        # Segments around the groups are compiled for float32: they would read what is lowered as if it were not.
        with torch.autocast(found.device.type, torch.bfloat16), torch.no_grad():
            assert torch.equal(fast(*x), found)
    assert 0 < fast.last_run["neurons0"] < 28


def test_the_reference_compiles_in_both_modes(converted):
    _, dyn, inputs = converted("mlp")
    decisive(dyn)
    x = inputs(3)
    compiled = torch.compile(dyn, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*x), dyn(*x))
    dyn.train()
    torch.manual_seed(0)
    assert compiled(*x).requires_grad
