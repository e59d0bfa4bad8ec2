"""Forced decisions of routes and of rows, in the reference and lowered; exits and gates are in test_lowering.py."""

import pytest
import torch
from gating import Rows, Toy

import dyncompile as dc
from dyncompile.errors import ArgumentError
from dyncompile.testing import forced

X = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dyn(device):
    torch.manual_seed(0)
    dyn = dc.dynamize(Rows().to(device), Toy(), example_inputs=X[:2].to(device)).eval()
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    return dyn


def test_shares_of_arms_and_of_rows(dyn, device):
    with forced(dyn, {"rows": 0.25, "large": [0.6, 0.4]}):
        trace = dyn.trace(X.to(device))
        out = dyn(X.to(device))
    assert torch.equal(out, trace.output)
    assert trace.decisions["rows"].shape == (20, 3)
    assert int(trace.decisions["rows"].sum()) == 15  # of 60 rows
    assert trace.decisions["large"].bincount().tolist() == [12, 8]
    assert trace.decisions["rows"].sum(1).unique().numel() > 1  # rows are drawn, not samples


def test_lowered_takes_the_same_decisions(dyn, device):
    fast = dc.lower(dyn, backend="eager")
    shares = {"rows": 0.5, "large": [0.25, 0.75]}
    for batch in (1, 2, 7, 20):
        x = X[:batch].to(device)
        with torch.no_grad(), forced(dyn, shares, seed=batch), forced(fast, shares, seed=batch):
            torch.testing.assert_close(fast(x), dyn(x), rtol=1e-5, atol=1e-6)
    assert fast.last_run["large=1"] == 15


def test_what_was_switched_off_when_lowered_is_refused(dyn, device):
    dyn.gates["rows"].enabled.fill_(False)
    fast = dc.lower(dyn, backend="eager")
    with pytest.raises(ArgumentError, match="found 'rows', which was switched off when the model was lowered"):
        forced(fast, {"rows": 0.5}).__enter__()
    with forced(fast, {"large": [0.0, 1.0]}):
        fast(X.to(device))
    assert fast.last_run["large=1"] == 20


def test_in_training_arms_are_weights(dyn, device):
    dyn.train()
    arms = torch.arange(20, device=device) % 2
    with forced(dyn, {"large": arms, "rows": 1.0}):
        trace = dyn.trace(X.to(device))
    assert torch.equal(trace.decisions["large"], torch.stack([1 - arms, arms], 1).float())
    assert (trace.decisions["rows"] == 1).all()
    assert trace.decisions["rows"].is_floating_point()


def test_masks_and_arms_that_are_given(dyn, device):
    rows = torch.rand(20, 3) < 0.5
    samples = torch.arange(20) < 5
    arms = torch.arange(20) % 2
    with forced(dyn, {"rows": rows, "large": arms}):
        trace = dyn.trace(X.to(device))
    assert torch.equal(trace.decisions["rows"].cpu(), rows)
    assert torch.equal(trace.decisions["large"].cpu(), arms)
    for mask in (samples, samples.repeat_interleave(3)):
        with forced(dyn, {"rows": mask}):
            found = dyn.trace(X.to(device)).decisions["rows"].cpu()
        assert torch.equal(found, samples[:, None].expand(20, 3))


def test_shares_of_arms_are_right_on_average_at_batch_one(dyn, device):
    counts = torch.zeros(2)
    for seed in range(400):
        with torch.no_grad(), forced(dyn, {"large": [0.3, 0.7]}, seed=seed):
            counts[int(dyn.trace(X[:1].to(device)).decisions["large"])] += 1
    assert counts[1].item() / 400 == pytest.approx(0.7, abs=0.07)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"large": 0.5}, r"`shares\['large'\]`: found 0.5; expected the shares of its 2 arms"),
        ({"large": [0.5, 0.4]}, r"found \[0.5, 0.4\]; expected the shares of its 2 arms, which sum to 1"),
        ({"large": [0.2, 0.3, 0.5]}, "expected the shares of its 2 arms"),
        ({"large": [-0.5, 1.5]}, "expected the shares of its 2 arms"),
        ({"large": torch.tensor([0, 2])}, r"found torch.int64 \[2\]; expected arms, integers in \[0, 2\)"),
        ({"large": torch.rand(20)}, "expected arms, integers"),
        ({"rows": [0.5, 0.5]}, r"found \[0.5, 0.5\]; expected a share in \[0, 1\] or a mask"),
        (None, "`shares`: found None; expected a mapping from names, or a sequence"),
        ("rows", "`shares`: found 'rows'; expected a mapping"),
        ({"rows": None}, r"`shares\['rows'\]`: found None; expected a share"),
        ({"rows": torch.rand(20)}, "expected a mask of bool"),
        ({"other": 0.5}, r"found 'other'; expected names among \['rows', 'large'\]"),
    ],
)
def test_shares_that_do_not_fit_are_refused(dyn, shares, message):
    with pytest.raises(ArgumentError, match=message), forced(dyn, shares):
        pass


def test_a_static_model_has_no_decisions_to_force(dyn):
    with pytest.raises(ArgumentError, match="`model`: found a Linear"), forced(torch.nn.Linear(2, 2), {"rows": 0.5}):
        pass
    with pytest.raises(ArgumentError, match="`seed`: found 'a'"), forced(dyn, {"rows": 0.5}, seed="a"):
        pass


def test_tensors_that_do_not_fit_the_batch_are_refused(dyn, device):
    for shares, message in (
        (
            {"rows": torch.ones(20, 2)},
            r"found \[20, 2\]; expected a mask of \[20\] samples, or \[20, 3\] of their rows",
        ),
        ({"large": torch.zeros(7).long()}, r"found \[7\]; expected arms of \[20\] samples"),
    ):
        with forced(dyn, shares), pytest.raises(ArgumentError, match=message):
            dyn.trace(X.to(device))


@pytest.mark.parametrize(("strategy", "shares"), [("layer_skip", {"gate0": 0.5}), ("early_exit", {"exit0": 0.5})])
def test_what_is_forced_costs_as_if_it_were_switched_on(strategy, shares, device):
    layers = [torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)]
    model = Residual() if strategy == "layer_skip" else torch.nn.Sequential(*layers)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    dyn = dc.dynamize(model.eval().to(device), strategy, example_inputs=x[:2]).eval()
    assert (dyn.trace(x).cost == 1).all()
    with forced(dyn, shares):
        trace = dyn.trace(x)
    done = trace.decisions[next(iter(shares))] == (strategy == "early_exit")  # left, or skipped
    assert done.sum() == 4
    assert (trace.cost[done] < trace.cost[~done].min()).all()
    assert (dyn.trace(x).cost == 1).all()


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = (
            torch.nn.Linear(8, 8),
            torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(9))),
            torch.nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + torch.relu(self.branch(x)))
