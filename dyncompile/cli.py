"""The command line, a thin layer over the API."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from dyncompile.commands.arguments import Model, Option, Shape, read_example, read_model, read_passes
from dyncompile.commands.check import check
from dyncompile.commands.passes import passes
from dyncompile.errors import ArgumentError, DyncompileError

if TYPE_CHECKING:
    from torch import nn

    from dyncompile import DynamicModule
    from dyncompile.demo.datasets import Images

app = typer.Typer(
    help="Turn static PyTorch models into dynamic ones that really skip work.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(check)
app.command()(passes)


Folder = Annotated[Path, typer.Argument(help="Folder of a converted model.", show_default=False, file_okay=False)]
Data = Annotated[
    str,
    typer.Option(
        help="digits, fashion-mnist, a folder of IDX files, imagefolder:DIR, or file.py:factory, "
        "a callable that returns dyncompile.demo.datasets.Images; resized to what the model was converted with."
    ),
]
Strategy = Annotated[
    list[str], typer.Option(help="Technique; repeat, or join by commas, to combine. file.py:Class for one of your own.")
]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per batch.")]
MaxDrop = Annotated[
    float,
    typer.Option(min=0, max=1, help="Highest risk that the dynamic model is wrong where the static is right."),
]
Confidence = Annotated[float, typer.Option(min=0, max=1, help="Probability with which that holds.")]


@app.command()
def demo(
    data: Data = "digits",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("dyncompile-demo"),
    seed: Seed = 0,
    depth: Annotated[int, typer.Option(help="Depth of the static ResNet, 6n + 2.")] = 20,
    width: Annotated[int, typer.Option(help="Channels of its first stage.")] = 16,
    epochs: Annotated[int | None, typer.Option(min=1, help="Static training; by the data.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(min=1, help="Training after conversion; by the data.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="As in calibrate; by the size of the data."),
    ] = None,
    confidence: Confidence = 0.95,
    batch_size: BatchSize = 64,
    device: Device = "cpu",
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Run the main job: train, convert, fine-tune, calibrate, lower, and measure."""
    from dyncompile.demo.run import Settings, run

    if not resume:
        _free(out, force=force, argument="out")
    run(
        Settings(
            data=data,
            out=out,
            seed=seed,
            depth=depth,
            width=width,
            epochs=epochs,
            finetune_epochs=finetune_epochs,
            max_drop=max_drop,
            confidence=confidence,
            batch_size=batch_size,
            device=device,
            report=report,
            resume=resume,
        ),
        Console(),
    )


@app.command()
def inspect(
    model: Model,
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder of the converted model; without it, what convert would do."),
    ] = None,
    strategy: Strategy = ["early_exit"],  # noqa: B006 - typer copies it
    option: Option = [],  # noqa: B006
    input_shape: Shape = None,
) -> None:
    """Print a dynamic model's regions, their guards and their share of the cost."""
    import dyncompile as dc

    static = read_model(model)
    dyn = dc.load(folder, static) if folder else _dynamize(static, strategy, input_shape, option)
    typer.echo(dyn.inspect())


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    strategy: Strategy = ["early_exit"],  # noqa: B006 - typer copies it
    option: Option = [],  # noqa: B006
    input_shape: Shape = None,
    force: Force = False,
) -> None:
    """Make a static model dynamic; before training it computes exactly what the static one does."""
    import dyncompile as dc

    _free(out, force=force, argument="out")
    dyn = _dynamize(read_model(model), strategy, input_shape, option)
    dc.save(dyn, out)
    typer.echo(dyn.inspect())


@app.command()
def finetune(
    model: Model,
    folder: Folder,
    data: Data = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training split.")] = 3,
    mode: Annotated[Literal["heads", "joint"], typer.Option(help="Train the heads only, or everything.")] = "heads",
    seed: Seed = 0,
    device: Device = "cpu",
    resume: Resume = False,
) -> None:
    """Train a converted model; its folder is written anew, all at once. Checkpoints and logs go to its finetune/."""
    import dyncompile as dc

    dyn = _load(model, folder, device)
    images = _images(data, seed, dyn)
    dc.finetune(
        dyn,
        images.train,
        images.calibration,
        epochs=epochs,
        mode=mode,
        accelerator=dyn.home.type,
        directory=folder / "finetune",
        resume=resume,
        seed=seed,
    )
    dc.save(dyn, folder)


