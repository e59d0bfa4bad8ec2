"""Recurrent layers step by step: what a step computes, and what a step that does not happen leaves behind."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from dyncompile.capture.recurrent import RecurrentLayer

State = tuple[Tensor, ...]
"""`h`, and `c` of an LSTM, each `[N, ...]`."""


class Cell(nn.Module):
    """One direction of one layer, step by step; without parameters of its own.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        bias: Whether the layer has biases.
    """

    def __init__(self, mode: str, *, bias: bool) -> None:
        super().__init__()
        self.mode = mode
        self.bias = bias

    def project(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """What the cell makes of its input, `[..., D]` to `[..., gates * H]`."""
        return F.linear(x, weights[0], weights[2] if self.bias else None)

    def forward(self, projected: Tensor, state: State, weights: tuple[Tensor, ...]) -> State:
        """One step.

        Args:
            projected: `[N, gates * H]`, of `project`.
            state: Before the step.
            weights: Of the layer and direction, in torch's order.
        """
        h = state[0]
        hidden = F.linear(h, weights[1], weights[3] if self.bias else None)
        if self.mode == "GRU":
            r, z, n = projected.chunk(3, -1)
            hidden_r, hidden_z, hidden_n = hidden.chunk(3, -1)
            z = torch.sigmoid(z + hidden_z)
            n = torch.tanh(n + torch.sigmoid(r + hidden_r) * hidden_n)
            return ((1 - z) * n + z * h,)
        if self.mode != "LSTM":
            total = projected + hidden
            return (torch.tanh(total) if self.mode == "RNN_TANH" else torch.relu(total),)
        i, f, g, o = (projected + hidden).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        own = 4 if self.bias else 2
        return (F.linear(h, weights[own]) if len(weights) > own else h, c)


class Stepwise(nn.Module):
    """A recurrent layer of which each step happens or does not: a step that does not copies the state.

    Args:
        form: The layer.
    """

    def __init__(self, form: "RecurrentLayer") -> None:
        super().__init__()
        self.form = form
        self.cell = Cell(form.mode, bias=form.bias)
        self.batch_first = form.batch_first

    def initial(self, x: Tensor, state: Tensor | State | None) -> State:
        """The states before the first step, `[directions, N, ...]` each."""
        if state is None:
            return self.form.initial(x)
        return (state,) if isinstance(state, Tensor) else tuple(state)

    def directions(self, weights: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The weights of each direction."""
        each = len(weights) // (1 + self.form.bidirectional)
        return [weights[i : i + each] for i in range(0, len(weights), each)]

    def rows(self, x: Tensor) -> Tensor:
        """A sequence as `[N, T, D]`."""
        return x if self.batch_first else x.transpose(0, 1)

    def stack(self, steps: list[Tensor]) -> Tensor:
        """Steps `[N, D]` as a sequence."""
        return torch.stack(steps, 1 if self.batch_first else 0)

    def join(self, outputs: list[Tensor], finals: list[State], real: Tensor | None = None) -> tuple[Tensor, ...]:
        """The results of the directions as torch's layer returns them: the sequence, then each final state.

        Args:
            outputs: Of each direction a sequence.
            finals: Of each direction the states after the last step.
            real: `[N, T]` bool, of packed sequences the steps that they have; the output is zero behind them.
        """
        out = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if real is not None:
            out = out.masked_fill(~(real if self.batch_first else real.t()).unsqueeze(-1), 0.0)
        return (out, *(torch.stack(parts) for parts in zip(*finals, strict=True)))

    def over(
        self,
        decision: Tensor,
        x: Tensor,
        state: Tensor | State | None,
        weights: tuple[Tensor, ...],
        real: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence, densely and differentiably.

        Args:
            decision: `[N, T]`, bool, or in [0, 1].
            x: `[N, T, D]`, or `[T, N, D]` without `batch_first`.
            state: As the layer takes it; None for zeros.
            weights: The layer's, in torch's order.
            real: `[N, T]` bool, of packed sequences the steps that they have; no other happens.

        Returns:
            The sequence, then each final state, as torch's layer returns them, flat.
        """
        given = self.initial(x, state)
        sequence = self.rows(x)
        d = decision if real is None else inside(decision, real)
        outputs, finals = [], []
        for i, own in enumerate(self.directions(weights)):
            out, final = self._steps(sequence, d, tuple(s[i] for s in given), own, reverse=i == 1)
            outputs.append(out)
            finals.append(final)
        return self.join(outputs, finals, real)

    def _steps(
        self, x: Tensor, d: Tensor, state: State, weights: tuple[Tensor, ...], *, reverse: bool
    ) -> tuple[Tensor, State]:
        projected = self.cell.project(x, weights)
        steps = range(x.shape[1])
        outputs = []
        for t in reversed(steps) if reverse else steps:
            state = mixed(d[:, t], self.cell(projected[:, t], state, weights), state)
            outputs.append(state[0])
        return self.stack(outputs[::-1] if reverse else outputs), state


def inside(decision: Tensor, real: Tensor) -> Tensor:
    """A decision about steps, of which those behind a sample's last one do not happen; both of one shape."""
    return decision * real if decision.is_floating_point() else decision & real


def mixed(decision: Tensor, new: State, old: State) -> State:
    """The state after a step: the new one where it happened, else the old one; in between a mixture."""
    d = decision.unsqueeze(-1)
    if not decision.is_floating_point():
        return tuple(torch.where(d, a, b) for a, b in zip(new, old, strict=True))
    d = d.to(new[0].dtype)
    return tuple(d * a + (1 - d) * b for a, b in zip(new, old, strict=True))
