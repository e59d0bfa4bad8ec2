"""On real inputs a file gives and decides what the lowered model does, and what is skipped does not run."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from profiling import flops, profiled

import dyncompile as dc
from dyncompile.exporting import set_knobs

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.equality import (
    QUICK,
    ROUNDING,
    TOLERANCE,
    Answers,
    difference,
    exported,
    lowered,
    margins,
)


@pytest.fixture(scope="module")
def real(tmp_path_factory, needs):
    """A model that was trained on real data, inputs that it has not seen, and its file."""
    for package in ("torchvision", "sklearn"):
        needs(package)
    folder = tmp_path_factory.mktemp("real")

    @functools.cache
    def make(name):
        dyn, x = QUICK[name].trained()
        return dyn, x, dc.export(dyn, folder / f"{len(list(folder.iterdir()))}.onnx", decisions=True)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_outputs_and_decisions_are_the_lowered_models(real, name):
    dyn, x, path = real(name)
    wanted = lowered(dc.lower(dyn, backend="eager", decline=False), x, batch=100)
    found = exported(path, x, batch=100)
    apart = difference(found, wanted, margins(dyn, x))
    assert apart.wrong == 0
    assert apart.ties <= 2
    assert apart.off < TOLERANCE
    for rows in found.decisions.values():
        assert {0, 1} <= set(rows.unique().tolist()), "a decision that says the same of all shows nothing"


@pytest.mark.parametrize("name", [name for name in QUICK if "lstm" not in name])
def test_of_what_is_skipped_no_operation_runs(real, name, tmp_path):
    dyn, x, path = real(name)
    static = dyn.cost_model().static
    for batch in (1, 33):
        part = x[-batch:]
        _, ran = profiled(path, {"x": part}, tmp_path)
        counted = float(dyn.trace(part).cost.double().sum()) * static
        assert flops(ran) == pytest.approx(counted, rel=1e-5)
        assert flops(ran) < 0.95 * batch * static


def test_steps_that_are_skipped_do_not_enter_the_lstm(real, tmp_path):
    dyn, x, path = real("lstm, frame_skip")
    for batch in (1, 33):
        part = x[-batch:]
        kept = dyn.trace(part).decisions["frames0"].sum(1)
        _, ran = profiled(path, {"x": part}, tmp_path)
        assert [given[0] for kind, given, _ in ran if kind == "LSTM"] == [[int(kept.max()), batch, 16]]
        assert 0 < int(kept.max()) < 16


@pytest.mark.parametrize("name", QUICK)
def test_another_threshold_is_noticed(real, name, tmp_path):
    dyn, x, path = real(name)
    other = tmp_path / "other.onnx"
    other.write_bytes(path.read_bytes())
    knob, value = ("exit0", 0.0) if dyn.exits else (next(iter(dyn.gates)), -100.0)
    set_knobs(other, {knob: value})
    assert difference(exported(other, x, 100), exported(path, x, 100), margins(dyn, x)).wrong > len(x) // 4


def test_what_follows_from_a_tie_is_one_tie():
    yes, no, unasked = 1, 0, -1
    one = Answers(
        output=torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        decisions={"a": torch.tensor([[yes], [no], [no], [no]]), "b": torch.tensor([[unasked], [no], [yes], [yes]])},
    )
    # The first sample ties at `a`, so that `b` is asked; the second differs at `b` without reason.
    other = dataclasses.replace(
        one,
        output=torch.tensor([[9.0], [9.0], [3.0], [4.5]]),
        decisions={"a": torch.tensor([[no], [no], [no], [no]]), "b": torch.tensor([[yes], [yes], [yes], [yes]])},
    )
    near, far = ROUNDING / 2, 10 * ROUNDING
    at = {"a": torch.tensor([[near], [far], [far], [far]]), "b": torch.tensor([[far], [far], [far], [far]])}
    found = difference(one, other, at)
    assert (found.ties, found.wrong) == (1, 1)
    assert found.nearest == pytest.approx(far)
    assert found.off == pytest.approx(0.5 / 9)
