"""Models that cannot be captured are refused, with the operation or the line."""

import pytest
import torch
from capturing import Lambda
from torch import nn

from dyncompile.capture import capture
from dyncompile.errors import CaptureError, MixedSamplesError

# --- refusals ------------------------------------------------------------------------------------

_MIXERS = {
    "mean": lambda m, x: m.fc(x) - m.fc(x).mean(0, keepdim=True),
    "sort": lambda m, x: m.fc(x.sort(0).values),
    "flip": lambda m, x: m.fc(x).flip(0),
    "cumsum": lambda m, x: m.fc(x).cumsum(0),
    "softmax": lambda m, x: m.fc(x).softmax(0),
    "matmul": lambda m, x: (x @ x.T) @ m.fc(x),
    "norm": lambda m, x: m.norm(m.fc(x)),
    "cat": lambda m, x: torch.cat([x, x[:1]])[1:],
    "slice": lambda m, x: m.fc(x) + x[:1],
}


@pytest.mark.parametrize("name", _MIXERS)
def test_models_that_mix_samples_are_refused_by_operation(device, name):
    model = Lambda(_MIXERS[name], fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(4, track_running_stats=False)).to(device)
    with pytest.raises(MixedSamplesError, match=rf"^`{name}.*mixes the samples of a batch") as caught:
        capture(model, (torch.randn(2, 4, device=device),))
    assert name == "norm" or "capturing.py" in str(caught.value)


def test_mixing_of_equal_rows_is_seen(device):
    """The example's batch is one row of integers: its copies must differ, or nothing shows."""
    model = Lambda(
        lambda m, x: m.fc(m.embed(x).mean(0, keepdim=True).expand(x.shape[0], -1, -1)).mean(1),
        fc=nn.Linear(4, 4),
        embed=nn.Embedding(10, 4),
    ).to(device)
    with pytest.raises(MixedSamplesError, match="^`mean"):
        capture(model, (torch.tensor([[1, 2, 3]], device=device),))


def test_a_little_mixing_in_half_precision_is_seen(device):
    model = Lambda(lambda m, x: m.fc(x) + 0.02 * x.mean(0), fc=nn.Linear(4, 4)).to(device, torch.bfloat16)
    with pytest.raises(MixedSamplesError, match="^`mean"):
        capture(model, (torch.randn(2, 4, device=device, dtype=torch.bfloat16),))


def test_time_taken_for_the_batch_is_refused(device):
    model = Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 4)).to(device)
    with pytest.raises(CaptureError, match="the batch was taken to be dim 0 of `x`, and the model fixes its size"):
        capture(model, (torch.randn(5, 2, 4, device=device),))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.fc(x)
        return x


def test_a_model_that_branches_on_data_is_refused_with_its_line(device):
    with pytest.raises(CaptureError, match=r"torch.export stopped: .*refusals.py:\d+: `if x.sum\(\) > 0:`"):
        capture(Branching().to(device), (torch.randn(2, 4, device=device),))


def test_a_model_that_cannot_be_copied(device):
    model = nn.Sequential(nn.Linear(4, 4)).to(device)
    model.cache = model[0].weight * 2
    x = torch.randn(2, 4, device=device)
    with pytest.raises(CaptureError, match="the model cannot be copied: .*inplace=True"):
        capture(model, (x,))
    assert capture(model, (x,), inplace=True).root is model


@pytest.mark.parametrize("name", ["meta", "graph"])
def test_a_layer_with_a_name_that_export_needs(device, name):
    model = Lambda(lambda m, x: getattr(m, name)(x), **{name: nn.Linear(4, 4)}).to(device)
    with pytest.raises(CaptureError, match=f"the model's own `{name}` has the name .* rename it"):
        capture(model, (torch.randn(2, 4, device=device),))
