"""Layers follow the mode, recurrent stacks come apart, unusual layers stay whole."""

import logging

import pytest
import torch
import torch.nn.functional as F
from capturing import Lambda, assert_captured, run, small_cnn, targets
from torch import nn

from dyncompile.capture import capture
from dyncompile.errors import CaptureError


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 8, 8, device=device)


# --- modes ---------------------------------------------------------------------------------------


def _functional_dropout(m, x):
    y = F.dropout(m.fc(x), 0.5, training=m.training)
    return F.dropout(y, 0.3, training=m.training, inplace=True)


def _functional_norm(m, x):
    y = m.fc(x)
    return F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, m.training)


def _feature_dropout(m, x):
    y = F.dropout2d(m.fc(x).view(-1, 2, 2, 1), 0.5, m.training).flatten(1)
    return F.alpha_dropout(y, 0.2, m.training)


def _attention(m, x):
    q = m.fc(x).view(-1, 1, 2, 2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if m.training else 0.0).flatten(1)


def _attention_with_mask(m, x):
    q = m.fc(x).view(-1, 1, 2, 2)
    mask = torch.tensor([[True, False], [True, True]], device=x.device)
    p = 0.5 if m.training else 0.0
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=p, scale=0.3).flatten(1)


@pytest.mark.parametrize(
    "function", [_functional_dropout, _functional_norm, _feature_dropout, _attention, _attention_with_mask]
)
def test_functional_layers_follow_the_mode(device, function):
    model = Lambda(function, fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)).to(device)
    x = torch.randn(8, 4, device=device)
    graph = assert_captured(model, x)
    assert not torch.equal(run(graph, x, training=True), run(graph, x))
    assert list(graph.root.state_dict()) == list(model.state_dict())


def test_batch_norm_statistics_move_in_training_alone(device, images):
    graph = capture(small_cnn().to(device), (images,))
    run(graph, images)
    assert int(graph.root.norm.num_batches_tracked) == 0
    run(graph, images, training=True)
    assert int(graph.root.norm.num_batches_tracked) == 1
    assert float(graph.root.norm.running_mean.abs().sum()) > 0


def test_another_structure_in_training_means_eval_mode(device, caplog):
    def function(m, x):
        y = m.fc(x)
        return {"logits": y, "aux": y * 2} if m.training else y

    with caplog.at_level(logging.WARNING):
        assert_captured(
            Lambda(function, fc=nn.Linear(4, 4)).to(device), torch.randn(2, 4, device=device), training=False
        )
    assert "captured in eval mode only" in caplog.text
    assert "returns ['logits', 'aux'] in training mode and ['output'] in eval mode" in caplog.text


def test_regions_without_gradient(device):
    def function(m, x):
        with torch.no_grad():
            h = m.fc(x)
            with torch.enable_grad():
                h = h + 1
        return m.out(h)

    model = Lambda(function, fc=nn.Linear(4, 4), out=nn.Linear(4, 2)).to(device)
    graph = assert_captured(model, torch.randn(2, 4, device=device))
    run(graph, torch.randn(2, 4, device=device), training=True).sum().backward()
    assert graph.root.fc.weight.grad is None
    assert graph.root.out.weight.grad is not None


def test_autocast_inside_a_model(device):
    def function(enabled):
        def forward(m, x):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled):
                return m.fc(x).float()

        return forward

    x = torch.randn(2, 4, device=device)
    assert_captured(Lambda(function(enabled=False), fc=nn.Linear(4, 4)).to(device), x)
    with pytest.raises(CaptureError, match="the model uses `wrap_with_autocast`.*; cast outside of it"):
        capture(Lambda(function(enabled=True), fc=nn.Linear(4, 4)).to(device), (x,))


