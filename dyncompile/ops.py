"""`select` and `switch`: the one primitive, and its reference semantics.

Both are custom operators, so export, dynamo and AOT autograd keep each as one node that demand
analysis can find.
"""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dyncompile.errors import ArgumentError


def select(decision: Tensor, taken: Any, otherwise: Any, *, dim: int = 0) -> Any:
    """Choose per sample between two values.

    Reference semantics, computed densely: boolean decisions choose (`torch.where`, so a NaN in the
    arm that is not taken does not leak); floating decisions in [0, 1] mix, `d * taken + (1 - d) *
    otherwise`, and are differentiable. `dyncompile.lower` and the `dyncompile` backend compute only
    what is chosen.

    Args:
        decision: `[N]`, or the leading dims it covers (`[N, L]` for tokens); bool or floating.
        taken: Value where the decision is true: a tensor `[..., N, ...]` or a pytree of tensors.
        otherwise: Value where it is false; same structure and shapes.
        dim: The dim of the arms at which the decision's dims start. An arm may own k entries of it
            per sample.

    Returns:
        A value of the structure of `taken`.

    Raises:
        ArgumentError: The arms differ in structure, shape or dtype, or the decision does not fit
            them.
    """
    left, spec = pytree.tree_flatten(taken)
    right, other = pytree.tree_flatten(otherwise)
    if spec != other:
        raise ArgumentError("otherwise", found=f"structure {other}", expected=f"that of `taken`, {spec}")
    leaves = []
    for a, b in zip(left, right, strict=True):
        _check("otherwise", decision, a, b, dim)
        leaves.append(torch.ops.dyncompile.select(decision, a, b, dim))
    return pytree.tree_unflatten(leaves, spec)


def switch(route: Tensor, *arms: Any, dim: int = 0) -> Any:
    """Choose per sample one of K values.

    Args:
        route: Evaluation: `[N]` integers in [0, K). Training: `[N, K]` floating weights that mix
            the arms.
        arms: K values of one structure; tensors `[..., N, ...]` or pytrees of tensors.
        dim: The dim of the arms that holds the samples.

    Returns:
        A value of the structure of an arm.

    Raises:
        ArgumentError: Fewer than two arms, or arms that differ in structure, shape or dtype.
    """
    if len(arms) < 2:
        raise ArgumentError("arms", found=f"{len(arms)}", expected="at least two")
    flat = [pytree.tree_flatten(arm) for arm in arms]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        raise ArgumentError("arms", found="different structures", expected="one structure")
    leaves = []
    for values in zip(*(values for values, _ in flat), strict=True):
        for value in values[1:]:
            _check("arms", route[..., 0] if route.is_floating_point() else route, values[0], value, dim)
        leaves.append(torch.ops.dyncompile.switch(route, list(values), dim))
    return pytree.tree_unflatten(leaves, spec)


def _check(argument: str, decision: Tensor, first: Tensor, second: Tensor, dim: int) -> None:
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ArgumentError(
            argument,
            found=f"{list(second.shape)} {second.dtype}",
            expected=f"that of the first arm: {list(first.shape)} {first.dtype}",
        )
    covered = first.shape[dim : dim + decision.dim()]
    fits = dim >= 0 and decision.dim() > 0 and len(covered) == decision.dim()
    if fits and decision.dim() == 1 and decision.shape[0] != 0:
        fits = covered[0] % decision.shape[0] == 0
    elif fits:
        fits = covered == decision.shape
    if not fits:
        raise ArgumentError(
            "decision",
            found=f"shape {list(decision.shape)} at dim {dim}",
            expected=f"the leading dims of {list(first.shape)} from there on",
        )


def aligned(decision: Tensor, arm: Tensor, dim: int) -> Tensor:
    """A decision with its dims at `dim`, repeated for the k entries of a sample, to broadcast."""
    if decision.dim() == 1:
        decision = _repeated(decision, arm.shape[dim])
    trailing = arm.dim() - dim - decision.dim()
    return decision.reshape([1] * dim + list(decision.shape) + [1] * trailing)


