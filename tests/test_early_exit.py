"""Early exit: where exits go, who leaves, how sure is sure, and why a place is refused."""

import itertools

import pytest
import torch
from exiting import Net, Tokens, dynamic, enable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dyncompile as dc
from dyncompile.errors import ArgumentError, PassError, UnknownStrategyError
from dyncompile.nn import CRITERIA, Exit
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.placement import expected_cost, place


@pytest.fixture
def images(device):
    return torch.randn(3, 3, 8, 8, device=device)


@pytest.fixture
def text(device):
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=device)
    return torch.randint(0, 20, (2, 6), device=device), mask


def reasons(dyn):
    return {r["node"]: r["reason"] for r in dyn.recipe.steps[0].refused}


# --- routing -------------------------------------------------------------------------------------


def test_each_sample_leaves_at_its_first_sure_exit(device, images):
    _, dyn = dynamic(Net(), images, device, exits=3)
    dyn.eval()
    x = torch.randn(16, 3, 8, 8, device=device)
    confidence = dyn.trace(x).confidence
    enable(dyn, threshold=float(confidence["exit0"].detach().median()))
    trace = dyn.trace(x)
    rows = []
    for i in range(len(x)):
        leaves = [n for n in dyn.exits if bool(trace.confidence[n][i] >= dyn.exits[n].threshold)]
        rows.append(trace.exits[leaves[0]][i] if leaves else trace.final[i])
        assert [bool(trace.decisions[n][i]) for n in dyn.exits] == [n in leaves for n in dyn.exits]
    assert torch.equal(trace.output, torch.stack(rows))
    assert torch.equal(dyn(x), trace.output)
    left = trace.decisions["exit0"]
    assert 0 < int(left.sum()) < len(x)
    costs = dyn.exit_costs()
    torch.testing.assert_close(trace.cost[left], torch.full_like(trace.cost[left], costs["exit0"]))


def test_nobody_leaves_in_training(device, images):
    model, dyn = dynamic(Net(), images, device)
    enable(dyn, threshold=0.0)
    dyn.train()
    expected = model.train()(images)
    assert torch.equal(dyn(images), expected)


def test_disabled_exits_cost_nothing(device, images):
    _, dyn = dynamic(Net(), images, device, exits=2)
    one = dyn.exit_costs(["exit1"])
    assert list(one) == ["exit1", "final"]
    head = 2 * (8 * 5) / dyn.graph.total_flops
    assert one["final"] == pytest.approx(1 + head, rel=1e-6)
    assert dyn.exit_costs(["exit0", "exit1"])["final"] == pytest.approx(1 + 2 * head, rel=1e-6)
    assert dyn.exit_costs([]) == {"final": pytest.approx(1.0)}


# --- placement -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    depth=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=7).map(sorted),
    heads=st.lists(st.floats(0.0, 0.3), min_size=7, max_size=7),
    count=st.integers(1, 4),
)
def test_placement_equals_brute_force(depth, heads, count):
    chosen = place(depth, heads, count)
    assert chosen == sorted(set(chosen))
    assert 1 <= len(chosen) <= count
    sets = (c for k in range(1, count + 1) for c in itertools.combinations(range(len(depth)), k))
    best = min(expected_cost(depth, heads, c) for c in sets)
    assert expected_cost(depth, heads, chosen) == pytest.approx(best, rel=1e-9)


def test_expected_cost_is_that_of_uniform_samples():
    needed = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    depth, heads = (0.2, 0.5), (0.03, 0.05)
    cost = torch.where(needed <= 0.2, 0.2 + 0.03, torch.where(needed <= 0.5, 0.5 + 0.08, 1 + 0.08))
    assert expected_cost(depth, heads, (0, 1)) == pytest.approx(float(cost.mean()), abs=2e-3)
    assert expected_cost(depth, heads, ()) == 1.0
    assert place((), (), 3) == []


def test_exits_are_spread_over_the_compute(device, images):
    _, dyn = dynamic(Net(blocks=7), images, device, exits=3)
    depth = [site["data"]["depth"] for site in dyn.recipe.steps[0].sites]
    assert depth == pytest.approx([0.25, 0.5, 0.75], abs=0.08)


def test_explicit_module_paths(device, images):
    _, dyn = dynamic(Net(), images, device, exits=["blocks.2", "blocks.0"])
    sites = [site["node"] for site in dyn.recipe.steps[0].sites]
    paths = [next(n for n in dyn.graph.fx.nodes if n.name == s).meta["path"][-1] for s in sites]
    assert paths == ["blocks.0", "blocks.2"]
    with pytest.raises(
        ArgumentError, match=r"`exits`: found 'blocks.9'; expected a module that ends in a cut point: \['blocks"
    ):
        dynamic(Net(), images, device, exits=["blocks.9"])


