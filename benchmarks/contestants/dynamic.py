"""dyncompile: converted, fine-tuned, calibrated, lowered."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import nn

import dyncompile as dc
from benchmarks.contestants.contestant import BATCH, Contestant, Forms, trained
from benchmarks.tasks import Run
from dyncompile.demo.train import training_layout
from dyncompile.passes import Pass, resolve

DROP = 0.01
"""Accuracy that calibration may lose, as a share of all samples."""
COST, BEFORE_EXITS = 0.6, 0.85
"""What gates are fine-tuned to: alone, and where exits leave less for them to save."""
_EXITS = {"early_exit"}
_CURVE, _GATED_CURVE = (0.65, 0.5), (0.5, 0.35)
"""Costs that exits, without gates and with them, are calibrated for beside: a curve is seen, and not a point."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(Contestant):
    """A strategy, or several joined by "+", in order.

    Args:
        strategy: Of passes.
        max_cost: Thresholds of exits are chosen for this cost; None: for a loss of `DROP`, with a guarantee.
    """

    strategy: str
    max_cost: float | None = None

    family: ClassVar[str] = "dyncompile"

    def curve(self) -> Iterator[Self]:
        """Itself, and calibrated for other costs where it has exits."""
        yield self
        names = set(self.strategy.split("+"))
        for cost in () if not names & _EXITS else _GATED_CURVE if names - _EXITS else _CURVE:
            yield dataclasses.replace(self, max_cost=cost)

    @property
    def name(self) -> str:
        cost = f", cost {self.max_cost:g}" if self.max_cost else ""
        return f"dyncompile, {self.strategy.replace('_', ' ').replace('+', ' + ')}{cost}"

    def model(self, run: Run) -> dc.DynamicModule:
        static, folder = trained(run, "converted", run.sizes.epochs), run.folder / self.slug
        if (folder / "recipe.json").exists():
            kept: dc.DynamicModule = dc.load(folder, static).eval()
            return kept
        if self.max_cost is not None:
            dyn = Dynamic(strategy=self.strategy).model(run)
            dc.calibrate(dyn, run.splits.calibration, max_cost=self.max_cost, progress=False)
        else:
            dyn = self._tuned(static, run)
        dc.save(dyn, folder)
        return dyn

    def _tuned(self, static: nn.Module, run: Run) -> dc.DynamicModule:
        """Converted, fine-tuned and, where it has exits, calibrated."""
        names = self.strategy.split("+")
        passes: list[str | Pass] = [_pass(name, run) for name in names]
        dyn = dc.dynamize(static, passes, example_inputs=run.splits.test.tensors[0][:2])
        if run.task.images:
            dyn.to(memory_format=training_layout(dyn))  # type: ignore[call-overload]
        gates, exits = set(names) - _EXITS, set(names) & _EXITS
        options: dict[str, Any] = {"target_cost": BEFORE_EXITS if exits else COST} if gates else {}
        dc.finetune(
            dyn,
            run.splits.train,
            run.splits.validation,
            epochs=run.sizes.tuning,
            mode="joint",
            lr=3e-3 if run.task.name != "fashion-vit" else 1e-3,
            batch_size=128,
            directory=run.folder / f"{self.slug}-tuning",
            resume=True,
            progress=False,
            accelerator="cpu",
            **options,
        )
        dyn.eval()
        if exits:
            self._calibrate(dyn, run)
        return dyn

    def _calibrate(self, dyn: dc.DynamicModule, run: Run) -> None:
        """Choose thresholds that lose a point at most, with a guarantee, or as few as the data can certify."""
        for drop in (DROP, 3 * DROP, 0.2):
            try:
                dc.calibrate(dyn, run.splits.calibration, max_drop=drop, progress=False)
            except dc.errors.CalibrationError:
                continue
            return
        raise RuntimeError(f"nothing of {self.name} can be certified on {len(run.splits.calibration)} samples")

    def forms(self, model: nn.Module, run: Run, *, compilers: bool) -> Forms:  # noqa: ARG002 - any task's
        assert isinstance(model, dc.DynamicModule)
        return {"lowered": partial(dc.lower, model, "inductor" if compilers else "eager")}

    def cost(self, model: nn.Module, run: Run) -> float:
        return counted(model, run)


def _pass(name: str, run: Run) -> Pass:
    """The pass; exits are given by module, so that every contestant that has exits has the same."""
    options: dict[str, Any] = {"exits": exit_paths(run)} if name == "early_exit" else {}
    return resolve(name, options)[0]


def exit_paths(run: Run) -> list[str]:
    """Modules of the static model that an exit follows: after a third, a half and two thirds of the layers."""
    model = run.build()
    name = next(name for name in ("blocks", "layers") if hasattr(model, name))
    count = len(getattr(model, name))
    return [f"{name}.{place}" for place in sorted({count // 3, count // 2, 2 * count // 3} - {count - 1})]


@torch.no_grad()
def counted(model: nn.Module, run: Run) -> float:
    """FLOPs of the decisions that the test samples take; 1.0 is the static model."""
    assert isinstance(model, dc.DynamicModule)
    inputs = run.splits.test.tensors[0]
    return float(torch.cat([model.trace(x).cost for x in inputs.split(BATCH)]).mean())
