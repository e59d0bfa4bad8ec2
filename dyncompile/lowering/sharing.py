"""One program for segments of equal structure: what folding did to the weights of one is done to those of the others.

Inductor folds frozen weights before it generates code: norms into convolutions, weights into the layout of their
kernel. The code reads what comes out by name. So a block that stands twelve times in a model is compiled once, and
for the other eleven the folding alone is repeated, on their own weights. `lower` compares each of them with eager mode.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor import constant_folding
from torch.utils import _pytree as pytree

_OWN = frozenset(vars(nn.Module())) | {"_forward_pre_hooks_with_kwargs", "_is_full_backward_hook"}
"""What every module has, which says nothing of what it computes."""


class _UnlikeError(Exception):
    """Something that cannot be compared."""


# --- which segments are alike --------------------------------------------------------------------------------


def structure(segment: fx.GraphModule) -> tuple[Hashable, list[Tensor]] | None:
    """What a segment computes but for the values of its tensors, and these.

    Returns:
        A key, equal for segments of equal structure, and their tensors in one order; None if it cannot be told.
    """
    tensors: list[Tensor] = []
    places: dict[str, int] = {}
    names: dict[fx.Node, int] = {}
    rows: list[Hashable] = []
    try:
        for node in segment.graph.nodes:
            target: Any = node.target
            if node.op in ("call_module", "get_attr"):
                seen = target in places
                target = places.setdefault(target, len(places))
                if not seen:
                    rows.append(_described(_at(segment, str(node.target)), tensors))
            elif node.op in ("placeholder", "output"):
                target = node.op
            arguments = fx.node.map_arg((node.args, dict(node.kwargs)), names.__getitem__)
            rows.append((node.op, target, _plain(arguments)))
            names[node] = len(names)
        ties = {id(tensor): i for i, tensor in reversed(list(enumerate(tensors)))}
        key = (tuple(rows), tuple(ties[id(tensor)] for tensor in tensors))
        hash(key)
    except (_UnlikeError, TypeError):
        return None
    return key, tensors


def _at(root: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), root)


def _described(item: Any, tensors: list[Tensor]) -> Hashable:
    """A module or tensor but for values; its tensors are added to the list."""
    if isinstance(item, Tensor):
        if type(item) not in (Tensor, nn.Parameter):
            raise _UnlikeError
        tensors.append(item)
        return item.shape, item.dtype, item.device, item.stride() if item.layout == torch.strided else item.layout
    if not isinstance(item, nn.Module) or item._forward_hooks or item._forward_pre_hooks:
        raise _UnlikeError
    own = {name: _plain(value) for name, value in vars(item).items() if name not in _OWN}
    held = [*item._parameters.items(), *item._buffers.items(), *item._modules.items()]
    parts = [(name, None if part is None else _described(part, tensors)) for name, part in held]
    return type(item), item.training, tuple(sorted(own.items())), tuple(parts)


def _plain(value: Any) -> Hashable:
    """Something hashable that is equal where a value is."""
    if isinstance(value, dict):
        return ("dict", tuple((key, _plain(part)) for key, part in value.items()))
    if isinstance(value, list | tuple):
        return (type(value), tuple(_plain(part) for part in value))
    if isinstance(value, float):
        return ("float", value.hex())  # 0.0 equals -0.0
    if isinstance(value, slice):
        return ("slice", _plain((value.start, value.stop, value.step)))
    if isinstance(value, Tensor | nn.Module | fx.Node):
        raise _UnlikeError
    return type(value), value


# --- what became of the weights ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Made:
    """A value of a folding, by its position."""

    at: int


@dataclasses.dataclass(frozen=True)
class Folding:
    """The operations that made constants of weights.

    Attributes:
        steps: What was called, with `_Made` in place of tensors: the weights come first, then each step's result.
        results: Which of them are the constants.
    """

    steps: tuple[tuple[Callable[..., Any], Any, Any], ...]
    results: tuple[int, ...]

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The constants that other weights give."""
        values: list[Any] = [weight.detach() for weight in weights]

        def value(item: Any) -> Any:
            return values[item.at] if isinstance(item, _Made) else item

        for target, args, kwargs in self.steps:
            given, named = pytree.tree_map(value, (args, kwargs))
            values.append(target(*given, **named))
        return [values[at] for at in self.results]


class Tape:
    """Notes what is done to constants while inductor compiles."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def note(self, target: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """An operation on tensors, and what it gave."""
        self._steps.append((target, args, kwargs, result))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Note every constant that inductor folds while the context is open."""
        note = self.note

        class Noting(constant_folding.ConstantFolder):
            def _deduce_value(self, node: fx.Node) -> Any:
                found = super()._deduce_value(node)
                if node.op == "call_function" and isinstance(found, Tensor):
                    note(node.target, *self.fetch_args_kwargs_from_env(node), found)  # type: ignore[arg-type]
                return found

        before = constant_folding.ConstantFolder
        constant_folding.ConstantFolder = Noting  # type: ignore[misc]
        try:
            yield
        finally:
            constant_folding.ConstantFolder = before  # type: ignore[misc]

    def folding(self, weights: Sequence[Tensor], constants: Sequence[Tensor]) -> Folding | None:
        """How weights became constants; None if something else became one."""
        makers = {id(step[3]): step for step in self._steps}
        places: dict[int, int] = {}
        for i, weight in enumerate(weights):
            places.setdefault(id(weight), i)
        steps: list[tuple[Callable[..., Any], Any, Any]] = []

        def place(tensor: Tensor) -> _Made:
            if id(tensor) not in places:
                if id(tensor) not in makers:
                    raise _UnlikeError
                target, args, kwargs, _ = makers[id(tensor)]
                named = pytree.tree_map_only(Tensor, place, (args, kwargs))
                places[id(tensor)] = len(weights) + len(steps)
                steps.append((target, *named))
            return _Made(places[id(tensor)])

        try:
            results = tuple(place(constant).at for constant in constants)
        except _UnlikeError:
            return None
        return Folding(tuple(steps), results)


def loaded(source: str, constants: Mapping[str, Any]) -> Callable[[list[Any]], Sequence[Tensor]]:
    """Code that inductor generated, with constants of its own."""
    module = types.ModuleType("dyncompile_segment")
    exec(compile(source, "<dyncompile segment>", "exec"), module.__dict__)  # noqa: S102 - inductor generated it
    vars(module).update(constants)
    call: Callable[[list[Any]], Sequence[Tensor]] = module.call
    return call
