"""What passes insert: exits and their heads and criteria, gates and their estimators."""

from dyncompile.nn.criteria import CRITERIA, Criterion, certainty
from dyncompile.nn.estimators import ESTIMATORS, Estimator, build_estimator
from dyncompile.nn.exits import Exit
from dyncompile.nn.frames import Admission, FramePolicy, PacedGate, SequencePolicy
from dyncompile.nn.gates import Gate
from dyncompile.nn.heads import Feature, Pool, build_head
from dyncompile.nn.policies import ConvolutionalPolicy, FeedForwardPolicy, RecurrentPolicy
from dyncompile.nn.recurrent import SkippingLayer, StepGate

__all__ = [
    "CRITERIA",
    "ESTIMATORS",
    "Admission",
    "ConvolutionalPolicy",
    "Criterion",
    "Estimator",
    "Exit",
    "Feature",
    "FeedForwardPolicy",
    "FramePolicy",
    "Gate",
    "PacedGate",
    "Pool",
    "RecurrentPolicy",
    "SequencePolicy",
    "SkippingLayer",
    "StepGate",
    "build_estimator",
    "build_head",
    "certainty",
]
