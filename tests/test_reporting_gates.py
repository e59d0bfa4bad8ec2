"""Pictures of what gates do, and the report of a model with gates."""

import numpy as np
import pytest
import torch
from test_calibration_gates import gated
from test_reporting import Reader, table

import dyncompile as dc
from dyncompile.calibration import calibrate
from dyncompile.calibration.usage import Examples, Usage
from dyncompile.errors import ArgumentError
from dyncompile.passes.neuron_gate import NeuronGate
from dyncompile.reporting import gate_heatmap, kept_frames, observe, skip_patterns
from dyncompile.reporting.gates import patterns


def usage(ran, *, labels=None, examples=None):
    return Usage(ran=ran, groups={"layer_skip": tuple(ran)}, labels=labels, examples=examples or {})


def test_patterns_are_counted_most_frequent_first():
    a, b = np.array([1, 1, 0, 1, 0, 1.0]), np.array([0, 0, 1, 0, 1, 1.0])
    tokens = np.ones((6, 4))
    found = patterns(usage({"a": a, "b": b, "tokens": tokens}))
    assert [(p, m.tolist()) for p, m in found] == [((1, 0), [0, 1, 3]), ((0, 1), [2, 4]), ((1, 1), [5])]
    assert skip_patterns(usage({"tokens": tokens})) is None


def test_heat_map_shows_the_rates_of_each_class_the_cheapest_first():
    a, b = np.array([1, 1, 0, 0.0]), np.array([1, 1, 1, 0.0])
    figure = gate_heatmap(usage({"a": a, "b": b}, labels=np.array([0, 0, 1, 1])), classes=["cat", "dog"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.5, 0.75], [0, 0.5], [1, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "dog", "cat"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


@pytest.mark.parametrize("shape", [(5, 3), (5, 1, 4, 4), (5, 2, 3), (5, 2, 4, 4)])
def test_kept_frames_are_marked_next_to_the_sequence(shape):
    ran = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0.0]])
    examples = {i: np.random.default_rng(i).random(shape).astype(np.float32) for i in range(3)}
    figure = kept_frames(usage({"frames": ran}, labels=np.array([4, 5, 6]), examples=examples))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["class 4, 20 % kept", "class 6, 40 % kept", "class 5, 100 % kept"]
    assert [len(axes.patches) for axes in figure.axes] == [1, 2, 5]
    ran[2, 3:] = np.nan
    figure = kept_frames(usage({"frames": ran}, examples=examples))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["20 % kept", "67 % kept", "100 % kept"]
    video = len(shape) == 4 and shape[1] == 1
    drawn = figure.axes[1].images[0].get_array().shape[1] // 4 if video else len(figure.axes[1].lines[0].get_xdata())
    assert drawn == 3, "padding is not"
    assert kept_frames(usage({"frames": ran})) is None
    with pytest.raises(ArgumentError, match="decision"):
        kept_frames(usage({"frames": ran}), decision="other")


def test_kept_tokens_are_marked_by_their_words():
    ran = np.array([[1, 0, 0], [1, 1, 1], [1, 0, np.nan]])
    examples = {i: np.array([7, 8, i], dtype=np.float32) for i in range(3)}
    figure = kept_frames(usage({"frames": ran}, examples=examples), words="abcdefghi".__getitem__)
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [
        ["h", "i", "a"], ["h", "i"], ["h", "i", "b"]
    ]  # fmt: skip
    assert [len(axes.patches) for axes in figure.axes] == [1, 1, 3]


def test_pictures_are_kept_rather_than_tokens():
    examples = Examples()
    examples.add([torch.arange(6).view(2, 3), torch.rand(2, 3, 4, 5)], torch.ones(2, dtype=torch.bool))
    assert examples.of(np.arange(2))[0].shape == (3, 4, 5)


def test_every_square_has_a_name():
    ran = {f"gate{i}": np.array([0.0, 1.0]) for i in range(36)}
    assert [text.get_text() for text in skip_patterns(usage(ran)).axes[0].texts[1:]] == list(ran)
    assert [label.get_text() for label in gate_heatmap(usage(ran)).axes[0].get_xticklabels()] == list(ran)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda u: gate_heatmap(u, classes=["cat"]), "`classes`: found 1 names; expected 2, for labels up to 1"),
        (lambda u: skip_patterns(u, count=0), "`count`: found 0; expected a whole number, at least 1"),
        (lambda u: kept_frames(u, count=-1), "`count`: found -1"),
        (lambda u: kept_frames(u, decision="a"), r"`decision`: found 'a'; expected one by frame: \['frames'\]"),
        (lambda u: gate_heatmap(3), "`usage`: found a int; expected what dyncompile.reporting.observe returns"),
        (
            lambda u: observe(torch.nn.Linear(2, 2), u),
            "`dyn`: found a Linear; expected what dyncompile.dynamize returns",
        ),
    ],
)
def test_mistakes_are_named(draw, message):
    ran = {"a": np.array([1.0, 0.0]), "frames": np.ones((2, 3))}
    with pytest.raises(ArgumentError, match=message):
        draw(usage(ran, labels=np.array([0, 1])))


