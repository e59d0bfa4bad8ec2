"""`assert_convertible` in the tests of a project, its baseline, and what the plug-in costs those that do not use it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dyncompile.errors import ArgumentError, BaselineError
from dyncompile.testing import assert_convertible

PROJECT = """
from torch import nn
from dyncompile.testing import assert_convertible

def model():
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(),
        nn.Linear(16, 32), nn.ReLU(),
        nn.Linear(32, 3),
    )

def test_model():
    given = dict(exits=1, name="mine", baseline="lock.json", batches=(2,), export=False)
    report = assert_convertible(model, "early_exit", **given)
    assert [site.name for site in report.snapshot.sites] == ["exit0"]
"""
EDITED = PROJECT.replace("nn.Linear(32, 3)", "nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)")
RUNS = """
import pytest
quick = ["-q", "-p", "no:hypothesispytest", "-p", "no:unraisableexception", "-p", "no:cacheprovider"]
runs = [["test_a.py"], ["test_a.py", "--dyncompile-update"], ["test_a.py"], ["test_b.py"]]
print([int(pytest.main(quick + run)) for run in runs])
"""


def model():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


def python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_project_commits_a_baseline_and_is_told_what_moved(tmp_path):
    (tmp_path / "test_a.py").write_text(PROJECT)
    (tmp_path / "test_b.py").write_text(EDITED)
    out = python(RUNS, tmp_path)
    assert out.splitlines()[-1] == "[1, 0, 0, 1]", out
    assert "BaselineError: no baseline lock.json: make it with --update (pytest: --dyncompile-update)" in out
    assert "AssertionError: mine by early_exit" in out
    assert "sites as in the baseline: `exit0` moved from `_1` in `1` to `_3` in `3`" in out
    assert "if this is meant, run `pytest --dyncompile-update` and commit lock.json" in out
    assert "torch.__trace" not in out
    committed = json.loads((tmp_path / "lock.json").read_text())
    assert committed["models"]["mine"]["early_exit"]["sites"][0]["module"] == "1"


def test_several_processes_do_not_write_one_baseline(tmp_path):
    if importlib.util.find_spec("xdist") is None:
        pytest.skip("needs xdist")
    out = python("import pytest; print(int(pytest.main(['--dyncompile-update', '-n', '2'])))", tmp_path)
    assert out.splitlines()[-1] == str(int(pytest.ExitCode.USAGE_ERROR))


def test_each_failure_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)Linear by early_exit\nrewrites: .*found no site"):
        assert_convertible(nn.Linear(8, 3), batches=(2,), export=False)
    with pytest.raises(ArgumentError, match="did you mean 'early_exit'"):
        assert_convertible(model, "early_exits")
    with pytest.raises(BaselineError, match="no baseline"):
        assert_convertible(model, baseline=tmp_path / "lock.json")


def test_a_model_is_named_by_its_class_or_its_maker(tmp_path, device):
    given = {"batches": (2,), "export": False, "exits": 1, "update": True, "baseline": tmp_path / "lock.json"}
    assert assert_convertible(model, **given).model == "test_pytest_plugin:model"
    inputs = torch.randn(2, 8, device=device)
    report = assert_convertible(model().to(device), example_inputs=inputs, **given)
    assert report.model == "torch.nn.modules.container:Sequential"
    written = json.loads(Path(given["baseline"]).read_text())["models"]
    assert sorted(written) == sorted([report.model, "test_pytest_plugin:model"])
    assert assert_convertible(model, **given | {"update": False}).passed


def test_the_plug_in_imports_no_torch(tmp_path):
    (tmp_path / "test_empty.py").write_text("def test(): pass\n")
    looked_for = {"torch", "dyncompile", "pytest_dyncompile"}
    out = python(f"import pytest, sys; pytest.main(['-q']); print({looked_for} & {{*sys.modules}})", tmp_path)
    assert out.splitlines()[-1] == "{'pytest_dyncompile'}", out
