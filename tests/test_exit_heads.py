"""Heads: what they read, and every shape of output they predict."""

import pytest
import torch
from exiting import Net, Tokens, dynamic, enable, exact_at_birth
from torch import nn

from dyncompile.calibration.scores import _score
from dyncompile.calibration.temperature import TEMPERATURES
from dyncompile.errors import ArgumentError, PassError
from dyncompile.nn.criteria import REDUCTIONS
from dyncompile.nn.heads import ConvMixer
from dyncompile.training import LearnedConfidence, MultiExit


@pytest.fixture
def images(device):
    return torch.randn(3, 3, 8, 8, device=device)


@pytest.fixture
def text(device):
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=device)
    return torch.randint(0, 20, (2, 6), device=device), mask


# --- heads ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("model", "expected"),
    [(Net(blocks=8), "conv"), (Net(blocks=2), "linear"), (Net(blocks=8, tail="pixels"), "linear")],
    ids=["cheap", "dear", "pixels"],
)
def test_a_head_is_a_convolution_where_that_costs_little(device, images, model, expected):
    model, dyn = dynamic(model, images, device, exits=1)
    exact_at_birth(model, dyn, images)
    (site,) = dyn.recipe.steps[0].sites
    assert site["data"]["head"] == expected
    head = dyn.exits["exit0"].head
    assert (isinstance(head.mixer, ConvMixer)) == (expected == "conv")


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
    sure = trace.exits["exit0"].softmax(2).amax(2)
    torch.testing.assert_close(trace.confidence["exit0"], torch.stack([sure[0].mean(), sure[1, :3].mean()]))


@pytest.mark.parametrize("reduction", ["mean", "min", "quantile10"])
@pytest.mark.parametrize("criterion", ["max_softmax", "patience"])
def test_how_sure_an_exit_is_of_padding_does_not_count(device, text, reduction, criterion):
    ids, mask = text
    _, dyn = dynamic(Tokens("tokens"), text, device, exits=2, reduction=reduction, criterion=criterion)
    dyn.eval()
    alone = dyn.trace(ids, mask).confidence
    changed = dyn.trace(torch.where(mask == 0, (ids + 7) % 20, ids), mask)
    short = REDUCTIONS[reduction]
    for name in dyn.exits:
        torch.testing.assert_close(changed.confidence[name], alone[name], rtol=0, atol=1e-6)
        if criterion == "max_softmax":
            sure = changed.exits[name][1:, :3].softmax(2).amax(2)
            torch.testing.assert_close(changed.confidence[name][1:], short(sure), rtol=0, atol=1e-6)
    targets = torch.randint(0, 4, ids.shape, device=device)
    scores = _score(dyn, (ids, mask), targets, lambda p, *_: torch.zeros(len(p), device=device), None)[0]
    at = list(TEMPERATURES).index(1.0)
    torch.testing.assert_close(scores["confidence"][:, 1, at], alone["exit1"].cpu())


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


@pytest.mark.parametrize("kind", ["tokens", "pixels"])
def test_regression_of_tokens_and_pixels_learns_a_confidence_of_the_sample(device, images, text, kind):
    inputs = (images,) if kind == "pixels" else text
    net = Net(classes=1, tail="pixels") if kind == "pixels" else Tokens("tokens", classes=1)
    model, dyn = dynamic(net, inputs, device, exits=1)
    assert dyn.task == "regression"
    exact_at_birth(model, dyn, *inputs)
    dyn.train()
    trace = dyn.trace(*inputs)
    assert trace.exits["exit0"].shape == trace.final.shape
    assert trace.confidence["exit0"].shape == (len(inputs[0]),)
    objective = MultiExit() + LearnedConfidence()
    objective(trace, torch.zeros_like(trace.final)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dyn.exits.parameters())


def test_a_cloned_tail_has_no_confidence_for_a_regression(device, images):
    with pytest.raises(ArgumentError, match="`head`: found 'clone' for a regression"):
        dynamic(Net(classes=1), images, device, head="clone")


def test_dense_heads_learn_from_features_of_any_size(device, images):
    """As a residual network's grow with its depth."""
    _, dyn = dynamic(Net(tail="pixels"), images, device, exits=1)
    head = dyn.exits["exit0"].head.train()
    small, large = (head(f * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))) for f in (1, 100))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-3)


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
