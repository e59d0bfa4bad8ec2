"""A batch of one is compacted as any other batch is, with fewer operations."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.nn.ragged import Alone, Ragged, compacted


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_a_batch_of_one_is_as_one_of_a_larger_batch(kind, device):
    torch.manual_seed(0)
    for batch_first, reverse in itertools.product((True, False), repeat=2):
        rnn = kind(3, 4, batch_first=batch_first).to(device)
        form = RecurrentLayer(rnn).eval()
        for mask in (torch.rand(1, 9) < 0.5, torch.zeros(1, 9).bool(), torch.ones(1, 9).bool()):
            kept = mask.to(device)
            x = torch.randn((1, 9, 3) if batch_first else (9, 1, 3), device=device)
            state = tuple(torch.randn(1, 4, device=device) for _ in range(2 if kind is torch.nn.LSTM else 1))
            weights = tuple(rnn._flat_weights)
            how = {"batch_first": batch_first, "reverse": reverse}
            with torch.no_grad():
                found = Alone(kept, **how).run(form, x, state, weights, exact=True)
                expected = Ragged(kept, **how).run(form, x, state, weights, exact=True)
            assert_close(found, expected)


def test_only_a_batch_of_one_is_alone(device):
    kept = torch.ones(2, 3, device=device).bool()
    assert type(compacted(kept[:1], batch_first=True)) is Alone
    assert type(compacted(kept, batch_first=True)) is Ragged
