import copy
import logging
import math
import random
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dyncompile as dc
from dyncompile.errors import ArgumentError, DataError, MissingExtraError
from dyncompile.training import Distillation, ExpectedCost, MultiExit

DIGITS = load_digits(return_X_y=True)
TRAIN = DIGITS[0][:600] / 16, DIGITS[1][:600]
VAL = DIGITS[0][600:800] / 16, DIGITS[1][600:800]
PROBE = torch.tensor(VAL[0], dtype=torch.float32)


def mlp():
    return nn.Sequential(
        nn.Linear(64, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(48, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@pytest.fixture(scope="module")
def born():
    torch.manual_seed(0)
    return dc.dynamize(mlp(), "early_exit", exits=1, example_inputs=PROBE[:2])


@pytest.fixture
def dyn(born, device):
    return copy.deepcopy(born).to(device)


def finetune(dyn, train=TRAIN, val=None, **options):
    return dc.finetune(dyn, train, val, **{"progress": False, "epochs": 1, **options})


def state(dyn):
    return {name: value.detach().cpu().clone() for name, value in dyn.state_dict().items()}


def changed(dyn, before):
    return {name for name, value in state(dyn).items() if not torch.equal(value, before[name])}


def test_heads_learn_and_the_backbone_does_not_move(dyn):
    before = state(dyn)
    result = finetune(dyn, val=VAL, epochs=3, lr=1e-2)
    assert changed(dyn, before) == {n for n in before if n.startswith("exits.exit0.head.")}
    losses = [epoch["train/task/exit0"] for epoch in result.history]
    assert losses[-1] < 0.8 * losses[0]
    assert len({epoch["val/accuracy/final"] for epoch in result.history}) == 1


def test_heads_are_trained_on_the_features_of_evaluation(dyn):
    recorded = []
    first = next(child for name, child in dyn.named_children() if name == "1")
    head = dyn.exits["exit0"]
    first.register_forward_hook(lambda module, *_: recorded.append(module.training))
    head.register_forward_hook(lambda module, *_: recorded.append(module.training))
    finetune(dyn, train=(TRAIN[0][:64], TRAIN[1][:64]))
    assert recorded[-2:] == [False, True]


def test_joint_training_moves_everything(dyn, device):
    before = state(dyn)
    frozen = dyn.get_parameter("4.bias").requires_grad_(False)
    result = finetune(dyn, val=VAL, epochs=8, mode="joint", lr=3e-2)
    untouched = {n for n in before if n.endswith(("threshold", "temperature", "enabled"))}
    assert changed(dyn, before) == set(before) - untouched - {"4.bias"}
    assert not frozen.requires_grad
    assert result.history[-1]["val/accuracy/final"] > 0.8
    assert result.history[-1]["val/accuracy/exit0"] > 0.7


@pytest.mark.parametrize("mode", ["heads", "joint"])
def test_the_model_comes_back_as_it_was(dyn, device, mode):
    dyn.train()
    dyn.get_submodule("1").eval()
    dyn.get_parameter("0.weight").requires_grad_(False)
    modes = [module.training for module in dyn.modules()]
    flags = [parameter.requires_grad for parameter in dyn.parameters()]
    identities = [id(parameter) for parameter in dyn.parameters()]
    finetune(dyn, mode=mode)
    assert [module.training for module in dyn.modules()] == modes
    assert [parameter.requires_grad for parameter in dyn.parameters()] == flags
    assert [id(parameter) for parameter in dyn.parameters()] == identities
    assert {tensor.device.type for tensor in dyn.state_dict().values()} == {device.type}
    assert all(parameter.grad is None for parameter in dyn.parameters())


def test_the_surroundings_stay_as_they_were(dyn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level
    drawn = []
    for train in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - the global state is what is tested
        if train:
            finetune(dyn, val=VAL, patience=1)
        drawn.append((torch.rand(3).tolist(), random.random(), np.random.rand()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger("lightning.pytorch").level == level


def test_the_seed_decides_the_result(dyn):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        trained = copy.deepcopy(dyn)
        finetune(trained, seed=seed, mode="joint")
        results.append(state(trained)["0.weight"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_history_measures_every_exit(dyn, device):
    result = finetune(dyn, val=VAL, epochs=2, objective=MultiExit())
    assert [epoch["epoch"] for epoch in result.history] == [1, 2]
    with torch.no_grad():
        trace = dyn.eval().trace(PROBE.to(device))
    labels = torch.tensor(VAL[1], device=device)
    for name, prediction in {**trace.exits, "final": trace.final}.items():
        accuracy = (prediction.argmax(1) == labels).float().mean().item()
        assert result.history[-1][f"val/accuracy/{name}"] == pytest.approx(accuracy, abs=1e-6)
    loss = MultiExit()(trace, labels).item()
    assert result.history[-1]["val/loss"] == pytest.approx(loss, rel=1e-4)
    header, *rows = str(result).splitlines()
    assert header.split()[:3] == ["epoch", "train/loss", "val/loss"]
    assert len(rows) == 2


def test_logs_and_checkpoints_are_written(dyn, tmp_path):
    result = finetune(dyn, val=VAL, epochs=2, directory=tmp_path)
    assert result.checkpoint == tmp_path / "last.ckpt"
    assert (tmp_path / "best.ckpt").exists()
    [metrics] = tmp_path.glob("csv/*/metrics.csv")
    assert "val/accuracy/exit0" in metrics.read_text().splitlines()[0]
    assert len(list(tmp_path.glob("tensorboard/*/events.out.tfevents.*"))) == 1


def test_patience_stops_and_keeps_the_best(dyn, device):
    rng = np.random.default_rng(0)
    noise = [(x[:64], rng.integers(10, size=64)) for x in (TRAIN[0], VAL[0])]
    options = {"mode": "joint", "lr": 0.1, "objective": MultiExit(), "batch_size": 16}
    result = finetune(dyn, *noise, epochs=30, patience=2, **options)
    losses = [epoch["val/loss"] for epoch in result.history]
    assert len(losses) == result.best_epoch + 2 < 30
    assert losses[result.best_epoch - 1] == min(losses)
    with torch.no_grad():
        trace = dyn.eval().trace(PROBE[:64].to(device))
    loss = MultiExit()(trace, torch.tensor(noise[1][1], device=device))
    assert loss.item() == pytest.approx(min(losses), rel=1e-4)


def test_mixed_precision_computes_in_bfloat16_and_keeps_the_weights(dyn):
    seen = set()
    dyn.exits["exit0"].head.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    before = state(dyn)
    finetune(dyn, val=VAL, precision="bf16-mixed")
    assert torch.bfloat16 in seen
    assert changed(dyn, before)
    assert {p.dtype for p in dyn.parameters()} == {torch.float32}


class Items(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"input": PROBE[index], "labels": int(VAL[1][index])}


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TensorDataset(PROBE[:64], torch.tensor(VAL[1][:64])), batch_size=20),
        TensorDataset(PROBE[:64], torch.tensor(VAL[1][:64])),
        Items(),
        ({"input": PROBE[:64]}, VAL[1][:64]),
    ],
    ids=["loader", "dataset", "dicts", "arrays"],
)
def test_every_form_of_data_trains_alike(dyn, data):
    before = state(dyn)
    result = finetune(dyn, data, data)
    assert changed(dyn, before)
    assert 0 <= result.history[0]["val/accuracy/exit0"] <= 1


def test_a_static_teacher_teaches_while_the_model_trains(dyn):
    objective = Distillation(alpha=0, teacher=dyn.static())
    first = finetune(dyn, epochs=3, mode="joint", lr=1e-2, objective=objective).history
    assert first[-1]["train/distillation/exit0"] < first[0]["train/distillation/exit0"]


def test_any_optimizer_and_further_arguments_of_the_trainer(dyn):
    made = []

    def sgd(groups):
        made.append([group["lr"] for group in groups])
        return torch.optim.SGD(groups, momentum=0.9)

    before = state(dyn)
    finetune(dyn, mode="joint", optimizer=sgd, lr=0.5, gradient_clip_val=1e-9)
    assert made == [[0.5, pytest.approx(0.05)]]
    after = state(dyn)
    assert all((after[n] - before[n]).abs().max() < 1e-6 for n in before if n.endswith("weight"))


def test_regression_learns_values_and_confidences(device):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 6)).astype(np.float32)
    noisy = x[:, 0] > 0
    y = x @ np.arange(6.0) / 6 + noisy * rng.normal(size=512)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    dyn = dc.dynamize(model, "early_exit", exits=1, example_inputs=torch.tensor(x[:2])).to(device)
    result = finetune(dyn, (x, y), (x, y), epochs=15, mode="joint", lr=2e-2)
    assert result.history[-1]["val/mse/exit0"] < 0.8 * result.history[0]["val/mse/exit0"]
    with torch.no_grad():
        confidence = dyn.eval().trace(torch.tensor(x, device=device)).confidence["exit0"].cpu()
    assert confidence[~noisy].mean() > confidence[noisy].mean() + 0.1


@pytest.mark.parametrize("argument", ["train_data", "val_data"])
def test_regression_on_labels_is_refused(argument):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    dyn = dc.dynamize(model, "early_exit", exits=1, example_inputs=PROBE[:2])
    before = state(dyn)
    data = {"train_data": (TRAIN[0], TRAIN[1] / 9), "val_data": None, argument: (TRAIN[0], TRAIN[1] % 2)}
    with pytest.raises(DataError, match=f"`{argument}`: found integer targets.*; expected floating targets; or a cl"):
        finetune(dyn, data["train_data"], data["val_data"])
    assert not changed(dyn, before)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(self.body(x.mean(0)))


def test_batches_along_another_dim_come_in_a_loader_alone(device):
    x, y = torch.randn(8, 8, 4), torch.randint(0, 3, (8,))
    dyn = dc.dynamize(TimeFirst(), "early_exit", exits=1, example_inputs=x[:, :2], batch_dims={"x": 1}).to(device)
    samples = TensorDataset(x.transpose(0, 1), y)
    for data in ((x, y), samples):
        for use in (finetune, dc.calibrate):
            with pytest.raises(DataError, match=r"put into batches along dim 0; expected a DataLoader .*{'x': 1}"):
                use(dyn, data)

    def time_first(pairs):
        return torch.stack([x for x, _ in pairs], 1), torch.stack([y for _, y in pairs])

    loader = DataLoader(samples, batch_size=4, collate_fn=time_first)
    before = state(dyn)
    finetune(dyn, loader)
    assert changed(dyn, before)
    assert dc.calibrate(dyn, loader, max_cost=0.99, method="greedy").cost < 1


def test_dense_predictions_learn_and_ignore(device):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )
    x = torch.randn(64, 1, 6, 6)
    y = (x[:, 0] > 0).long()
    y[:, 0] = 255
    dyn = dc.dynamize(model, "early_exit", exits=1, example_inputs=x[:2]).to(device)
    result = finetune(
        dyn,
        (x, y),
        (x, y),
        epochs=6,
        mode="joint",
        lr=2e-2,
        batch_size=8,
        objective=Distillation(ignore_index=255),
    )
    assert result.history[-1]["val/accuracy/exit0"] > 0.7
    with pytest.raises(DataError, match="labels from 0 to 255"):
        finetune(dyn, (x, y))


def test_cost_can_be_part_of_the_objective(dyn):
    objective = MultiExit() + ExpectedCost(weight=5.0)
    result = finetune(dyn, epochs=3, lr=1e-2, objective=objective)
    assert result.history[-1]["train/sparsity/cost"] < result.history[0]["train/sparsity/cost"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs`: found 0; expected a whole number, at least 1"),
        ({"epochs": 1.5}, "`epochs`: found 1.5; expected a whole number"),
        ({"objective": "x"}, "`objective`: found 'x'; expected a dyncompile.training.Objective"),
        ({"directory": __file__}, r"`directory`: found .*test_training.py, a file"),
        ({"mode": "head"}, r"`mode`: found 'head'; expected one of \('heads', 'joint'\)"),
        ({"precision": "fp8"}, "`precision`: found 'fp8'"),
        ({"lr": 0}, "`lr`: found 0"),
        ({"patience": 0, "val": VAL}, "`patience`: found 0"),
        ({"patience": 1}, "`patience`: found 1; expected val_data beside it"),
        ({"resume": True}, "`directory`: found None"),
        ({"batch_size": 0}, "`batch_size`: found 0"),
        ({"batch_size": "a"}, "`batch_size`: found 'a'"),
        ({"epochs": None}, "`epochs`: found None"),
        ({"lr": "a"}, "`lr`: found 'a'; expected a number above 0"),
        ({"lr": math.inf}, "`lr`: found inf"),
        ({"seed": -1}, "`seed`: found -1; expected a whole number, at least 0"),
        ({"optimizer": "adam"}, "`optimizer`: found 'adam'; expected what makes one"),
        ({"directory": 3}, "`directory`: found 3; expected a path"),
        ({"max_epochs": 3}, "`max_epochs`: found an option of the Trainer; expected `epochs` in its place"),
        ({"accelerator": "tpuu"}, "`trainer_options`: found .*accelerator='tpuu'"),
        ({"nonsense": 1}, "`trainer_options`: found .*unexpected keyword argument 'nonsense'"),
    ],
)
def test_arguments_without_meaning_are_refused(dyn, options, message):
    with pytest.raises(ArgumentError, match=message):
        finetune(dyn, **options)


@pytest.mark.parametrize("argument", ["train_data", "val_data"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((TRAIN[0], TRAIN[1] + 1), r"found labels from 1 to 10; expected integers in \[0, 10\)"),
        ((TRAIN[0][:0], TRAIN[1][:0]), "found no samples"),
        ((np.where(TRAIN[0] > 0.9, np.nan, TRAIN[0]), TRAIN[1]), "NaN or infinite values in the"),
        ((TRAIN[0], TRAIN[1] / 2), "found targets of torch.float32; expected integer labels"),
        ((TRAIN[0], TRAIN[1][:, None]), r"found targets \[64, 1\] for predictions \[64, 10\]"),
    ],
)
def test_bad_data_is_refused_before_anything_changes(dyn, data, message, argument):
    before = state(dyn)
    both = {"train_data": TRAIN, "val_data": TRAIN, argument: data}
    with pytest.raises(DataError, match=message) as raised:
        finetune(dyn, both["train_data"], both["val_data"])
    assert raised.value.argument == argument
    assert not changed(dyn, before)


def test_bad_data_in_the_middle_of_a_loader_leaves_the_model_consistent(dyn):
    x = PROBE.clone()
    x[150] = torch.nan
    loader = DataLoader(TensorDataset(x, torch.tensor(VAL[1])), batch_size=20)
    dyn.eval()
    with pytest.raises(DataError, match="`train_data`: found NaN"):
        finetune(dyn, loader)
    assert not any(module.training for module in dyn.modules())
    assert all(parameter.requires_grad for parameter in dyn.parameters())


def test_a_last_batch_of_one_sample_is_told():
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    dyn = dc.dynamize(nn.Sequential(*layers), exits=1)
    loader = DataLoader(TensorDataset(torch.randn(9, 4), torch.arange(9) % 3), batch_size=4)
    with pytest.raises(DataError, match="`train_data`: found a batch of one sample, .*expected drop_last=True"):
        finetune(dyn, loader, mode="joint")


def test_a_model_with_nothing_to_train_is_refused(dyn):
    dyn.requires_grad_(False)
    with pytest.raises(ArgumentError, match="`mode`: found 'joint' for a model without parameters"):
        finetune(dyn, mode="joint")


def test_a_static_model_is_refused():
    with pytest.raises(ArgumentError, match="`dyn`: found a Sequential; expected what dyncompile.dyn"):
        finetune(mlp())


def test_a_missing_lightning_names_the_extra(dyn, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dyncompile\[train\]'"):
        finetune(dyn)


def test_a_missing_tensorboard_names_the_extra(dyn, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"`tensorboard` is needed"):
        finetune(dyn, directory=tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_example_of_an_own_loop_trains_its_exits(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_loop.py"))
    found = re.findall(r"(exit\d|final): accuracy (\d\.\d+) at (\d\.\d+)", capsys.readouterr().out)
    assert [name for name, _, _ in found] == ["exit0", "exit1", "final"]
    assert all(float(accuracy) > 0.8 for _, accuracy, _ in found)
    costs = [float(cost) for _, _, cost in found]
    assert costs == sorted(costs)
