"""The guarantee: calibrate on many random splits of a pool of scores, count how often it is broken."""

import re

import numpy as np
import pytest
from test_calibration_search import costs, pool

from dyncompile.calibration.certify import Scores, choose
from dyncompile.calibration.target import Target, split
from dyncompile.errors import CalibrationError, UnreachableTargetError

EXITS, POOL, SAMPLES, LIMIT, DELTA, SPLITS = 3, 20_000, 500, 0.05, 0.1, 200


def calibrated(confidence, losses, /, *, seed=0, binary=True, **target):
    goal = Target(**target)
    scores = Scores(
        exits=tuple(f"exit{i}" for i in range(confidence.shape[1])),
        confidence=confidence,
        losses=losses,
        correct=1 - losses,
        binary=binary,
    )
    design, held_out = split(len(losses), goal, binary=binary, seed=seed)
    return choose(scores, costs, goal, design=design, held_out=held_out, seed=seed)


def outcome(calibration, confidence, losses):
    """Mean loss and cost of a calibration on other samples, as the model would have them."""
    thresholds = np.array(list(calibration.thresholds.values()), dtype=np.float32)
    enabled = tuple(calibration.enabled.values())
    fires = (confidence >= thresholds) & enabled
    leave = np.column_stack([fires, np.ones(len(fires), dtype=bool)]).argmax(1)
    return losses[np.arange(len(leave)), leave].mean(), costs(enabled)[leave].mean()


def broken(method, losses_of=lambda losses: losses, *, binary=True, splits=SPLITS):
    """Share of the splits after which the risk on the rest of the pool exceeds the limit."""
    confidence, losses = pool(POOL, EXITS, seed=7)
    losses = losses_of(losses)
    failures, savings = 0, []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(POOL)
        ours, rest = order[:SAMPLES], order[SAMPLES:]
        try:
            calibration = calibrated(
                confidence[ours],
                losses[ours],
                seed=seed,
                binary=binary,
                max_drop=LIMIT,
                confidence=1 - DELTA,
                method=method,
            )
        except UnreachableTargetError:
            continue  # dyn stays as it was
        risk, cost = outcome(calibration, confidence[rest], losses[rest])
        failures += risk > LIMIT
        savings.append(1 - cost)
    return failures / splits, float(np.mean(savings))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ltt", "ucb"])
def test_guarantee_holds_on_random_splits(method):
    share, saving = broken(method)
    assert share <= DELTA
    assert saving > 0.2  # it does not hold by never leaving early


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ltt", "ucb"])
def test_guarantee_holds_for_bounded_losses(method):
    weight = np.random.default_rng(0).uniform(0.2, 1, (POOL, 1))
    share, saving = broken(method, lambda losses: losses * weight, binary=False)
    assert share <= DELTA
    assert saving > 0.2


@pytest.mark.slow
def test_greedy_breaks_what_the_guarantee_holds():
    share, _ = broken("greedy", splits=30)
    assert share > 3 * DELTA


@pytest.mark.slow
def test_bound_under_a_budget_holds_on_random_splits():
    confidence, losses = pool(POOL, EXITS, seed=7)
    wrong, over = 0, []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(POOL)
        ours, rest = order[:SAMPLES], order[SAMPLES:]
        calibration = calibrated(confidence[ours], losses[ours], seed=seed, max_cost=0.7, confidence=1 - DELTA)
        risk, cost = outcome(calibration, confidence[rest], losses[rest])
        wrong += risk > calibration.bound
        over.append(cost - 0.7)
        assert calibration.cost <= 0.7
    assert wrong / SPLITS <= DELTA
    assert np.mean(over) < 0.01


def test_a_certified_choice_is_the_cheapest_of_the_certified():
    confidence, losses = pool(4000, 4)
    result = calibrated(confidence, losses, max_drop=0.03)
    certified = [point for point in result.frontier if point.certified]
    assert result.cost == min(point.cost for point in certified) < 0.9
    assert result.risk <= 0.03 == result.bound
    assert not result.frontier[-1].certified
    assert result.design_samples + result.held_out_samples == 4000


def test_budget_gives_the_safest_within_it():
    confidence, losses = pool(4000, 4)
    results = [calibrated(confidence, losses, max_cost=budget) for budget in (0.9, 0.7, 0.5)]
    for result, budget in zip(results, (0.9, 0.7, 0.5), strict=True):
        assert budget - 0.05 < result.cost <= budget
        assert result.risk < result.bound < result.risk + 0.03
    assert results[0].risk < results[1].risk < results[2].risk
    # A budget that the static model meets needs no exit.
    assert not any(calibrated(confidence, losses, max_cost=1.0).enabled.values())


