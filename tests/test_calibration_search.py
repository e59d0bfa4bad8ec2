"""The joint search over thresholds, against brute force and on scores with known structure."""

import itertools

import numpy as np
import pytest

from dyncompile.calibration.search import ThresholdSpace


def pool(samples: int, exits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and 0/1 losses of exits that get better with depth, on samples easy and hard."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(size=(samples, 1))
    skill = np.linspace(0.8, 2.5, exits)
    noise = 0.7 * generator.normal(size=(samples, exits))
    confidence = 1 / (1 + np.exp(-(skill - 1.5 * difficulty + noise)))
    right = generator.random((samples, exits)) < confidence
    final = generator.random((samples, 1)) < 1 / (1 + np.exp(-(3 - 1.2 * difficulty)))
    losses = np.column_stack([final & ~right, np.zeros(samples)]).astype(float)
    return confidence.astype(np.float32), losses


def costs(enabled: tuple[bool, ...], head: float = 0.02) -> np.ndarray:
    """Equal stages and a head per enabled exit."""
    depth = np.arange(1, len(enabled) + 2) / (len(enabled) + 1)
    heads = head * np.cumsum([*enabled, False])
    return depth + heads


def means(space, passed, losses, levels):
    loss, cost = space.outcome(passed, losses, levels)
    return loss.mean(), cost.mean()


@pytest.mark.parametrize("exits", [1, 2, 3])
def test_search_is_as_good_as_trying_everything(exits):
    confidence, losses = pool(400, exits)
    coarse = ThresholdSpace(confidence, costs, resolution=12)
    passed = coarse.passed(confidence)
    vectors = itertools.product(*(range(off + 1) for off in coarse.off))
    everything = [means(coarse, passed, losses, levels) for levels in vectors]
    path = [means(coarse, passed, losses, levels) for levels in coarse.path(passed, losses)]
    for price in (0.5, 2, 5, 20, 100):
        best = min(cost + price * risk for risk, cost in everything)
        assert min(cost + price * risk for risk, cost in path) <= best + 2e-3
    fine = ThresholdSpace(confidence, costs)
    passed = fine.passed(confidence)
    path = [means(fine, passed, losses, levels) for levels in fine.path(passed, losses)]
    for limit in (0.005, 0.02, 0.05, 0.1):
        best = min(cost for risk, cost in everything if risk <= limit)
        assert min(cost for risk, cost in path if risk <= limit) <= best + 0.03


def test_joint_thresholds_beat_a_common_one():
    confidence, losses = pool(4000, 6)
    space = ThresholdSpace(confidence, costs)
    passed = space.passed(confidence)
    path = [means(space, passed, losses, levels) for levels in space.path(passed, losses)]
    common = [
        means(space, passed, losses, tuple(np.searchsorted(grid, t) for grid in space.grids))
        for t in np.linspace(0, 1, 200)
    ]
    for limit in (0.01, 0.03, 0.1):
        joint = min(cost for risk, cost in path if risk <= limit)
        assert joint < min(cost for risk, cost in common if risk <= limit)


def test_path_goes_from_the_full_depth_to_the_cheapest():
    confidence, losses = pool(2000, 4)
    space = ThresholdSpace(confidence, costs)
    passed = space.passed(confidence)
    path = list(space.path(passed, losses))
    risks, prices = np.array([means(space, passed, losses, levels) for levels in path]).T
    assert path[0] == space.off
    assert (np.diff(risks) >= 0).all()
    assert (np.diff(prices) < 0).all()
    assert prices[0] == 1.0
    # Everything leaves at the first exit in the end.
    assert prices[-1] == pytest.approx(0.2 + 0.02)


def test_levels_do_what_the_thresholds_do_in_the_model():
    confidence, losses = pool(500, 3)
    unseen, _ = pool(500, 3, seed=1)
    space = ThresholdSpace(confidence, costs, resolution=50)
    for levels in space.path(space.passed(confidence), losses):
        thresholds = np.array(space.thresholds(levels), dtype=np.float32)
        assert ((thresholds >= 0) & (thresholds <= 1)).all()
        for sample in (confidence, unseen):
            fires = (sample >= thresholds) & np.array(space.enabled(levels))
            expected = np.column_stack([fires, np.ones(500, dtype=bool)]).argmax(1)
            assert (space.leave(space.passed(sample), levels) == expected).all()


def test_an_exit_that_does_not_pay_is_off():
    generator = np.random.default_rng(0)
    confidence, losses = pool(3000, 3)
    # The second exit guesses, with a confidence that says nothing.
    confidence[:, 1] = generator.random(3000)
    losses[:, 1] = generator.random(3000) < 0.9
    space = ThresholdSpace(confidence, costs)
    passed = space.passed(confidence)
    for price in (1.0, 10.0, 100.0):
        assert not space.enabled(space.descend(passed, losses, price, space.off))[1]


def test_a_head_dearer_than_what_it_saves_is_off():
    confidence, losses = pool(1000, 2)

    def dear(enabled):
        return costs(enabled, head=0.9)

    space = ThresholdSpace(confidence, dear)
    assert next(iter(space.path(space.passed(confidence), losses))) == space.off
    assert space.descend(space.passed(confidence), losses, 1000.0, (0, 0)) == space.off


@pytest.mark.parametrize("values", [[0.0, 1.0], [1.0], [0.5], [0.0, 0.5, 1.0]])
def test_discrete_confidences(values):
    """Patience counts, saturated softmax: few values, many ties."""
    generator = np.random.default_rng(0)
    confidence = generator.choice(np.float32(values), size=(300, 2))
    losses = np.column_stack([generator.random((300, 2)) > 0.2 + 0.8 * confidence, np.zeros(300)])
    space = ThresholdSpace(confidence, costs)
    passed = space.passed(confidence)
    for levels in space.path(passed, losses.astype(float)):
        fires = (confidence >= np.float32(space.thresholds(levels))) & space.enabled(levels)
        expected = np.column_stack([fires, np.ones(300, dtype=bool)]).argmax(1)
        assert (space.leave(passed, levels) == expected).all()


def test_thresholds_lie_between_confidences():
    """So that a last bit, which another batch size may change, does not move all who are sure."""
    confidence = np.float32([0.2, 0.6, 1.0] * 100)[:, None]
    space = ThresholdSpace(confidence, costs)
    assert space.grids[0] == pytest.approx([0, 0.4, 0.8])
    shaken = np.nextafter(confidence, np.float32(0))
    assert (space.passed(shaken) == space.passed(confidence)).all()