@app.command()
def calibrate(
    model: Model,
    folder: Folder,
    data: Data = "digits",
    max_drop: MaxDrop = 0.01,
    confidence: Confidence = 0.95,
    report: Annotated[Path | None, typer.Option(help="HTML file to write as well.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Choose the thresholds of a converted model; its folder is written anew, all at once."""
    import dyncompile as dc
    from dyncompile.calibration.beside import write_beside

    if report:
        _free(report, force=force, argument="report")
    dyn = _load(model, folder, device)
    images = _images(data, seed, dyn)
    calibration = dc.calibrate(dyn, images.calibration, max_drop=max_drop, confidence=confidence, seed=seed)
    dc.save(dyn, folder)
    write_beside(calibration, folder)
    Console().print(calibration.table())
    if report:
        calibration.report(report)


@app.command()
def bench(
    model: Model,
    folder: Folder,
    data: Data = "digits",
    batch_size: BatchSize = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Passes of which the median counts.")] = 5,
    backend: Annotated[Literal["inductor", "eager"], typer.Option(help="How segments are run.")] = "inductor",
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Time the lowered model against every form of the static one, on the test split."""
    from dyncompile.demo.measure import bench as measure

    dyn = _load(model, folder, device).eval()
    images = _images(data, seed, dyn)
    table = measure(dyn, images.test.tensors[0], batch_size=batch_size, repeats=repeats, backend=backend)
    Console().print(table)


@app.command()
def export(
    model: Model,
    folder: Folder,
    out: Annotated[
        Path,
        typer.Argument(help="*.onnx, *.pt2, *.aoti.pt2, or a folder with --routing stages.", show_default=False),
    ],
    routing: Annotated[
        Literal["sample", "batch", "stages"],
        typer.Option(help="An arm runs on the rows that take it, on the whole batch if any does, or as a file."),
    ] = "sample",
    decisions: Annotated[bool, typer.Option("--decisions", help="Decisions are outputs too.")] = False,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Write a converted model as a file that skips without dyncompile; it is run and compared first."""
    import dyncompile as dc
    from dyncompile.calibration.beside import read_beside

    _free(out, force=force, argument="out")
    dyn = _load(model, folder, device).eval()
    dc.export(dyn, out, routing=routing, decisions=decisions, calibration=read_beside(folder))
    enabled = [name for modules in (dyn.exits, dyn.gates) for name, module in modules.items() if bool(module.enabled)]
    typer.echo(f"{out}: {', '.join(enabled) or 'nothing is skipped: no exit or gate is enabled, calibrate first'}")


@app.command()
def set_threshold(
    path: Annotated[Path, typer.Argument(help="What export wrote: *.onnx, or a folder.", show_default=False)],
    settings: Annotated[
        list[str],
        typer.Argument(help="exit2=0.8, gate3=-1 (its bias), exit2.temperature=1.5, exit2.enabled=false."),
    ],
) -> None:
    """Change thresholds in an exported ONNX file, without another export."""
    from dyncompile.exporting import set_knobs

    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        value = _number_or_switch(text)
        if not equals or value is None:
            expected = "name=value, such as exit2=0.8 or exit2.enabled=false"
            raise ArgumentError("settings", found=repr(setting), expected=expected)
        if name in values:
            raise ArgumentError("settings", found=f"{name!r} twice", expected="one value for each")
        values[name] = value
    for name, now in set_knobs(path, values).items():
        typer.echo(f"{name} = {now}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit 1 with one line on stderr where dyncompile raises, 2 for usage."""
    try:
        app(arguments)
    except DyncompileError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _number_or_switch(text: str) -> float | bool | None:
    """What a knob can be set to; None for any other text."""
    if (switch := {"true": True, "false": False}.get(text.lower())) is not None:
        return switch
    try:
        return float(text)
    except ValueError:
        return None


def _free(path: Path, *, force: bool, argument: str) -> None:
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not force:
        found = f"{path}, which exists"
        raise ArgumentError(argument, found=found, expected="a new path, or --force")


def _load(model: str, folder: Path, device: str) -> "DynamicModule":
    import dyncompile as dc
    from dyncompile.data import find_device

    dyn: DynamicModule = dc.load(folder, read_model(model)).to(find_device(device))
    return dyn


def _images(data: str, seed: int, dyn: "DynamicModule") -> "Images":
    """Images of the shape that the model was captured with."""
    from dyncompile.demo.datasets import load

    return load(data, seed=seed, shape=tuple(dyn.graph.inputs[0].shape[1:]))


def _dynamize(model: "nn.Module", strategy: list[str], shape: str | None, options: list[str]) -> "DynamicModule":
    import dyncompile as dc

    [passes] = read_passes([",".join(strategy)], options)
    return dc.dynamize(model, passes, example_inputs=read_example(shape))
