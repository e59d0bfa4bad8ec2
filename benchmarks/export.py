"""Exported models in onnxruntime: what they save by the clock over what they save by the count, and what depth costs.

`python -m benchmarks.export --out export.json` exports models with exits, gates and skipped frames, sets their knobs
so that a share of the samples decides each way, and times onnxruntime in turns with the static model's own export, one
thread. Batch 1 is a stream of single samples through `routing="batch"`, batch 32 goes through `routing="sample"`. Keep
the core quiet. The weights are random and the knobs chosen on the inputs: what is measured is time.

`--equal` compares files with the lowered model instead, outputs and decisions, on 1,000 real inputs each
(`benchmarks.equality`); it needs torchvision, aeon and the Debian package dataset-fashion-mnist.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dyncompile as dc
from benchmarks import equality, harness
from benchmarks.cases import CASES, torchvision
from benchmarks.deciding import enable, knobs, settle
from benchmarks.early_exit import realised_saving
from benchmarks.harness import Report, Table, Target, Timing, take_turns
from dyncompile.demo.models import ResNet, resnet20
from dyncompile.exporting import set_knobs
from dyncompile.passes import Pass
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.passes.layer_skip import LayerSkip

SAVING = 0.9
DEPTH = 1.05
ROUTINGS = {1: "batch", 32: "sample"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model to export.

    Attributes:
        build: Makes the static model.
        passes: What makes it dynamic.
        shape: Of one input.
    """

    build: Callable[[], nn.Module]
    passes: list[Pass]
    shape: tuple[int, ...]

    def dynamic(self) -> tuple[nn.Module, dc.DynamicModule]:
        """The static model and the dynamic one, everything enabled."""
        torch.manual_seed(0)
        model = self.build().eval()
        dyn = dc.dynamize(model, self.passes, example_inputs=torch.randn(2, *self.shape)).eval()
        enable(dyn)
        return model, dyn


class Reader(nn.Module):
    """Classifies sequences by an LSTM."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(width, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


def _vit() -> nn.Module:
    torchvision()
    import timm

    model: nn.Module = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=10)
    return model


FULL = {
    "resnet18, 3 exits": Case(
        build=CASES["resnet18-64"].build,
        passes=[EarlyExit(exits=("layer1", "layer2", "layer3"), head="linear")],
        shape=(3, 112, 112),
    ),
    "resnet20, gates and exits": Case(
        build=resnet20, passes=[LayerSkip(), EarlyExit(head="linear")], shape=(3, 32, 32)
    ),
    "vit, layer_skip": Case(build=_vit, passes=[LayerSkip()], shape=(3, 64, 64)),
    "lstm, frame_skip": Case(build=lambda: Reader(64, 256), passes=[FrameSkip()], shape=(128, 64)),
}
QUICK = {
    "resnet8, gates and exits": Case(
        build=lambda: ResNet(8, width=8), passes=[LayerSkip(), EarlyExit(exits=1, head="linear")], shape=(3, 16, 16)
    ),
    "lstm, frame_skip": Case(build=lambda: Reader(8, 16), passes=[FrameSkip()], shape=(12, 8)),
}


def session(path: Path) -> Any:
    """A file in onnxruntime, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def stream(loaded: Any, x: Tensor, batch: int) -> Callable[[], None]:
    """All inputs through a session, a batch after the other."""
    name = loaded.get_inputs()[0].name
    parts = [part.numpy() for part in x.split(batch)]

    def run() -> None:
        for part in parts:
            loaded.run(None, {name: part})

    return run


def measure(report: Report, name: str, case: Case, folder: Path, *, rounds: int) -> None:
    """Add a case's table and targets."""
    model, dyn = case.dynamic()
    x = torch.randn(32, *case.shape, generator=torch.Generator().manual_seed(1))
    static = folder / "static.onnx"
    example = torch.randn(3, *case.shape)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (example,), static, dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False)
    for batch, routing in ROUTINGS.items():
        calls = {"static": stream(session(static), x, batch)}
        counted = {"static": 1.0}
        path = dc.export(dyn, folder / "dynamic.onnx", routing=routing)
        for what, share in (("full depth", 0.0), ("a half decides", 0.5), ("a quarter decides", 0.25)):
            counted[what] = settle(dyn, x, share)
            set_knobs(path, knobs(dyn))
            calls[what] = stream(session(path), x, batch)
        times = take_turns(calls, rounds=rounds)
        report.tables.append(_table(f"{name}, batch {batch}, routing {routing!r}", times, counted, len(x) // batch))
        over = times["full depth"].over(times["static"])
        spread = {"low": over.low, "high": over.high}
        title = f"{name}, batch {batch}"
        report.targets.append(Target(what=f"{title}: full depth over static", found=over.value, bound=DEPTH, **spread))
        for what in list(counted)[2:]:
            saved = times[what].over(times["static"]).map(partial(realised_saving, counted[what]))
            what_ = f"{title}: realised over counted saving, {what}"
            spread = {"low": saved.low, "high": saved.high}
            report.targets.append(Target(what=what_, found=saved.value, bound=SAVING, at_least=True, **spread))


def _table(title: str, times: dict[str, Timing], counted: dict[str, float], calls: int) -> Table:
    table = Table(title=title, columns=["what runs", "counted cost", "ms a call", "iqr", "over static"], rows=[])
    for what, timing in times.items():
        over = timing.over(times["static"]).value
        table.rows.append([what, counted[what], 1e3 * timing.median / calls, 1e3 * timing.iqr / calls, over])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="JSON file to write, and Markdown beside it")
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--equal", action="store_true", help="compare on real inputs instead")
    parser.add_argument("--case", action="append", help="only these", choices=list({**FULL, **QUICK, **equality.FULL}))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    harness.keep_memory()
    command = harness.command("export", arguments)
    report = Report(command=command, machine=harness.machine("cpu"), settings={"rounds": options.rounds})
    with tempfile.TemporaryDirectory() as folder:
        if options.equal:
            cases = equality.QUICK if options.quick else equality.FULL
            chosen = {name: case for name, case in cases.items() if not options.case or name in options.case}
            equality.compare(report, chosen, Path(folder), backend="eager" if options.quick else "inductor")
            print(report.tables[-1].markdown())
        else:
            for name, case in (QUICK if options.quick else FULL).items():
                if not options.case or name in options.case:
                    measure(report, name, case, Path(folder), rounds=2 if options.quick else options.rounds)
                    print(report.tables[-2].markdown(), report.tables[-1].markdown(), sep="\n\n", flush=True)
    print(report.outcome().markdown())
    if options.out:
        report.write(options.out)


if __name__ == "__main__":
    harness.told(main)
