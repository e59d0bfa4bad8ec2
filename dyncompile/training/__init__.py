"""Objectives and fine-tuning of dynamic models."""

from dyncompile.training.finetuning import TrainingResult, finetune
from dyncompile.training.gating import ActivationRate, BatchShaping, MinimumUsage
from dyncompile.training.norms import recalibrate_norms
from dyncompile.training.objectives import (
    Distillation,
    ExpectedCost,
    LearnedConfidence,
    MultiExit,
    Objective,
)
from dyncompile.training.policy import PolicyGradient
from dyncompile.training.schedule import GateSchedule

__all__ = [
    "ActivationRate",
    "BatchShaping",
    "Distillation",
    "ExpectedCost",
    "GateSchedule",
    "LearnedConfidence",
    "MinimumUsage",
    "MultiExit",
    "Objective",
    "PolicyGradient",
    "TrainingResult",
    "finetune",
    "recalibrate_norms",
]
