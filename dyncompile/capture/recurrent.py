"""Unstack `nn.LSTM`, `nn.GRU` and `nn.RNN` into one node per layer, so that cut points lie between."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

KERNELS: dict[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


class RecurrentLayer(nn.Module):
    """One layer of a stack; its weights stay on the stack and come as arguments.

    Args:
        stack: The user's module.
    """

    def __init__(self, stack: nn.RNNBase) -> None:
        super().__init__()
        self.mode = stack.mode
        self.bias = stack.bias
        self.batch_first = stack.batch_first
        self.bidirectional = stack.bidirectional
        self.hidden_size = stack.hidden_size
        self.output_size = stack.proj_size or stack.hidden_size

    def forward(self, x: Tensor, state: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        """Run the layer over a sequence.

        Args:
            x: `[N, L, D]`, or `[L, N, D]` without `batch_first`.
            state: `h`, or `(h, c)` for an LSTM, each `[directions, N, ...]`; None for zeros.
            weights: Those of the layer, in torch's order.

        Returns:
            The sequence, then `h` (and `c`) after the last step.
        """
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

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        """The states before the first step where none are given: zeros `[directions, N, ...]`, `h` first."""
        shape = (1 + self.bidirectional, x.shape[0 if self.batch_first else 1])
        h = x.new_zeros(*shape, self.output_size)
        return (h, x.new_zeros(*shape, self.hidden_size)) if self.mode == "LSTM" else (h,)

    def extra_repr(self) -> str:
        """The kind of layer and its sizes."""
        return f"{self.mode}, hidden_size={self.hidden_size}, bidirectional={self.bidirectional}"


def unstack(graph: fx.Graph, root: nn.Module, added: dict[str, nn.Module]) -> None:
    """Replace each call of a stack by one call per layer, with the dropout between them.

    Args:
        graph: A functional graph, changed in place.
        root: The model that its nodes name.
        added: Filled with the parameterless modules to add to the root, by path.
    """
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        stack = root.get_submodule(str(node.target))
        plain = type(stack) in (nn.LSTM, nn.GRU, nn.RNN) and not stack._forward_hooks
        if plain and stack.num_layers > 1 and not stack._forward_pre_hooks:  # type: ignore[operator]
            _unstack(graph, node, stack, added)  # type: ignore[arg-type]


def _unstack(graph: fx.Graph, node: fx.Node, stack: nn.RNNBase, added: dict[str, nn.Module]) -> None:
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
            new = graph.create_node("call_module", path, args)
        else:
            new = graph.call_function(target, args)
        place = (*node.meta.get("path", ()), f"{node.target}.{layer}")
        new.meta = {"stack_trace": node.meta.get("stack_trace"), "path": place}
        return new

    def part(state: Any, layer: int) -> Any:
        rows = (0, layer * directions, (layer + 1) * directions)
        return fx.map_arg(state, lambda s: call(torch.ops.aten.slice.Tensor, s, *rows, layer=layer))

    with graph.inserting_before(node):
        for layer in range(stack.num_layers):
            weights = [graph.get_attr(f"{node.target}.{name}") for name in names[layer * count : (layer + 1) * count]]
            out = call(RecurrentLayer(stack), x, part(given, layer), *weights, layer=layer)
            states = 2 if stack.mode == "LSTM" else 1
            last.append([call(operator.getitem, out, 1 + i, layer=layer) for i in range(states)])
            x = call(operator.getitem, out, 0, layer=layer)
            if stack.dropout and layer < stack.num_layers - 1:
                x = call(nn.Dropout(stack.dropout), x, layer=layer)
        finals = [
            call(torch.ops.aten.cat.default, list(states), 0, layer=stack.num_layers - 1)
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


def _replace(graph: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    graph.erase_node(node)