# --- recurrent layers ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, *, layers=3, states=False, **options):
        super().__init__()
        self.rnn = kind(4, 6, layers, dropout=0.3 if layers > 1 else 0.0, **options)
        self.fc = nn.LazyLinear(3)
        self.states = states

    def forward(self, x):
        y, state = self.rnn(x)
        y = y[:, -1] if self.rnn.batch_first else y[-1]
        if self.states:
            for s in state if isinstance(state, tuple) else (state,):
                y = torch.cat([y, s.transpose(0, 1).flatten(1)], 1)
        return self.fc(y)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stacks_of_recurrent_layers_are_unstacked(device, kind, bidirectional, batch_first):
    model = Recurrent(kind, states=True, batch_first=batch_first, bidirectional=bidirectional).to(device)
    x = torch.randn(*((2, 5) if batch_first else (5, 2)), 4, device=device)
    model(x)
    graph = assert_captured(model, x, batch_dims=None if batch_first else {"x": 1})
    layers = [n for n in graph.fx.nodes if type(graph.module_of(n)).__name__ == "RecurrentLayer"]
    assert [n.name for n in layers] == ["rnn_layer0", "rnn_layer1", "rnn_layer2"]
    assert list(graph.root.state_dict()) == list(model.state_dict())
    run(graph, x, training=True).sum().backward()
    assert all(p.grad is not None for p in graph.root.parameters())


def test_cut_points_lie_between_recurrent_layers(device):
    model = Recurrent(nn.LSTM, batch_first=True).to(device)
    x = torch.randn(2, 5, 4, device=device)
    model(x)
    paths = {path for node in capture(model, (x,)).cut_points for path in node.meta["path"]}
    assert {"rnn.0", "rnn.1", "rnn.2"} <= paths


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_with_projection_and_given_state(device):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, 2, proj_size=3, bias=False, batch_first=True)

        def forward(self, x, h, c):
            y, (h, c) = self.lstm(x, (h.transpose(0, 1), c.transpose(0, 1)))
            return y.mean(1) + h[1] + c[0, :, :3]

    shapes = ((2, 5, 4), (2, 2, 3), (2, 2, 6))
    assert_captured(Stateful().to(device), *(torch.randn(*s, device=device) for s in shapes))


def test_a_single_recurrent_layer_stays_itself(device):
    model = Recurrent(nn.LSTM, layers=1, batch_first=True).to(device)
    x = torch.randn(2, 5, 4, device=device)
    model(x)
    assert "rnn" in targets(assert_captured(model, x))


# --- what layers may be made of ------------------------------------------------------------------


class PlainTensor(nn.Module):
    """A leaf with a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.full((4,), 2.0)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale.to(x.device) * self.weight


def _checkpointed(m, x):
    return m.out(torch.utils.checkpoint.checkpoint(m.fc, x, use_reentrant=False))


def _self_attention(m, x):
    h = m.fc(x).unsqueeze(1).expand(-1, 3, -1)
    return m.out(m.mha(h, h, h, need_weights=False)[0].mean(1))


def _chunked(m, x):
    a, b = m.fc(x).chunk(2, -1)
    values, indices = (a * b.sigmoid()).topk(1, 1)
    return values + indices


@pytest.mark.parametrize("function", [_checkpointed, _self_attention, _chunked])
def test_usual_constructions(device, function):
    layers = {"fc": nn.Linear(4, 4), "out": nn.Linear(4, 3), "mha": nn.MultiheadAttention(4, 2, 0.2, batch_first=True)}
    assert_captured(Lambda(function, **layers).to(device), torch.randn(2, 4, device=device))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        PlainTensor,
    ],
)
def test_unusual_layers_stay_one_node(device, layer):
    model = nn.Sequential(layer(), nn.Linear(4, 3)).to(device)
    graph = assert_captured(model, torch.randn(2, 4, device=device))
    assert targets(graph) == ["input", "0", "1", "output"]


def test_identities_leave_no_node(device):
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3), nn.Identity()).to(device)
    assert targets(assert_captured(model, torch.randn(2, 4, device=device))) == ["input", "1", "output"]


def test_control_flow_is_refused(device):
    def function(m, x):
        return m.fc(torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))

    with pytest.raises(CaptureError, match="the model uses `cond`.*; data-dependent control flow is not supported"):
        capture(Lambda(function, fc=nn.Linear(4, 4)).to(device), (torch.randn(2, 4, device=device),))
