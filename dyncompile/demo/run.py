"""The main job: train, convert, fine-tune, calibrate, lower, and measure against static models."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.calibration.target import Target
from dyncompile.data import find_device
from dyncompile.demo.datasets import Images, load
from dyncompile.demo.measure import fastest, has_compiler, take_turns
from dyncompile.demo.models import ResNet
from dyncompile.demo.train import Augmented, Schedule, accuracy, multiplies_in_bfloat16, train
from dyncompile.drafts import drafted
from dyncompile.errors import ArgumentError
from dyncompile.values import whole

FEW = 10_000
"""Training sets smaller than this are passed more often, and take no less precision."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the demo does; what is None is chosen by the size of the data.

    Attributes:
        data: As in `dyncompile.demo.datasets.load`.
        out: Folder for the report, the saved model, the static weights and result.json.
        seed: Same seed, same result.
        depth: Depth of the static ResNet, 6n + 2.
        width: Channels of its first stage.
        epochs: Passes over the data that train a static model.
        finetune_epochs: Passes over the data after conversion.
        max_drop: Highest risk that the dynamic model is wrong where the static one is right.
        confidence: Probability with which `max_drop` holds.
        batch_size: Samples per batch, in training and when measured.
        repeats: Times that the whole test split is run by each model that is measured.
        device: Where everything runs.
        report: Whether to write report.html.
        resume: Continue from what a stopped run with the same settings has left in `out`.
    """

    data: str = "digits"
    out: Path = Path("dyncompile-demo")
    seed: int = 0
    depth: int = 20
    width: int = 16
    epochs: int | None = None
    finetune_epochs: int | None = None
    max_drop: float | None = None
    confidence: float = 0.95
    batch_size: int = 64
    repeats: int = 5
    device: str = "cpu"
    report: bool = True
    resume: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model on the untouched test split.

    Attributes:
        accuracy: Share of the samples labelled right.
        cost: Counted compute per sample, 1.0 = the static model.
        seconds: Wall clock for the whole test split.
        form: How it was run when timed.
    """

    accuracy: float
    cost: float
    seconds: float
    form: str


def run(settings: Settings, console: Console) -> dict[str, Row]:
    """Run the demo.

    Returns:
        The static model, the dynamic one, and a static one of the same cost as the dynamic one.

    Raises:
        ArgumentError: A setting has no usable value, or `resume` comes with other settings than
            those of the run in `out`.
        DataError: The data cannot be read.
        UnreachableTargetError: No thresholds keep `max_drop`.
    """
    find_device(settings.device)
    images = load(settings.data, seed=settings.seed)
    full = _flops(images, settings.depth, settings.width)
    few = len(images.train) < FEW
    settings = dataclasses.replace(
        settings,
        epochs=settings.epochs or (20 if few else 6),
        finetune_epochs=settings.finetune_epochs or (20 if few else 3),
        max_drop=(0.015 if few else 0.01) if settings.max_drop is None else settings.max_drop,
    )
    # Before anything is trained for them.
    Target(max_drop=settings.max_drop, confidence=settings.confidence)
    whole("seed", settings.seed, least=0)
    _remember(settings)
    console.print(
        f"[bold]{images.name}[/]: {len(images.train)} images {list(images.shape)} to train, "
        f"{len(images.calibration)} to calibrate, {len(images.test)} to test"
    )
    static = _static(settings, images, settings.depth, settings.width, console)
    with _step(console, "convert"):
        torch.manual_seed(settings.seed)  # heads are drawn; a resumption has not trained before
        example = images.train.tensors[0][:2].to(settings.device)
        dyn = dc.dynamize(static, "early_exit", example_inputs=(example,))
    dc.finetune(
        dyn,
        Augmented(images.train, mirror=images.mirror),
        images.calibration,
        epochs=settings.finetune_epochs,
        mode="joint",
        lr=5e-3,
        precision="bf16-mixed" if _autocast(images) else "32-true",
        accelerator=torch.device(settings.device).type,
        batch_size=settings.batch_size,
        directory=settings.out / "finetune",
        resume=settings.resume,
        seed=settings.seed,
    )
    with _step(console, "calibrate"):
        calibration = dc.calibrate(
            dyn,
            images.calibration,
            max_drop=settings.max_drop,
            confidence=settings.confidence,
            seed=settings.seed,
        )
    console.print(calibration.table())
    dc.save(dyn, settings.out / "model")

    dyn.eval()
    test, labels = (tensor.to(settings.device) for tensor in images.test.tensors)
    with torch.no_grad():
        cost = torch.cat([dyn.trace(part).cost for part in test.split(256)]).mean().item()
    width = next(w for w in itertools.count(1) if _flops(images, 8, w) >= cost * full)
    small = _static(settings, images, 8, width, console)

    batches = list(test.split(settings.batch_size))
    with _step(console, "compile"):
        fast = dc.lower(dyn, backend="inductor" if has_compiler() else "eager")
        fast.warmup(sorted({len(batch) for batch in batches}))
        static_form, static_twin = fastest(static, batches[0])
        small_form, small_twin = fastest(small, batches[0])
    models = {
        f"static ResNet-{settings.depth} ×{settings.width}": (static_twin, static_form, 1.0),
        "the same, early exit": (fast, "lowered", cost),
        f"static ResNet-8 ×{width}": (
            small_twin,
            small_form,
            _flops(images, 8, width) / full,
        ),
    }
    with _step(console, "measure"):
        calls = {name: call for name, (call, _, _) in models.items()}
        seconds = take_turns(calls, batches, repeats=settings.repeats)
    rows = {
        name: Row(accuracy=accuracy(call, test, labels), cost=share, seconds=seconds[name], form=form)
        for name, (call, form, share) in models.items()
    }
    result = {name: dataclasses.asdict(row) for name, row in rows.items()}
    (settings.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(_table(rows, settings))
    if settings.report:
        calibration.report(settings.out / "report.html", measurements=rows, classes=images.classes)
    console.print(f"written to {settings.out}/")
    return rows


def _static(settings: Settings, images: Images, depth: int, width: int, console: Console) -> nn.Module:
    """A trained ResNet; the weights of a stopped run are taken up again."""
    name = f"resnet{depth}-{width}"
    path = settings.out / f"{name}.safetensors"
    torch.manual_seed(settings.seed)
    model = _resnet(images, depth, width).to(settings.device)
    if settings.resume and path.exists():
        try:
            model.load_state_dict(load_file(path, device=settings.device))
        except (SafetensorError, RuntimeError) as error:
            raise ArgumentError("resume", found=f"{path}, which is corrupt", expected="a run to resume") from error
        return model.eval()
    assert settings.epochs is not None
    schedule = Schedule(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        autocast=_autocast(images),
    )
    with Progress(console=console) as progress:
        train(model, images, schedule, seed=settings.seed, progress=progress, title=name)
    # A run that is killed here must not leave half a file for the next one to take up.
    with drafted(path) as draft:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, draft)
    return model