def test_shares_and_costs_add_up():
    confidence, losses = pool(3000, 4)
    result = calibrated(confidence, losses, max_drop=0.05)
    parts = [*result.exits, result.final]
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert sum(part.share * part.cost for part in parts if part.enabled) == pytest.approx(result.cost)
    accuracy = sum(part.share * part.accuracy for part in parts if part.share)
    assert accuracy == pytest.approx(result.accuracy)
    assert all(part.share == 0 and part.cost is None for part in parts if not part.enabled)


def test_same_seed_same_result_and_another_seed_another_split():
    confidence, losses = pool(2000, 3)
    first = calibrated(confidence, losses, max_drop=0.05, seed=1)
    assert first == calibrated(confidence, losses, max_drop=0.05, seed=1)
    assert first != calibrated(confidence, losses, max_drop=0.05, seed=2)


@pytest.mark.parametrize("method", ["ltt", "ucb"])
def test_too_few_samples_say_how_many_are_needed(method):
    goal = Target(max_drop=0.01, confidence=0.95, method=method)
    with pytest.raises(CalibrationError, match="at least") as caught:
        split(200, goal, binary=True, seed=0)
    assert not isinstance(caught.value, UnreachableTargetError)
    needed = int(re.search(r"at least (\d+) are needed", str(caught.value))[1])
    split(needed, goal, binary=True, seed=0)
    with pytest.raises(CalibrationError):
        split(needed - 1, goal, binary=True, seed=0)
    if method == "ltt":
        assert needed == 426  # 0.99^299 <= 0.05; 127 to design on


def test_greedy_and_budgets_take_few_samples():
    assert len(split(3, Target(max_drop=0.01, method="greedy"), binary=True, seed=0)[0]) == 3
    assert len(split(4, Target(max_cost=0.5), binary=True, seed=0)[1]) == 3
    with pytest.raises(CalibrationError, match="at least 4"):
        split(3, Target(max_cost=0.5), binary=True, seed=0)


@pytest.mark.parametrize("method", ["ltt", "ucb", "greedy"])
def test_unreachable_risk_gives_the_best_reachable(method):
    confidence, losses = pool(1000, 3)
    losses[:, :3] = np.random.default_rng(0).random((1000, 3)) < 0.6
    with pytest.raises(UnreachableTargetError, match="best reachable is max_drop=") as caught:
        calibrated(confidence, losses, max_drop=0.01, confidence=0.9, method=method)
    reachable = float(re.search(r"max_drop=([\d.]+)", str(caught.value))[1])
    result = calibrated(confidence, losses, max_drop=reachable, confidence=0.9, method=method)
    assert result.cost < 1


@pytest.mark.parametrize("extra", [{}, {"max_drop": 0.05}])
@pytest.mark.parametrize("method", ["ltt", "ucb", "greedy"])
def test_unreachable_cost_gives_the_best_reachable(extra, method):
    confidence, losses = pool(1000, 3)
    with pytest.raises(UnreachableTargetError, match="best reachable is max_cost=") as caught:
        calibrated(confidence, losses, max_cost=0.1, method=method, **extra)
    reachable = float(re.search(r"max_cost=([\d.]+)", str(caught.value))[1])
    result = calibrated(confidence, losses, max_cost=reachable, method=method, **extra)
    assert result.cost <= reachable


def test_no_exit_that_saves_is_an_error():
    confidence, losses = pool(1000, 2)
    goal = Target(max_drop=0.05)
    scores = Scores(exits=("exit0", "exit1"), confidence=confidence, losses=losses, binary=True)
    design, held_out = split(1000, goal, binary=True, seed=0)
    with pytest.raises(UnreachableTargetError, match="no exit saves anything"):
        choose(scores, lambda on: costs(on, head=1.0), goal, design=design, held_out=held_out)


def test_a_loss_that_the_full_depth_has_too():
    """An absolute loss: the full depth itself may be over the limit, and an exit may be better."""
    confidence, losses = pool(3000, 3)
    absolute = losses.copy()
    absolute[:, 3] = np.random.default_rng(0).random(3000) < 0.2
    result = calibrated(confidence, absolute, max_drop=0.15)
    assert result.bound == 0.15 < absolute[:, 3].mean()
    assert result.cost < 1
    with pytest.raises(UnreachableTargetError):
        calibrated(confidence, np.maximum(losses, absolute[:, 3:]), max_drop=0.15)


@pytest.mark.parametrize(
    ("values", "argument"),
    [
        ({"max_drop": 0.0}, "max_drop"),
        ({"max_drop": 1.0}, "max_drop"),
        ({"max_drop": float("nan")}, "max_drop"),
        ({"max_cost": 0.0}, "max_cost"),
        ({"max_cost": -1.0}, "max_cost"),
        ({"max_drop": 0.1, "confidence": 0.0}, "confidence"),
        ({"max_drop": 0.1, "confidence": 1.0}, "confidence"),
        ({"max_drop": 0.1, "method": "luck"}, "method"),
        ({}, "max_drop"),
    ],
)
def test_targets_out_of_range(values, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        Target(**values)
