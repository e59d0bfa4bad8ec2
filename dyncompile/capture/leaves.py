"""Keep every layer one node: during export a layer is an opaque operator that remembers its module.

Export inlines `nn.Linear` to `aten.linear` with its parameters as extra inputs. Passes and training
want the layer itself back. So while the model is exported, the forward of each *leaf* calls one
operator, `dyncompile::leaf`, whose shapes come from running the layer on fake tensors. Afterwards
each such node becomes a `call_module` of the original module object. Layers with several outputs
(LSTM, GRU) need no rule of their own.
"""

import collections
import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dyncompile.capture.canonical import storage
from dyncompile.capture.packing import Packed
from dyncompile.capture.recurrent import Packing, is_plain
from dyncompile.errors import CaptureError

# Concrete layers that own sub-modules or parametrizations only as an implementation detail.
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_LAYERS = tuple(
    kind
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module
)
_LAYERS = tuple(kind for kind in _LAYERS if not issubclass(kind, _CONTAINERS))


@dataclasses.dataclass(kw_only=True, slots=True)
class Call:
    """One call of a leaf: where its tensors go in and how its output is put together.

    One on packed sequences (`packing`) is one on the padded ones, with `lengths` beside them.
    """

    path: str
    spec: pytree.TreeSpec
    constants: list[Any]
    mutates: bool
    packing: Packing | None = None
    output: pytree.TreeSpec | None = None
    present: tuple[bool, ...] = ()


@dataclasses.dataclass(slots=True)
class _Export:
    """The export under way: what the operator's fake kernel may look up."""

    modules: dict[str, nn.Module]
    originals: dict[str, dict[str, Any]]
    calls: list[Call] = dataclasses.field(default_factory=list)


_current: list[_Export] = []


@torch.library.custom_op("dyncompile::leaf", mutates_args=())
def _leaf(tensors: list[Tensor], call: int) -> list[Tensor]:  # noqa: ARG001 - the schema
    raise RuntimeError("dyncompile::leaf only stands for a layer while a model is exported")


