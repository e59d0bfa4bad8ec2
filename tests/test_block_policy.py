"""Block policy: what it reads, what it costs, one decision a branch, and models of the libraries."""

import pytest
import torch
from test_layer_skip import Attending, Branch, residual
from test_zoo import ZOO, call, leaf, moved
from torch import nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.errors import ArgumentError, PassError
from dyncompile.nn import ConvolutionalPolicy, FeedForwardPolicy
from dyncompile.ops import decision_of, is_select
from dyncompile.passes import Refusal, Site
from dyncompile.passes.block_policy import BlockPolicy
from dyncompile.shapes import flop_counter
from dyncompile.testing import forced


def converted(model, x, device, **options):
    example = tuple(t.to(device) for t in x) if isinstance(x, tuple) else x.to(device)
    return dc.dynamize(model.to(device).eval(), "block_policy", example_inputs=example, **options)


def enabled(dyn):
    dyn.gates["policy"].enabled.fill_(True)
    return dyn.eval()


class Images(nn.Module):
    def __init__(self, channels=1, branches=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(branches))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = x + conv(x).relu()
        return self.fc(x.mean((2, 3)))


def test_golden_graph(device):
    dyn = converted(residual(Branch(16), Branch(16)), torch.randn(2, 6), device)
    assert [f"{n.name} = {n.target}{n.args}" for n in dyn.graph.fx.nodes][1:-1] == [
        "gates_policy = gates.policy(input_1,)",
        "getitem = <built-in function getitem>(gates_policy, 0)",
        "getitem_1 = <built-in function getitem>(gates_policy, 1)",
        "select_int_1 = aten.select.int(getitem, 1, 0)",
        "select_int = aten.select.int(getitem, 1, 1)",
        "_0 = 0(input_1,)",
        "_1_inner = 1.inner(_0,)",
        "relu = aten.relu.default(_1_inner,)",
        "_1_outer = 1.outer(relu,)",
        "add = aten.add.Tensor(_1_outer, _0)",
        "select_default_1 = dyncompile.select.default(select_int_1, add, _0)",
        "_2_inner = 2.inner(select_default_1,)",
        "relu_1 = aten.relu.default(_2_inner,)",
        "_2_outer = 2.outer(relu_1,)",
        "add_1 = aten.add.Tensor(_2_outer, select_default_1)",
        "select_default = dyncompile.select.default(select_int, add_1, select_default_1)",
        "_3 = 3(select_default,)",
    ]


def test_one_decision_a_branch_all_by_one_policy(device):
    dyn = enabled(converted(Images(), torch.randn(2, 1, 16, 16), device))
    assert list(dyn.gates) == ["policy"]
    decisions = [decision_of(n) for n in dyn.graph.fx.nodes if is_select(n)]
    assert [d.meta["decision"] for d in decisions] == ["block0", "block1", "block2"]
    assert {d.meta["owner"] for d in decisions} == {"policy"}
    x = torch.randn(6, 1, 16, 16, device=device)
    with torch.no_grad():
        trace, logits = dyn.trace(x), dyn.gates["policy"].policy(x)
    torch.testing.assert_close(trace.probabilities["policy"], logits.sigmoid())
    dyn.gates["policy"].bias.copy_(-logits.median())
    trace = dyn.trace(x)
    taken = torch.stack([trace.decisions[f"block{i}"] for i in range(3)], 1)
    assert torch.equal(taken, logits > logits.median())
    assert 0 < taken.float().mean() < 1
    # A policy that is switched off keeps every branch, and costs nothing once lowered.
    dyn.gates["policy"].enabled.fill_(False)
    assert bool(torch.stack(list(dyn.trace(x).decisions.values())).all())
    fast = dc.lower(dyn, backend="eager")
    with flop_counter() as counter:
        fast(x)
    assert counter.get_total_flops() == 6 * dyn.cost_model().static


def test_all_decisions_are_made_ahead(device):
    dyn = enabled(converted(Images(), torch.randn(2, 1, 16, 16), device))
    fast = dc.lower(dyn, backend="eager", decline=False)
    first = fast.inspect().split("where block0")[0]
    assert "where" not in first
    nodes = [n.name for n in dyn.graph.fx.nodes]
    decided = max(nodes.index(decision_of(n).name) for n in dyn.graph.fx.nodes if is_select(n))
    assert decided < nodes.index("stem")


