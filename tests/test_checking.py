"""`dyncompile check`: what it finds, what it says of it, and what it does with bad input."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.checking import Baseline, Report, Result, Settings, check
from dyncompile.checking.baseline import Place, Refused, Snapshot, differences
from dyncompile.checking.contracts import (
    Run,
    gradient_reaches_every_parameter,
    lowered_equals_reference,
    skips_as_planned,
)
from dyncompile.checking.deciding import BATCHES, settle, switch_on
from dyncompile.checking.formats import annotations, to_junit
from dyncompile.errors import BaselineError
from dyncompile.passes import resolve

MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        # here
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

def mixing():
    return nn.Sequential(nn.Linear(4, 4), Mixing())

def inputs():
    return {"input": torch.randn(2, 1, 8, 8)}

def nothing():
    raise RuntimeError("no weights here")
"""
EDITED = MODEL.replace("# here", "nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),")
PASSES = """
import dataclasses
import torch
from torch import nn
from dyncompile.nn import Gate, build_estimator
from dyncompile.ops import SELECT
from dyncompile.passes import Pass, Site
from dyncompile.passes.base import find

class Policy(nn.Module):
    def __init__(self, spare):
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.spare = nn.Parameter(torch.zeros(3)) if spare else None

    def forward(self, x):
        return self.fc(x.mean((2, 3))).squeeze(1)

@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip(Pass):
    name = "skip"
    spare: bool = False

    def sites(self, graph):
        yield Site(name="gate0", node="_2")

    def rewrite(self, graph, site):
        conv = find(graph, site.node)
        gate = Gate(Policy(self.spare), estimator=build_estimator("gumbel"))
        decision, _ = graph.insert("gates.gate0", gate, [graph.main_input], ("decision", "probability"))
        users = list(conv.users)
        with graph.fx.inserting_after(conv):
            other = self.other(graph, conv)
        with graph.fx.inserting_after(conv if other is conv.args[0] else other):
            chosen = graph.fx.call_function(SELECT, (decision, conv, other))
        for user in users:
            user.replace_input_with(conv, chosen)

    def other(self, graph, conv):
        return conv.args[0]

class Uneven(Skip):
    name = "uneven"

    def other(self, graph, conv):
        return graph.fx.call_function(torch.ops.aten.mean.dim, (conv, [2, 3], True))

class Useless(Skip):
    name = "useless"

    def other(self, graph, conv):
        return graph.fx.call_function(torch.ops.aten.neg.default, (conv,))

class Drifting(Skip):
    name = "drifting"

    def rewrite(self, graph, site):
        final = graph.final
        with graph.fx.inserting_before(graph.output):
            new = graph.fx.call_function(torch.ops.aten.mul.Tensor, (final, 1.5))
        graph.output.args = ((new,),)

class Crashing(Skip):
    name = "crashing"

    def rewrite(self, graph, site):
        raise KeyError("nowhere")
"""
FAST = ("--no-export", "--input-shape", "1,8,8")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    (tmp_path / "models.py").write_text(MODEL)
    (tmp_path / "own.py").write_text(PASSES)
    return tmp_path


def flat(text):
    return " ".join(text.split())


def statuses(path):
    [conversion] = json.loads(Path(path).read_text())["conversions"]
    return {result["check"]: result["status"] for result in conversion["results"]}


# --- what it finds -------------------------------------------------------------------------------


def test_a_sound_conversion_passes_every_check(run, needs):
    needs("onnxruntime")
    given = ("-o", "exits=1", "--example-inputs", "models.py:inputs", "--json", "found.json")
    code, out, err = run("check", "models.py:model", *given)
    assert (code, err) == (0, "")
    assert "no check failed" in out
    assert json.loads(Path("found.json").read_text())["passed"]
    assert statuses("found.json") == dict.fromkeys(Settings().checks, "passed")


