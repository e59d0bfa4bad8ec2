"""Fine-tuning as Lightning runs it; `finetune` imports this late, because it loads Lightning."""

import contextlib
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from dyncompile.data import Batch, call
from dyncompile.errors import ArgumentError, DataError, DyncompileError
from dyncompile.module import DynamicModule
from dyncompile.training.gating import activation_rates
from dyncompile.training.losses import score, widen
from dyncompile.training.objectives import Objective
from dyncompile.training.parts import Mode, parameter_groups, set_training
from dyncompile.training.schedule import GateSchedule

_FIXED = ("mode", "seed", "target_cost", "lr", "backbone_lr")
"""What a run has from its start; a resumption with another value would go on with the old one all the same."""


class FineTuning(LightningModule):
    """A dynamic model with its objective and data.

    The order of samples and all random numbers are functions of seed, epoch, batch and process, so
    a run that resumes at an epoch repeats what an uninterrupted one does.
    """

    def __init__(
        self,
        dyn: DynamicModule,
        objective: Objective,
        *,
        train_loader: Callable[..., DataLoader[Batch]],
        val_loader: Callable[..., DataLoader[Batch]] | None,
        mode: Mode,
        gates: bool,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        lr: float,
        backbone_lr: float,
        seed: int,
        schedule: GateSchedule | None = None,
    ) -> None:
        super().__init__()
        self.dyn = dyn
        self.objective = objective
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.mode = mode
        self.gates = gates
        self.optimizer = optimizer
        self.lr = lr
        self.backbone_lr = backbone_lr
        self.seed = seed
        self.schedule = schedule
        self.target_cost = None if schedule is None else schedule.target_cost
        self.history: list[dict[str, float]] = []
        self._worker_seeds = torch.Generator()
        self._order: torch.Generator | None = None  # the user's own, where a loader brings one
        self._order_state: Tensor | None = None

    def configure_optimizers(self) -> Any:
        """The optimizer, and a learning rate that changes with each step."""
        optimizer = self.optimizer(parameter_groups(self.dyn, self.lr, self.backbone_lr))
        # The number of batches is known only after this, and infinite until then.
        schedule = LambdaLR(optimizer, self._cosine)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _cosine(self, step: int) -> float:
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        total = (self.trainer.max_epochs or 1) * batches
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / total))

    def train_dataloader(self) -> DataLoader[Batch]:
        """The share of this process."""
        loader = self.train_loader(replicas=self.trainer.world_size, rank=self.trainer.global_rank)
        loader.generator = self._worker_seeds
        self._order = getattr(loader.sampler, "generator", None)
        if self._order is not None and self._order_state is not None:
            self._order.set_state(self._order_state)
        # When resuming, Lightning starts the workers here, before the epoch starts.
        self._reseed()
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """The share of this process."""
        assert self.val_loader is not None
        return self.val_loader(replicas=self.trainer.world_size, rank=self.trainer.global_rank)

    def _reseed(self, *place: int) -> None:
        # `completed`, which `current_epoch` reads, lags behind while Lightning resumes.
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        state = np.random.SeedSequence([self.seed, progress.processed, *place]).generate_state(2)
        torch.manual_seed(int(state[0]))
        np.random.seed(state[0])  # noqa: NPY002 - augmentations draw from the global state
        random.seed(int(state[0]))
        if not place:
            self._worker_seeds.manual_seed(int(state[1]))

    def on_train_start(self) -> None:
        """Do not go on where the checkpoint's patience was at its end."""
        for callback in self.trainer.early_stopping_callbacks:
            if callback.wait_count >= callback.patience:
                self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Set what the epoch starts from, whatever ran before."""
        set_training(self.dyn, self.mode, gates=self.gates)
        self._reseed()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Give the step random numbers of its own, and the gates what the schedule says."""
        self._reseed(batch_idx, self.global_rank)
        if self.schedule is not None:
            # An unknown number of batches is infinite: then the schedule moves with the epochs.
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            done = progress.processed + batch_idx / self.trainer.num_training_batches
            self.schedule.update(done / (self.trainer.max_epochs or 1))

    def on_validation_start(self) -> None:
        """Judge every epoch by the target of the end."""
        if self.schedule is not None:
            self.schedule.validating = True

    def on_validation_end(self) -> None:
        """Go on."""
        if self.schedule is not None:
            self.schedule.validating = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """The loss of a batch.

        Raises:
            DataError: Batch norm stops at a batch of one sample.
        """
        try:
            loss = self._loss(batch, "train")
        except ValueError as error:
            if len(batch[1]) > 1 or isinstance(error, DyncompileError):
                raise
            found = f"a batch of one sample, at which a layer stops: {error}"
            raise DataError("train_data", found=found, expected="drop_last=True, or another batch size") from error
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Measure loss and every exit."""
        self._loss(batch, "val")

    def _loss(self, batch: Batch, stage: str) -> Tensor:
        inputs, targets = batch
        with contextlib.nullcontext() if self.schedule is None else self.schedule.holding():
            trace = call(self.dyn.trace, inputs)
            if self.dyn.task == "regression":
                targets = targets.to(trace.final.dtype)
            parts = self.objective.parts(trace, targets, inputs)
        loss = torch.stack(list(parts.values())).sum()
        for name, value in {"loss": loss, **parts}.items():
            self._log_epoch(f"{stage}/{name}", value, len(targets))
        if stage == "val":
            metric = "mse" if targets.is_floating_point() else "accuracy"
            for name, prediction in {**trace.exits, "final": trace.final}.items():
                value, count = score(prediction, targets, self.objective.ignore_index)
                self._log_epoch(f"val/{metric}/{name}", value, count)
        if self.dyn.gates:
            self._log_epoch(f"{stage}/cost", widen(trace.cost).mean(), len(targets))
            if stage == "val":
                for name, rate in activation_rates(trace).items():
                    self._log_epoch(f"val/rate/{name}", rate, len(targets))
        return loss

    def _log_epoch(self, name: str, value: Tensor, count: int) -> None:
        self.log(name, value.detach(), on_step=False, on_epoch=True, batch_size=count, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Keep what was measured, before Lightning writes the checkpoint."""
        measured = {
            name: float(value)
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith(("train/", "val/"))
        }
        self.history.append({"epoch": len(self.history) + 1, **measured})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumption needs besides weights and optimizer."""
        checkpoint["dyncompile"] = {
            "history": self.history,
            **{name: getattr(self, name) for name in _FIXED},
            "order": None if self._order is None else self._order.get_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what was made otherwise; else continue its history."""
        state = checkpoint.get("dyncompile", {})
        for name in _FIXED:
            if name in state and state[name] != getattr(self, name):
                raise ArgumentError(
                    name,
                    found=repr(getattr(self, name)),
                    expected=f"{state[name]!r}, with which the checkpoint was made",
                )
        if _shapes(checkpoint["state_dict"]) != _shapes(self.state_dict()):
            raise ArgumentError(
                "directory",
                found="a checkpoint of another model",
                expected="one of this model, or resume=False",
            )
        if len(state["history"]) > (self.trainer.max_epochs or 0):
            raise ArgumentError(
                "epochs",
                found=self.trainer.max_epochs,
                expected=f"at least the {len(state['history'])} that the checkpoint has behind it",
            )
        self.history = state["history"]
        self._order_state = state["order"]


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