def _autocast(images: Images) -> bool:
    """Whether to multiply in bfloat16: where that is worth it, and the processor can."""
    return multiplies_in_bfloat16() and len(images.train) >= FEW


def _resnet(images: Images, depth: int, width: int) -> ResNet:
    return ResNet(depth, width=width, classes=len(images.classes), in_channels=images.shape[0])


def _flops(images: Images, depth: int, width: int) -> int:
    """FLOPs for one image; a multiply-add is two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _resnet(images, depth, width).eval()(torch.empty(1, *images.shape))
    return int(counter.get_total_flops())


def _remember(settings: Settings) -> None:
    """Write the settings beside the results; a run is resumed with the same ones only.

    One that starts anew removes the weights of a run before, which a resumption would take for its own.
    """
    path = settings.out / "settings.json"
    now = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(settings).items()
        if key not in {"out", "report", "resume"}
    }
    if settings.resume and path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ArgumentError("resume", found=f"{path}, which is corrupt", expected="a run to resume") from error
        changed = [key for key, value in now.items() if before.get(key) != value]
        if changed:
            found = ", ".join(f"{key}={now[key]}" for key in changed)
            expected = ", ".join(f"{key}={before.get(key)}" for key in changed)
            raise ArgumentError("resume", found=found, expected=f"{expected}, as before")
    settings.out.mkdir(parents=True, exist_ok=True)
    if not settings.resume or not path.exists():
        for left in (*settings.out.glob("resnet*.safetensors"), *settings.out.glob("finetune/*.ckpt")):
            left.unlink()
    with drafted(path) as draft:
        draft.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _table(rows: dict[str, Row], settings: Settings) -> Table:
    """Every model beside the static one."""
    static, dynamic, _ = rows.values()
    saved = 1 - dynamic.seconds / static.seconds
    table = Table(
        title=f"the test split, batch size {settings.batch_size}",
        caption=f"saved {saved:.1%} of the time; counting says {1 - dynamic.cost:.1%}",
    )
    table.add_column("model", no_wrap=True)
    for heading in ("accuracy", "cost", "seconds", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("run as", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row.accuracy:.2%}",
            f"{row.cost:.3f}",
            f"{row.seconds:.3f}",
            f"{row.seconds / static.seconds:.3f}",
            row.form,
        )
    return table


@contextmanager
def _step(console: Console, title: str) -> Iterator[None]:
    with Progress(console=console) as progress:
        task = progress.add_task(title, total=None)
        yield
        progress.update(task, total=1, completed=1)