def test_what_a_model_prints_is_no_json(run, folder):
    (folder / "loud.py").write_text("from models import model\nprint('made')\n")
    code, out, err = run("check", "loud.py:model", *FAST, "-o", "exits=1", "--batch-size", "2", "--json", "-")
    assert code == 0
    assert json.loads(out)["passed"]
    assert "made" in err


def test_each_strategy_is_a_conversion_of_its_own(run):
    strategies = ("--strategy", "own.py:Skip,early_exit", "--strategy", "own.py:Skip")
    given = ("-o", "early_exit.exits=1", "-o", "own.py:Skip.spare=false", "--batch-size", "2", "--json", "-")
    code, out, err = run("check", "models.py:model", *FAST, *strategies, *given)
    assert code == 0
    assert "no check failed" in err
    found = json.loads(out)
    assert [conversion["strategy"] for conversion in found["conversions"]] == ["skip,early_exit", "skip"]
    assert [[site["name"] for site in c["snapshot"]["sites"]] for c in found["conversions"]] == [
        ["gate0", "exit0"],
        ["gate0"],
    ]
    assert found["conversions"][0]["snapshot"]["options"]["early_exit"]["exits"] == 1


@pytest.mark.parametrize(
    ("strategy", "failed", "message"),
    [
        (
            "own.py:Drifting",
            "exact at birth",
            "pass `drifting` changed the model's output in eval mode: `output` is off by up to",
        ),
        (
            "own.py:Skip -o spare=true",
            "gradient reaches every new parameter",
            "no gradient reaches `gates.gate0.policy.spare`: neither the predictions nor the expected cost hang on",
        ),
        (
            "own.py:Uneven",
            "rewrites",
            "site gate0 at `_2`: `arms`: found [3, 8, 1, 1] torch.float32 in arm 0 and [3, 8, 8, 8] torch.float32",
        ),
        ("own.py:Useless", "operations skipped as planned", "no decision saves any operation"),
        ("own.py:Crashing", "rewrites", "KeyError: 'nowhere'"),
        ("layer_skip", "rewrites", "pass `layer_skip` found no site: the graph offers none"),
    ],
)
def test_a_fault_fails_its_check_and_says_why(run, strategy, failed, message):
    options = ("--strategy", *strategy.split(), "--batch-size", "1", "--batch-size", "5", "--json", "found.json")
    code, out, err = run("check", "models.py:model", *FAST, *options)
    assert (code, err) == (1, "")
    assert message in flat(out)
    found = statuses("found.json")
    assert [name for name, status in found.items() if status == "failed"] == [failed]
    if failed in ("rewrites", "exact at birth"):
        assert found["lowered equals reference (eager)"] == "skipped"
        assert f"not checked, since `{failed}` failed" in flat(out)


def test_a_model_that_cannot_be_captured_fails(run):
    code, out, _ = run("check", "models.py:mixing", "--no-export", "--json", "found.json", "--strategy", "early_exit")
    assert code == 1
    assert "mixes the samples of a batch" in flat(out)
    found = statuses("found.json")
    assert found.pop("captures") == "failed"
    assert set(found.values()) == {"skipped"}


def test_an_edit_that_moves_sites_fails_until_the_baseline_is_updated(run, folder, needs):
    junitparser = needs("junitparser")
    given = ("check", "models.py:model", *FAST, "-o", "exits=1", "--batch-size", "2", "--baseline", "lock.json")
    code, _, err = run(*given)
    assert code == 2
    assert "no baseline lock.json: make it with --update" in err
    assert run(*given, "--update")[0] == 0
    assert run(*given)[0] == 0
    committed = Path("lock.json").read_bytes()

    (folder / "models.py").write_text(EDITED)
    code, out, _ = run(*given, "--github", "--junit", "junit.xml")
    assert code == 1
    moved = "`exit0` moved from `_1` in `1` to `_3` in `3`"
    assert moved in flat(out)
    assert "if this is meant, run again with --update and commit lock.json" in flat(out)
    [annotation] = [line for line in out.splitlines() if line.startswith("::error")]
    title = "title=dyncompile early_exit%3A sites as in the baseline::"
    assert annotation.startswith(f"::error file=models.py,line=5,{title}{moved}%0A")
    [suite] = junitparser.JUnitXml.fromfile("junit.xml")
    assert (suite.name, suite.failures, suite.tests) == ("models.py:model early_exit", 1, 7)
    assert Path("lock.json").read_bytes() == committed

    assert run(*given, "--update")[0] == 0
    assert run(*given)[0] == 0


