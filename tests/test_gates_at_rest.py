"""Gates that fine-tuning has no target for stay as they are, and decide as in evaluation."""

import copy

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.errors import ArgumentError
from dyncompile.training import ActivationRate, MultiExit
from dyncompile.training.parts import set_training

X = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
Y = (X[:, :8].abs().sum(1) > X[:, 8:].abs().sum(1)).long()
STRATEGIES = ["layer_skip", "block_policy", "channel_gate", "neuron_gate"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


def convert(strategy, device="cpu"):
    """A model that does the same in training as in evaluation, with gates that are on, half of the time open."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), *(Block() for _ in range(3)), nn.Linear(24, 2))
    options = {"hidden": 4} if strategy == "layer_skip" else {}
    dyn = dc.dynamize(model, strategy, example_inputs=X[:2], **options).to(device)
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
        gate.aim(0.5)
        for parameter in gate.policy.parameters():
            nn.init.normal_(parameter)
    with torch.no_grad():
        dyn.train().trace(X.to(device))  # for what logits are standardised by
    return dyn.eval()


def finetune(dyn, **options):
    return dc.finetune(dyn, (X, Y), **{"progress": False, "epochs": 1, "mode": "joint", **options})


def moved(dyn, before):
    return {name for name, value in dyn.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_target_nothing_of_a_gate_moves(strategy, device):
    dyn = convert([strategy, "early_exit"], device)
    before = copy.deepcopy(dyn.state_dict())
    finetune(dyn)
    found = moved(dyn, before)
    assert {name.partition(".")[0] for name in found} >= {"exits", "0", "1"}
    assert not any(name.startswith("gates.") for name in found)
    before = copy.deepcopy(dyn.state_dict())
    finetune(dyn, mode="heads")
    assert {name.partition(".")[0] for name in moved(dyn, before)} == {"exits"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_they_decide_in_training_as_in_evaluation(strategy, device):
    dyn = convert(strategy, device)
    x = X.to(device)
    with torch.no_grad():
        expected = dyn.trace(x)
        set_training(dyn, "joint", gates=False)
        found = dyn.trace(x)
    assert dyn.training
    assert expected.cost.std() > 0.01
    torch.testing.assert_close(found.final, expected.final)


def test_an_objective_of_ones_own_trains_gates_without_a_target(device):
    dyn = convert("layer_skip", device)
    before = copy.deepcopy(dyn.state_dict())
    finetune(dyn, objective=MultiExit() + ActivationRate(target=0.5))
    assert any("policy" in name for name in moved(dyn, before))


def test_gates_that_are_off_are_named(device):
    dyn = convert("layer_skip", device)
    for gate in dyn.gates.values():
        gate.enabled.fill_(False)
    with pytest.warns(UserWarning, match="gates stay switched off: target_cost=0.6 would train them"):
        finetune(dyn)
    assert not any(bool(gate.enabled) for gate in dyn.gates.values())


def test_gates_alone_need_a_target(device):
    with pytest.raises(
        ArgumentError, match="expected some that require a gradient; 'heads' needs exits, or gates and a"
    ):
        finetune(convert("layer_skip", device), mode="heads")
