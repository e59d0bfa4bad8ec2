"""Unstack `nn.LSTM`, `nn.GRU` and `nn.RNN` into one node per layer, so that cut points lie between."""

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dyncompile.capture.cells import Stepwise
from dyncompile.errors import ArgumentError

KERNELS: dict[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How a stack was called on packed sequences.

    Attributes:
        steps: T, what they are padded to.
        batch_first: Whether the padded ones are `[N, T, D]`, else `[T, N, D]`, whatever the stack says of tensors.
        enforce_sorted: Whether the model asks for samples in order of length, the longest first. They need not be in
            that order here.
    """

    steps: int
    batch_first: bool
    enforce_sorted: bool


class RealSteps(nn.Module):
    """Which steps of padded sequences are there: `t < length`.

    Args:
        steps: T.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, anchor: Tensor, lengths: Tensor) -> Tensor:
        """`[N * T]` bool, the steps of a sample next to each other.

        Args:
            anchor: A tensor on the device that the steps are wanted on; `lengths` may lie on another.
            lengths: `[N]` integers.

        Raises:
            ArgumentError: A length that is not from 1 to T, as torch has it. Only those on the processor are looked at,
                and only where nothing is compiled.
        """
        if lengths.device.type == "cpu" and not _traced(lengths) and len(lengths):
            low, high = (int(bound) for bound in lengths.aminmax())
            if low < 1 or high > self.steps:
                found = f"from {low} to {high}"
                raise ArgumentError("lengths", found=found, expected=f"from 1 to {self.steps}, the steps of the input")
        steps = torch.arange(self.steps, device=anchor.device)
        return (steps < lengths.to(anchor.device).unsqueeze(1)).flatten()


