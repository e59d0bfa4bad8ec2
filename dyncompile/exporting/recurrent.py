"""Recurrent layers that skip steps, in the form that ONNX runs: the steps that a sample keeps move together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncompile.capture.cells import State, inside, mixed
from dyncompile.errors import ExportError
from dyncompile.nn.gates import Gate
from dyncompile.nn.recurrent import SkippingLayer, StepGate

_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""torch's gates, in the order of ONNX."""


class SequenceLayer(nn.Module):
    """`SkippingLayer` in evaluation, by ONNX's own operator with the length that each sample keeps.

    Args:
        layer: Whose form and results it has.
    """

    def __init__(self, layer: SkippingLayer) -> None:
        super().__init__()
        self.layer = layer
        self.mode = "RNN" if layer.form.mode.startswith("RNN") else layer.form.mode

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
        given = layer.initial(x, state)
        sequence = layer.rows(x)
        kept = (decision if real is None else inside(decision, real)).view(-1, sequence.shape[1])
        outputs, finals = [], []
        for i, own in enumerate(layer.directions(weights)):
            start = tuple(s[i] for s in given)
            if i:
                out, final = self._run(sequence.flip(1), kept.flip(1), start, own)
                out = out.flip(1)
            else:
                out, final = self._run(sequence, kept, start, own)
            outputs.append(out)
            finals.append(final)
        joined, *states = layer.join(outputs, finals)
        if real is not None:
            joined = joined.masked_fill(~real.view(kept.shape).unsqueeze(-1), 0.0)
        return (joined if layer.batch_first else joined.transpose(0, 1), *states)

    def _run(self, x: Tensor, kept: Tensor, state: State, weights: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        """One direction of `[N, T, D]`: outputs `[N, T, H]` and final states `[N, H]`."""
        batch, length = kept.shape
        done = kept.long().cumsum(1)
        count = done[:, -1]
        sample = torch.arange(batch, device=x.device)
        steps = torch.arange(length, device=x.device).expand(batch, -1)
        # The k-th kept step of a sample; skipped ones all go to a place behind, which nobody reads.
        place = torch.where(kept, done - 1, length)
        source = torch.zeros_like(torch.cat((steps, steps[:, :1]), 1)).scatter(1, place, steps)
        # No longer than what the sample that keeps most has kept.
        longest: Any = count.max().clamp(min=1).item()
        torch._check(longest >= 1)
        torch._check(longest <= length)
        rows = (sample.unsqueeze(1) * length + source.narrow(1, 0, longest)).t().reshape(-1)
        compact = x.reshape(-1, x.shape[-1]).index_select(0, rows).reshape(longest, batch, x.shape[-1])
        out, after = self._operator(compact, count, state, weights)
        flat = torch.cat((state[0].unsqueeze(0), out)).reshape(-1, out.shape[-1])
        spread = flat.index_select(0, (done * batch + sample.unsqueeze(1)).reshape(-1)).reshape(batch, length, -1)
        # ONNX says nothing of the states of a sequence of no steps.
        none = (count == 0).unsqueeze(1)
        finals = tuple(torch.where(none, old, new) for old, new in zip(state, after, strict=True))
        return spread, finals

    def _operator(
        self, compact: Tensor, count: Tensor, state: State, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, State]:
        form = self.layer.form
        hidden = form.hidden_size
        if form.output_size != hidden:
            raise ExportError(
                "an LSTM with projections cannot skip steps in ONNX, whose LSTM has none: take proj_size=0, "
                "export to *.pt2, or disable its gate"
            )
        attributes: dict[str, Any] = {"hidden_size": hidden}
        if self.mode == "GRU":
            attributes["linear_before_reset"] = 1
        elif self.mode == "RNN":
            attributes["activations"] = ["Tanh" if form.mode == "RNN_TANH" else "Relu"]
        first, second, *biases = (self._ordered(w) for w in weights)
        bias = torch.cat(biases).unsqueeze(0) if biases else None
        inputs = [
            compact,
            first.unsqueeze(0),
            second.unsqueeze(0),
            bias,
            count.int(),
            *(s.unsqueeze(0) for s in state),
        ]
        length, batch = compact.shape[:2]
        shapes = [(length, 1, batch, hidden), *((1, batch, hidden) for _ in state)]
        out, *after = torch.onnx.ops.symbolic_multi_out(
            self.mode, inputs, attributes, dtypes=[compact.dtype] * len(shapes), shapes=shapes
        )
        # `Y` holds zeros where a sequence has ended; its last step is what `Y_h` holds.
        return out.squeeze(1), tuple(s.squeeze(0) for s in after)

    def _ordered(self, weight: Tensor) -> Tensor:
        order = _ORDER.get(self.mode, (0,))
        parts = weight.chunk(len(order))
        return torch.cat([parts[i] for i in order])


class Start(nn.Module):
    """What goes into a loop over the steps of a sequence; called as `StepGate` is.

    Args:
        layer: Whose sequence and states.
    """

    def __init__(self, layer: SkippingLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        static: None,  # noqa: ARG002 - the place that it has in the dense form
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,  # noqa: ARG002 - the cell has them
    ) -> tuple[Tensor, ...]:
        """The sequence `[T, N, D]`, then the states `[N, ...]` before the first step."""
        sequence = self.layer.rows(x).transpose(0, 1)
        return sequence, *(s[0] for s in self.layer.initial(x, state))


class Agent(nn.Module):
    """The decisions of a gate about one step.

    Args:
        gate: Reads the step and the state.
        path: The gate's name in the model.
    """

    def __init__(self, gate: StepGate, path: str) -> None:
        super().__init__()
        self.path = path
        owner, name = path.split(".")
        self.add_module(owner, nn.ModuleDict({name: gate}))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor]:
        """From a step `[N, D]` and the output before it `[N, H]` to `[N]`."""
        gate = self.get_submodule(self.path)
        assert isinstance(gate, StepGate)
        return (Gate.forward(gate, torch.cat((x, h), -1))[0],)


