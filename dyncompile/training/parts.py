"""Which parts of a dynamic model learn, and how the model gets back to what it was."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from dyncompile.errors import ArgumentError

Mode = Literal["heads", "joint"]

INSERTED = ("exits", "gates")
"""The children of a dynamic model that passes inserted; the others are its backbone."""


def set_training(dyn: nn.Module, mode: Mode, *, gates: bool = True) -> None:
    """Put a dynamic model into training mode, but for what does not learn.

    With "heads" the backbone stays in evaluation mode, so that the statistics of its batch norms do
    not move and its dropout does not blur the features that heads are trained on. Without `gates` these decide as in
    evaluation.
    """
    dyn.train()
    for name, child in dyn.named_children():
        if (name == "gates" and not gates) or (name not in INSERTED and mode == "heads"):
            child.eval()


def default_backbone_lr(lr: float, *, gated: bool) -> float:
    """The backbone's learning rate beside that of what is inserted, which starts from random weights.

    Exits leave what the backbone computes as it is; behind gates it sees other values, and learns at the full rate.
    """
    return lr if gated else 0.1 * lr


def parameter_groups(dyn: nn.Module, lr: float, backbone_lr: float) -> list[dict[str, Any]]:
    """The parameters that require a gradient, those of the backbone at a rate of their own."""
    inserted = _inserted(dyn)
    groups = []
    for rate, chosen in ((lr, True), (backbone_lr, False)):
        learning = [p for p in dyn.parameters() if p.requires_grad and (p in inserted) is chosen]
        if learning:
            groups.append({"params": learning, "lr": rate})
    return groups


@contextlib.contextmanager
def learning(dyn: nn.Module, mode: Mode, *, gates: bool = True) -> Iterator[None]:
    """Let the parameters of a mode learn; then restore flags, modes and device, whatever happened.

    Args:
        dyn: The model.
        mode: "heads" or "joint".
        gates: Whether gates learn.

    Raises:
        ArgumentError: Nothing could learn.
    """
    with preserved(dyn):
        still = set(dyn.parameters()) - _inserted(dyn) if mode == "heads" else set()
        if not gates:
            still |= _inserted(dyn, ("gates",))
        for parameter in still:
            parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in dyn.parameters()):
            raise ArgumentError(
                "mode",
                found=f"{mode!r} for a model without parameters that it could train",
                expected="some that require a gradient; 'heads' needs exits, or gates and a target_cost",
            )
        yield


@contextlib.contextmanager
def preserved(dyn: nn.Module) -> Iterator[None]:
    """Restore device, `requires_grad` flags and each module's mode; leave no gradients behind."""
    device = next(dyn.parameters()).device
    modes = [(module, module.training) for module in dyn.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in dyn.parameters()]
    try:
        yield
    finally:
        dyn.to(device)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


def _inserted(dyn: nn.Module, names: tuple[str, ...] = INSERTED) -> set[nn.Parameter]:
    return {parameter for name, child in dyn.named_children() if name in names for parameter in child.parameters()}
