"""Which layer of torch.nn a module computes as, whatever its class."""

import copy
import math
from typing import Any

import torch
from torch import nn

from dyncompile.capture.modes import Dropout

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS: tuple[type[nn.Module], ...] = (Dropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
POINTWISE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity),
)
POOLS: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ReflectionPad2d),
)
_KINDS = {
    *(*CONVOLUTIONS, *LINEARS, *BATCH_NORMS, *DROPOUTS, *POINTWISE, *POOLS),
    *(nn.LayerNorm, nn.GroupNorm, nn.PReLU),
}
_NORMS = (*BATCH_NORMS, nn.GroupNorm)


def kind_of(module: nn.Module | None) -> type[nn.Module] | None:
    """The layer of torch.nn that a module computes as: its own type, or the one whose forward it inherits.

    An activation of another library (no parameters, each entry by itself) counts as `nn.Identity`: run as it is. A norm
    that ends in an activation of its own counts as the norm, see `tail_of`.
    """
    if module is None or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    for base in type(module).__mro__:
        if base in _KINDS:
            own = [name for name in ("forward", "_conv_forward") if getattr(base, name, None) is not None]
            same = all(getattr(type(module), name) is getattr(base, name) for name in own)
            return base if same or (base in _NORMS and _ends_in_children(module, base)) else None
    return nn.Identity if _acts_pointwise(module) else None


def tail_of(module: nn.Module) -> tuple[str, ...]:
    """The children that a norm runs on what it normalised, in order (timm's `BatchNormAct2d`); of others none."""
    kind = kind_of(module)
    own = kind in _NORMS and type(module).forward is not kind.forward
    return tuple(name for name, _ in module.named_children()) if own else ()


def _ends_in_children(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module is `base` and then its children, one after the other, in training as well: tried out."""
    if not all(kind_of(child) in (*POINTWISE, *DROPOUTS) for child in module.children()):
        return False
    whole, apart = copy.deepcopy(module), copy.deepcopy(module)
    channels: Any = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    shape = (4, channels, *[3] * (1 if base is nn.BatchNorm1d else 3 if base is nn.BatchNorm3d else 2))
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.empty(0))
    x = torch.linspace(-3, 4, math.prod(shape)).sin().reshape(shape).to(like)
    for copied in (whole, apart):
        for number, parameter in enumerate(copied.parameters()):  # a weight of nought would make all alike
            parameter.data = torch.linspace(1, 2 + number, parameter.numel()).to(parameter).reshape(parameter.shape)
    for training in (True, False):
        for copied in (whole, apart):
            copied.train(training)
            for child in copied.children():
                child.eval()
        try:
            with torch.no_grad():
                found, expected = whole(x.clone()), base.forward(apart, x.clone())
                for child in apart.children():
                    expected = child(expected)
        except Exception:  # noqa: BLE001 - whatever a module of another shape of input raises
            return False
        pairs = ((found, expected), *zip(whole.buffers(), apart.buffers(), strict=True))
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs):
            return False
    return True


def _acts_pointwise(module: nn.Module) -> bool:
    """Whether a stateless module of unknown type maps entry to entry, in training as well; tried on a few, shuffled."""
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    mode = module.training
    x = torch.linspace(-3, 4, 60, dtype=torch.float64).reshape(3, 4, 5)
    order = torch.arange(60).mul(7).remainder(60)[:40]  # of 60, so that a mean over all of them would be another
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            expected = module.eval()(x).flatten()[order]
            found = [module.train(training)(x.flatten()[order].reshape(2, 4, 5)) for training in (False, True)]
    except Exception:  # noqa: BLE001 - whatever a module of another shape of input raises
        return False
    finally:
        module.train(mode)
    return all(y.shape == (2, 4, 5) and torch.allclose(y.flatten(), expected) for y in found)
