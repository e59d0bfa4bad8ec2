"""Passes of other packages: how they are found, what is said of broken ones, and that the contracts run on them."""

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

import dyncompile as dc
from dyncompile.cli import app
from dyncompile.errors import PassError, UnknownStrategyError
from dyncompile.passes import available, registered

EXAMPLES = Path(__file__).parent.parent / "examples"
MODULE = """
from dyncompile.passes.early_exit import EarlyExit

class Late(EarlyExit):
    name = "late"
    summary = "exits, but later"
    paper = "2601.00001"

class Nameless(EarlyExit):
    paper = None

not_a_pass = 3
"""
ENTRY_POINTS = """
[dyncompile.passes]
late = others:Late
early_exit = others:Late
gone = others:Gone
missing = no_such_module:Pass
number = others:not_a_pass
mistaken = others:Late
nameless = others:Nameless
"""
BROKEN = {
    "early_exit": "`dyncompile` registers a pass of that name already",
    "gone": "`others:Gone` cannot be loaded (AttributeError: module 'others' has no attribute 'Gone')",
    "missing": "`no_such_module:Pass` cannot be loaded (ModuleNotFoundError: No module named 'no_such_module')",
    "number": "`others:not_a_pass` is no subclass of dyncompile.passes.Pass",
    "mistaken": "`others:Late` calls itself `late`, not `mistaken` as its entry point",
    "nameless": "`others:Nameless` has no `paper`",
}


@pytest.fixture
def others(tmp_path, monkeypatch):
    """A package with one pass that is sound and several that are not."""
    (tmp_path / "others.py").write_text(MODULE)
    info = tmp_path / "others-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("others", None)


def test_a_pass_of_another_package_is_used_by_its_name(others, device):
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    dyn = dc.dynamize(nn.Sequential(*layers).to(device), "late", exits=1)
    assert dyn.recipe.steps[0].strategy == "late"


def test_broken_passes_are_shown_with_the_reason_and_harm_no_other(others):
    found = {(one.name, one.package): one.broken for one in registered()}
    assert {name: why for (name, package), why in found.items() if package == "others" and why} == BROKEN
    assert not found["early_exit", "dyncompile"]
    assert available()["early_exit"].__module__ == "dyncompile.passes.early_exit"
    assert "late" in available()
    assert not {"gone", "missing", "number", "mistaken", "nameless"} & set(available())
    with pytest.raises(UnknownStrategyError, match=r"'gone', which is broken in `others`; expected a pass, but .*Gone"):
        dc.dynamize(nn.Linear(2, 2), "gone")


def test_passes_lists_them(run, others, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = run("passes", "--json")
    assert (code, err) == (0, "")
    listed = {(row["name"], row["package"]): row for row in json.loads(out)}
    assert listed["early_exit", "dyncompile"]["paper"] == "1709.01686"
    assert listed["late", "others"] == {
        "name": "late",
        "package": "others",
        "version": "2.1",
        "summary": "exits, but later",
        "paper": "2601.00001",
        "broken": None,
    }
    assert listed["gone", "others"]["broken"] == BROKEN["gone"]
    assert listed["gone", "others"]["summary"] is None

    code, out, _ = run("passes")
    assert code == 0
    for name in available():
        assert name in out
    assert "broken: `no_such_module:Pass` cannot be loaded" in " ".join(out.split())


def test_the_pass_of_the_tutorial_keeps_the_contracts(run, tmp_path, monkeypatch):
    # Its export is checked where the example runs.
    monkeypatch.chdir(tmp_path)
    given = ("--strategy", f"{EXAMPLES / 'own_pass.py'}:Glance", "-o", "width=4", "--no-export", "--json", "found.json")
    code, _, _ = run("check", "dyncompile.demo.models:resnet20", "--input-shape", "3,16,16", *given)
    [conversion] = json.loads((tmp_path / "found.json").read_text())["conversions"]
    assert {result["status"] for result in conversion["results"]} == {"passed"}
    assert code == 0


def test_the_pass_of_the_tutorial_says_where_it_does_not_fit():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from own_pass import Glance
    finally:
        sys.path.pop(0)
    with pytest.raises(PassError, match=r"from \[1, 8\] to \[1, 3\] and 1 outputs, not from images to classes"):
        dc.dynamize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), Glance())
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(PassError, match="a glance costs .* FLOPs, the model"):
        dc.dynamize(small, Glance(), example_inputs=torch.randn(2, 3, 8, 8))


def test_the_workflow_runs_commands_that_exist(needs):
    yaml = needs("yaml")
    workflow = yaml.safe_load((EXAMPLES / "ci" / "dyncompile.yml").read_text())
    steps = workflow["jobs"]["check"]["steps"]
    runs = [step["run"].split() for step in steps if step.get("run", "").startswith("dyncompile ")]
    group = typer.main.get_command(app)
    parsed = {}
    for _, name, *arguments in runs:
        command = group.commands[name]
        parsed[name] = command.make_context(name, arguments).params
    assert set(workflow["on"]) == {"push", "pull_request"}
    assert parsed["check"]["strategy"] == ["early_exit", "layer_skip,early_exit"]
    assert str(parsed["check"]["baseline"]) == "dyncompile.lock.json"
    [upload] = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert upload["with"]["path"].split() == [str(parsed["check"]["junit"]), str(parsed["check"]["json"])]
    installed = next(step["run"] for step in steps if "pip install" in step.get("run", ""))
    project = (EXAMPLES.parent / "pyproject.toml").read_text()
    for extra in installed.partition("[")[2].partition("]")[0].split(","):
        assert f"\n{extra} = [" in project