def test_a_failing_conversion_leaves_its_baseline(run):
    given = ("check", "models.py:model", *FAST, "--strategy", "own.py:Useless", "--batch-size", "2")
    Baseline().updated("models.py:model", "useless", Snapshot(flops=1.0)).write(Path("lock.json"))
    before = Path("lock.json").read_bytes()
    code, out, _ = run(*given, "--baseline", "lock.json", "--update")
    assert code == 1
    assert "left as it was for useless, of which a check failed" in flat(out)
    assert Path("lock.json").read_bytes() == before


def test_inductor_is_checked_where_it_is_asked_for(run, monkeypatch):
    # What inductor compiles is tested elsewhere.
    asked = []

    def lower(dyn, backend, decline):
        asked.append((backend, decline))
        return dc.lower(dyn, backend="eager", decline=decline)

    monkeypatch.setattr("dyncompile.checking.conversion.lower", lower)
    given = ("-o", "exits=1", "--batch-size", "3", "--backend", "inductor", "--json", "found.json")
    assert run("check", "models.py:model", *FAST, *given)[0] == 0
    assert asked == [("inductor", False)]
    assert list(statuses("found.json"))[-1] == "lowered equals reference (inductor)"


def test_without_the_extra_the_export_is_skipped_with_the_reason(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    given = ("--input-shape", "1,8,8", "-o", "exits=1", "--batch-size", "2")
    code, out, _ = run("check", "models.py:model", *given)
    assert code == 0
    assert "`onnxruntime` is needed here and is not installed: pip install 'dyncompile[export]'" in flat(out)


# --- contracts -----------------------------------------------------------------------------------


def test_what_differs_and_what_runs_too_much_is_told():
    dyn = dc.dynamize(nn.Sequential(*[nn.Linear(8, 8), nn.ReLU()] * 2, nn.Linear(8, 3)), exits=1)
    settle(switch_on(dyn), dyn.examples(max(BATCHES)))
    fast = dc.lower(dyn, backend="eager", decline=False)
    good = {"batch": 7, "decided": "drawn decisions", "difference": "", "flops": 4e6, "planned": 4e6, "dense": 6e6}
    assert not lowered_equals_reference([Run(**good)])
    assert not skips_as_planned(fast, [Run(**good)])
    assert lowered_equals_reference([Run(**good | {"difference": "output `y` is off by up to 2"})]) == (
        "lowered, output `y` is off by up to 2 at batch size 7, with drawn decisions"
    )
    assert skips_as_planned(fast, [Run(**good | {"flops": 5e6})]) == (
        "5.000 MFLOPs ran and 4.000 are planned, of 6.000 if nothing is skipped, at batch size 7 with drawn decisions"
    )
    fast.plan.dense["exit0"] = "it draws random numbers"
    assert skips_as_planned(fast, [Run(**good)]) == "`exit0` skips nothing, since it draws random numbers"


def test_settled_knobs_divide_the_samples_and_lie_between_them(device):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
    dyn = dc.dynamize(nn.Sequential(*blocks, nn.Linear(8, 3)).to(device), exits=2)
    x = dyn.examples(33)
    settle(switch_on(dyn), x)
    with torch.no_grad():
        trace = dyn.trace(*x)
    for name, confidence in trace.confidence.items():
        assert 8 <= int(trace.decisions[name].sum()) <= 25
        assert float((confidence - dyn.exits[name].threshold).abs().min()) > 1e-6


def test_the_model_is_left_as_it_was(device):
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    model = model.to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = Settings(batches=(2,), export=False)
    [report] = check(model, [resolve("early_exit", {"exits": 1})], name="m", settings=settings)
    assert report.passed, report.failed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


class Block(nn.Module):
    """A residual block whose last norm sees other values where the layer before it is narrower."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8)]
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


def test_norms_of_an_arm_that_nobody_takes_at_birth_are_trained(device):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), Block(), *head).to(device)
    example = torch.randn(2, 3, 8, 8, device=device)
    dyn = dc.dynamize(model, ["channel_gate", "layer_skip"], example_inputs=example)
    assert any("arm0" in name for name, _ in dyn.named_parameters())
    assert not gradient_reaches_every_parameter(model, dyn)
    dyn.exits.register_parameter("spare", nn.Parameter(torch.zeros(1, device=device)))
    assert gradient_reaches_every_parameter(model, dyn).startswith("no gradient reaches `exits.spare`: neither")


# --- the baseline --------------------------------------------------------------------------------


def place(name, node, module, **data):
    return Place(strategy="p", name=name, node=node, module=module, data=data)


def test_differences_are_told_site_by_site():
    before = Snapshot(
        options={"p": {"k": 1}},
        flops=1,
        sites=[place("g0", "add_1", "a"), place("g1", "add_2", "b", role="x"), place("g2", "add_3", "c")],
        refused=[Refused(strategy="p", node="add_9", module="z", reason="too dear")],
        shares={"always": 0.5, "g0": 0.3},
    )
    assert not differences(before, before)
    # Nodes are numbered anew by every edit before them: that moves nothing.
    sites = [s.model_copy(update={"node": f"add_{i + 4}"}) for i, s in enumerate(before.sites)]
    assert not differences(before.model_copy(update={"sites": sites}), before)
    now = Snapshot(
        options={"p": {"k": 2}},
        flops=1,
        sites=[place("g0", "add_1", "b", role="y"), place("g1", "add_2", "d"), place("g3", "add_5", "e")],
        refused=[Refused(strategy="p", node=f"add_{i}", module=m, reason="no rows") for i, m in enumerate("uv")],
        shares={"always": 0.6, "g3": 0.3},
    )
    assert differences(now, before) == [
        "options of `p` are {'k': 2}; they were {'k': 1}",
        "`g1` at `add_2` in `b` is now called `g0`",
        "`g0` is gone; it was at `add_1` in `a`",
        "`g2` is gone; it was at `add_3` in `c`",
        "`g1` is new, at `add_2` in `d`",
        "`g3` is new, at `add_5` in `e`",
        "`p` no longer refuses `add_9` in `z`",
        "`p` now refuses `add_0` in `u`, `add_1` in `v`: no rows",
        "region `always` costs 60.0% of the static model; it was 50.0%",
        "region `g0` is gone",
        "region `g3` is new",
    ]
    changed = before.model_copy(update={"sites": [*before.sites[:1], place("g1", "add_2", "b", role="y")]})
    assert differences(changed, before)[0] == "`g1` at `add_2` in `b` has {'role': 'y'}; it had {'role': 'x'}"


def test_a_baseline_is_read_as_it_was_written(folder):
    path = folder / "lock.json"
    baseline = Baseline().updated("m", "b", Snapshot(flops=2)).updated("m", "a", Snapshot(flops=1))
    baseline.write(path)
    assert Baseline.read(path) == baseline
    assert list(baseline.models["m"]) == ["a", "b"]
    assert list(folder.glob(".lock*")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ('{"format": "dyncompile-lock", "version": 1, "models": {', "is no JSON"),
        ("[]", "is no baseline: it has no `format` 'dyncompile-lock'"),
        ('{"format": "dyncompile-recipe"}', "is no baseline"),
        ('{"format": "dyncompile-lock", "version": 99}', "has version 99; this dyncompile reads up to 1: upgrade it"),
        ('{"format": "dyncompile-lock", "version": "x"}', "is malformed: `version`"),
        (
            '{"format": "dyncompile-lock", "models": {"m": {"s": {}}}}',
            "is malformed: `models.m.s.flops`: Field required",
        ),
        ('{"format": "dyncompile-lock", "spam": 1}', "is malformed: `spam`"),
        ("\xff", "is no JSON"),
    ],
)
def test_a_malformed_baseline_is_refused(folder, text, message):
    path = folder / "lock.json"
    path.write_text(text)
    with pytest.raises(BaselineError, match=message):
        Baseline.read(path)


def test_a_write_that_fails_leaves_the_baseline(folder, monkeypatch):
    path = folder / "lock.json"
    path.write_text("before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Baseline().write(path)
    assert path.read_text() == "before"
    assert sorted(p.name for p in folder.iterdir()) == ["lock.json", "models.py", "own.py"]


# --- formats -------------------------------------------------------------------------------------


def test_formats_of_a_failure(needs):
    junitparser = needs("junitparser")
    results = [
        Result(check="captures", status="passed", seconds=1.5),
        Result(check="rewrites", status="failed", message="50% off:\na, b"),
        Result(check="export", status="skipped", message="no onnx"),
    ]
    report = Report(model="m.py:f", strategy="s,t", results=results)
    assert list(annotations(report, "a,b.py", 3)) == [
        "::error file=a%2Cb.py,line=3,title=dyncompile s%2Ct%3A rewrites::50%25 off:%0Aa, b"
    ]
    [suite] = junitparser.JUnitXml.fromstring(to_junit([report]).encode())
    assert [(case.name, [type(r).__name__ for r in case.result]) for case in suite] == [
        ("captures", []),
        ("rewrites", ["Failure"]),
        ("export", ["Skipped"]),
    ]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch.py:model"], "`model`: found no file nosuch.py"),
        (["models.py"], "`model`: found 'models.py'"),
        (["models.py:nothing"], "RuntimeError: no weights here"),
        (["models.py:model", "--strategy", "early_exits"], "did you mean 'early_exit'?"),
        (["models.py:model", "--strategy", "layer_skip,"], "found ''"),
        (["models.py:model", "--strategy", "early_exit,early_exit"], "a pass is applied once"),
        (["models.py:model", "--strategy", "own.py:Policy"], "found own.py:Policy, which fails"),
        (["models.py:model", "--strategy", "own.py:Skip", "-o", "spam=1"], "unexpected keyword argument 'spam'"),
        (["models.py:model", "--strategy", "early_exit,layer_skip", "-o", "exits=1"], "early_exit.exits=1"),
        (["models.py:model", "-o", "exits"], "`option`: found 'exits'"),
        (["models.py:model", "-o", "layer_skip.hidden=3"], "one of ['early_exit'] before the last dot"),
        (["models.py:model", "--input-shape", "1,x"], "`input_shape`: found '1,x'"),
        (["models.py:model", "--example-inputs", "models.py:none"], "has no attribute 'none'"),
        (["models.py:model", "--input-shape", "1,8,8", "--example-inputs", "models.py:inputs"], "one of the two"),
        (["models.py:model", "--backend", "abacus"], "`backend`: found 'abacus'"),
        (["models.py:model", "--update"], "`update`: found no --baseline"),
        (["models.py:model", "--baseline", "none.json"], "no baseline none.json"),
        (["models.py:model", "--baseline", "own.py"], "the baseline own.py is no JSON"),
        (["models.py:model", "--baseline", "own.py", "--update"], "the baseline own.py is no JSON"),
        (["models.py:model", "--junit", "none/junit.xml"], "whose folder is not there"),
        (["models.py:model", "--json", "."], "a folder"),
        (["models.py:model", "--json", "x", "--junit", "x"], "x twice"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(run, folder, arguments, message):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, out, err = run("check", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