def test_all_takes_every_distinct_depth(device, images):
    _, dyn = dynamic(Net(), images, device, exits="all")
    paths = [
        next(n for n in dyn.graph.fx.nodes if n.name == s["node"]).meta["path"][-1] for s in dyn.recipe.steps[0].sites
    ]
    assert paths == ["stem", "blocks.0", "blocks.1", "blocks.2"]  # behind the last block an exit saves nothing
    assert list(dyn.exits) == [f"exit{i}" for i in range(4)]


# --- criteria ------------------------------------------------------------------------------------


def test_confidence_lies_between_0_and_1_and_grows_with_certainty(device):
    sure = torch.eye(4, device=device) * 20
    unsure = torch.zeros(4, 4, device=device)
    for name in ("max_softmax", "margin", "entropy"):
        for logits, expected in ((sure, 1.0), (unsure, 0.25 if name == "max_softmax" else 0.0)):
            found = CRITERIA[name](logits, ())
            torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=1e-5)
            assert float(found.min()) >= -1e-6
            assert float(found.max()) <= 1 + 1e-6


def test_patience_counts_the_exits_that_agree_in_a_row(device):
    def labels(*values):
        return nn.functional.one_hot(torch.tensor(values, device=device), 3).float()

    patience = CRITERIA["patience"]
    now = labels(0, 1, 2, 0)
    assert torch.equal(patience(now, ()), torch.zeros(4, device=device))
    before = [labels(0, 1, 0, 1), labels(0, 0, 2, 0)]
    assert torch.equal(patience(now, before), torch.tensor([1.0, 0.0, 0.5, 0.5], device=device))


def test_patience_and_callables_read_the_exits_before(device, images):
    seen = []

    def first_agrees(logits, earlier):
        seen.append(len(earlier))
        return torch.ones_like(logits[:, 0]) if not earlier else (earlier[0].argmax(1) == logits.argmax(1)).float()

    for criterion in ("patience", first_agrees):
        _, dyn = dynamic(Net(), images, device, exits=3, criterion=criterion)
        dyn.eval()
        trace = dyn.trace(images)
        agree = (trace.exits["exit0"].argmax(1) == trace.exits["exit1"].argmax(1)).float()
        assert torch.equal(trace.confidence["exit1"], agree)
    assert set(seen) == {0, 1, 2}


def test_temperature_threshold_and_dtype(device, images):
    _, dyn = dynamic(Net(), images, device, exits=1)
    dyn.eval()
    exit0 = dyn.exits["exit0"]
    exit0.temperature.fill_(2.5)
    exit0.threshold.fill_(0.123456789)
    trace = dyn.trace(images)
    expected = (trace.exits["exit0"] / 2.5).softmax(1).amax(1)
    torch.testing.assert_close(trace.confidence["exit0"], expected)
    exact = exit0.threshold.clone()
    half = dyn.half().float()
    assert half.exits["exit0"].threshold.dtype == torch.float32
    assert torch.equal(half.exits["exit0"].threshold, exact)
    assert not bool(exit0.enabled)


# --- options and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "cubic"}, r"`head`: found 'cubic'; expected one of \('auto', 'linear', 'conv', 'clone'\)"),
        ({"features": "all"}, "`features`: found 'all'"),
        ({"features": "dense", "head": "clone"}, "`features`: found 'dense'; expected 'last' with head='clone'"),
        (
            {"criterion": "luck"},
            r"`criterion`: found 'luck'; expected one of \['entropy', 'margin', 'max_softmax', 'patience'\]",
        ),
        ({"reduction": "max"}, "`reduction`: found 'max'"),
        ({"pool": "max"}, "`pool`: found 'max'"),
        ({"exits": 0}, "`exits`: found 0; expected a number >= 1"),
        ({"exits": []}, r"`exits`: found \[\]"),
        ({"exits": True}, "`exits`: found True"),
        ({"exits": "most"}, "`exits`: found 'most'"),
        ({"exits": 2.5}, "`exits`: found 2.5; expected a number >= 1"),
        ({"exits": [1]}, r"`exits`: found \[1\]; expected a number >= 1"),
        ({"criterion": ["margin"]}, r"`criterion`: found \['margin'\]; expected one of"),
        ({"criterion": lambda logits: logits}, "`criterion`: found one that stops: TypeError"),
        (
            {"criterion": lambda logits, _: logits},
            r"`criterion`: found one that returns \[2, 5\] for logits \[2, 5\]; expected a callable",
        ),
        ({"criterion": lambda logits, _: logits.sum(1) - 9}, "`criterion`: found .*NaN or values outside"),
        ({"depth": 3}, "`options`: found .*'depth'.*; expected options of `early_exit`"),
    ],
)
def test_bad_options(images, device, options, message):
    with pytest.raises(ArgumentError, match=message):
        dynamic(Net(), images, device, **options)


