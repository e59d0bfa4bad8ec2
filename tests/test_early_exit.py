"""Early exit: where exits go, what heads read, who leaves, and why a place is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dyncompile as dc
from dyncompile.errors import ArgumentError, PassError, UnknownStrategyError
from dyncompile.nn import CRITERIA, Exit
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.placement import expected_cost, place


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.norm(self.conv(x))).relu_()


class Net(nn.Module):
    """A small residual network; `tail` turns the last features into the output."""

    def __init__(self, blocks=4, width=8, classes=5, tail="logits"):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, classes)
        self.tail = tail

    def forward(self, x):
        h = self.blocks(self.stem(x))
        if self.tail == "pixels":
            return self.fc(h.movedim(1, -1)).movedim(-1, 1)
        y = self.fc(h.mean((2, 3)))
        if self.tail == "several":
            return {"logits": y, "norm": h.flatten(1).norm(dim=1), "early": x.mean((1, 2, 3))}
        return y.squeeze(1) if self.tail == "number" else y


class Tokens(nn.Module):
    """A small transformer encoder over token ids with a mask of the tokens to keep."""

    def __init__(self, pooling="mean", width=16, layers=3, classes=4):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.fc = nn.Linear(width, classes)
        self.pooling = pooling

    def forward(self, ids, attention_mask):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=attention_mask == 0)
        if self.pooling == "tokens":
            return self.fc(h)
        if self.pooling == "cls":
            return self.fc(h[:, 0])
        if self.pooling == "last":
            rows = torch.arange(ids.shape[0], device=ids.device)
            return self.fc(h[rows, attention_mask.sum(1) - 1])
        keep = attention_mask.to(h.dtype)[..., None]
        return self.fc((h * keep).sum(1) / keep.sum(1))


@pytest.fixture
def images(device):
    return torch.randn(3, 3, 8, 8, device=device)


@pytest.fixture
def text(device):
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=device)
    return torch.randint(0, 20, (2, 6), device=device), mask


def dynamic(model, inputs, device, **options):
    model = model.to(device).eval()
    return model, dc.dynamize(model, "early_exit", example_inputs=inputs, **options)


def enable(dyn, *, threshold, names=None):
    for name in names or dyn.exits:
        dyn.exits[name].enabled.fill_(True)
        dyn.exits[name].threshold.fill_(threshold)


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


# --- heads ---------------------------------------------------------------------------------------


def exact_at_birth(model, dyn, *inputs):
    for training in (False, True):
        model.train(training)
        dyn.train(training)
        assert torch.equal(dyn(*inputs), model(*inputs))


@pytest.mark.parametrize("head", ["linear", "conv"])
@pytest.mark.parametrize("features", ["last", "dense"])
def test_heads_of_images(device, images, head, features):
    model, dyn = dynamic(Net(), images, device, exits=2, head=head, features=features)
    exact_at_birth(model, dyn, images)
    dyn.eval()
    widths = [dyn.exits[name].head.norm.normalized_shape[0] for name in dyn.exits]
    assert widths == ([8, 16] if features == "dense" else [8, 8])
    assert (dyn.exits["exit0"].head.mixer is not None) == (head == "conv")
    assert dyn.trace(images).exits["exit1"].shape == (3, 5)


@pytest.mark.parametrize("model", [Net(), Tokens("cls"), Tokens("mean")], ids=["images", "cls", "mean"])
def test_a_cloned_tail_predicts_what_the_tail_would(device, images, text, model):
    inputs = (images,) if isinstance(model, Net) else text
    model, dyn = dynamic(model, inputs, device, exits="all", head="clone")
    exact_at_birth(model, dyn, *inputs)
    dyn.eval()
    trace = dyn.trace(*inputs)
    name, site = list(dyn.exits)[-1], dyn.recipe.steps[0].sites[-1]
    values = {}
    for node, value in _values(dyn, inputs).items():
        values[node.name] = value
    if isinstance(model, Net):
        expected = model.fc(values[site["node"]].mean((2, 3)))
    else:
        keep = inputs[1].to(torch.float32)[..., None]
        h = model.layers[-1].norm2(values[site["node"]])
        expected = model.fc(h[:, 0] if model.pooling == "cls" else (h * keep).sum(1) / keep.sum(1))
    assert torch.equal(trace.exits[name], expected)
    own = {id(p) for p in model.parameters()} | {id(p) for p in dyn.fc.parameters()}
    assert own.isdisjoint(id(p) for p in dyn.exits[name].parameters())


def _values(dyn, inputs):
    from dyncompile.capture.check import _record

    return _record(dyn.graph, inputs)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_token_heads_pool_as_the_model_does_and_heed_the_mask(device, text, pooling):
    ids, mask = text
    model, dyn = dynamic(Tokens(pooling), (ids, mask), device, exits=["layers.0", "layers.1"])
    exact_at_birth(model, dyn, ids, mask)
    dyn.eval()
    assert dyn.exits["exit0"].head.pools[0].feature.pool == pooling
    changed = torch.where(mask == 0, (ids + 7) % 20, ids)
    a, b = dyn.trace(ids, mask), dyn.trace(changed, mask)
    assert not torch.equal(ids, changed)
    for name in dyn.exits:
        torch.testing.assert_close(a.exits[name], b.exits[name], rtol=0, atol=1e-6)
    other = dyn.trace((ids + 1) % 20, mask)
    assert not torch.allclose(a.exits["exit0"], other.exits["exit0"], atol=1e-3)


def test_pooling_may_be_chosen(device, text):
    _, dyn = dynamic(Tokens("cls"), text, device, exits=1, pool="mean")
    assert dyn.exits["exit0"].head.pools[0].feature.pool == "mean"


def test_a_mask_of_padding_is_read_the_other_way_round(device, text):
    class Padded(Tokens):
        def forward(self, ids, padding):
            return super().forward(ids, (~padding).to(torch.int64))

    ids, mask = text
    _, dyn = dynamic(Padded(), (ids, mask == 0), device, exits=["layers.0"])
    dyn.eval()
    changed = torch.where(mask == 0, (ids + 7) % 20, ids)
    a, b = dyn.trace(ids, mask == 0), dyn.trace(changed, mask == 0)
    torch.testing.assert_close(a.exits["exit0"], b.exits["exit0"], rtol=0, atol=1e-6)


def test_recurrent_models_exit_between_layers(device):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 6, 4, batch_first=True, dropout=0.2)
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.rnn(x)[0][:, -1])

    x = torch.randn(2, 5, 4, device=device)
    model, dyn = dynamic(Tagger(), (x,), device, exits=["rnn.0", "rnn.1"])
    assert dyn.exits["exit0"].head.pools[0].feature.pool == "last"
    for training in (False, True):
        model.train(training)
        dyn.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(dyn(x), expected)


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "min", "quantile10"])
def test_pixels(device, images, reduction):
    model, dyn = dynamic(Net(tail="pixels"), images, device, exits=2, reduction=reduction)
    exact_at_birth(model, dyn, images)
    dyn.eval()
    trace = dyn.trace(images)
    assert trace.exits["exit0"].shape == (3, 5, 8, 8)
    sure = trace.exits["exit0"].softmax(1).amax(1).flatten(1)
    reduced = {"mean": sure.mean(1), "min": sure.amin(1), "quantile10": sure.quantile(0.1, dim=1)}
    torch.testing.assert_close(trace.confidence["exit0"], reduced[reduction])


def test_tokens(device, text):
    model, dyn = dynamic(Tokens("tokens"), text, device, exits=2)
    exact_at_birth(model, dyn, *text)
    dyn.eval()
    trace = dyn.trace(*text)
    assert trace.exits["exit0"].shape == (2, 6, 4)
    expected = trace.exits["exit0"].softmax(2).amax(2).mean(1)
    torch.testing.assert_close(trace.confidence["exit0"], expected)


@pytest.mark.parametrize("tail", ["number", "logits"])
def test_regression_learns_its_confidence(device, images, tail):
    model, dyn = dynamic(Net(classes=1, tail=tail), images, device, exits=2)
    assert dyn.task == "regression"
    exact_at_birth(model, dyn, images)
    trace = dyn.trace(images)
    assert trace.exits["exit0"].shape == trace.final.shape
    (sum(c.sum() for c in trace.confidence.values()) + sum(e.sum() for e in trace.exits.values())).backward()
    assert all(p.grad is not None for p in dyn.exits.parameters())


def test_regression_of_several_values(device, images):
    _, dyn = dynamic(Net(), images, device, exits=1, task="regression")
    dyn.eval()
    assert dyn.trace(images).confidence["exit0"].shape == (3,)
    with pytest.raises(
        PassError, match=r"`task`: found regression of shape \[1, 5, 8, 8\]; expected \[N\] or \[N, D\]"
    ):
        dynamic(Net(tail="pixels"), images, device, task="regression")


def test_one_column_is_no_classification(device, images):
    with pytest.raises(ArgumentError, match=r"`task`: found 'classification' of a prediction \[1, 1\]"):
        dynamic(Net(classes=1), images, device, task="classification")


def test_other_leaves_of_the_output(device, images):
    model = Net(tail="several")
    with pytest.raises(PassError, match="`outputs`: found `norm`, which is computed later.*prediction_only=True"):
        dynamic(model, images, device)
    model, dyn = dynamic(model, images, device, prediction_only=True)
    dyn.eval()
    assert torch.equal(dyn(images), model(images)["logits"])
    assert dyn.recipe.prediction_only


def test_a_leaf_that_is_there_at_the_exit_is_kept(device, images):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            h = self.net.stem(x)
            y = self.net.fc(self.net.blocks(h).mean((2, 3)))
            return {"logits": y, "stem": h}

    model, dyn = dynamic(Both(), images, device, exits=2)
    dyn.eval()
    out, expected = dyn(images), model(images)
    assert set(out) == set(expected)
    assert all(torch.equal(out[k], expected[k]) for k in out)
    enable(dyn, threshold=0.0)
    assert torch.equal(dyn(images)["logits"], dyn.trace(images).exits["exit0"])


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
        ({"head": "cubic"}, r"`head`: found 'cubic'; expected one of \('linear', 'conv', 'clone'\)"),
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
    assert (
        "`head`: found 'clone' at features [1, 8]; expected a later cut point of that shape, which the model's tail reads"
        in reasons(dyn).values()
    )
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