class PackedDropout(nn.Dropout):
    """Dropout between the layers of a packed stack: it draws for the steps that are there, in torch's order.

    Args:
        p: Probability.
        packing: Of the stack.
    """

    def __init__(self, p: float, packing: Packing) -> None:
        super().__init__(p)
        self.packing = packing

    def forward(self, x: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        """Drop in training mode, pass on in evaluation; `real` as `RealSteps` gives it."""
        if not self.training or _traced(x):
            return super().forward(x)
        own = self.packing
        packed = pack(x, real.view(-1, own.steps).sum(1), own.batch_first, own.enforce_sorted)
        dropped = packed._replace(data=super().forward(packed.data))
        return pad_packed_sequence(dropped, own.batch_first, total_length=own.steps)[0]


class RecurrentLayer(nn.Module):
    """One layer of a stack; its weights stay on the stack and come as arguments.

    Args:
        stack: The user's module.
        packing: How it reads packed sequences, if it does.
    """

    def __init__(self, stack: nn.RNNBase, packing: Packing | None = None) -> None:
        super().__init__()
        self.enforce_sorted = packing is not None and packing.enforce_sorted
        self.mode = stack.mode
        self.bias = stack.bias
        self.batch_first = stack.batch_first if packing is None else packing.batch_first
        self.bidirectional = stack.bidirectional
        self.hidden_size = stack.hidden_size
        self.output_size = stack.proj_size or stack.hidden_size

    def forward(self, x: Tensor, state: Any, *weights: Tensor, real: Tensor | None = None) -> tuple[Tensor, ...]:
        """Run the layer over a sequence.

        Args:
            x: `[N, L, D]`, or `[L, N, D]` without `batch_first`.
            state: `h`, or `(h, c)` for an LSTM, each `[directions, N, ...]`; None for zeros.
            weights: Those of the layer, in torch's order.
            real: Of packed sequences the steps that they have, as `RealSteps` gives them; the values of `x` behind
                them are not read.

        Returns:
            The sequence, then `h` (and `c`) after the last step. Of packed sequences the sequence padded with zeros,
            as long as `x`, and the states after each sample's own last step; samples in the order of `x`.
        """
        if real is not None:
            return self._packed(x, state, weights, real)
        if state is None:
            first = self.initial(x)
            state = first if self.mode == "LSTM" else first[0]
        out: tuple[Tensor, ...] = KERNELS[self.mode](
            x,
            state,
            weights,
            self.bias,
            1,
            0.0,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        return out

    def _packed(self, x: Tensor, state: Any, weights: tuple[Tensor, ...], real: Tensor) -> tuple[Tensor, ...]:
        length = x.shape[1 if self.batch_first else 0]
        steps = real.view(-1, length)
        if _traced(x):
            # How long a packed sequence is hangs on the data, which are not there yet.
            return Stepwise(self).over(steps, x, state, weights, steps)
        packed = pack(x, steps.sum(1), self.batch_first, self.enforce_sorted)
        given = (state,) if isinstance(state, Tensor) else self.initial(x) if state is None else tuple(state)
        if packed.sorted_indices is not None:
            given = tuple(s.index_select(1, packed.sorted_indices) for s in given)
        hx = given if self.mode == "LSTM" else given[0]
        options = (self.bias, 1, 0.0, self.training, self.bidirectional)
        data, *finals = KERNELS[self.mode](packed.data, packed.batch_sizes, hx, weights, *options)
        out, _ = pad_packed_sequence(packed._replace(data=data), self.batch_first, total_length=length)
        if packed.unsorted_indices is not None:
            finals = [s.index_select(1, packed.unsorted_indices) for s in finals]
        return (out, *finals)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        """The states before the first step where none are given: zeros `[directions, N, ...]`, `h` first."""
        shape = (1 + self.bidirectional, x.shape[0 if self.batch_first else 1])
        h = x.new_zeros(*shape, self.output_size)
        return (h, x.new_zeros(*shape, self.hidden_size)) if self.mode == "LSTM" else (h,)

    def extra_repr(self) -> str:
        """The kind of layer and its sizes."""
        return f"{self.mode}, hidden_size={self.hidden_size}, bidirectional={self.bidirectional}"


def pack(x: Tensor, lengths: Tensor, batch_first: bool, enforce_sorted: bool) -> PackedSequence:
    """Pack padded sequences as torch does; where it would refuse samples that are not in order, they are sorted."""
    lengths = lengths.cpu()
    return pack_padded_sequence(x, lengths, batch_first, enforce_sorted=enforce_sorted and in_order(lengths))


def in_order(lengths: Tensor) -> bool:
    """Whether the longest come first."""
    return bool((lengths[:-1] >= lengths[1:]).all())


def _traced(x: Tensor) -> bool:
    """Whether a program is being made of what runs, or shapes are being found: no value can be looked at."""
    return torch.compiler.is_compiling() or detect_fake_mode((x,)) is not None


def unstack(graph: fx.Graph, root: nn.Module, added: dict[str, nn.Module]) -> None:
    """Replace each call of a stack by one call per layer, with the dropout between them.

    A stack that reads packed sequences (metadata `packing`, and their `lengths` beside its arguments) comes to read
    padded ones and which steps are there. That is a decision of the model's own, by name `steps0`, ..., which traces
    show; nodes of which it scales the work have that name in their metadata `real`.

    Args:
        graph: A functional graph, changed in place.
        root: The model that its nodes name.
        added: Filled with the parameterless modules to add to the root, by path.
    """
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        stack = root.get_submodule(str(node.target))
        packing: Packing | None = node.meta.get("packing")
        if packing is not None:
            real = _real_steps(graph, node.kwargs["lengths"], packing.steps, added)
            _unstack(graph, node, stack, added, packing, real)  # type: ignore[arg-type]
        elif is_plain(stack) and stack.num_layers > 1:  # type: ignore[operator]
            _unstack(graph, node, stack, added)  # type: ignore[arg-type]


def is_plain(stack: nn.Module, hooks: int = 0) -> bool:
    """Whether a stack is torch's own, and does nothing but what its weights say; `hooks` of either kind are ours."""
    own = type(stack) in (nn.LSTM, nn.GRU, nn.RNN)
    return own and len(stack._forward_hooks) == hooks == len(stack._forward_pre_hooks)


def _real_steps(graph: fx.Graph, lengths: Any, steps: int, added: dict[str, nn.Module]) -> fx.Node:
    """The node that says which steps are there, one for all stacks that read the same."""
    made: list[fx.Node] = [n for n in graph.nodes if isinstance(added.get(str(n.target)), RealSteps)]
    for node in made:
        if node.args[1] is lengths and added[str(node.target)].steps == steps:
            return node
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    # One that is computed with: lengths may stay on the CPU.
    anchor = next((n for n in inputs if n.meta["dtype"] is not None and n.meta["dtype"].is_floating_point), inputs[0])
    path = f"_modes.{len(added)}"
    added[path] = RealSteps(steps)
    with graph.inserting_after(lengths):
        found = graph.create_node("call_module", path, (anchor, lengths), name="real_steps")
    found.meta = {"stack_trace": lengths.meta.get("stack_trace"), "path": ()}
    found.meta["tap"] = ("decision", f"steps{len(made)}")
    return found


def _unstack(
    graph: fx.Graph,
    node: fx.Node,
    stack: nn.RNNBase,
    added: dict[str, nn.Module],
    packing: Packing | None = None,
    real: fx.Node | None = None,
) -> None:
    names = [name for name, _ in stack.named_parameters(remove_duplicate=False)]
    directions = 1 + stack.bidirectional
    count = len(names) // stack.num_layers
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
    x: Any = node.args[0] if node.args else node.kwargs["input"]
    last: list[list[fx.Node]] = []

    def call(target: Any, *args: Any, layer: int) -> fx.Node:
        if isinstance(target, nn.Module):
            path = f"_modes.{len(added)}"
            added[path] = target
            kwargs: dict[str, Any] = {} if real is None else {"real": real}
            new = graph.create_node("call_module", path, args, kwargs, name=f"{node.name}_layer{layer}")
        else:
            new = graph.call_function(target, args)
        place = (*node.meta.get("path", ()), f"{node.target}.{layer}")
        new.meta = {"stack_trace": node.meta.get("stack_trace"), "path": place}
        if real is not None and isinstance(target, RecurrentLayer):
            new.meta["real"] = real.meta["tap"][1]
        return new

    def part(state: Any, layer: int) -> Any:
        rows = (0, layer * directions, (layer + 1) * directions)
        return fx.map_arg(state, lambda s: call(torch.ops.aten.slice.Tensor, s, *rows, layer=layer))

    with graph.inserting_before(node):
        for layer in range(stack.num_layers):
            weights = [graph.get_attr(f"{node.target}.{name}") for name in names[layer * count : (layer + 1) * count]]
            out = call(RecurrentLayer(stack, packing), x, part(given, layer), *weights, layer=layer)
            states = 2 if stack.mode == "LSTM" else 1
            last.append([call(operator.getitem, out, 1 + i, layer=layer) for i in range(states)])
            x = call(operator.getitem, out, 0, layer=layer)
            if stack.dropout and layer < stack.num_layers - 1:
                x = call(_dropout(stack, packing), x, layer=layer)
        finals = [
            states[0] if len(states) == 1 else call(torch.ops.aten.cat.default, list(states), 0, layer=len(states) - 1)
            for states in zip(*last, strict=True)
        ]
    for user in list(node.users):
        if user.args[1] == 0:
            _replace(graph, user, x)
        elif stack.mode != "LSTM":
            _replace(graph, user, finals[0])
        else:
            for item in list(user.users):
                _replace(graph, item, finals[item.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)


def _dropout(stack: nn.RNNBase, packing: Packing | None) -> nn.Dropout:
    if packing is None:
        return nn.Dropout(stack.dropout)
    return PackedDropout(stack.dropout, packing)


def _replace(graph: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    graph.erase_node(node)
