"""Recurrent layers that skip steps: a skipped step copies the state, and its output is the last one computed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.nn.estimators import Estimator
from dyncompile.nn.gates import Gate
from dyncompile.nn.ragged import compacted

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


class SkippingLayer(nn.Module):
    """A recurrent layer of which each step happens or does not (Skip RNN, arXiv 1708.06834).

    `s_t = d_t cell(x_t, s_{t-1}) + (1 - d_t) s_{t-1}`: the state, the output with it, is copied where the step is
    skipped. Densely computed, and differentiable in d. It stands in for the user's layer: for samples of which no
    step is skipped its value is what that layer computed, to the bit, with the gradient of the formula.

    Args:
        form: The user's layer.
        cell_read: Whether anybody reads an LSTM's cell state after the last step; where lowered, it is left out else.
    """

    def __init__(self, form: RecurrentLayer, *, cell_read: bool = True) -> None:
        super().__init__()
        self.form = form
        self.cell = Cell(form.mode, bias=form.bias)
        self.batch_first = form.batch_first
        self.cell_read = cell_read

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

    def join(self, outputs: list[Tensor], finals: list[State]) -> tuple[Tensor, ...]:
        """The results of the directions as torch's layer returns them: the sequence, then each final state."""
        out = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return (out, *(torch.stack(parts) for parts in zip(*finals, strict=True)))

    def forward(
        self,
        static: tuple[Tensor | None, ...] | None,
        decision: Tensor,
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence.

        Args:
            static: What the user's layer returned: the sequence and each final state, None for one that nobody reads;
                or None altogether.
            decision: `[N * T]`, the steps of a sample next to each other; bool, or in [0, 1].
            x: `[N, T, D]`, or `[T, N, D]` without `batch_first`.
            state: As the user's layer takes it; None for zeros.
            weights: The layer's, in torch's order.

        Returns:
            The sequence, then each final state, as torch's layer returns them, flat.
        """
        given = self.initial(x, state)
        sequence = self.rows(x)
        d = decision.view(sequence.shape[:2])
        outputs, finals = [], []
        for i, own in enumerate(self.directions(weights)):
            out, final = self._steps(sequence, d, tuple(s[i] for s in given), own, reverse=i == 1)
            outputs.append(out)
            finals.append(final)
        return standing(static, self.join(outputs, finals), d == 1, self.batch_first)

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

    def lowered(self) -> "CompactedLayer":
        """What runs in its place where steps are skipped for real."""
        return CompactedLayer(self)


class CompactedLayer(nn.Module):
    """The same in evaluation: the steps that happen move together, and torch's own kernel runs over them alone.

    Args:
        layer: Whose form and results it has; a cell state that nobody reads is left out.
    """

    def __init__(self, layer: SkippingLayer) -> None:
        super().__init__()
        self.layer = layer
        self.eval()

    def forward(
        self,
        static: None,  # noqa: ARG002 - the place that it has in the dense form
        decision: Tensor,
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments and results as in `SkippingLayer.forward`, the decisions bool."""
        layer = self.layer
        if bool(decision.all()):
            return layer.form(x, state, *weights)  # type: ignore[no-any-return]
        given = layer.initial(x, state)
        d = decision.view(-1, x.shape[1 if layer.batch_first else 0])
        outputs, finals = [], []
        for i, own in enumerate(layer.directions(weights)):
            ragged = compacted(d, batch_first=layer.batch_first, reverse=i == 1)
            start = tuple(s[i] for s in given)
            out, final = ragged.run(layer.form, x, start, own, exact=layer.cell_read)
            outputs.append(out)
            finals.append(final)
        return layer.join(outputs, finals)


class StepGate(Gate):
    """An agent that reads `x_t` and the state before each step, with the layer that it controls.

    It stands in for the user's layer as `SkippingLayer` does, and decides on the way.

    Args:
        policy: Maps `[N, D + H]`, the input of a step beside the layer's output before it, to logits `[N]`.
        estimator: How training decides.
        layer: The layer's form.
    """

    def __init__(self, policy: nn.Module, *, estimator: Estimator, layer: SkippingLayer) -> None:
        super().__init__(policy, estimator=estimator, standardise=False)
        self.layer = layer

    def forward(  # type: ignore[override]
        self,
        static: tuple[Tensor | None, ...] | None,
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments as in `SkippingLayer.forward`.

        Returns:
            What the layer returns; then the decision and the probability, `[N * T]` each.
        """
        layer = self.layer
        now = tuple(s[0] for s in layer.initial(x, state))
        sequence = layer.rows(x)
        projected = layer.cell.project(sequence, weights)
        outputs, decisions, probabilities = [], [], []
        for t in range(sequence.shape[1]):
            d, p = super().forward(torch.cat((sequence[:, t], now[0]), -1))
            now = mixed(d, layer.cell(projected[:, t], now, weights), now)
            outputs.append(now[0])
            decisions.append(d)
            probabilities.append(p)
        found = layer.join([layer.stack(outputs)], [now])
        d = torch.stack(decisions, 1)
        return (
            *standing(static, found, d == 1, layer.batch_first),
            d.flatten(),
            torch.stack(probabilities, 1).flatten(),
        )

    def lowered(self) -> "DroppingLayer":
        """What runs in its place where steps are skipped for real."""
        return DroppingLayer(self)


class DroppingLayer(nn.Module):
    """`StepGate` in evaluation: at each step only the samples whose agent keeps it enter the cell.

    Args:
        gate: Whose policy and weights are used.
    """

    def __init__(self, gate: StepGate) -> None:
        super().__init__()
        self.gate = gate
        self.training = False

    def forward(
        self,
        static: None,  # noqa: ARG002 - the place that it has in the dense form
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments and results as in `StepGate.forward`."""
        layer = self.gate.layer
        now = tuple(s[0].clone() for s in layer.initial(x, state))
        sequence = layer.rows(x)
        outputs, decisions, probabilities = [], [], []
        for t in range(sequence.shape[1]):
            step = sequence[:, t]
            d, p = Gate.forward(self.gate, torch.cat((step, now[0]), -1))
            kept = d.nonzero().view(-1)
            if kept.shape[0] == d.shape[0]:
                now = layer.cell(layer.cell.project(step, weights), now, weights)
            elif kept.shape[0]:
                before = tuple(s.index_select(0, kept) for s in now)
                new = layer.cell(layer.cell.project(step.index_select(0, kept), weights), before, weights)
                now = tuple(s.index_copy(0, kept, part) for s, part in zip(now, new, strict=True))
            outputs.append(now[0])
            decisions.append(d)
            probabilities.append(p)
        found = layer.join([layer.stack(outputs)], [now])
        return (*found, torch.stack(decisions, 1).flatten(), torch.stack(probabilities, 1).flatten())


def mixed(decision: Tensor, new: State, old: State) -> State:
    """The state after a step: the new one where it happened, else the old one; in between a mixture."""
    d = decision.unsqueeze(-1)
    if not decision.is_floating_point():
        return tuple(torch.where(d, a, b) for a, b in zip(new, old, strict=True))
    d = d.to(new[0].dtype)
    return tuple(d * a + (1 - d) * b for a, b in zip(new, old, strict=True))


def standing(
    static: tuple[Tensor | None, ...] | None, found: tuple[Tensor, ...], kept: Tensor, batch_first: bool
) -> tuple[Tensor, ...]:
    """Values in which a sample of which every step is kept has what the static layer computed, to the bit.

    Both are the same function of the same numbers there, so the gradient of `found` is right for either.

    Args:
        static: The static layer's results, None for one that is not there; or None altogether.
        found: The results step by step.
        kept: `[N, T]` bool.
        batch_first: Where the samples are in a sequence; in a state they are in dim 1.
    """
    if static is None:
        return found
    whole = kept.all(1)
    values = []
    for i, (value, exact) in enumerate(zip(found, static, strict=True)):
        if exact is None:
            values.append(value)
            continue
        if torch.is_grad_enabled():
            exact = exact.detach() + (value - value.detach())  # noqa: PLW2901
        per = whole.view(-1, 1, 1) if i == 0 and batch_first else whole.view(1, -1, 1)
        values.append(torch.where(per, exact, value))
    return tuple(values)