def _repeated(decision: Tensor, entries: int) -> Tensor:
    """One value a sample (in dim 0) to one value an entry, where a sample owns several entries."""
    count = decision.shape[0]
    return decision if count == entries else decision.repeat_interleave(entries // max(count, 1), 0)


def _reduced(gradient: Tensor, decision: Tensor, dim: int) -> Tensor:
    """Sum a gradient over every entry that one decision controls."""
    if decision.dim() == 1 and gradient.shape[dim] != decision.shape[0]:
        gradient = gradient.unflatten(dim, (decision.shape[0], -1))
    kept = range(dim, dim + decision.dim())
    gone = [i for i in range(gradient.dim()) if i not in kept]
    return (gradient.sum(gone) if gone else gradient).to(decision.dtype)


def mix(decision: Tensor, taken: Tensor, otherwise: Tensor, dim: int = 0) -> Tensor:
    """What `select` computes, in plain operations."""
    d = aligned(decision, taken, dim)
    if not decision.is_floating_point():
        return torch.where(d.bool(), taken, otherwise)
    d = d.to(taken.dtype)
    return d * taken + (1 - d) * otherwise


def mix_many(route: Tensor, arms: list[Tensor], dim: int) -> Tensor:
    """What `switch` computes, in plain operations."""
    if route.is_floating_point():
        first, *others = (
            aligned(weight, arm, dim).to(arm.dtype) * arm for weight, arm in zip(route.unbind(-1), arms, strict=True)
        )
        return sum(others, start=first)
    out = torch.where(aligned(route == 0, arms[0], dim), arms[0], arms[-1])
    for k, arm in enumerate(arms[1:-1], start=1):
        out = torch.where(aligned(route == k, arm, dim), arm, out)
    return out


# `switch` has no default for `dim`: the dispatcher drops defaults, which confuses autograd over lists.
_select = torch.library.custom_op("dyncompile::select", mix, mutates_args=())
_switch = torch.library.custom_op("dyncompile::switch", mix_many, mutates_args=())
_select.register_fake(mix)
_switch.register_fake(mix_many)


def _select_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    decision, taken, otherwise, ctx.dim = inputs
    soft = decision.is_floating_point() and decision.requires_grad
    ctx.save_for_backward(decision, taken if soft else None, otherwise if soft else None)


def _select_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    decision, taken, otherwise = ctx.saved_tensors
    d = aligned(decision, gradient, ctx.dim)
    if not decision.is_floating_point():
        d = d.bool()
        return None, torch.where(d, gradient, 0), torch.where(d, 0, gradient), None
    of_decision = None
    if ctx.needs_input_grad[0]:
        of_decision = _reduced(gradient * (taken - otherwise), decision, ctx.dim)
    d = d.to(gradient.dtype)
    return of_decision, d * gradient, (1 - d) * gradient, None


def _switch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    route, arms, ctx.dim = inputs
    ctx.count = len(arms)
    ctx.save_for_backward(route, *(arms if route.is_floating_point() else ()))


def _switch_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    route, *arms = ctx.saved_tensors
    if not arms:
        chosen = [aligned(route == k, gradient, ctx.dim) for k in range(ctx.count)]
        return None, [torch.where(c, gradient, 0) for c in chosen], None
    weights = route.unbind(-1)
    of_arms = [aligned(w, gradient, ctx.dim).to(gradient.dtype) * gradient for w in weights]
    parts = [_reduced(gradient * a, w, ctx.dim) for a, w in zip(arms, weights, strict=True)]
    return torch.stack(parts, dim=-1), of_arms, None


_select.register_autograd(_select_backward, setup_context=_select_setup)
_switch.register_autograd(_switch_backward, setup_context=_switch_setup)


def _moved(tensor: Tensor, batched: int | None, to: int, size: int) -> Tensor:
    """A tensor with vmap's dim at `to`, whether it has one or not."""
    if batched is not None:
        return tensor.movedim(batched, to)
    return tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:])


def _covering(decision: Tensor, arm: Tensor, dim: int) -> Tensor:
    """`[B, N, ...]` decisions for arms with B at `dim`: repeated where a sample owns several entries."""
    entries = arm.shape[dim + 1]
    if decision.shape[1] == entries:
        return decision
    return _repeated(decision.movedim(1, 0), entries).movedim(0, 1)


def _select_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    decision: Tensor,
    taken: Tensor,
    otherwise: Tensor,
    dim: int = 0,
) -> tuple[Tensor, int]:
    size = info.batch_size
    a, b = _moved(taken, in_dims[1], dim, size), _moved(otherwise, in_dims[2], dim, size)
    d = _covering(_moved(decision, in_dims[0], 0, size), a, dim)
    return torch.ops.dyncompile.select(d, a, b, dim), dim


def _switch_vmap(
    info: Any, in_dims: tuple[Any, ...], route: Tensor, arms: list[Tensor], dim: int
) -> tuple[Tensor, int]:
    size = info.batch_size
    moved = [_moved(a, i, dim, size) for a, i in zip(arms, in_dims[1], strict=True)]
    r = _covering(_moved(route, in_dims[0], 0, size), moved[0], dim)
    return torch.ops.dyncompile.switch(r, moved, dim), dim


_select.register_vmap(_select_vmap)
_switch.register_vmap(_switch_vmap)

SELECT = torch.ops.dyncompile.select.default
SWITCH = torch.ops.dyncompile.switch.default


def check_arms(arms: list[Tensor]) -> None:
    """Refuse arms of different shapes or types, of which a decision would change what the model's next layer sees.

    Raises:
        ArgumentError: Two arms differ.
    """
    for number, arm in enumerate(arms[1:], start=1):
        if arm.shape != arms[0].shape or arm.dtype != arms[0].dtype:
            shown = [f"{list(a.shape)} {a.dtype}" for a in (arms[0], arm)]
            found = f"{shown[0]} in arm 0 and {shown[1]} in arm {number}"
            raise ArgumentError("arms", found=found, expected="one shape and dtype in every arm of a select or switch")


def is_select(node: fx.Node) -> bool:
    """Whether a node is a `select` or a `switch`."""
    return node.op == "call_function" and node.target in (SELECT, SWITCH)


def decision_of(node: fx.Node) -> fx.Node:
    """The decision of a `select` or the route of a `switch`."""
    return node.args[0]  # type: ignore[return-value]


def arms_of(node: fx.Node) -> list[fx.Node]:
    """The arms in order of the decision's value: `[otherwise, taken]` for a `select`."""
    if node.target is SELECT:
        return [node.args[2], node.args[1]]  # type: ignore[list-item]
    return list(node.args[1])  # type: ignore[arg-type]