@pytest.mark.parametrize(
    ("model", "inputs", "kind"),
    [
        (lambda: Images(3), (torch.randn(2, 3, 32, 32),), ConvolutionalPolicy),
        (lambda: Images(3), (torch.randn(2, 3, 5, 90),), ConvolutionalPolicy),
        (lambda: residual(Branch(16), Branch(16)), (torch.randn(2, 6),), FeedForwardPolicy),
        (
            lambda: nn.Sequential(Attending(), Attending(), nn.Flatten(), nn.Linear(80, 3)),
            (torch.randn(2, 5, 16),),
            ConvolutionalPolicy,
        ),
    ],
    ids=["images", "wide images", "vectors", "sequences"],
)
def test_policy_fits_the_input_and_is_cheap(model, inputs, kind, device):
    dyn = converted(model(), inputs, device)
    assert dyn.recipe.steps[0].sites[0]["node"] == dyn.graph.main_input.name
    assert type(dyn.gates["policy"].policy) is kind
    policy = sum(n.meta["flops"] for n in dyn.graph.fx.nodes if n.meta.get("inserted"))
    assert policy == dyn.graph.flops(next(n for n in dyn.graph.fx.nodes if n.target == "gates.policy"))
    width = dyn.recipe.steps[0].sites[0]["data"]["width"]
    assert policy <= 0.05 * dyn.graph.total_flops or width == 4
    assert policy < 0.5 * dyn.graph.total_flops


def test_integers_are_read_behind_the_embedding_and_masks_heeded(device):
    make, inputs = ZOO["encoder"]
    ids, padding = (t.to(device) for t in inputs(3))
    dyn = converted(make(None), (ids, padding), device)
    assert dyn.recipe.steps[0].sites[0]["node"] == "embed"
    assert type(dyn.gates["policy"].policy) is FeedForwardPolicy
    other = torch.where(padding, (ids + 1) % 64, ids)
    before, after = dyn.trace(ids, padding).probabilities, dyn.trace(other, padding).probabilities
    torch.testing.assert_close(after["policy"], before["policy"], rtol=0, atol=1e-6)
    assert dyn.trace((ids + 1) % 64, padding).probabilities["policy"].sub(before["policy"]).abs().max() > 1e-4


def test_refusals(device):
    model, x = residual(Branch(16), Branch(16, out=16)), torch.randn(2, 6)

    def found(**options):
        return list(BlockPolicy(**options).sites(capture(model.cpu().eval(), (x,))))

    site, *others = found()
    assert isinstance(site, Site)
    assert not others
    refusal, site = found(projection=False)
    assert refusal == Refusal(node="add_1", reason="its shortcut is a projection, and projection=False")
    assert len(site.data["blocks"]) == 1
    (refusal,) = found(width=2048)
    assert refusal.reason == "the policy costs 32768 FLOPs and skipping every branch saves 8192"
    with pytest.raises(PassError, match="found no site: input_1: the policy costs 32768 FLOPs"):
        converted(model, x, device, width=2048)

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.frame, self.fc = nn.Embedding(20, 16), Branch(16), nn.Linear(16, 3)

        def forward(self, ids):
            return self.fc(self.frame(self.embed(ids.flatten())).unflatten(0, ids.shape).mean(1))

    with pytest.raises(PassError, match=r"found input \[1, 4\]; expected floating features, one row a sample, before"):
        converted(Frames(), torch.randint(0, 20, (2, 4)), device)
    for options, message in (
        ({"width": 0}, "`width`: found 0; expected a width >= 1, or None"),
        ({"granularity": "stage"}, "`granularity`: found 'stage'"),
        ({"estimator": "oracle"}, "`estimator`: found 'oracle'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            BlockPolicy(**options)


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel", "straight_through", "semantic_hashing"])
def test_every_estimator_decides_in_training(estimator, device):
    dyn = enabled(converted(Images(), torch.randn(2, 1, 16, 16), device, estimator=estimator)).train()
    dyn.gates["policy"].policy.outer.bias.data.zero_()
    trace = dyn.trace(torch.randn(64, 1, 16, 16, device=device))
    decisions = torch.stack(list(trace.decisions.values()))
    assert decisions.min() == 0
    assert decisions.max() == 1
    assert 0.2 < decisions.mean() < 0.8
    weight = dyn.gates["policy"].policy.outer.weight
    if estimator == "reinforce":
        assert not trace.cost.requires_grad
        trace.probabilities["policy"].log().mean().backward()
    else:
        trace.cost.mean().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [("resnet18", {}, 8), ("vit_small", {"granularity": "block"}, 12), ("hf_bert", {"granularity": "block"}, 3)],
)
def test_library_models(name, options, blocks, needs, device):
    make, inputs = ZOO[name]
    model = make(needs).to(device).eval()
    dyn = dc.dynamize(model, "block_policy", example_inputs=moved(inputs(2), device), **options)
    for training, batch in ((False, 4), (True, 3)):
        x = moved(inputs(batch), device)
        model.train(training)
        dyn.train(training)
        assert torch.equal(leaf(call(dyn, x)), leaf(call(model, x)))
    fast = dc.lower(enabled(dyn), backend="eager", decline=False)
    for batch in (1, 7):
        x = moved(inputs(batch), device)
        masks = {f"block{i}": torch.rand(batch) < 0.5 for i in range(blocks)}
        with torch.no_grad(), forced(dyn, masks), forced(fast, masks):
            trace = call(dyn.trace, x)
            with flop_counter() as counter:
                output = leaf(call(fast, x))
        assert list(trace.decisions) == list(masks)
        torch.testing.assert_close(output, leaf(trace.output), rtol=1e-4, atol=1e-5)
        expected = float(trace.cost.double().sum()) * dyn.cost_model().static
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-5)
