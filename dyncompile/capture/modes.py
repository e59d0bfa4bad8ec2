"""What reads a training flag that export froze follows `train()` and `eval()` again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyncompile.capture.canonical import aten


class Dropout(nn.Module):
    """A functional dropout that follows the module's mode; its probability is an argument."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor, p: float) -> Tensor:
        """Drop in training mode, pass on in evaluation."""
        return self.operation(x, p, True) if self.training else x


class Attention(nn.Module):
    """`scaled_dot_product_attention` with dropout in training mode only."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend; the arguments are the function's own, without the dropout."""
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            self.dropout if self.training else 0.0,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


class BatchNorm(nn.Module):
    """A functional batch norm that uses the batch's statistics in training mode only."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        training: bool,  # noqa: ARG002 - the flag that export froze
        momentum: float,
        eps: float,
        cudnn: bool,  # noqa: ARG002
    ) -> Tensor:
        """Normalise; the arguments are those of `aten.batch_norm`."""
        own = self.training or mean is None
        return nn.functional.batch_norm(x, mean, variance, weight, bias, own, momentum, eps)


_DROPOUTS = {
    aten.dropout.default: torch.dropout,
    aten.feature_dropout.default: torch.feature_dropout,
    aten.alpha_dropout.default: torch.alpha_dropout,
    aten.feature_alpha_dropout.default: torch.feature_alpha_dropout,
}


def follow_mode(graph: fx.Graph, added: dict[str, nn.Module]) -> None:
    """Wrap what reads a training flag that export made constant, so that `train()` and `eval()` reach it.

    Args:
        graph: A functional graph that was exported in training mode, changed in place.
        added: Filled with the parameterless modules to add to the root, by path.
    """
    for node in list(graph.nodes):
        if node.target in _DROPOUTS and node.args[2]:
            module: nn.Module = Dropout(_DROPOUTS[node.target])
            args = node.args[:2]
            kwargs: dict[str, Any] = {}
        elif node.target is aten.scaled_dot_product_attention.default and _dropout_of(node) > 0:
            module = Attention(_dropout_of(node))
            args = (*node.args[:4], *node.args[5:])
            kwargs = {k: v for k, v in node.kwargs.items() if k != "dropout_p"}
            if "attn_mask" in kwargs:
                kwargs["mask"] = kwargs.pop("attn_mask")
        elif node.target is aten.batch_norm.default and node.args[5]:
            module, args, kwargs = BatchNorm(), node.args, {}
        else:
            continue
        path = f"_modes.{len(added)}"
        added[path] = module
        with graph.inserting_before(node):
            new = graph.create_node("call_module", path, args, kwargs, name=node.name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _dropout_of(node: fx.Node) -> float:
    found: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return float(found)
