"""What an exported file holds, how it is written, and what is refused."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from exiting import Net, Tokens
from profiling import profiled
from test_cli import MODELS as CLI_MODELS
from torch import nn

import dyncompile as dc
from dyncompile.calibration.beside import read_beside
from dyncompile.checking.deciding import settle
from dyncompile.cli import main
from dyncompile.demo.datasets import load
from dyncompile.demo.factory import make
from dyncompile.demo.models import ResNet
from dyncompile.errors import ArgumentError, ExportError, LoweringError, RecipeError
from dyncompile.exporting import checking, files, set_knobs
from dyncompile.exporting.stages import StagedModel
from dyncompile.passes.frame_skip import FrameSkip


@pytest.fixture
def dyn():
    dyn = dc.dynamize(Net(), "early_exit", exits=2, example_inputs=torch.randn(2, 3, 8, 8)).eval()
    for exit_ in dyn.exits.values():
        exit_.enabled.fill_(True)
    settle(dyn, (torch.randn(64, 3, 8, 8),))
    return dyn


def tensors(graph):
    """Initialisers of a graph and of those inside, by name."""
    found = {t.name: t for t in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                inner = tensors(attribute.g)
                assert not found.keys() & inner.keys()
                found.update(inner)
    return found


def convolutions(path, x, folder):
    """Rows that each convolution saw."""
    return [given[0][0] for kind, given, _ in profiled(path, {"x": x}, folder)[1] if kind == "Conv"]


def test_a_file_says_what_it_is_and_its_knobs_turn(dyn, tmp_path):
    for name, exit_ in dyn.exits.items():
        exit_.threshold.fill_(1.0)
        exit_.temperature.fill_(1.0)
        assert bool(dyn.exits[name].enabled)
    path = dc.export(dyn, tmp_path / "model.onnx", decisions=True)
    model = onnx.load(path)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    assert model.opset_import[0].version == 20
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(held["dyncompile.recipe"])["steps"][0]["strategy"] == "early_exit"
    assert json.loads(held["dyncompile.costs"])["exits"] == pytest.approx(dyn.exit_costs())
    # Six numbers that are all 1, and none of them merged with another.
    top = {t.name for t in model.graph.initializer}
    assert {f"exits.{e}.{k}" for e in dyn.exits for k in ("threshold", "temperature", "enabled")} <= top

    x = torch.randn(20, 3, 8, 8)
    assert convolutions(path, x, tmp_path) == [20] * 5
    for settings, rows in (
        ({"exit1": 0.0}, [20, 20, 20, 20]),
        ({"exit0": 0.0}, [20, 20]),
        ({"exits.exit0.enabled": False}, [20, 20, 20, 20]),
    ):
        now = set_knobs(path, settings)
        assert all(now[n] == v for n, v in settings.items() if n in now)
        assert len(convolutions(path, x, tmp_path)) == len(rows)


def test_rows_that_leave_are_not_computed(dyn, tmp_path):
    x = torch.randn(20, 3, 8, 8)
    trace = dyn.trace(x)
    stay = [20 - int(trace.decisions["exit0"].sum())]
    stay.append(int((~trace.decisions["exit0"] & ~trace.decisions["exit1"]).sum()))
    assert 20 > stay[0] > stay[1] > 0
    for routing, rows in (("sample", stay), ("batch", [20, 20])):
        path = dc.export(dyn, tmp_path / "model.onnx", routing=routing)
        ran = convolutions(path, x, tmp_path)
        assert sorted(set(ran)) == sorted({20, *rows})
        assert len(ran) == 5


def test_each_weight_is_written_once_and_large_ones_beside(dyn, tmp_path, monkeypatch):
    path = dc.export(dyn, tmp_path / "model.onnx")
    held = [t for t in tensors(onnx.load(path).graph).values() if len(t.dims) == 4]
    assert sorted(tuple(t.dims) for t in held) == sorted(
        tuple(m.weight.shape) for m in dyn.modules() if isinstance(m, nn.Conv2d)
    )
    whole = path.stat().st_size
    monkeypatch.setattr(files, "LIMIT", 1000)
    for _ in range(2):
        dc.export(dyn, path)
        assert len(list(tmp_path.glob("*.data"))) == 1
        assert path.stat().st_size < whole
    set_knobs(path, {"exit0": 0.25})
    run = checking.running(checking.session(path))
    x = torch.randn(5, 3, 8, 8)
    dyn.exits["exit0"].threshold.fill_(0.25)
    assert not checking.differences(run({"x": x.numpy()}), dyn, [x])
    monkeypatch.undo()
    dc.export(dyn, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_a_weight_that_is_tied_is_one(tmp_path):
    model = Tokens()
    model.layers[2] = model.layers[0]
    ids, mask = torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    dyn = dc.dynamize(model.eval(), "layer_skip", example_inputs=(ids, mask)).eval()
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    graph = onnx.load(dc.export(dyn, tmp_path / "tied.onnx")).graph
    wide = [t for t in tensors(graph).values() if sorted(t.dims) == [16, 32]]
    assert len(wide) == 4


def test_stages_decide_and_compute_what_the_model_does(dyn, tmp_path):
    path = dc.export(dyn, tmp_path / "stages", routing="stages")
    staged = StagedModel(path)
    for batch in (1, 7, 33):
        x = torch.randn(batch, 3, 8, 8)
        found = staged(x=x.numpy())
        assert not checking.differences(found, dyn, [x])
        left = torch.stack([*dyn.trace(x).decisions.values(), torch.ones(batch, dtype=torch.bool)])
        np.testing.assert_array_equal(found["exit"], left.int().argmax(0))
        fast = dc.lower(dyn, backend="eager", decline=False)
        fast(x)
        assert staged.last_run == fast.last_run
    nothing = staged(x=np.empty((0, 3, 8, 8), np.float32))
    assert [nothing[name].shape for name in ("output", "exit", "decisions.exit1")] == [(0, 5), (0,), (0,)]
    set_knobs(path, {"exit0": 0.0})
    assert StagedModel(path)(x=x.numpy())["exit"].max() == 0
    manifest = json.loads((path / "manifest.json").read_text())
    for broken, why in (({**manifest, "version": 9}, "up to 1: upgrade"), ({**manifest, "root": 1}, "corrupt: `root`")):
        (path / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(ExportError, match=why):
            StagedModel(path)
    with pytest.raises(ExportError, match=r"no manifest\.json in it"):
        StagedModel(tmp_path)


@pytest.mark.parametrize("routing", ["sample", "stages"])
def test_an_exit_keeps_its_number_where_one_before_it_is_disabled(dyn, tmp_path, routing):
    dyn.exits["exit0"].enabled.fill_(False)
    path = dc.export(dyn, tmp_path / ("model.onnx" if routing == "sample" else "stages"), routing=routing,
                     decisions=routing == "sample")  # fmt: skip
    x = torch.randn(20, 3, 8, 8)
    inputs = {"x": x.numpy()}
    found = StagedModel(path)(**inputs) if routing == "stages" else checking.running(checking.session(path))(inputs)
    left = dyn.trace(x).decisions["exit1"]
    assert 0 < int(left.sum()) < 20
    np.testing.assert_array_equal(found["exit"], torch.where(left, 1, 2).numpy())


def test_what_differs_leaves_what_was_there(dyn, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("before")
    monkeypatch.setattr(checking, "differences", lambda *_: "output `y` is off by up to 3")
    for target, options in ((path, {}), (tmp_path / "model.pt2", {}), (tmp_path / "folder", {"routing": "stages"})):
        with pytest.raises(ExportError, match="computes something else at batch size .: output `y` is off by up to 3"):
            dc.export(dyn, target, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "before"


def test_what_cannot_be_exported_is_refused(dyn, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    for path, options, why in (
        ("model.onnx", {"routing": "stages"}, "a folder for routing='stages'"),
        ("folder", {}, r"else \*\.onnx"),
        ("model.onnx", {"routing": "rows"}, "found 'rows'"),
        ("model.pt2", {"decisions": True}, "only ONNX files"),
        ("model.pt2", {"routing": "stages"}, "a folder for routing='stages'"),
        ("", {"routing": "stages"}, "a folder of something else"),
    ):
        with pytest.raises(ArgumentError, match=why):
            dc.export(dyn, tmp_path / path, **options)
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(ArgumentError, match="what `dyncompile.dynamize` returned"):
        dc.export(nn.Linear(2, 2), tmp_path / "model.onnx")
    with pytest.raises(LoweringError, match="training mode"):
        dc.export(dyn.train(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projection_is_refused_with_a_way_out(tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(6, 8, proj_size=4, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0][:, -1]

    dyn = dc.dynamize(Reader().eval(), FrameSkip(), example_inputs=torch.randn(2, 5, 6)).eval()
    dyn.gates["frames0"].enabled.fill_(True)
    with pytest.raises(ExportError, match=r"LSTM with projections.*export to \*\.pt2, or disable its gate"):
        dc.export(dyn, tmp_path / "model.onnx")


def test_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(CLI_MODELS)
    assert run("convert", "models.py:model", "out", "--input-shape", "1,8,8", "-o", "exits=1")[0] == 0
    code, out, _ = run("export", "models.py:model", "out", "model.onnx", "--decisions")
    assert (code, "no exit or gate is enabled, calibrate first" in out) == (0, True)
    before = (tmp_path / "model.onnx").read_bytes()
    code, _, error = run("export", "models.py:model", "out", "model.onnx")
    assert (code, "model.onnx, which exists" in error) == (1, True)
    # A disabled exit is left out: there is nothing to set.
    code, _, error = run("set-threshold", "model.onnx", "exit0=0.5")
    assert (code, "no exit or gate was enabled" in error) == (1, True)
    assert (tmp_path / "model.onnx").read_bytes() == before


def test_the_calibration_of_a_saved_model_is_in_its_file_until_the_model_is_saved_anew(tmp_path, monkeypatch, needs):
    needs("sklearn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(CLI_MODELS)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments[:1], "models.py:model", "out", *arguments[1:]])
        assert not stopped.value.code

    def kept():
        run("export", "model.onnx", "--force")
        return {entry.key: entry.value for entry in onnx.load("model.onnx").metadata_props}.get(
            "dyncompile.calibration"
        )

    run("convert", "--input-shape", "1,16,16", "-o", "exits=1")
    run("calibrate", "--max-drop", "0.9")
    assert json.loads(kept())["max_drop"] == 0.9
    dyn = dc.load("out", make("models.py:model", nn.Module, argument="model"))
    with torch.no_grad():
        next(dyn.parameters()).mul_(2)
    dc.save(dyn, "out")
    assert kept() is None
    (tmp_path / "out" / "calibration.json").write_text("[]")
    with pytest.raises(RecipeError, match=r"calibration\.json is corrupt: TypeError"):
        read_beside(tmp_path / "out")


def test_thresholds_are_set_or_nothing_is(dyn, tmp_path, capsys, monkeypatch):
    path = dc.export(dyn, tmp_path / "model.onnx")
    (tmp_path / "link.onnx").symlink_to(path)
    before = path.read_bytes()
    (tmp_path / "other.onnx").write_text("no model")
    for arguments, why in (
        ((path, "exit9=0.5"), "found 'exit9'"),
        ((path, "exit0=0.5", "exit1=high"), "'exit1=high'"),
        ((path, "exit0=0.5", "exit1.enabled=0.5"), "true or false"),
        ((path, "exit0.temperature=0"), "a temperature above 0"),
        ((path, "exit0.temperature=1e-60"), "a temperature above 0"),
        ((path, "exit0.temperature=1e60"), "a finite number"),
        ((path, "exit0=nan"), "a finite number"),
        ((path, "exit0=1.01"), r"a number in [0, 1]"),
        ((path, "exit0=0.5", "exit0=0.6"), "'exit0' twice"),
        ((path, "exit0=0.5", "exits.exit0.threshold=0.6"), "'exits.exit0.threshold' twice"),
        ((tmp_path / "other.onnx", "exit0=0.5"), "no ONNX model"),
        ((tmp_path / "none.onnx", "exit0=0.5"), "no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["set-threshold", *map(str, arguments)])
        assert stopped.value.code == 1
        assert why in capsys.readouterr().err
    with pytest.raises(ExportError, match=r"no manifest\.json in it"):
        set_knobs(tmp_path, {"exit0": 0.5})
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda *_: False)  # the tests may be run by root, who may write anything
        with pytest.raises(ExportError, match="is read-only"):
            set_knobs(path, {"exit0": 0.5})
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.onnx", "model.onnx", "other.onnx"]
    path.chmod(0o640)
    with pytest.raises(SystemExit):
        main(["set-threshold", str(tmp_path / "link.onnx"), "exit1=.8", "exit0.enabled=False"])
    assert "exits.exit1.threshold = 0.8" in capsys.readouterr().out
    assert set_knobs(path, {})["exits.exit0.enabled"] is False
    assert (path.stat().st_mode & 0o777, (tmp_path / "link.onnx").is_symlink()) == (0o640, True)


def test_stages_decide_a_thousand_real_images_as_the_lowered_model_does(tmp_path, needs):
    needs("sklearn")
    images = load("digits", seed=0, shape=(1, 8, 8))
    x = torch.cat([images.train.tensors[0], images.test.tensors[0]])[:1000]
    torch.manual_seed(0)
    model = ResNet(8, width=8, in_channels=1).eval()
    dyn = dc.dynamize(model, ["layer_skip", "early_exit"], example_inputs=x[:3]).eval()
    for module in (*dyn.exits.values(), *dyn.gates.values()):
        module.enabled.fill_(True)
    settle(dyn, (x,))
    found = StagedModel(dc.export(dyn, tmp_path / "stages", routing="stages"))(x=x.numpy())
    assert not checking.differences(found, dyn, [x])
    fast = dc.lower(dyn, backend="eager", decline=False)
    torch.testing.assert_close(torch.from_numpy(found["output"]), fast(x), rtol=1e-4, atol=1e-5)
    ran = {name: int((found[f"decisions.{name}"] >= 0).sum()) for name in dyn.exits}
    assert len(x) == ran["exit0"] > min(ran.values()) > 0
    assert len(set(found["exit"].tolist())) > 1


def test_nothing_is_imported_before_it_is_used():
    code = "import dyncompile, sys; dyncompile.export; assert not {'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