class Cell(nn.Module):
    """One step of a layer, with its weights.

    Args:
        layer: Whose step.
        weights: In torch's order.
    """

    def __init__(self, layer: SkippingLayer, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.cell = layer.cell
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """From a step `[N, D]` and states `[N, ...]` to states."""
        weights = tuple(self.weights)
        return self.cell(self.cell.project(x, weights), state, weights)  # type: ignore[no-any-return]


# --- programs of torch -------------------------------------------------------------------------------


def conditional_step(cell: Cell, decision: Tensor, x: Tensor, state: State) -> State:
    """A step of `cell` on `[N, D]`, left out by `torch.cond` where no sample keeps it."""

    def run(decision: Tensor, x: Tensor, *before: Tensor) -> State:
        return mixed(decision, cell(x, *before), before)

    def skip(decision: Tensor, x: Tensor, *before: Tensor) -> State:  # noqa: ARG001 - as the other branch
        return tuple(s.clone() for s in before)

    result: State = torch.cond(decision.any(), run, skip, (decision, x, *state))
    return tuple(result)


class ConditionalLayer(nn.Module):
    """`SkippingLayer` in evaluation, a `torch.cond` for each step; also an LSTM with projections.

    Args:
        layer: Whose form and results it has.
        weights: In torch's order. Branches read them off modules: sizes of what they are given are not known.
    """

    def __init__(self, layer: SkippingLayer, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.cells = nn.ModuleList(Cell(layer, own) for own in layer.directions(tuple(weights)))

    def forward(
        self,
        static: None,  # noqa: ARG002 - the place that it has in the dense form
        decision: Tensor,
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,  # noqa: ARG002 - the cells have them
        real: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments and results as in `SkippingLayer.forward`, the decisions bool."""
        layer = self.layer
        given = layer.initial(x, state)
        sequence = layer.rows(x)
        kept = (decision if real is None else inside(decision, real)).view(-1, sequence.shape[1])
        outputs, finals = [], []
        for i, cell in enumerate(self.cells):
            assert isinstance(cell, Cell)
            now, steps = tuple(s[i] for s in given), []
            order = range(sequence.shape[1])
            for t in reversed(order) if i else order:
                now = conditional_step(cell, kept[:, t], sequence[:, t], now)
                steps.append(now[0])
            outputs.append(layer.stack(steps[::-1] if i else steps))
            finals.append(now)
        return layer.join(outputs, finals, None if real is None else real.view(kept.shape))


class ConditionalAgent(nn.Module):
    """`StepGate` in evaluation, a `torch.cond` for each step.

    Args:
        gate: Whose policy and layer are used.
        weights: In torch's order.
    """

    def __init__(self, gate: StepGate, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.gate = gate
        self.cell = Cell(gate.layer, weights)

    def forward(
        self,
        static: None,  # noqa: ARG002 - the place that it has in the dense form
        x: Tensor,
        state: Tensor | State | None,
        *weights: Tensor,  # noqa: ARG002 - the cell has them
        real: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over a sequence; arguments and results as in `StepGate.forward`."""
        layer = self.gate.layer
        now = tuple(s[0] for s in layer.initial(x, state))
        sequence = layer.rows(x)
        there = None if real is None else real.view(sequence.shape[:2])
        steps, decisions, probabilities = [], [], []
        for t in range(sequence.shape[1]):
            d, p = Gate.forward(self.gate, torch.cat((sequence[:, t], now[0]), -1))
            if there is not None:
                d, p = inside(d, there[:, t]), inside(p, there[:, t])
            now = conditional_step(self.cell, d, sequence[:, t], now)
            steps.append(now[0])
            decisions.append(d)
            probabilities.append(p)
        found = layer.join([layer.stack(steps)], [now], there)
        return (*found, torch.stack(decisions, 1).flatten(), torch.stack(probabilities, 1).flatten())
