"""Channel gates: narrow arms compute what a narrower model would, on the same weights, and nothing else runs."""

import copy

import pytest
import torch
import widening
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.demand import analyse
from dyncompile.nn.narrow import ArmBatchNorm, ArmDropout, ArmStatistics
from dyncompile.ops import SWITCH, arms_of
from dyncompile.passes.channel_gate import ChannelGate
from dyncompile.testing import forced
from dyncompile.training import recalibrate_norms

BATCHES = (1, 2, 7, 33)


@pytest.fixture(scope="module")
def converted(device):
    """The static model, the dynamic one with its gates enabled, and a maker of inputs: copies of what was made once."""
    made = {}

    def get(name, **options):
        key = (name, *options.items())
        if key not in made:
            torch.manual_seed(0)
            make, inputs, _ = widening.MODELS[name]
            model = widening.settled(make()).to(device)
            options = {"hidden": 2, "worth": 0.0, **options}
            made[key] = model, dc.dynamize(model, ChannelGate(**options), example_inputs=inputs(2).to(device))
        model, dyn = copy.deepcopy(made[key])
        for gate in dyn.gates.values():
            gate.enabled.fill_(True)
        return model, dyn.eval(), lambda n: widening.MODELS[name][1](n).to(device)

    return get


def narrowed(model, sites, arm, found):
    """The static model with zeros where an arm leaves channels out: columns of the layers that read them."""
    model = copy.deepcopy(model)
    for site, groups in zip(found, sites, strict=True):
        for i, (_, parts, readers) in enumerate(groups):
            kept = (*site["data"]["parts"], [parts for _, parts, _ in groups])[arm][i]
            for reader in readers:
                weight = model.get_submodule(reader).weight
                with torch.no_grad():
                    weight[:, weight.shape[1] * kept // parts :] = 0
    return model


@pytest.mark.parametrize("name", widening.MODELS)
def test_sites(converted, name):
    _, dyn, _ = converted(name)
    step = dyn.recipe.steps[0]
    found = [[group.replace(".", "_").lstrip("_") for group in site["data"]["groups"]] for site in step.sites]
    expected = [[maker.replace(".", "_") for maker, _, _ in groups] for groups in widening.MODELS[name][2]]
    assert [[group.lstrip("_") for group in groups] for groups in found] == expected
    assert list(dyn.gates) == [site["name"] for site in step.sites] == [f"width{i}" for i in range(len(found))]
    assert all(
        gate.routes == len(site["data"]["parts"]) + 1 == 4
        for gate, site in zip(dyn.gates.values(), step.sites, strict=True)
    )


@pytest.mark.parametrize("name", [n for n in widening.MODELS if n != "mlp"])
def test_an_arm_computes_what_a_narrower_model_does(converted, name):
    model, dyn, inputs = converted(name)
    x = inputs(3)
    outputs = []
    for arm in range(4):
        expected = narrowed(model, widening.MODELS[name][2], arm, dyn.recipe.steps[0].sites)(x)
        route = {gate: torch.full((3,), arm) for gate in dyn.gates}
        with forced(dyn, route), torch.no_grad():
            outputs.append(dyn(x))
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs[-1], model(x))
    assert not torch.allclose(outputs[0], outputs[-1])


