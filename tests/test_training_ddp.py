"""Two processes train as one process does with the doubled batch.

Run as a script it is that training: `python test_training_ddp.py DIRECTORY`; Lightning starts it
again for the second process.
"""

import os
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401 - as a script: one thread, operators of torchvision
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dyncompile as dc

X = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def train(directory, **options):
    """Fine-tune everything, then the heads; returns the model and both results."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)]
    dyn = dc.dynamize(nn.Sequential(*layers), "early_exit", exits=1, example_inputs=X[:2])
    shared = {"lr": 1e-2, "progress": False, "accelerator": "cpu", **options}
    results = [
        dc.finetune(dyn, (X, Y), (X[:50], Y[:50]), epochs=2, mode="joint", patience=2, **shared),
        dc.finetune(dyn, TensorDataset(X, Y), epochs=2, directory=directory, **shared),
    ]
    return dyn, results


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in {"LOCAL_RANK", "WORLD_SIZE"}}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        check=False,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    dyn, results = train(tmp_path / "one", batch_size=16)
    for name, value in dyn.state_dict().items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name]), name
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=1e-4, atol=1e-6)
    for together, alone in zip(ranks[0]["history"], results, strict=True):
        for epoch, expected in zip(together, alone.history, strict=True):
            assert epoch == pytest.approx(expected, rel=1e-4)
    assert ranks[0]["history"] == ranks[1]["history"]
    assert {rank["processes"] for rank in ranks} == {2}
    assert (tmp_path / "two" / "last.ckpt").exists()


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    dyn, results = train(directory / "two", batch_size=8, devices=2, strategy="ddp")
    rank = torch.distributed.get_rank()
    found = {
        "state": dyn.state_dict(),
        "history": [list(result.history) for result in results],
        "processes": torch.distributed.get_world_size(),
    }
    torch.save(found, directory / f"{rank}.pt")
    torch.distributed.barrier()
