"""A data set scored by two processes, in input order: `python examples/offline_scoring.py`.

Lightning gives each process its share of the rows, none twice; each writes what it has scored, batch by batch. A run
that was stopped goes on with the rows that are missing. By hand: `torchrun --nproc-per-node=N ... FOLDER`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import dyncompile as dc
from dyncompile.data import as_loader
from dyncompile.demo.datasets import digits
from dyncompile.demo.models import ResNet

FILE = "model.onnx"


def to_score() -> TensorDataset:
    """449 images: neither batches nor processes share them evenly."""
    return TensorDataset(digits().test.tensors[0][:449])


class Scorer(LightningModule):  # type: ignore[misc]
    """Scores batches by an exported file, which each process reads as it is: nothing is compiled."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def setup(self, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Read the file, in the process that runs it."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])

    def predict_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """Logits, and the exit that each sample took."""
        names = ["output", "exit"]
        found = self.session.run(names, {self.session.get_inputs()[0].name: batch[0].numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


class Parts(BasePredictionWriter):  # type: ignore[misc]
    """Writes each batch's scores with the rows that they belong to.

    Args:
        folder: Where to.
        rows: Of the data set, for each index that the loader knows.
    """

    def __init__(self, folder: Path, rows: Tensor) -> None:
        super().__init__("batch")
        self.folder, self.rows = folder, rows

    def write_on_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 - Lightning's signature
        module: LightningModule,  # noqa: ARG002
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int],
        *_: Any,
    ) -> None:
        """A file that is complete has its name; what was cut off while it was written has not."""
        rows = self.rows[list(batch_indices)]
        path = self.folder / f"{int(rows[0])}.safetensors"
        save_file({"rows": rows, **prediction}, path.with_suffix(".draft"))
        path.with_suffix(".draft").replace(path)


def scored(folder: Path) -> dict[str, Tensor]:
    """What all parts hold, in the order of the data set."""
    parts = [load_file(path) for path in folder.glob("*.safetensors")]
    if not parts:
        return {"rows": torch.empty(0, dtype=torch.int64)}
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = found["rows"].argsort()
    return {name: values[order] for name, values in found.items()}


def score(folder: Path, *, batches: int | None = None) -> None:
    """What each process does, be it alone or one of several.

    Args:
        folder: Holds the exported file, and takes the scores.
        batches: Stop after so many.
    """
    data = to_score()
    missing = torch.ones(len(data), dtype=torch.bool)
    missing[scored(folder)["rows"]] = False
    rows = missing.nonzero().view(-1)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[Parts(folder, rows)],
        limit_predict_batches=batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Subset(data, rows.tolist()), batch_size=32)
    trainer.predict(Scorer(folder / FILE), loader, return_predictions=False)


def main() -> None:
    torch.manual_seed(0)
    data = digits()  # ships with scikit-learn
    model = ResNet(8, width=8, in_channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):  # the static model, as you have it
        for images, labels in as_loader(data.train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    (x,) = to_score().tensors
    dyn = dc.dynamize(model, "early_exit", exits=2, example_inputs=x[:2])
    dc.finetune(dyn, data.train, epochs=4, lr=5e-3, progress=False)
    dc.calibrate(dyn, data.calibration, max_drop=0.05)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dc.export(dyn.eval(), folder / FILE, decisions=True)
        score(folder, batches=3)  # in this process, and as if it had been stopped
        print(f"{len(scored(folder)['rows'])} of {len(x)} images, then the run was stopped")
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, name]
        subprocess.run(command, check=True, timeout=300)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "something was scored twice"
        found = scored(folder)
    assert torch.equal(found["rows"], torch.arange(len(x))), "a row is missing, or there twice"
    with torch.no_grad():
        torch.testing.assert_close(found["output"], dyn(x), rtol=1e-3, atol=1e-4)
    accuracy = (found["output"].argmax(1) == data.test.tensors[1][: len(x)]).float().mean().item()
    print(f"all {len(found['rows'])} of {len(x)}, in order, none twice; accuracy {accuracy:.3f}")
    print("images by exit, and those that took none:", found["exit"].bincount(minlength=len(dyn.exits) + 1).tolist())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        score(Path(sys.argv[1]))
    else:
        main()
