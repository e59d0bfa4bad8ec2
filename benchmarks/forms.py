"""Ways to run a static model: the fastest of them is what a dynamic model is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dyncompile.demo.measure import static_forms
from dyncompile.lowering.inductor import compile_module

WHOLE = "whole, as segments are"
"""The static model through the compiler of the lowered model's segments."""


def whole(model: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The static model, compiled the same way as the segments of a lowered model."""
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    compiled = compile_module(model, [inputs])
    return lambda x: compiled(x)[0]


def forms(model: nn.Module, *, compilers: bool = True) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every other static form.

    Args:
        model: In eval mode.
        compilers: Those of `torch.compile` too.
    """
    # Dynamo counts compilations by code object: without this, a later model of the same class would run eagerly.
    torch._dynamo.reset()
    found = static_forms(model)
    return {name: call for name, call in found.items() if compilers or "inductor" not in name}
