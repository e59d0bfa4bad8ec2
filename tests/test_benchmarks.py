import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.harness import Report, Target, Timing, take_turns  # noqa: E402


@pytest.mark.slow
def test_exported_files_are_compared_with_the_lowered_model(tmp_path, needs):
    for package in ("torchvision", "sklearn"):
        needs(package)
    from benchmarks import equality

    report = Report(command="", machine={}, settings={})
    equality.compare(report, {"lstm": equality.QUICK["lstm, frame_skip"]}, tmp_path, backend="eager")
    [table] = report.tables
    assert [(row[0], row[1], row[4]) for row in table.rows] == [("lstm", 200, r) for r in ("sample", "batch")]
    assert len(report.targets) == 4
    assert all(target.passed for target in report.targets)
    report.markdown()


def test_turns_are_paired_and_contexts_are_entered_once_a_round():
    entered, called = [], []

    class Context:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *_):
            return None

    times = take_turns(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")},
        rounds=3,
        repeats=2,
        within={"b": Context},
    )
    assert len(times["a"].seconds) == len(times["b"].seconds) == 3
    assert called.count("a") == called.count("b") == 4 * 3  # a round to warm up; a call before each
    assert len(entered) == 4


def test_ratio_is_of_medians_with_the_quartiles_of_the_rounds():
    slow, fast = Timing(seconds=[2.0, 4.0, 9.0]), Timing(seconds=[1.0, 2.0, 3.0])
    ratio = slow.over(fast)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.5)
    saving = ratio.map(lambda r: 1 - r)
    assert (saving.low, saving.high) == (-1.5, -1.0)


def test_mixture_weighs_each_round():
    exits, stays = Timing(seconds=[1.0, 2.0]), Timing(seconds=[3.0, 4.0])
    assert Timing.mixture([(0.25, exits), (0.75, stays)]).seconds == [2.5, 3.5]


@pytest.mark.parametrize(
    ("at_least", "found", "passed", "margin"),
    [(False, 1.1, False, -0.1), (False, 0.9, True, 0.1), (True, 1.1, True, 0.1), (True, 0.9, False, -0.1)],
)
def test_target_verdicts(at_least, found, passed, margin):
    target = Target(what="x", found=found, bound=1.0, at_least=at_least)
    assert target.passed is passed
    assert target.margin == pytest.approx(margin)
