"""Recurrent layers that skip steps: a skipped step copies the state, and its output is the last one computed."""

import torch
from torch import Tensor, nn

from dyncompile.capture.cells import State, Stepwise, inside, mixed
from dyncompile.capture.recurrent import RecurrentLayer
from dyncompile.nn.estimators import Estimator
from dyncompile.nn.gates import Gate
from dyncompile.nn.ragged import compacted


class SkippingLayer(Stepwise):
    """A recurrent layer of which each step happens or does not (Skip RNN, arXiv 1708.06834).

    `s_t = d_t cell(x_t, s_{t-1}) + (1 - d_t) s_{t-1}`: the state, the output with it, is copied where the step is
    skipped. Densely computed, and differentiable in d. It stands in for the user's layer: for samples of which no
    step is skipped its value is what that layer computed, to the bit, with the gradient of the formula.

    Args:
        form: The user's layer.
        cell_read: Whether anybody reads an LSTM's cell state after the last step; where lowered, it is left out else.
    """

    def __init__(self, form: RecurrentLayer, *, cell_read: bool = True) -> None:
        super().__init__(form)
        self.cell_read = cell_read

    def forward(
        self,
        static: tuple[Tensor | None, ...] | None,
        decision: Tensor,
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,
        real: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence.

        Args:
            static: What the user's layer returned: the sequence and each final state, None for one that nobody reads;
                or None altogether.
            decision: `[N * T]`, the steps of a sample next to each other; bool, or in [0, 1].
            x: `[N, T, D]`, or `[T, N, D]` without `batch_first`.
            state: As the user's layer takes it; None for zeros.
            weights: The layer's, in torch's order.
            real: `[N * T]` bool, of packed sequences the steps that they have; None if all are.

        Returns:
            The sequence, then each final state, as torch's layer returns them, flat.
        """
        d = decision.view(self.rows(x).shape[:2])
        steps = None if real is None else real.view(d.shape)
        kept = d == 1 if steps is None else (d == 1) | ~steps
        return standing(static, self.over(d, x, state, weights, steps), kept, self.batch_first)

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
        real: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments and results as in `SkippingLayer.forward`, the decisions bool."""
        layer = self.layer
        if bool((decision if real is None else decision | ~real).all()):
            return layer.form(x, state, *weights, real=real)  # type: ignore[no-any-return]
        given = layer.initial(x, state)
        d = (decision if real is None else inside(decision, real)).view(-1, x.shape[1 if layer.batch_first else 0])
        outputs, finals = [], []
        for i, own in enumerate(layer.directions(weights)):
            ragged = compacted(d, batch_first=layer.batch_first, reverse=i == 1)
            start = tuple(s[i] for s in given)
            out, final = ragged.run(layer.form, x, start, own, exact=layer.cell_read)
            outputs.append(out)
            finals.append(final)
        return layer.join(outputs, finals, None if real is None else real.view(d.shape))


class StepGate(Gate):
    """An agent that reads `x_t` and the state before each step, with the layer that it controls.

    It stands in for the user's layer as `SkippingLayer` does, and decides on the way.

    Args:
        policy: Maps `[N, D + H]`, the input of a step beside the layer's output before it, to logits `[N]`.
        estimator: How training decides.
        layer: The layer's form.
    """

    alone = False

    def __init__(self, policy: nn.Module, *, estimator: Estimator, layer: SkippingLayer) -> None:
        super().__init__(policy, estimator=estimator, standardise=False)
        self.layer = layer

    def forward(  # type: ignore[override]
        self,
        static: tuple[Tensor | None, ...] | None,
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,
        real: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments as in `SkippingLayer.forward`.

        Returns:
            What the layer returns; then the decision and the probability, `[N * T]` each.
        """
        layer = self.layer
        now = tuple(s[0] for s in layer.initial(x, state))
        sequence = layer.rows(x)
        steps = None if real is None else real.view(sequence.shape[:2])
        projected = layer.cell.project(sequence, weights)
        outputs, decisions, probabilities = [], [], []
        for t in range(sequence.shape[1]):
            d, p = super().forward(torch.cat((sequence[:, t], now[0]), -1))
            if steps is not None:
                d, p = inside(d, steps[:, t]), inside(p, steps[:, t])
            now = mixed(d, layer.cell(projected[:, t], now, weights), now)
            outputs.append(now[0])
            decisions.append(d)
            probabilities.append(p)
        found = layer.join([layer.stack(outputs)], [now], steps)
        d = torch.stack(decisions, 1)
        return (
            *standing(static, found, d == 1 if steps is None else (d == 1) | ~steps, layer.batch_first),
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
        real: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments and results as in `StepGate.forward`."""
        layer = self.gate.layer
        now = tuple(s[0].clone() for s in layer.initial(x, state))
        sequence = layer.rows(x)
        steps = None if real is None else real.view(sequence.shape[:2])
        outputs, decisions, probabilities = [], [], []
        for t in range(sequence.shape[1]):
            step = sequence[:, t]
            d, p = Gate.forward(self.gate, torch.cat((step, now[0]), -1))
            if steps is not None:
                d, p = inside(d, steps[:, t]), inside(p, steps[:, t])
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
        found = layer.join([layer.stack(outputs)], [now], steps)
        return (*found, torch.stack(decisions, 1).flatten(), torch.stack(probabilities, 1).flatten())


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
