"""In-place operations become functional, with the model's own results."""

import logging

import pytest
import torch
import torch.nn.functional as F
from capturing import Lambda, assert_captured, run
from torch import nn

from dyncompile.capture import capture
from dyncompile.errors import CaptureError

# --- in-place operations -------------------------------------------------------------------------


def _first_column(m, x):
    y = m.fc(x)
    y[:, 0] = 0.0
    y[:, 1:3] += y[:, 2:4] * 2
    return y


def _chained(m, x):
    y = m.fc(x)
    y[:, 1].mul_(2).add_(1)
    return y


def _view_taken_before(m, x):
    y = m.fc(x)
    v = y.view(-1, 2, 2)
    y.add_(1)
    v.transpose(1, 2)[:, 0].mul_(3)
    return torch.cat([y, v.flatten(1)], 1)


def _written_view_of_a_view(m, x):
    y = m.fc(x)
    a = y[:, :3]
    b = a[:, 1:]
    b.fill_(2.0)
    a.exp_()
    return y * b.sum(1, keepdim=True)


def _masked(m, x):
    y = m.fc(x)
    y[y < 0] = -1.0
    y.masked_fill_(y > 1, 1.0)
    return y.clamp_(min=-0.5)


def _reused_preactivation(m, x):
    y = m.fc(x)
    z = F.relu(y, inplace=True)
    return z + y


def _layer_overwrites(m, x):
    y = m.fc(x)
    z = m.act(y)
    return z + y


def _copied_reshape(m, x):
    y = m.fc(x).view(-1, 2, 2)
    r = y.transpose(1, 2).reshape(-1, 4)  # a copy: writing to it leaves y alone
    r.add_(1)
    return torch.cat([r, y.flatten(1)], 1)


def _no_op_cast(m, x):
    y = m.fc(x)
    y.to(x.dtype).contiguous().add_(1)  # no copies: y changes
    return y


def _writes_to_the_input(m, x):
    x.mul_(2)
    return m.fc(x)


def _dtype_stays(m, x):
    y = m.fc(x)
    flags = (y > 0).to(torch.int64)
    flags.eq_(1)
    flags.mul_(y.argmax(1, keepdim=True))
    return y * flags


def _flattened_layer(m, x):
    y = m.fc(x).view(-1, 2, 2)
    m.flat(y).add_(1)
    return y.sum(1)


def _copied_into(m, x):
    y = torch.zeros_like(x)
    y[:, :2].copy_(m.fc(x)[:, :2])
    y[:, 2:] = 1
    return y


def _nested_lists(m, x):
    y = m.fc(x)
    a, b = y.clone(), y.clone()
    for part in (a, b):
        part.view(-1, 2, 2).diagonal(0, 1, 2).mul_(2)
        part.unsqueeze(1)[:, 0].add_(1)
        part.permute(1, 0).t().unflatten(1, (2, 2)).narrow(1, 0, 1).neg_()
    return a + b


@pytest.mark.parametrize(
    "function",
    [
        _first_column,
        _chained,
        _view_taken_before,
        _written_view_of_a_view,
        _masked,
        _reused_preactivation,
        _layer_overwrites,
        _copied_reshape,
        _no_op_cast,
        _writes_to_the_input,
        _dtype_stays,
        _flattened_layer,
        _copied_into,
        _nested_lists,
    ],
)
def test_in_place_operations_become_functional(device, function):
    model = Lambda(function, fc=nn.Linear(4, 4), act=nn.ReLU(inplace=True), flat=nn.Flatten()).to(device)
    graph = assert_captured(model, torch.randn(3, 4, device=device))
    for node in graph.fx.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node.format_node()
        assert not getattr(graph.module_of(node), "inplace", False)


def test_inputs_are_not_written_to(device):
    model = Lambda(_writes_to_the_input, fc=nn.Linear(4, 4)).to(device)
    x = torch.randn(3, 4, device=device)
    before = x.clone()
    graph = capture(model, (x,))
    run(graph, x)
    assert torch.equal(x, before)


class Counter(nn.Module):
    def __init__(self, only_training=False):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.only_training = only_training
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        if self.training or not self.only_training:
            self.step += 1
        return self.fc(x) * (1 + 0 * self.step)


def test_a_model_that_writes_to_its_own_buffer_is_refused(device):
    with pytest.raises(
        CaptureError, match=r"writes to its own `step` in forward, at File .*test_capture_.*self.step \+= 1"
    ):
        capture(Counter().to(device), (torch.randn(2, 4, device=device),))


def test_one_that_does_so_in_training_is_captured_in_eval_mode(device, caplog):
    model = Counter(only_training=True).to(device)
    with caplog.at_level(logging.WARNING):
        assert_captured(model, torch.randn(2, 4, device=device), training=False)
    assert "captured in eval mode only, because in training mode the model writes to its own `step`" in caplog.text
    assert float(model.step) == 0
