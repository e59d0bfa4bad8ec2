"""Frame skip: an agent decides at each step of a recurrent layer whether the state is updated or copied."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import fx, nn

from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.errors import ArgumentError
from dyncompile.graph import Graph, is_tensor, spec
from dyncompile.nn import Admission, FramePolicy, Gate, SequencePolicy, SkippingLayer, StepGate, build_estimator
from dyncompile.ops import SELECT
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.sequences import Backbone, Layer, backbone, stacks
from dyncompile.shapes import module_flops

