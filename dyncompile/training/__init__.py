"""Objectives and fine-tuning of dynamic models."""

from dyncompile.training.finetuning import TrainingResult, finetune
from dyncompile.training.objectives import (
    Distillation,
    ExpectedCost,
    LearnedConfidence,
    MultiExit,
    Objective,
)

__all__ = [
    "Distillation",
    "ExpectedCost",
    "LearnedConfidence",
    "MultiExit",
    "Objective",
    "TrainingResult",
    "finetune",
]