@_leaf.register_fake
def _(tensors: list[Tensor], call: int) -> list[Tensor]:
    export = _current[-1]
    record = export.calls[call]
    module = export.modules[record.path]
    mode = next(t.fake_mode for t in tensors if hasattr(t, "fake_mode"))

    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor, static_shapes=True)  # type: ignore[no-any-return]

    state = {name: fake(tensor.detach()) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    leaves = _merge(record.constants, tensors)
    args, kwargs = pytree.tree_unflatten(leaves, record.spec)
    other = record.packing is not None and record.packing.batch_first != module.batch_first
    if record.packing is not None:
        args = (args[0].transpose(0, 1) if other else args[0], args[1])
        kwargs = {}
    with swapped(module, export.originals[record.path]):
        out = torch.func.functional_call(module, state, args, kwargs, strict=False)
    out = (out[0].transpose(0, 1), *out[1:]) if other else out
    flat, record.output = pytree.tree_flatten(out)
    record.present = tuple(isinstance(leaf, Tensor) for leaf in flat)
    # A custom operator may not return its input or a view of it, so hand out fresh tensors.
    return [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in flat if isinstance(t, Tensor)
    ]


class _Slot:
    """Marks the place of a tensor among a call's constants."""


_SLOT = _Slot()


def _merge(constants: list[Any], tensors: list[Tensor]) -> list[Any]:
    queue = iter(tensors)
    return [next(queue) if leaf is _SLOT else leaf for leaf in constants]


_HOOKS = ("forward", "_forward_hooks", "_forward_pre_hooks")


def calling(module: nn.Module) -> dict[str, Any]:
    """What decides how a module is called: its own `forward`, if it has one, and its hooks."""
    return {name: vars(module)[name] for name in _HOOKS if name in vars(module)}


def hookless(forward: Callable[..., Any]) -> dict[str, Any]:
    """A forward, and no hooks."""
    return {"forward": forward, **{name: collections.OrderedDict() for name in _HOOKS[1:]}}


@contextmanager
def swapped(module: nn.Module, state: dict[str, Any]) -> Iterator[None]:
    """Give a module another `forward` and other hooks (entries of its `vars`) for a while."""
    own = vars(module)
    before = {name: own.pop(name) for name in _HOOKS if name in own}
    own.update(state)
    try:
        yield
    finally:
        for name in _HOOKS:
            own.pop(name, None)
        own.update(before)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is taken as one node: childless, or a concrete `torch.nn` layer."""
    if isinstance(module, _CONTAINERS):
        return False
    return isinstance(module, _LAYERS) or next(module.children(), None) is None


def leaves_of(root: nn.Module, run: Callable[[], object]) -> dict[str, bool]:
    """Find the layers that can be kept whole, by running the model once.

    Args:
        root: The model.
        run: Calls the model on example inputs.

    Returns:
        Path of every leaf that is called with tensors and constants, returns tensors only, and is
        inside no other leaf; the value says whether it overwrites its first input (`inplace=True`).
    """
    found: dict[str, bool] = {}
    spoiled: set[str] = set()
    handles = []
    versions: dict[str, list[tuple[Tensor, int]]] = {}

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if isinstance(module, nn.RNNBase) and _packed((args, kwargs)) and not is_plain(module, hooks=1):
            raise CaptureError(
                f"`{path}` reads a packed sequence, whose size depends on the data, and is not torch's own layer alone "
                f"({type(module).__qualname__}, with hooks or without); give it the padded sequence, and read the "
                "output of each sample at its own last step: out[torch.arange(out.shape[0]), lengths - 1]"
            )
        tensors = tensors_of((args, kwargs))
        versions[path] = [(t, t._version) for t in tensors if not t.is_inference()]
        if not tensors or not _plain((args, kwargs)):
            spoiled.add(path)

    def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        written = [t for t, version in versions.pop(path, []) if t._version != version]
        if _packed((args, kwargs, output)):
            if not isinstance(module, nn.RNNBase):
                spoiled.add(path)
            found.setdefault(path, False)
            return
        if written and not getattr(module, "inplace", False):
            spoiled.add(path)
        leaves = pytree.tree_leaves(output)
        if not leaves or not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
            spoiled.add(path)
        if not any(isinstance(leaf, Tensor) for leaf in leaves) or (
            not written and _returns_its_input(module, tensors_of((args, kwargs)), leaves)
        ):
            spoiled.add(path)
        found[path] = found.get(path, False) or bool(written)

    inside: list[str] = []
    for path, module in root.named_modules():
        if not path or not is_layer(module):
            continue
        if inside and path.startswith(f"{inside[-1]}."):  # what is inside of a module comes right after it
            continue
        inside.append(path)
        handles.append(module.register_forward_pre_hook(functools.partial(before, path), with_kwargs=True))
        handles.append(module.register_forward_hook(functools.partial(after, path), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: written for path, written in found.items() if path not in spoiled}


def _packed(tree: Any) -> bool:
    """Whether a packed sequence is among what a layer reads or returns."""
    kind = nn.utils.rnn.PackedSequence
    leaves = pytree.tree_leaves(tree, is_leaf=lambda value: isinstance(value, kind))
    return any(isinstance(leaf, kind) for leaf in leaves)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a pytree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _returns_its_input(module: nn.Module, inputs: list[Tensor], outputs: list[Any]) -> bool:
    """Whether a layer only passes on or views its input (Identity, Flatten): its operations say more.

    A dropout does so in evaluation, and a layer with hooks (beside ours) does what the hooks do.
    """
    if len(module._forward_hooks) > 1 or len(module._forward_pre_hooks) > 1:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return False
    given = {storage(t) for t in inputs}
    return any(storage(t) in given for t in outputs if isinstance(t, Tensor))


def _plain(tree: Any) -> bool:
    simple = (Tensor, int, float, bool, str, type(None), torch.dtype, torch.device)
    return all(isinstance(leaf, simple) for leaf in pytree.tree_leaves(tree))


@contextmanager
def opaque(root: nn.Module, leaves: dict[str, bool]) -> Iterator[list[Call]]:
    """While open, each leaf of `root` traces as one `dyncompile::leaf` node.

    Args:
        root: The model that is exported; its leaves are as before when the context closes.
        leaves: What `leaves_of` returned.

    Yields:
        The record of every call; a node's second argument is an index into it.
    """
    modules = {path: root.get_submodule(path) for path in leaves}
    originals = {
        path: {name: vars(module)[name] for name in _HOOKS if name in vars(module)} for path, module in modules.items()
    }
    export = _Export(modules, originals)

    def enter(path: str, *args: Any, **kwargs: Any) -> Any:
        packed = args[0] if args else kwargs.get("input")
        if not isinstance(packed, Packed):
            return record(path, args, kwargs)
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        out, state = record(path, (packed.padded, hx), {"lengths": packed.lengths}, packed.packing)
        return packed.with_output(out), state

    def record(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], packing: Packing | None = None) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        constants = [_SLOT if isinstance(leaf, Tensor) else leaf for leaf in flat]
        call = Call(path=path, spec=spec, constants=constants, mutates=leaves[path], packing=packing)
        export.calls.append(call)
        out = iter(_leaf(tensors, len(export.calls) - 1))
        assert call.output is not None
        return pytree.tree_unflatten([next(out) if here else None for here in call.present], call.output)

    _current.append(export)
    try:
        with contextlib.ExitStack() as stack:
            for path, module in modules.items():
                # Hooks belong to the layer: they run when the graph calls it, and are not traced.
                stack.enter_context(swapped(module, hookless(functools.partial(enter, path))))
            yield export.calls
    finally:
        _current.pop()


def raise_leaves(graph: fx.Graph, calls: list[Call]) -> set[fx.Node]:
    """Turn every `dyncompile::leaf` node into a `call_module` of the layer.

    Args:
        graph: The exported graph, changed in place.
        calls: What `opaque` recorded.

    Returns:
        The new nodes that overwrite their first argument.
    """
    mutating: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is not torch.ops.dyncompile.leaf.default:
            continue
        tensors, index = node.args
        call = calls[index]
        args, kwargs = pytree.tree_unflatten(_merge(call.constants, tensors), call.spec)
        with graph.inserting_before(node):
            raised = graph.create_node("call_module", call.path, tuple(args), kwargs)
        raised.meta = {**node.meta, "path": (*node.meta["path"], call.path)}
        if call.packing is not None:
            raised.meta["packing"] = call.packing
        values = {user.args[1]: user for user in list(node.users)}
        assert call.output is not None
        with graph.inserting_after(raised):
            _replace_outputs(graph, raised, call, values)
        graph.erase_node(node)
        if call.mutates:
            mutating.add(raised)
    return mutating


def _replace_outputs(graph: fx.Graph, raised: fx.Node, call: Call, values: dict[Any, fx.Node]) -> None:
    """Rewire the users of the operator's list of tensors to the module's own structure of outputs."""
    assert call.output is not None
    tokens: list[Any] = []
    count = 0
    for here in call.present:
        tokens.append(count if here else None)
        count += here
    tree = pytree.tree_unflatten(tokens, call.output)

    def visit(part: Any, source: fx.Node) -> None:
        if isinstance(part, int):
            user = values.get(part)
            if user is not None:
                user.replace_all_uses_with(source)
                graph.erase_node(user)
        elif isinstance(part, tuple | list):
            for index, child in enumerate(part):
                if any(leaf is not None and leaf in values for leaf in pytree.tree_leaves(child)):
                    with graph.inserting_after(source):
                        item = graph.call_function(operator.getitem, (source, index))
                    visit(child, item)
        elif isinstance(part, dict):
            for key, child in part.items():
                with graph.inserting_after(source):
                    item = graph.call_function(operator.getitem, (source, key))
                visit(child, item)

    visit(tree, raised)
