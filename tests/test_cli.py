"""The command line: a whole way through it, and what it says to bad input."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file

MODELS = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

def fixed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 12 * 10, 2),
    )

def number():
    return 3

def broken():
    raise RuntimeError("no weights here")

def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    return "models.py:model"


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "inspect", "convert", "finetune", "calibrate", "bench", "check", "passes"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0
        assert "Usage" in text


@torch._dynamo.config.patch(disable=True)
def test_from_convert_to_bench(run, model, needs, device):
    # Whether inductor is fast is measured elsewhere; here its forms run uncompiled.
    needs("sklearn")
    needs("lightning")
    shape = ("--input-shape", "1,16,16")
    code, out, err = run("convert", model, "dyn", "-o", "exits=1", *shape)
    assert (code, err) == (0, "")
    assert "exit0" in out
    steps = json.loads(Path("dyn/recipe.json").read_text())["steps"]
    assert [step["options"]["exits"] for step in steps] == [1]

    on = ("--device", device)
    assert run("finetune", model, "dyn", "--epochs", "1", *on)[0] == 0
    code, out, _ = run("calibrate", model, "dyn", "--max-drop", "0.2", "--report", "report.html", *on)
    assert code == 0
    assert "exit0" in out
    assert "<html" in Path("report.html").read_text()
    assert "exit0" in run("inspect", model, "dyn")[1]
    code, out, _ = run("bench", model, "dyn", "--backend", "eager", "--repeats", "1", "--batch-size", "64", *on)
    assert code == 0
    assert "dynamic, lowered" in out


KILLED = """
import os, signal
import torch

from dyncompile.training.checkpoints import WholeCheckpoints

save = WholeCheckpoints.save_checkpoint

def kill(self, checkpoint, path, storage_options=None):
    save(self, checkpoint, path, storage_options)
    if checkpoint["epoch"] == 1 and path.endswith("last.ckpt"):
        os.kill(os.getpid(), signal.SIGKILL)

WholeCheckpoints.save_checkpoint = kill
"""


@pytest.mark.slow
def test_fine_tuning_that_is_killed_is_resumed(run, model, needs, tmp_path):
    needs("sklearn")
    needs("lightning")
    assert run("convert", model, "dyn", "-o", "exits=1", "--input-shape", "1,16,16")[0] == 0
    shutil.copytree("dyn", "whole")
    arguments = ("--epochs", "3", "--mode", "joint")
    here = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import conftest\n{KILLED}"
    code += f"from dyncompile.cli import main\nmain(['finetune', {model!r}, 'dyn', *{arguments!r}])"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert run("finetune", model, "dyn", *arguments, "--resume")[0] == 0
    assert run("finetune", model, "whole", *arguments)[0] == 0
    resumed, whole = (load_file(f"{folder}/model.safetensors") for folder in ("dyn", "whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert len(Path("dyn/finetune/csv/version_1/metrics.csv").read_text().splitlines()) > 1  # it went on


def test_data_come_in_the_shape_that_the_model_was_captured_with(run, model, needs):
    image = needs("PIL.Image")
    needs("sklearn")
    needs("lightning")
    for label, name in enumerate(("dark", "light")):
        Path("pictures", name).mkdir(parents=True)
        for index in range(20):
            picture = np.full((16, 9, 3), 200 * label + index, np.uint8)
            image.fromarray(picture).save(f"pictures/{name}/{index}.png")
    assert run("convert", "models.py:fixed", "dyn", "-o", "exits=1", "--input-shape", "3,12,10")[0] == 0
    assert run("finetune", "models.py:fixed", "dyn", "--epochs", "1", "--data", "imagefolder:pictures")[0] == 0
    for command in ("finetune", "calibrate", "bench"):
        code, _, err = run(command, "models.py:fixed", "dyn", "--data", "digits")
        assert code == 1
        assert err == (
            "error: `data`: found images [1, 16, 16] in digits; expected [3, 12, 10], as the model was captured with\n"
        )


def test_inspect_shows_what_convert_would_do(run, model):
    code, out, _ = run("inspect", model, "--input-shape", "1,16,16")
    assert code == 0
    assert "exit0" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "models.py", "out"], "error: `model`: found 'models.py'; expected package"),
        (["convert", "none.py:model", "out"], "error: `model`: found no file none.py"),
        (["convert", "models.py:none", "out"], "has no attribute 'none'"),
        (["convert", "models.py:broken", "out"], "RuntimeError: no weights here"),
        (["convert", "models.py:leaves", "out"], "models.py:leaves, which fails (SystemExit: 0)"),
        (["convert", "models.py:number", "out"], "found a int from models.py:number"),
        (["convert", "no.such.module:model", "out"], "No module named 'no'"),
        (
            ["convert", "models.py:model", "out", "--input-shape", "3,x"],
            "`input_shape`: found '3,x'",
        ),
        (["convert", "models.py:model", "out", "-o", "exits"], "`option`: found 'exits'"),
        (["convert", "models.py:model", "out", "--strategy", "early_exits"], "early_exit"),
        (["convert", "models.py:model", "."], "`out`: found ., which exists"),
        (
            ["calibrate", "models.py:model", "out", "--report", "models.py"],
            "`report`: found models.py",
        ),
        (["finetune", "models.py:model", "none"], "none"),
        (["bench", "models.py:model", "none"], "none"),
        (["demo", "--out", "."], "`out`: found ., which exists"),
        (["demo", "--data", "letters"], "`data`: found 'letters'"),
        (["demo", "--data", "none.py:images"], "`data`: found no file none.py"),
        (["demo", "--device", "abacus"], "`device`: found 'abacus'"),
        (["demo", "--max-drop", "0"], "`max_drop`: found 0.0; expected between 0 and 1"),
        (["demo", "--confidence", "1"], "`confidence`: found 1.0; expected between 0 and 1"),
        (["demo", "--seed", "-1"], "`seed`: found -1; expected a whole number, at least 0"),
        (["demo", "--data", "imagefolder:none"], "`data`: found no folder none"),
        (["demo", "--depth", "19"], "`depth`: found 19; expected 6n + 2"),
    ],
)
def test_bad_input_is_one_line(run, model, tmp_path, needs, arguments, message):
    needs("sklearn")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*") if "pycache" not in str(path)) == before


def test_a_file_imports_what_lies_beside_it(run, tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "beside_it.py").write_text(MODELS)
    (folder / "models.py").write_text("from beside_it import model")
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "models/models.py:model", "--input-shape", "1,8,8")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["demo", "--epochs", "0"],
        ["calibrate", "m.py:f", "out", "--max-drop", "1.5"],
        ["finetune", "m.py:f", "out", "--mode", "tails"],
    ],
)
def test_wrong_usage_exits_with_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage" in err
