"""Fine-tuning of gates: open at first, annealed to a target cost, alike after an interruption."""

import copy
import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.errors import ArgumentError
from dyncompile.training import BatchShaping, Distillation, GateSchedule, MultiExit
from dyncompile.training.schedule import GateCost

DIGITS = load_digits(return_X_y=True)
ORDER = torch.randperm(len(DIGITS[1]), generator=torch.Generator().manual_seed(0))
PIXELS = torch.tensor(DIGITS[0], dtype=torch.float32)[ORDER] / 16
LABELS = torch.tensor(DIGITS[1])[ORDER]
TRAIN, VAL = (PIXELS[:1200], LABELS[:1200]), (PIXELS[1200:], LABELS[1200:])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(48, 96), nn.BatchNorm1d(96), nn.Linear(96, 48)

    def forward(self, x):
        return x + self.outer(self.norm(self.inner(x)).relu())


def build():
    return nn.Sequential(nn.Linear(64, 48), *(Block() for _ in range(5)), nn.Linear(48, 10))


@pytest.fixture(scope="module")
def static():
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        for rows in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(TRAIN[0][rows]), TRAIN[1][rows]).backward()
            optimizer.step()
    return model.eval()


def convert(static, strategy="layer_skip", **options):
    torch.manual_seed(0)
    options = {"hidden": 8, **options} if strategy == "layer_skip" else options
    return dc.dynamize(static, strategy, example_inputs=PIXELS[:2], **options)


@pytest.fixture(scope="module")
def born(static):
    return convert(static)


@pytest.fixture
def dyn(born, device):
    return copy.deepcopy(born).to(device)


def finetune(dyn, train=TRAIN, val=VAL, **options):
    return dc.finetune(dyn, train, val, **{"progress": False, "mode": "joint", "batch_size": 100, **options})


def accuracy(model, device, data=VAL):
    with torch.no_grad():
        return (model.to(device).eval()(data[0].to(device)).argmax(1).cpu() == data[1]).float().mean().item()


def spread(dyn, device):
    """Cost and rates on the validation data, with hard decisions."""
    with torch.no_grad():
        trace = dyn.eval().trace(VAL[0].to(device))
    return trace.cost.mean().item(), {n: d.float().mean().item() for n, d in trace.decisions.items()}


# --- the schedule --------------------------------------------------------------------------------


def test_the_schedule_opens_then_anneals(dyn):
    schedule = GateSchedule(dyn, target_cost=0.5, warmup=0.2, settled=0.6, margin=0.0)
    gate = dyn.gates["gate0"]
    found = []
    for progress in (0.0, 0.19, 0.2, 0.4, 0.6, 0.8, 1.0):
        schedule.update(progress)
        found.append((bool(gate.enabled), schedule.target, float(gate.estimator.temperature)))
    full = found[0][1]
    assert 1.0 < full < 1.1
    assert [enabled for enabled, _, _ in found] == [False, False, True, True, True, True, True]
    half = full + 0.5 * (0.5 - full)
    assert [target for _, target, _ in found] == pytest.approx([full, full, full, half, 0.5, 0.5, 0.5])
    assert [t for _, _, t in found] == pytest.approx([1, 1, 1, 0.5**0.25, 0.5**0.5, 0.5**0.75, 0.5])
    schedule.update(0.3)  # a function of the progress alone
    schedule.update(0.0)
    assert not gate.enabled
    schedule.validating = True
    assert schedule.target == 0.5
    assert GateSchedule(dyn, target_cost=0.5, warmup=0.0, settled=0.0, margin=0.1).target == pytest.approx(full)
    below = GateSchedule(dyn, target_cost=0.5, margin=0.1)
    below.update(1.0)
    assert below.target == pytest.approx(0.45)