def test_a_wrong_name_suggests_the_nearest(images):
    with pytest.raises(
        UnknownStrategyError, match="`strategy`: found 'early_exits'; expected did you mean 'early_exit'?"
    ):
        dc.dynamize(Net(), "early_exits", example_inputs=images)


def test_nan_is_told_where_it_comes_from(images, device):
    model = Net().to(device).eval()
    with pytest.raises(ArgumentError, match="`example_inputs`: found NaN in `x`"):
        dc.dynamize(model, example_inputs=images.to(device) * torch.nan)
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(PassError, match="the model itself gives NaN for its example inputs"):
        dc.dynamize(model, example_inputs=images.to(device))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda m: m, {"batch_dims": 0}, "`batch_dims`: found 0; expected a mapping"),
        (lambda m: m, {"batch_dims": {"x": "0"}}, r"`batch_dims\['x'\]`: found 0; expected a dim"),
        (lambda m: m.to("meta"), {}, "`example_inputs`: found a model or inputs on `meta`"),
        (torch.compile, {}, "`model`: found what torch.compile returned; expected its model"),
    ],
)
def test_what_cannot_be_captured_as_it_is(images, device, make, options, message):
    with pytest.raises(ArgumentError, match=message):
        dc.dynamize(make(Net().to(device)), example_inputs=images.to(device), **options)


def test_a_model_without_cut_points(device):
    model = nn.Sequential(nn.Linear(4, 3)).to(device)
    with pytest.raises(PassError, match="pass `early_exit` found no site: the graph offers none"):
        dc.dynamize(model, example_inputs=torch.randn(2, 4, device=device))


def test_refused_places_say_why(device, images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 300), nn.Linear(300, 300)
            self.out = nn.Linear(300, 3)

        def forward(self, x):
            h = self.a(x).flatten(1)
            h = self.c(self.b(h).view(-1, 300).repeat_interleave(2, 0)).view(-1, 2, 300).mean(1)
            return self.out(h)

    _, dyn = dynamic(Odd(), images, device, exits=1)
    found = reasons(dyn)
    assert found["repeat_interleave"] == "`cut point`: found value [2, 300]; expected one row a sample"
    _, dyn = dynamic(Net(), images, device, head="clone", exits=1)
    expected = "expected a later cut point of that shape, which the model's tail reads"
    assert f"`head`: found 'clone' at features [1, 8]; {expected}" in reasons(dyn).values()
    with pytest.raises(
        PassError, match=r"`head`: found 'conv' on features \[1, 6, 16\]; expected features \[N, C, H, W\]"
    ):
        dynamic(
            Tokens(),
            (torch.zeros(2, 6, dtype=torch.int64, device=device), torch.ones(2, 6, dtype=torch.int64, device=device)),
            device,
            head="conv",
        )
    with pytest.raises(ArgumentError, match=r"`features`: found 'dense' for an output \[1, 5, 8, 8\]; expected 'last'"):
        dynamic(Net(tail="pixels"), images, device, features="dense")


def test_heads_too_dear_are_refused(device):
    model = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2), nn.ReLU(), nn.Linear(2, 32), nn.Linear(32, 40)
    ).to(device)
    x = torch.randn(2, 4, device=device)
    dyn = dc.dynamize(model, example_inputs=x)
    assert [s["node"] for s in dyn.recipe.steps[0].sites] == ["_3"]
    assert reasons(dyn)["_1"] == "`head`: found a head as dear as what an exit here could save; expected a cheaper one"


def test_a_prediction_that_the_batch_does_not_lead(device):
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(4, 6, 2), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.rnn(x)[0])

    x = torch.randn(5, 2, 4, device=device)
    message = r"fc: the prediction \[5, 2, 3\] of two samples does not hold one in each entry of dim 0"
    with pytest.raises(PassError, match=message):
        dc.dynamize(TimeFirst().to(device), example_inputs=(x,), batch_dims={"x": 1})


def test_options_are_plain_data():
    assert EarlyExit(exits=2).options()["exits"] == 2
    assert issubclass(Exit, nn.Module)
