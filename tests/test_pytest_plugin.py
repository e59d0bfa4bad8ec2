"""`assert_convertible` in the tests of a project, its baseline, and what the plug-in costs those that do not use it."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dyncompile.errors import ArgumentError
from dyncompile.testing import assert_convertible

pytest_plugins = ["pytester"]

PROJECT = """
import torch
from torch import nn
from dyncompile.testing import assert_convertible

def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(),
        nn.Linear(16, 32), nn.ReLU(),
        nn.Linear(32, 3),
    )

def test_model():
    report = assert_convertible(model, "early_exit", exits=1, baseline="lock.json", batches=(2,), export=False)
    assert [site.name for site in report.snapshot.sites] == ["exit0"]
"""


def model():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


@pytest.fixture
def project(pytester):
    # What a run inside of this run imports it forgets, and torch takes no module twice.
    assert_convertible(model(), "early_exit", exits=1, batches=(2,), export=False)
    pytester.makepyfile(test_project=PROJECT)
    # With torch in memory, collecting garbage at the end of each run takes seconds.
    return functools.partial(pytester.runpytest_inprocess, "-p", "no:unraisableexception")


def test_a_project_commits_a_baseline_and_is_told_what_moved(project, pytester):
    missing = project()
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*BaselineError: no baseline lock.json: make it with --update *"])
    project("--dyncompile-update").assert_outcomes(passed=1)
    committed = (pytester.path / "lock.json").read_bytes()
    project().assert_outcomes(passed=1)

    edited = PROJECT.replace("nn.Linear(32, 3)", "nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)")
    pytester.makepyfile(test_project=edited)
    moved = project()
    moved.assert_outcomes(failed=1)
    moved.stdout.fnmatch_lines(
        [
            "E *AssertionError: test_project:model by early_exit",
            "E *sites as in the baseline: `exit0` moved from `_?` in `?` to `_?` in `?`",
            "E *if this is meant, run `pytest --dyncompile-update` and commit lock.json",
        ]
    )
    assert (pytester.path / "lock.json").read_bytes() == committed


def test_several_processes_do_not_write_one_baseline(project, needs):
    needs("xdist")
    refused = project("--dyncompile-update", "-n", "2")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--dyncompile-update: several processes would overwrite each other's baseline*"])


def test_each_failure_is_named():
    with pytest.raises(AssertionError, match=r"(?s)Linear by early_exit\nrewrites: .*found no site"):
        assert_convertible(nn.Linear(8, 3), batches=(2,), export=False)
    with pytest.raises(ArgumentError, match="did you mean 'early_exit'"):
        assert_convertible(model, "early_exits")


def test_a_model_is_named_by_its_class_or_its_maker(tmp_path, device):
    given = {"batches": (2,), "export": False, "exits": 1, "update": True, "baseline": tmp_path / "lock.json"}
    assert assert_convertible(model, **given).model == "test_pytest_plugin:model"
    inputs = torch.randn(2, 8, device=device)
    report = assert_convertible(model().to(device), example_inputs=inputs, name="mine", **given)
    assert report.model == "mine"
    assert Path(given["baseline"]).read_text().count('"early_exit": {\n    "options"') == 2


def test_the_plug_in_imports_no_torch(tmp_path):
    (tmp_path / "test_empty.py").write_text("def test(): pass\n")
    code = (
        "import pytest, sys; pytest.main(['-q']); print({'torch', 'dyncompile', 'pytest_dyncompile'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "{'pytest_dyncompile'}", done.stdout + done.stderr