def test_the_rate_is_that_at_which_the_cost_is_the_target(dyn, device):
    schedule = GateSchedule(dyn, target_cost=0.47, warmup=0.0, settled=0.0, margin=0.0)
    schedule.update(1.0)
    rate = torch.full((1,), schedule.rate)
    cost = dyn.train().cost_model().expected(dict.fromkeys(dyn.gates, rate))
    assert cost.item() == pytest.approx(0.47, abs=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_cost": 0.01},
            r"`target_cost`: found 0.01; expected above 0.\d+, what runs when every gate is closed",
        ),
        ({"target_cost": 1.5}, "and at most 1.0"),
        ({"target_cost": "0.5"}, "`target_cost`: found '0.5'; expected a number above 0"),
        ({"target_cost": True}, "`target_cost`: found True"),
        ({"warmup": 0.7, "settled": 0.5}, "expected 0 <= warmup <= settled <= 1"),
        ({"margin": 1.0}, r"`margin`: found 1.0; expected a share in \[0, 1\)"),
        ({"cost_weight": -1}, "`cost_weight`: found -1"),
        ({"guard_weight": -1}, "`guard_weight`: found -1"),
        ({"shape_weight": -1}, "`shape_weight`: found -1"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(dyn, options, message):
    with pytest.raises(ArgumentError, match=message):
        GateSchedule(dyn, **{"target_cost": 0.6, **options})


def test_a_target_needs_gates(static):
    exits = dc.dynamize(static, "early_exit", exits=1, example_inputs=PIXELS[:2])
    with pytest.raises(ArgumentError, match="`target_cost`: found 0.6 for a model without gates; expected None"):
        finetune(exits, target_cost=0.6)


def test_a_schedule_belongs_to_its_model(dyn, born):
    with pytest.raises(ArgumentError, match="`target_cost`: found the schedule of another model"):
        finetune(dyn, target_cost=GateSchedule(born, target_cost=0.6))


def test_the_cost_is_that_of_who_stays(static, device):
    """Exits fire in part in training; the gates' target is about the samples that no exit lets go."""
    dyn = dc.dynamize(static, ["layer_skip", "early_exit"], example_inputs=PIXELS[:2]).to(device).train()
    schedule = GateSchedule(dyn, target_cost=0.6, margin=0.0)
    schedule.update(1.0)
    for exit_ in dyn.exits.values():
        exit_.threshold.fill_(0.1)
    trace = dyn.trace(TRAIN[0][:64].to(device))
    assert trace.cost.mean() < 0.7  # exits fire
    nobody = {n: torch.zeros(64, device=device) for n in dyn.exits}
    objective = GateCost(schedule=schedule, costs=dyn.cost_model(), weight=3.0)
    expected = 3 * (dyn.cost_model().expected(nobody | trace.probabilities).mean() - 0.6) ** 2
    found = objective(trace, TRAIN[1][:64].to(device))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    assert all(gate.policy.outer.weight.grad.abs().sum() > 0 for gate in dyn.gates.values())
    costs = dyn.cost_model()
    hard = dyn.eval().trace(TRAIN[0][:64].to(device))  # in evaluation by what is decided
    decided = {n: torch.zeros_like(d) if n in dyn.exits else d for n, d in hard.decisions.items()}
    expected = 3 * (costs.expected(decided).mean() - 0.6) ** 2
    assert objective(hard, TRAIN[1][:64].to(device)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_decisions_are_set_free_from_the_last_to_the_first(static, device):
    dyn = convert(static, "block_policy", estimator="reinforce").to(device).train()
    schedule = GateSchedule(dyn, target_cost=0.5, warmup=0.0, settled=0.5)
    held = []
    for progress in (0.0, 0.1, 0.25, 0.5):
        schedule.update(progress)
        held.append(sorted(schedule.held))
    blocks = [f"block{i}" for i in range(5)]
    assert held == [blocks, blocks[:4], blocks[:2], []]
    schedule.update(0.25)
    dyn.gates["policy"].shift.data.fill_(-50.0)
    with schedule.holding():
        trace = dyn.trace(TRAIN[0][:32].to(device))
        hard = dyn.eval().trace(TRAIN[0][:32].to(device))
    for found in (trace, hard):
        assert {name: float(d.float().mean()) for name, d in found.decisions.items()} == {
            "block0": 1, "block1": 1, "block2": 0, "block3": 0, "block4": 0,
        }  # fmt: skip
    assert dyn._override is None
    assert schedule.objective.parts(trace, TRAIN[1][:32].to(device), TRAIN[0][:32].to(device)).keys() == {
        "sparsity/cost",
        "sparsity/usage",
        "sparsity/shape",
        "policy",
    }


# --- finetune ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["layer_skip", "block_policy"])
def test_defaults_reach_the_target_without_collapse(static, strategy, device):
    dyn = convert(static, strategy).to(device)
    result = dc.finetune(
        dyn, TRAIN, VAL, epochs=25, mode="joint", target_cost=0.6, lr=1e-2, batch_size=50, progress=False
    )
    cost, rates = spread(dyn, device)
    assert 0.53 < cost < 0.62  # 597 images; what training sees lies at the target
    assert result.history[-1]["train/cost"] == pytest.approx(0.6, abs=0.03)
    assert all(0.005 < rate < 0.99 for rate in rates.values()), rates
    assert accuracy(dyn, device) > accuracy(static, device) - 0.02
    assert all(bool(gate.enabled) for gate in dyn.gates.values())
    last = result.history[-1]
    assert last["val/cost"] == pytest.approx(cost, abs=1e-4)
    assert last["val/accuracy/final"] == pytest.approx(accuracy(dyn, device), abs=1e-4)
    for name, rate in rates.items():
        assert last[f"val/rate/{name}"] == pytest.approx(rate, abs=1e-4)
    first = result.history[0]
    assert first["val/cost"] == pytest.approx(1.0)
    text = str(result)
    assert "val/cost" in text.splitlines()[0]
    assert f"open at the end: {next(iter(rates))} " in text


def test_gates_are_open_in_the_warm_up_and_learn(dyn, device):
    schedule = GateSchedule(dyn, target_cost=0.6, warmup=1.0, settled=1.0)
    before = copy.deepcopy(dyn.gates.state_dict())
    result = finetune(dyn, epochs=1, target_cost=schedule)
    assert result.history[0]["train/cost"] == pytest.approx(dyn.train().cost_model().expected(
        dict.fromkeys(dyn.gates, torch.ones(1))
    ).item(), rel=1e-3)  # fmt: skip
    moved = {n for n, v in dyn.gates.state_dict().items() if not torch.equal(v, before[n])}
    assert {f"{g}.policy.outer.weight" for g in dyn.gates} <= moved
    assert all(bool(gate.enabled) for gate in dyn.gates.values())


def test_gates_are_taught_by_the_static_model_by_default(dyn, device):
    result = finetune(dyn, epochs=1, target_cost=0.6)
    assert "train/distillation/final" in result.history[0]
    plain = copy.deepcopy(dyn)
    result = finetune(plain, epochs=1, target_cost=0.6, objective=MultiExit())
    assert "train/distillation/final" not in result.history[0]
    assert {"train/sparsity/cost", "train/sparsity/usage", "train/sparsity/shape"} <= result.history[0].keys()


def test_only_gates_move_in_mode_heads(dyn, device):
    before = copy.deepcopy(dyn.state_dict())
    finetune(dyn, epochs=2, mode="heads", target_cost=0.6)
    moved = {n for n, v in dyn.state_dict().items() if not torch.equal(v, before[n])}
    assert moved
    assert all(name.startswith("gates.") for name in moved)


def test_norms_keep_the_statistics_of_training(dyn, device):
    """Those that the layers behind them have learned for: of all samples, in the dense reference."""
    finetune(dyn, epochs=2, target_cost=0.6, lr=1e-2)
    found = dyn.get_submodule("1.norm").running_mean.clone()
    dyn.train()
    with torch.no_grad():
        for _ in range(40):
            dyn(TRAIN[0].to(device))
    torch.testing.assert_close(found, dyn.get_submodule("1.norm").running_mean, rtol=0.1, atol=0.1)


def test_patience_judges_by_the_target_of_the_end(dyn, device):
    """An epoch with gates still open, though the most accurate, is not the best."""
    result = finetune(dyn, epochs=6, target_cost=0.5, lr=1e-2, patience=6)
    assert result.best_epoch > 2
    assert spread(dyn, device)[0] < 0.9
    first = result.history[0]
    assert first["val/cost"] > 0.7
    assert first["val/sparsity/cost"] == pytest.approx(100 * (first["val/cost"] - 0.49) ** 2, rel=0.02)


@pytest.mark.parametrize(
    ("strategy", "estimator"),
    [("layer_skip", "straight_through"), ("layer_skip", "semantic_hashing"), ("block_policy", "reinforce")],
)
def test_any_estimator_trains(static, strategy, estimator, device):
    dyn = convert(static, strategy, estimator=estimator).to(device)
    result = finetune(dyn, epochs=6, target_cost=0.6, lr=1e-2)
    assert spread(dyn, device)[0] < 0.97
    assert result.history[-1]["val/accuracy/final"] > 0.8
    assert ("train/policy" in result.history[0]) == (estimator == "reinforce")


def test_a_loop_of_ones_own(dyn, device):
    schedule = GateSchedule(dyn, target_cost=0.6)
    objective = Distillation(teacher=dyn.static()) + schedule.objective
    optimizer = torch.optim.AdamW(dyn.parameters(), 5e-3)
    dyn.train()
    x, y = (t.to(device) for t in TRAIN)
    batches = [rows for _ in range(12) for rows in torch.randperm(1200).split(100)]
    for step, rows in enumerate(batches):
        schedule.update(step / len(batches))
        with schedule.holding():
            loss = objective(dyn.trace(x[rows]), y[rows], x[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.update(1.0)
    cost, _ = spread(dyn, device)
    assert cost < 0.8
    assert accuracy(dyn, device) > 0.85


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["layer_skip", "block_policy"])
def test_an_interrupted_run_resumes_to_the_same_result(static, tmp_path, strategy):
    estimator = "gumbel" if strategy == "layer_skip" else "reinforce"
    options = {"epochs": 4, "target_cost": 0.6, "lr": 1e-2, "accelerator": "cpu"}
    whole, cut, resumed = (convert(static, strategy, estimator=estimator) for _ in range(3))
    expected = finetune(whole, directory=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, directory=tmp_path / "cut", callbacks=[interrupting()], **options)
    torch.manual_seed(99)
    result = finetune(resumed, directory=tmp_path / "cut", resume=True, **options)
    assert result.history == expected.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def interrupting():
    from lightning.pytorch import Callback

    class Interrupting(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == 5:
                raise KeyboardInterrupt

    return Interrupting()


def test_a_checkpoint_of_another_target_is_refused(dyn, tmp_path):
    finetune(dyn, epochs=1, target_cost=0.6, directory=tmp_path)
    with pytest.raises(ArgumentError, match="`target_cost`: found 0.5; expected 0.6, with which the checkpoint"):
        finetune(dyn, epochs=2, target_cost=0.5, directory=tmp_path, resume=True)


def test_the_schedule_moves_with_the_epochs_where_batches_are_not_counted(dyn, device):
    """Data of unknown length: half of the epochs is half of the way."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(*(t[:200] for t in TRAIN), strict=True)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=50)
    schedule = GateSchedule(dyn, target_cost=0.6, warmup=0.5, settled=0.5)
    seen = []
    update = schedule.update
    schedule.update = lambda progress: (seen.append(progress), update(progress))
    finetune(dyn, loader, None, epochs=4, target_cost=schedule)
    assert [key for key, _ in itertools.groupby(seen)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_all_gates_alike_follow_the_schedule(dyn, device):
    """As a guard in a loop of one's own: the rate at which the cost is the target."""
    schedule = GateSchedule(dyn, target_cost=0.5, warmup=0.0, settled=1.0)
    trace = dyn.train().trace(TRAIN[0][:64].to(device))
    found = []
    for progress in (0.0, 1.0):
        schedule.update(progress)
        found.append(BatchShaping(target=schedule)(trace, TRAIN[1][:64]).item())
        fixed = BatchShaping(target=min(schedule.rate, 0.99))(trace, TRAIN[1][:64]).item()
        assert found[-1] == pytest.approx(fixed)
    assert found[0] != pytest.approx(found[1])