@pytest.mark.parametrize("samples", [5, 6])  # as many as steps, and not
def test_examples_are_samples_where_time_comes_first(samples):
    class TimeFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = torch.nn.LSTM(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.rnn(x)[0][-1])

    x = torch.randn(5, samples, 3)
    dyn = dc.dynamize(TimeFirst(), "frame_skip", example_inputs=x[:, :2], batch_dims={"x": 1})
    dyn.gates["frames0"].enabled.fill_(True)
    batch = x, torch.zeros(samples, dtype=torch.int64)
    seen = observe(dyn, torch.utils.data.DataLoader([batch], batch_size=None))
    assert all(np.array_equal(shown, x[:, i].numpy()) for i, shown in seen.examples.items())
    assert len(kept_frames(seen).axes) == 4


def test_observe_sees_what_the_calibration_saw():
    dyn, (x, y) = gated(["layer_skip", "early_exit"])
    result = calibrate(dyn, (x, y), max_cost=0.5, method="greedy", progress=False)
    seen = observe(dyn, (x, y), batch_size=50)
    rates = {name: rate for setting in result.gates for name, rate in setting.rates.items()}
    assert {name: pytest.approx(rate) for name, rate in rates.items()} == seen.rates
    assert np.array_equal(seen.labels, y.numpy())
    born, _ = gated(enabled=False)
    with pytest.raises(ArgumentError, match="without a gate that is on"):
        observe(born, (x, y))


@pytest.mark.parametrize("strategy", ["layer_skip", ["layer_skip", "early_exit"]])
def test_report_shows_what_gates_do(strategy, tmp_path):
    dyn, data = gated(strategy)
    result = calibrate(dyn, data, max_cost=0.6, progress=False)
    assert result.gates[0].enabled
    result.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader(page)
    assert reader.open == []
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert "What gates do" in page
    assert "Most frequent patterns" in page
    assert table(page, "Gates of")["layer_skip"] == ["4", result.gates[0].knob, result.gates[0].rate]
    rows = table(page, "Region runs")
    assert rows.pop("together")[-1] == f"{result.cost:.3f}"
    assert ("Who leaves where" in page) == bool(len(dyn.exits))
    # The page is of the calibration, whatever the model is set to by then.
    for gate in dyn.gates.values():
        gate.bias.fill_(3.0)
    result.report(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
    assert all(float(gate.bias) == 3.0 for gate in dyn.gates.values())


def test_report_without_gates_has_none_of_it(tmp_path):
    dyn, data = gated("early_exit")
    calibrate(dyn, data, max_cost=0.8, progress=False).report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What gates do" not in page
    assert "Gates of" not in page


def test_steps_that_frame_skip_keeps_are_calibrated_and_drawn(tmp_path):
    torch.manual_seed(0)

    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = torch.nn.LSTM(6, 24, batch_first=True), torch.nn.Linear(24, 3)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])

    dyn = dc.dynamize(Recurrent(), "frame_skip", example_inputs=torch.zeros(2, 12, 6))
    for gate in dyn.gates.values():
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        gate.offset.fill_(0.0)
        gate.enabled.fill_(True)
    x, y = torch.randn(400, 12, 6), torch.randint(0, 3, (400,))
    result = calibrate(dyn, (x, y), max_cost=0.7, progress=False)
    assert result.cost <= 0.7
    name, rate = next(iter(result.gates[0].rates.items()))
    assert 0 < rate < 1
    assert result.evidence.usage.ran[name].shape == (result.held_out_samples, 12)
    result.report(tmp_path / "report.html")
    assert "Kept along sequences" in (tmp_path / "report.html").read_text(encoding="utf-8")
    kept_frames(result.evidence.usage).savefig(tmp_path / "frames.png")
    assert (tmp_path / "frames.png").stat().st_size > 1000


@pytest.mark.parametrize("per", ["sample", "token"])
def test_groups_of_neurons_are_shown_one_by_one(per, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 6), torch.nn.Flatten(), torch.nn.Linear(24, 3)
    )
    dyn = dc.dynamize(model, NeuronGate(groups=4, hidden=2, per=per), example_inputs=torch.zeros(2, 4, 6)).eval()
    gate = dyn.gates["neurons0"]
    gate.enabled.fill_(True)
    gate.offset.fill_(0.0)
    x, y = torch.randn(60, 4, 6), torch.randint(0, 3, (60,))
    usage = observe(dyn, (x, y))
    names = [f"neurons0.{group}" for group in range(4)]
    assert list(usage.ran) == names
    assert usage.groups == {"neuron_gate": tuple(names)}
    decided = dyn.trace(x).decisions["neurons0"].view(60, -1, 4).float().numpy()
    for group, name in enumerate(names):
        np.testing.assert_array_equal(usage.ran[name].reshape(60, -1), decided[:, :, group])
    gate_heatmap(usage).savefig(tmp_path / "usage.png")
    by_sample = per == "sample"
    assert (skip_patterns(usage) is not None) == by_sample
    assert (kept_frames(usage) is None) == by_sample  # four groups are not the four steps of the input
    result = calibrate(dyn, (x, y), max_cost=0.95, progress=False)
    assert set(result.gates[0].rates) == set(names)
