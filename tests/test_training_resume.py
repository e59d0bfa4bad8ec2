"""A run that was cut short and resumed ends where an uninterrupted one does.

Run as a script it is the run that gets killed: `python test_training_resume.py DIRECTORY`.
"""

import copy
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import conftest  # noqa: F401 - as a script: one thread, operators of torchvision
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dyncompile as dc
from dyncompile.errors import ArgumentError

X = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
Y = (X[:, :4].argmax(1)).long()
EPOCHS = 4


def convert():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3)]
    model = nn.Sequential(*layers, nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    return dc.dynamize(model, "early_exit", exits=1, example_inputs=X[:2])


class Deadly(TensorDataset):
    """Data in the middle of whose third epoch something happens."""

    def __init__(self, event):
        super().__init__(X, Y)
        self.event = event
        self.taken = 0

    def __getitem__(self, index):
        self.taken += 1
        if self.taken == int(2.5 * len(self)):
            self.event()
        noise = torch.rand(()) < 0.5  # an augmentation
        return X[index] * (1 + 0.1 * noise), Y[index]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def nothing():
    pass


def train(dyn, data, directory, **options):
    options = {"epochs": EPOCHS, "mode": "joint", "batch_size": 16, "progress": False, **options}
    return dc.finetune(dyn, data, (X[:32], Y[:32]), directory=directory, **options)


def assert_equal(dyn, other):
    for name, value in dyn.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.fixture(scope="module")
def born():
    return convert()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(born, tmp_path):
    killed = subprocess.run([sys.executable, __file__, str(tmp_path / "killed")], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    saved = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1  # counted from 0: two epochs were done, half of the third is lost
    whole, resumed = copy.deepcopy(born), convert()
    expected = train(whole, Deadly(nothing), tmp_path / "whole")
    result = train(resumed, Deadly(nothing), tmp_path / "killed", resume=True)
    assert_equal(whole, resumed)
    assert result.history == expected.history
    assert [epoch["epoch"] for epoch in result.history] == [1, 2, 3, 4]


def own_generator(dataset):
    generator = torch.Generator().manual_seed(5)
    return DataLoader(dataset, batch_size=16, shuffle=True, generator=generator)


LOADERS = {
    "dataset": lambda dataset: dataset,
    "shuffled": lambda dataset: DataLoader(dataset, batch_size=16, shuffle=True),
    "generator": own_generator,
    "workers": lambda dataset: DataLoader(dataset, batch_size=16, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("form", LOADERS)
def test_an_interrupted_run_resumes_to_the_same_result(born, tmp_path, form):
    make = LOADERS[form]
    whole, cut = copy.deepcopy(born).eval(), copy.deepcopy(born).eval()
    expected = train(whole, make(Deadly(nothing)), tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    options = {"callbacks": [interrupting()]} if form == "workers" else {}
    data = make(Deadly(nothing if options else interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(cut, data, tmp_path / "cut", **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(module.training for module in cut.modules())
    assert cut(X).isfinite().all()
    resumed = copy.deepcopy(born)
    torch.manual_seed(99)  # what was drawn before does not matter
    result = train(resumed, make(Deadly(nothing)), tmp_path / "cut", resume=True)
    assert_equal(whole, resumed)
    assert result.history == expected.history


def interrupting(epoch=2):
    """An interrupt from the keyboard in the middle of an epoch, from the training loop itself."""
    from lightning.pytorch import Callback

    class Interrupting(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == epoch and batch_idx == 1:
                raise KeyboardInterrupt

    return Interrupting()


def test_early_stopping_survives_a_resumption(born, tmp_path):
    options = {"lr": 0.05, "patience": 2, "epochs": 40}
    whole, cut = copy.deepcopy(born), copy.deepcopy(born)
    expected = train(whole, Deadly(nothing), tmp_path / "whole", **options)
    assert 3 < len(expected.history) < 40  # it stops, and after the interruption
    with pytest.raises(KeyboardInterrupt):
        train(cut, Deadly(interrupt), tmp_path / "cut", **options)
    resumed = copy.deepcopy(born)
    result = train(resumed, Deadly(nothing), tmp_path / "cut", resume=True, **options)
    assert (result.history, result.best_epoch) == (expected.history, expected.best_epoch)
    assert_equal(whole, resumed)
    again = train(resumed, Deadly(nothing), tmp_path / "cut", resume=True, **options)
    assert again.history == expected.history
    assert_equal(whole, resumed)


def test_resuming_what_is_finished_changes_nothing(born, tmp_path):
    dyn = copy.deepcopy(born)
    first = train(dyn, (X, Y), tmp_path)
    again = copy.deepcopy(born)
    assert train(again, (X, Y), tmp_path, resume=True).history == first.history
    assert_equal(dyn, again)


def test_without_a_checkpoint_a_resumption_starts(born, tmp_path):
    assert len(train(copy.deepcopy(born), (X, Y), tmp_path, resume=True).history) == EPOCHS


def test_not_resuming_starts_anew(born, tmp_path):
    first, second = copy.deepcopy(born), copy.deepcopy(born)
    train(first, (X, Y), tmp_path)
    assert len(train(second, (X, Y), tmp_path).history) == EPOCHS
    assert_equal(first, second)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_a_run_that_starts_anew_leaves_no_checkpoint_of_another(born, tmp_path):
    train(copy.deepcopy(born), (X, Y), tmp_path, epochs=2, lr=0.5)
    options = {"lr": 1e-3, "callbacks": [interrupting(epoch=0)]}
    with pytest.raises(KeyboardInterrupt):  # before its own first checkpoint
        train(copy.deepcopy(born), (X, Y), tmp_path, **options)
    whole, resumed = copy.deepcopy(born), copy.deepcopy(born)
    expected = train(whole, (X, Y), None, lr=1e-3)
    assert train(resumed, (X, Y), tmp_path, lr=1e-3, resume=True).history == expected.history
    assert_equal(whole, resumed)


def test_a_checkpoint_is_whole_or_the_one_before(born, tmp_path, monkeypatch):
    whole, cut = copy.deepcopy(born), copy.deepcopy(born)
    expected = train(whole, (X, Y), tmp_path / "whole")
    written = []
    save = torch.save

    def torn(checkpoint, file, *args, **kwargs):
        written.append(checkpoint)
        if len(written) == 5:  # the best and the last of two epochs, then half of a third
            file.write_bytes(b"PK\x03\x04")
            raise KeyboardInterrupt
        save(checkpoint, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", torn)
    # Nor is a checkpoint copied over the one before from another disk.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(KeyboardInterrupt):
        train(cut, (X, Y), tmp_path / "cut")
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.*")) == ["best.ckpt", "last.ckpt"]
    resumed = copy.deepcopy(born)
    assert train(resumed, (X, Y), tmp_path / "cut", resume=True).history == expected.history
    assert_equal(whole, resumed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "which cannot be read"),
        (lambda path: path.write_bytes(b""), "which cannot be read"),
        (lambda path: path.write_text("notes"), "which cannot be read"),
        (lambda path: torch.save({"state_dict": {}}, path), "not of `finetune`"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused(born, tmp_path, damage, message):
    torch.save({"dyncompile": {}, "state_dict": {"x": torch.zeros(999)}}, tmp_path / "last.ckpt")
    damage(tmp_path / "last.ckpt")
    dyn = copy.deepcopy(born)
    with pytest.raises(ArgumentError, match=rf"`directory`: found .*last.ckpt, {message}.*resume=False"):
        train(dyn, (X, Y), tmp_path, resume=True)
    assert_equal(dyn, born)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "heads"}, "`mode`: found 'heads'; expected 'joint', with which the checkpoint"),
        ({"seed": 1}, "`seed`: found 1; expected 0"),
        ({"lr": 1.0}, "`lr`: found 1.0; expected 0.002, with which the checkpoint was made"),
        ({"epochs": 1}, "`epochs`: found 1; expected at least the 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(born, tmp_path, options, message):
    train(copy.deepcopy(born), (X, Y), tmp_path, epochs=2)
    with pytest.raises(ArgumentError, match=message):
        train(copy.deepcopy(born), (X, Y), tmp_path, resume=True, **options)


def test_a_checkpoint_of_another_model_is_refused(born, tmp_path):
    train(copy.deepcopy(born), (X, Y), tmp_path, epochs=1)
    other = dc.dynamize(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        "early_exit",
        exits=1,
        example_inputs=X[:2],
    )
    with pytest.raises(ArgumentError, match="`directory`: found a checkpoint of another model"):
        train(other, (X, Y), tmp_path, resume=True)


if __name__ == "__main__":
    train(convert(), Deadly(die), Path(sys.argv[1]))
