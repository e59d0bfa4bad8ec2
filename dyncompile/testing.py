"""What users and our own tests check a conversion with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dyncompile.demand import decision_name
from dyncompile.errors import ArgumentError
from dyncompile.lowering.lowered import LoweredModule
from dyncompile.module import DynamicModule, decision_owners
from dyncompile.ops import SWITCH, arms_of, decision_of

Shares = Mapping[str, float | Tensor] | Sequence[float]


@contextmanager
def forced(model: DynamicModule | LoweredModule, shares: Shares, *, seed: int = 0) -> Iterator[None]:
    """Replace decisions while the context is open, for benchmarks and what-if questions.

    Args:
        model: A dynamic model or a lowered one.
        shares: For each exit the share of all samples that leave there, for each gate the share that it keeps; or a
            mask `[N]` bool in input order. For a route the share that takes the last arm, which computes everything
            (the others take the first); or arms `[N]` integers. A sequence gives the exits' shares in order. Decisions
            that are not named are left as they are; exits must be enabled to be forced in a lowered model.
        seed: Which samples are drawn; the same seed draws the same samples for the same batch size.

    Raises:
        ArgumentError: An unknown decision, a share outside [0, 1], or exits' shares that sum to more than 1.

    Example:
        >>> import dyncompile as dc
        >>> from torch.nn import Linear, ReLU
        >>> layers = [Linear(8, 8), ReLU(), Linear(8, 8), ReLU(), Linear(8, 3)]
        >>> model = torch.nn.Sequential(*layers)
        >>> dyn = dc.dynamize(model.eval(), exits=1)
        >>> dyn.exits["exit0"].enabled.fill_(True)
        tensor(True)
        >>> fast = dc.lower(dyn, backend="eager")
        >>> with forced(fast, {"exit0": 0.5}):
        ...     _ = fast(torch.randn(8, 8))
        >>> fast.last_run
        {'always': 8, 'not exit0': 4}
    """
    dyn = model.dynamic if isinstance(model, LoweredModule) else model
    wanted = _checked(dyn, shares)
    draw = _Draw(wanted, [n for n in dyn.exits if n in wanted], _routes(dyn), seed)
    if isinstance(model, LoweredModule):
        for name in wanted:
            if name in model.plan.dense:
                why = f"{name!r}, which runs densely: {model.plan.dense[name]}"
                raise ArgumentError("shares", found=why, expected="lower(dyn, decline=False)")
        before, model._override = model._override, draw
        try:
            yield
        finally:
            model._override = before
    else:
        previous, dyn._override = dyn._override, lambda name, value: draw(name, value, None, value.shape[0])
        try:
            yield
        finally:
            dyn._override = previous


class _Draw:
    """Masks over the whole batch, made when the first decision of a batch is asked for."""

    def __init__(
        self, shares: Mapping[str, float | Tensor], exits: list[str], routes: Mapping[str, int], seed: int
    ) -> None:
        self.shares = shares
        self.exits = exits
        self.routes = routes
        self.seed = seed
        self.masks: dict[tuple[str, int, torch.device], Tensor] = {}

    def __call__(self, name: str, value: Tensor, index: Tensor | None, total: int) -> Tensor:
        if name not in self.shares:
            return value
        key = (name, total, value.device)
        if key not in self.masks:
            mask = self._mask(name, total)
            if name in self.routes and mask.dtype == torch.bool:
                mask = mask * (self.routes[name] - 1)
            self.masks[key] = mask.to(value.device)
        mask = self.masks[key]
        mask = mask if index is None else mask[index]
        if name in self.routes and value.is_floating_point():
            mask = nn.functional.one_hot(mask, self.routes[name])
        return mask if value.dtype == torch.bool else mask.to(value.dtype)

    def _mask(self, name: str, batch: int) -> Tensor:
        share = self.shares[name]
        if isinstance(share, Tensor):
            if share.shape != (batch,):
                raise ArgumentError(
                    f"shares[{name!r}]",
                    found=list(share.shape),
                    expected=f"a mask of [{batch}] samples",
                )
            return share.long() if name in self.routes and share.dtype != torch.bool else share.bool()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(batch, generator=generator)
        offset = float(torch.rand((), generator=generator))
        start = 0.0
        if name in self.exits:
            # Exits draw disjoint samples: each its own stretch of one order.
            earlier = [self.shares[n] for n in self.exits[: self.exits.index(name)]]
            start = sum(s for s in earlier if not isinstance(s, Tensor))
        else:
            order = order[torch.randperm(batch, generator=generator.manual_seed(self.seed + _stable(name)))]
        mask = torch.zeros(batch, dtype=torch.bool)
        mask[order[_cut(start, batch, offset) : _cut(start + share, batch, offset)]] = True
        return mask


def _cut(share: float, batch: int, offset: float) -> int:
    """The number of samples that a share is: rounded down after a random offset, so that it is right on average."""
    if share >= 1 - 1e-9:
        return batch
    return min(batch, math.floor(share * batch + offset)) if share > 0 else 0


def _stable(name: str) -> int:
    return sum((i + 1) * byte for i, byte in enumerate(name.encode()))


def _routes(dyn: DynamicModule) -> dict[str, int]:
    """Arms of each route."""
    switches = [n for n in dyn.graph.fx.nodes if n.target is SWITCH]
    return {decision_name(decision_of(n)): len(arms_of(n)) for n in switches}


def _checked(dyn: DynamicModule, shares: Shares) -> dict[str, float | Tensor]:
    known = list(dict.fromkeys((*dyn.exits, *decision_owners(dyn.graph.fx))))
    named = shares.items() if isinstance(shares, Mapping) else zip(dyn.exits, shares, strict=False)
    given: dict[str, float | Tensor] = dict(named)
    if not isinstance(shares, Mapping) and len(shares) > len(dyn.exits):
        raise ArgumentError(
            "shares",
            found=f"{len(shares)} shares",
            expected=f"at most {len(dyn.exits)}, one an exit",
        )
    for name, share in given.items():
        if name not in known:
            raise ArgumentError("shares", found=repr(name), expected=f"names among {known}")
        if not isinstance(share, Tensor) and not 0 <= share <= 1:
            raise ArgumentError(f"shares[{name!r}]", found=share, expected="a share in [0, 1] or a mask")
    total = sum(s for n, s in given.items() if n in dyn.exits and not isinstance(s, Tensor))
    if total > 1 + 1e-9:
        raise ArgumentError("shares", found=f"exits that sum to {total}", expected="at most 1")
    return given


__all__ = ["Shares", "forced"]