def test_layer_norm_is_over_the_channels_that_are_kept(converted):
    model, dyn, inputs = converted("mlp")
    x = inputs(5)
    for arm, (first, second) in enumerate(dyn.recipe.steps[0].sites[0]["data"]["parts"]):
        h = nn.functional.linear(x, model[0].weight[:first], model[0].bias[:first])
        norm = model[1]
        h = (h - norm.running_mean[:first]) / (norm.running_var[:first] + norm.eps).sqrt()
        h = (h * norm.weight[:first] + norm.bias[:first]).relu()
        h = nn.functional.linear(h, model[3].weight[:second, :first], model[3].bias[:second])
        h = nn.functional.layer_norm(h, (second,), model[4].weight[:second], model[4].bias[:second])
        expected = nn.functional.linear(nn.functional.gelu(h), model[6].weight[:, :second], model[6].bias)
        with forced(dyn, {"width0": torch.full((5,), arm)}), torch.no_grad():
            torch.testing.assert_close(dyn(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", widening.MODELS)
def test_lowered_equals_reference_and_runs_what_is_counted(converted, name):
    _, dyn, inputs = converted(name)
    fast = dc.lower(dyn, backend="eager", decline=False)
    assert not fast.plan.dense
    for batch in BATCHES:
        x = inputs(batch)
        routes = {gate: torch.randint(0, 4, (batch,), device=x.device) for gate in dyn.gates}
        with torch.no_grad(), forced(dyn, routes), forced(fast, routes):
            trace = dyn.trace(x)
            with FlopCounterMode(display=False) as counter:
                actual = fast(x)
        torch.testing.assert_close(actual, trace.output, rtol=1e-4, atol=1e-5)
        for gate, route in routes.items():
            counts = [fast.last_run.get(f"{gate}={arm}", 0) for arm in range(4)]
            assert counts == [int((route == arm).sum()) for arm in range(4)]
        widest = dict.fromkeys(dyn.gates, (0.0, 0.0, 0.0, 1.0))
        # Attention is not counted by every kernel, so count what is saved.
        with torch.no_grad(), forced(fast, widest), FlopCounterMode(display=False) as full:
            fast(x)
        saved = (full.get_total_flops() - counter.get_total_flops()) / batch / dyn.graph.total_flops
        with torch.no_grad(), forced(dyn, widest):
            expected = dyn.trace(x).cost.mean() - trace.cost.mean()
        assert saved == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", widening.MODELS)
def test_an_arm_is_needed_under_its_own_guard_only(converted, name):
    _, dyn, _ = converted(name)
    demand = analyse(dyn.graph.fx)
    layers = {n: dyn.graph.flops(n) for n in dyn.graph.fx.nodes if dyn.graph.flops(n)}
    for i, groups in enumerate(widening.MODELS[name][2]):
        names = {layer for maker, _, readers in groups for layer in (maker, *readers)}
        for arm in range(4):
            region = next(r for r in demand.regions if r.name == f"width{i}={arm}")
            inside = [n for n in region.nodes if n in layers]
            if arm == 3:
                assert names <= {str(n.target) for n in inside}
                full = sum(layers[n] for n in inside)
                count = len(inside)
            else:
                assert all("inserted" in n.meta for n in region.nodes)
        for arm in range(3):
            inside = [n for n in next(r for r in demand.regions if r.name == f"width{i}={arm}").nodes if n in layers]
            assert len(inside) == count
            assert sum(layers[n] for n in inside) < full


def test_flops_of_an_arm_by_hand(converted):
    _, dyn, _ = converted("bottleneck")
    regions = {r.name: sum(dyn.graph.flops(n) for n in r.nodes) for r in analyse(dyn.graph.fx).regions}
    for arm, kept in enumerate((2, 4, 6, 8)):
        assert regions[f"width0={arm}"] == 2 * 64 * (16 * kept + 9 * kept * kept + kept * 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic", "inverted", "mlp"])
def test_inductor_equals_reference(converted, name):
    _, dyn, inputs = converted(name)
    fast = dc.lower(dyn, decline=False)
    for batch in (1, 33):
        x = inputs(batch)
        routes = {gate: torch.randint(0, 4, (batch,), device=x.device) for gate in dyn.gates}
        with torch.no_grad(), forced(dyn, routes), forced(fast, routes):
            torch.testing.assert_close(fast(x), dyn(x), rtol=1e-4, atol=1e-5)


def test_weights_are_shared(converted):
    _, dyn, inputs = converted("basic")
    new = [name for name, _ in dyn.named_parameters() if name.startswith("gates.width0.") and ".arm" in name]
    assert new == [f"gates.width0.arm{i}__1_bn2.{kind}" for i in range(3) for kind in ("weight", "bias")]
    x = inputs(2)
    with torch.no_grad():
        before = [_forced(dyn, x, arm) for arm in range(4)]
        dyn.get_submodule("1.conv1").weight[0].mul_(3)  # the first channel, which every arm has
        after = [_forced(dyn, x, arm) for arm in range(4)]
        dyn.get_submodule("1.conv1").weight[7].mul_(3)  # the last one, which only the full arm has
        last = [_forced(dyn, x, arm) for arm in range(4)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [torch.equal(a, b) for a, b in zip(after, last, strict=True)] == [True, True, True, False]


def _forced(dyn, x, arm):
    with forced(dyn, {"width0": torch.full((x.shape[0],), arm), "width1": torch.full((x.shape[0],), 3)}):
        return dyn(x)


def test_switchable_norms_keep_statistics_of_their_own(converted):
    model, dyn, inputs = converted("bottleneck")
    own = {n: m for n, m in dyn.gates.width0.named_modules() if isinstance(m, nn.BatchNorm2d)}
    # The norm behind the first layer sees the same channels at every width; the two behind it do not.
    assert sorted({name.split("_", 1)[1] for name in own}) == ["_1_bn2", "_1_bn3"]
    assert [own[f"arm{i}__1_bn2"].num_features for i in range(3)] == [2, 4, 6]
    assert [own[f"arm{i}__1_bn3"].num_features for i in range(3)] == [16, 16, 16]
    assert torch.equal(own["arm1__1_bn2"].running_mean, model[1].bn2.running_mean[:4])
    start = model[1].bn2.running_mean[:4].clone()
    x = inputs(16)
    static = copy.deepcopy(model).train()
    dyn.train()(x)
    model.train()(x)
    h = static[1].bn1(static[1].conv1(static[0](x))).relu()[:, :4]
    mean = nn.functional.conv2d(h, static[1].conv2.weight[:4, :4], padding="same").mean((0, 2, 3))
    torch.testing.assert_close(own["arm1__1_bn2"].running_mean, 0.9 * start + 0.1 * mean)
    # The static norms moved as in the static model, and once.
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(dyn.get_buffer(name), buffer)


def test_shared_norms(converted):
    _, dyn, inputs = converted("bottleneck", norm="shared")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in dyn.gates.modules())
    assert {type(m) for n, m in dyn.gates.width0.named_modules() if n.startswith("arm")} == {ArmBatchNorm}
    switch = next(n for n in dyn.graph.fx.nodes if n.target is SWITCH)
    assert [str(user.target) for user in switch.users] == ["1.bn3"]
    fast = dc.lower(dyn, backend="eager", decline=False)
    x, route = inputs(9), torch.arange(9) % 4
    with torch.no_grad(), forced(dyn, {"width0": route}), forced(fast, {"width0": route}):
        torch.testing.assert_close(fast(x), dyn(x), rtol=1e-4, atol=1e-5)


def test_recalibrated_norms_have_statistics_of_their_own_alone(converted):
    _, dyn, inputs = converted("bottleneck", norm="recalibrated")
    own = {n: m for n, m in dyn.gates.width0.named_modules() if isinstance(m, ArmStatistics)}
    assert [own[f"arm{i}__1_bn2"].num_features for i in range(3)] == [2, 4, 6]
    assert not any(list(norm.parameters()) for norm in own.values())
    fast = dc.lower(dyn.eval(), backend="eager", decline=False)
    x, route = inputs(64), torch.arange(64) % 4
    before = [norm.running_mean.clone() for norm in own.values()]
    with torch.no_grad(), forced(dyn, {"width0": route}), forced(fast, {"width0": route}):
        torch.testing.assert_close(fast(x), dyn(x), rtol=1e-4, atol=1e-5)
    dyn.gates.width0.enabled.fill_(True)
    reached = recalibrate_norms(dyn, (x, route))
    moved = [not torch.equal(a, norm.running_mean) for a, norm in zip(before, own.values(), strict=True)]
    assert moved == [reached[f"gates.width0.{name}"] > 0 for name in own]


@pytest.mark.parametrize("name", widening.MODELS)
def test_gradient_reaches_every_arm(converted, name):
    _, dyn, inputs = converted(name, hidden=8)
    dyn.train()
    for gate in dyn.gates.values():
        gate.estimator.hard = False
    trace = dyn.trace(inputs(8))
    for gate, weights in trace.decisions.items():
        assert weights.shape == (8, 4)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
        assert gate in dyn.gates
    (trace.final.square().mean() + trace.cost.mean()).backward()
    silent = {n for n, p in dyn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # What a norm takes away again has no gradient.
    assert {n for n in silent if not n.endswith(("bias", "conv3.bias"))} == set()


def test_soft_routes_mix_the_arms(converted):
    _, dyn, inputs = converted("gated")
    x = inputs(4)
    with torch.no_grad():
        arms = []
        for arm in range(4):
            with forced(dyn, {"width0": torch.full((4,), arm)}):
                arms.append(dyn(x))
        dyn.train()
        weights = torch.softmax(torch.randn(4, 4), -1)
        dyn._override = lambda name, value: weights
        torch.testing.assert_close(dyn(x), sum(weights[:, i, None] * arm for i, arm in enumerate(arms)))
        assert dyn.trace(x).cost.shape == (4,)


def test_dropout_in_an_arm_waits_for_its_gate(converted):
    _, dyn, inputs = converted("encoder")
    assert any(isinstance(m, ArmDropout) for m in dyn.gates.modules())
    dyn.train()
    x = inputs(4)
    arm = dyn.gates.width0.arm0_layer_dropout
    enabled, h = torch.tensor(False), torch.ones(1000)
    state = torch.get_rng_state()
    assert torch.equal(arm(enabled, h), h)
    assert torch.equal(torch.get_rng_state(), state)
    assert 100 < int((arm(~enabled, h) == 0).sum()) < 300
    dyn.eval()
    assert torch.equal(arm(~enabled, h), h)
    assert torch.equal(dyn(x), dyn(x))


def test_chain(converted):
    _, dyn, _ = converted("bottleneck", chain=1)
    refused = {r["node"]: r["reason"] for r in dyn.recipe.steps[0].refused}
    assert [site["data"]["groups"] for site in dyn.recipe.steps[0].sites] == [["_1_conv1"]]
    assert refused["_1_conv2"] == "`width0` narrows `1.conv2` and saves more"


def test_levels_that_coincide_are_one(converted):
    _, dyn, _ = converted("grouped", levels=(0.5, 0.6, 1.0))
    assert dyn.recipe.steps[0].sites[0]["data"]["parts"] == [[2]]
    assert dyn.gates.width0.routes == 2


@pytest.mark.parametrize(
    "strategy",
    [
        ["channel_gate", "layer_skip", "early_exit"],
        ["layer_skip", "channel_gate", "early_exit"],
        ["layer_skip", "early_exit", "channel_gate"],
        ["early_exit", "channel_gate", "layer_skip"],
    ],
)
def test_composition(strategy, device):
    torch.manual_seed(0)
    model = widening.settled(widening.vision(*(widening.Basic(16) for _ in range(3)), width=16)).to(device)
    x = widening.images(9).to(device)
    dyn = dc.dynamize(model, strategy, example_inputs=x).eval()
    assert torch.equal(dyn(x), model(x))
    for part in (*dyn.gates.values(), *dyn.exits.values()):
        part.enabled.fill_(True)
    fast = dc.lower(dyn, backend="eager", decline=False)
    assert not fast.plan.dense
    for batch in BATCHES:
        x = widening.images(batch).to(device)
        keep = {name: 0.6 for name in dyn.gates if name.startswith("gate")}
        route = {name: torch.randint(0, 4, (batch,)) for name in dyn.gates if name.startswith("width")}
        shares = {**keep, **route, **dict.fromkeys(dyn.exits, 0.2)}
        with torch.no_grad(), forced(dyn, shares, seed=1), forced(fast, shares, seed=1):
            trace = dyn.trace(x)
            with FlopCounterMode(display=False) as counter:
                actual = fast(x)
        torch.testing.assert_close(actual, trace.output, rtol=1e-4, atol=1e-5)
        ran = counter.get_total_flops() / batch / dyn.graph.total_flops
        assert ran == pytest.approx(float(trace.cost.mean()), rel=1e-5)


def test_saved_and_loaded(converted, tmp_path, device):
    _, dyn, inputs = converted("bottleneck")
    with torch.no_grad():
        dyn.gates.width0.arm0__1_bn3.weight.normal_()
    dc.save(dyn, tmp_path)
    again = dc.load(tmp_path, widening.MODELS["bottleneck"][0]().to(device).eval())
    x, narrowest = inputs(6), {"width0": torch.zeros(6, dtype=torch.int64)}
    with torch.no_grad(), forced(dyn, narrowest), forced(again, narrowest):
        assert torch.equal(again(x), dyn(x))
    arms = [n for n in again.graph.fx.nodes if n.target is SWITCH]
    assert len(arms) == 1
    assert len(arms_of(arms[0])) == 4


def test_fine_tuning_reaches_a_cost_with_four_levels(converted):
    _, dyn, inputs = converted("plain", levels=(0.25, 0.5, 0.75, 1.0))
    assert {gate.routes for gate in dyn.gates.values()} == {4}
    x = inputs(64)
    labels = dyn(x).argmax(1).detach()
    dc.finetune(dyn, (x, labels), epochs=2, mode="joint", target_cost=0.7, batch_size=16, progress=False)
    assert dyn.eval().trace(x).cost.mean() < 1.0
