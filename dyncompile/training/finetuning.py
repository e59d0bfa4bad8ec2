"""Fine-tuning of a dynamic model on Lightning's Trainer."""

import contextlib
import functools
import logging
import os
import random
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from dyncompile.data import Batch, as_loader, call
from dyncompile.errors import ArgumentError, DataError, require
from dyncompile.module import DynamicModule
from dyncompile.nn import Gate
from dyncompile.training.losses import class_dim
from dyncompile.training.objectives import Distillation, LearnedConfidence, Objective
from dyncompile.training.parts import Mode, default_backbone_lr, learning, preserved
from dyncompile.training.schedule import GateSchedule
from dyncompile.values import positive, whole

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

_OWN = {
    "max_epochs": "epochs",
    "enable_progress_bar": "progress",
    "default_root_dir": "directory",
}
"""Options of the Trainer that have another name here."""

# What Lightning says about choices that are made on purpose here, or that are the user's.
_HINTS = (
    r".*does not have many workers",
    r"Found \d+ module\(s\) in eval mode",
    r"The number of training batches .* is smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
    r".* available but not used",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What fine-tuning did.

    Attributes:
        history: One dict per epoch, those before a resumption included: `epoch` (from 1),
            `train/loss` and its parts, and with validation data `val/loss`, its parts, and
            `val/accuracy/<exit>`, in regression `val/mse/<exit>`. With gates also `train/cost` and `val/cost`, what a
            sample costs on average (1.0 = the static model), and `val/rate/<decision>`, how often each is open.
        best_epoch: The epoch with the lowest validation loss; without validation data the last.
        checkpoint: The last checkpoint, None where nothing was kept.
    """

    history: tuple[dict[str, float], ...]
    best_epoch: int
    checkpoint: Path | None

    def __str__(self) -> str:
        shown = ("epoch", "train/loss", "val/loss", "val/cost", "val/accuracy/", "val/mse/")
        names = [name for start in shown for name in self.history[-1] if name.startswith(start)]
        rows = [names, *([f"{epoch[name]:.4g}" for name in names] for epoch in self.history)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        rates = {n.removeprefix("val/rate/"): r for n, r in self.history[-1].items() if n.startswith("val/rate/")}
        if rates:
            lines.append("open at the end: " + ", ".join(f"{name} {rate:.0%}" for name, rate in rates.items()))
        return "\n".join(lines)


def finetune(
    dyn: DynamicModule,
    train_data: Any,
    val_data: Any = None,
    *,
    epochs: int = 3,
    mode: Mode = "heads",
    objective: Objective | None = None,
    target_cost: float | GateSchedule | None = None,
    lr: float = 2e-3,
    backbone_lr: float | None = None,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] = torch.optim.AdamW,
    batch_size: int = 64,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    devices: int | str | list[int] = 1,
    strategy: str = "auto",
    num_nodes: int = 1,
    directory: str | Path | None = None,
    resume: bool = False,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **trainer_options: Any,
) -> TrainingResult:
    """Train the exits and gates of a dynamic model, or all of it, in place.

    Runs on Lightning's Trainer. Mode, device, `requires_grad` flags and the global random state are
    afterwards as they were, also after Ctrl-C or an error. The learning rate falls to 0 along half
    a cosine.

    Args:
        dyn: A dynamic model.
        train_data: What `dyncompile.data.as_loader` takes. Arrays and datasets are shuffled; a
            DataLoader keeps its order on one device, several share a shuffled one.
        val_data: The same; loss and the accuracy of every exit are measured after each epoch. With
            `patience` it chooses the weights, and must not be the data that `calibrate` is given.
        epochs: Passes over the training data, in all: those before a resumption count.
        mode: "heads" trains what passes inserted; parameters, batch norm statistics and dropout of
            the backbone are frozen. "joint" trains every parameter that requires a gradient.
        objective: Loss of a trace. Default: `Distillation()`, which is multi-exit with distillation
            from the full depth; for a model with gates, which change that, from the static model as it is now. In
            regression with `LearnedConfidence()`.
        target_cost: What a sample is to cost on average, 1.0 = the static model, for a model with gates: they are
            enabled after a warm-up and annealed to it, and the cost's distance to it and a guard against dead and
            always-open gates are added to the objective. A `GateSchedule` sets the details. Exits are not counted:
            their thresholds are `calibrate`'s. None: gates stay as they are, on or off, and decide as in evaluation;
            with an `objective` of one's own those that are on learn what it says.
        lr: Learning rate of what was inserted.
        backbone_lr: That of the backbone. Default: a tenth of `lr`, and with `target_cost` as much.
        optimizer: Makes the optimizer from parameter groups that carry their `lr`.
        batch_size: Samples per batch and process, for data that is not a DataLoader.
        precision: Of the computation; weights stay as they are.
        accelerator: As in Lightning, like `devices`, `strategy` and `num_nodes`.
        devices: How many, which, or "auto" for all. Each runs a process of its own: the strategy
            "ddp" starts the user's script again for every further one.
        strategy: How the processes work together.
        num_nodes: Machines; they need a common `directory`.
        directory: Where `last.ckpt`, `best.ckpt` and logs (CSV, TensorBoard) go. None: nowhere.
        resume: Continue from `last.ckpt`, if there is one, with the result of a run that was never
            interrupted. It is written after each epoch; one that was cut short is repeated.
        patience: Stop after so many epochs without a lower validation loss, and keep the weights of
            the best epoch. None: run all, and keep the last.
        seed: Of the order of samples and all random numbers.
        progress: Show a progress bar.
        **trainer_options: Further arguments of Lightning's Trainer, such as `gradient_clip_val`.

    Raises:
        ArgumentError: An argument has no usable value, nothing can be trained, or the checkpoint to
            resume from cannot be read or belongs to another model, mode or seed, or to more epochs.
        DataError: See `as_loader`; or labels do not fit the model's predictions: a regression model,
            which is also any of one column, takes floating targets alone.
        MissingExtraError: Lightning or TensorBoard is not installed (extra `train`).
    """
    if not isinstance(dyn, DynamicModule):
        raise ArgumentError("dyn", found=f"a {type(dyn).__name__}", expected="what dyncompile.dynamize returns")
    counts = {"epochs": epochs, "num_nodes": num_nodes, "patience": 1 if patience is None else patience}
    for name, count in counts.items():
        whole(name, count, least=1)
    whole("seed", seed, least=0)
    positive("lr", lr)
    for name, choice, choices in (("mode", mode, Mode), ("precision", precision, Precision)):
        if choice not in get_args(choices):
            raise ArgumentError(name, found=repr(choice), expected=f"one of {get_args(choices)}")
    backbone_lr = default_backbone_lr(lr, gated=target_cost is not None) if backbone_lr is None else backbone_lr
    positive("backbone_lr", backbone_lr)
    _check_trainer(optimizer, directory, trainer_options)
    if patience is not None and val_data is None:
        raise ArgumentError("patience", found=patience, expected="val_data beside it")
    if directory is None and (resume or num_nodes > 1):
        raise ArgumentError("directory", found=None, expected="a path, for resume and for several nodes")
    if objective is not None and not isinstance(objective, Objective):
        raise ArgumentError("objective", found=repr(objective), expected="a dyncompile.training.Objective")
    require("lightning.pytorch", extra="train")
    from dyncompile.training.checkpoints import starting_point
    from dyncompile.training.lightning_module import FineTuning

    schedule = _schedule(dyn, target_cost)
    gates = schedule is not None or objective is not None
    objective = _objective(dyn, objective, schedule)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_own_randomness())
        stack.enter_context(learning(dyn, mode, gates=gates))
        where = Path(directory or stack.enter_context(tempfile.TemporaryDirectory()))
        data: dict[str, Any] = {
            "batch_size": batch_size,
            "ignore_index": objective.ignore_index,
            "batch_dims": dyn.recipe.batch_dims,
        }
        data["classes"] = _classes(dyn, train_data, "train_data", **data)
        if val_data is not None:
            _classes(dyn, val_data, "val_data", **data)
        module = FineTuning(
            dyn,
            objective,
            train_loader=_source(train_data, argument="train_data", shuffle=True, seed=seed, **data),
            val_loader=None if val_data is None else _source(val_data, argument="val_data", **data),
            mode=mode,
            gates=gates,
            optimizer=optimizer,
            lr=lr,
            backbone_lr=backbone_lr,
            seed=seed,
            schedule=schedule,
        )
        trainer = _trainer(
            where,
            log=directory is not None,
            validated=val_data is not None,
            patience=patience,
            max_epochs=epochs,
            precision=precision,
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            num_nodes=num_nodes,
            enable_progress_bar=progress,
            **trainer_options,
        )
        _fit(trainer, module, starting_point(where, resume=resume))
        result = _finish(trainer, module, keep=directory is not None, best=patience is not None)
        if schedule is not None:
            schedule.update(1.0)
        return result


def _check_trainer(optimizer: object, directory: object, options: dict[str, Any]) -> None:
    if not callable(optimizer):
        expected = "what makes one from parameter groups, such as torch.optim.AdamW"
        raise ArgumentError("optimizer", found=repr(optimizer), expected=expected)
    if directory is not None:
        if not isinstance(directory, str | os.PathLike):
            raise ArgumentError("directory", found=repr(directory), expected="a path")
        if Path(directory).is_file():
            raise ArgumentError("directory", found=f"{directory}, a file", expected="a folder, or a path for a new one")
    if taken := sorted(options.keys() & _OWN):
        raise ArgumentError(taken[0], found="an option of the Trainer", expected=f"`{_OWN[taken[0]]}` in its place")


def _objective(dyn: DynamicModule, objective: Objective | None, schedule: GateSchedule | None) -> Objective:
    """What is trained for: the user's objective or the default, and what the schedule adds."""
    if objective is None:
        objective = Distillation(teacher=dyn.static() if dyn.gates else "final")
        if dyn.task == "regression":
            objective += LearnedConfidence()
    return objective if schedule is None else objective + schedule.objective


def _schedule(dyn: DynamicModule, target_cost: float | GateSchedule | None) -> GateSchedule | None:
    if target_cost is None:
        gates = [gate for gate in dyn.gates.values() if isinstance(gate, Gate)]
        if gates and not any(bool(gate.enabled) for gate in gates):
            warnings.warn("gates stay switched off: target_cost=0.6 would train them to a cost", stacklevel=3)
        return None
    if not isinstance(target_cost, GateSchedule):
        return GateSchedule(dyn, target_cost=target_cost)
    if target_cost.dyn is not dyn:
        raise ArgumentError("target_cost", found="the schedule of another model", expected="GateSchedule(dyn, ...)")
    return target_cost


def _classes(dyn: DynamicModule, data: Any, argument: str, **options: Any) -> int | None:
    """Number of classes, by asking the model about the first batch; None in regression."""
    batch = next(iter(as_loader(data, argument=argument, **options)))
    if dyn.task == "regression":
        if not batch[1].is_floating_point():
            raise DataError(
                argument,
                found="integer targets, such as labels, for a regression model",
                expected="floating targets; or a classifier, which has a column for each class, two at least",
            )
        return None
    device = next(dyn.parameters()).device
    inputs, targets = tree_map_only(torch.Tensor, lambda t: t.to(device), batch)
    with preserved(dyn), torch.no_grad():
        final = call(dyn.eval().trace, inputs).final
    return int(final.shape[class_dim(final, targets, argument)])


def _source(data: Any, **options: Any) -> Callable[..., DataLoader[Batch]]:
    """Checks the data now, and makes the loader of each process when it is there."""
    checked = as_loader(data, **options)
    source = data if isinstance(data, DataLoader) else checked.dataset
    return functools.partial(as_loader, source, **options)


def _trainer(where: Path, *, log: bool, validated: bool, patience: int | None, **options: Any) -> Any:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.plugins.io import CheckpointIO

    from dyncompile.training.checkpoints import BEST, LAST, WholeCheckpoints

    callbacks: list[Any] = []
    checkpoint: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
    if patience is not None:
        callbacks.append(EarlyStopping("val/loss", patience=patience))
    if validated:
        callbacks.append(ModelCheckpoint(where, BEST, monitor="val/loss", **checkpoint))
    # After the best, whose state the last has to hold for a resumption.
    callbacks.append(ModelCheckpoint(where, LAST, **checkpoint))
    loggers: list[Any] = []
    if log:
        require("tensorboard", extra="train")
        loggers = [CSVLogger(where, name="csv"), TensorBoardLogger(where, name="tensorboard")]
    if not validated:
        options["limit_val_batches"] = 0
    # A CheckpointIO of the user's own comes in its place.
    plugins = options.pop("plugins", None) or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins = [*plugins, WholeCheckpoints()]
    given = options.pop("callbacks", None) or []
    try:
        return Trainer(
            plugins=plugins,
            callbacks=[*callbacks, *(given if isinstance(given, list) else [given])],
            logger=options.pop("logger", loggers),
            default_root_dir=where,
            **{"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 10, **options},
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        found = " ".join(str(error).split())
        expected = "accelerator, devices, strategy and options as Lightning's Trainer takes them"
        raise ArgumentError("trainer_options", found=found, expected=expected) from error


def _fit(trainer: Any, module: Any, checkpoint: Path | None) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, ckpt_path=checkpoint)
    except SystemExit as stop:
        # After an interrupt Lightning ignores further ones and leaves; the caller decides that.
        if isinstance(stop.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
        raise


def _finish(trainer: Any, module: Any, *, keep: bool, best: bool) -> TrainingResult:
    """Read what was done off the checkpoints: strategies that fork train in other processes."""
    where = Path(trainer.checkpoint_callback.dirpath)
    last = where / "last.ckpt"
    history = torch.load(last, map_location="cpu", weights_only=True)["dyncompile"]["history"]
    if best:
        state = torch.load(where / "best.ckpt", map_location="cpu", weights_only=True)
        module.load_state_dict(state["state_dict"])
    trainer.strategy.barrier()  # before anyone removes a temporary directory
    losses = [epoch.get("val/loss", -epoch["epoch"]) for epoch in history]
    return TrainingResult(
        history=tuple(history),
        best_epoch=1 + losses.index(min(losses)),
        checkpoint=last if keep else None,
    )


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """The global generators go on afterwards as if nothing had been drawn."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's greetings, hints, and deprecations of what it calls itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _HINTS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
