"""What becomes ready as values arrive, and in which order."""

import pytest
from torch import fx

from dyncompile.lowering.waiting import Waiting


@pytest.fixture
def values():
    graph = fx.Graph()
    return [graph.placeholder(name) for name in "abc"]


def test_items_come_in_their_order_and_not_before_all_that_they_read(values):
    a, b, c = values
    reads = {"first": [a, b], "second": [a], "third": [], "fourth": [c]}
    waiting = Waiting(list(reads), reads.__getitem__, there={c})
    assert waiting.take() == "third"
    assert waiting.take() == "fourth"
    assert waiting.take() is None
    waiting.deliver(a)
    assert waiting.take() == "second"
    waiting.deliver(b)
    assert len(waiting) == 1
    assert waiting.take() == "first"
    assert not len(waiting)


def test_what_is_not_wanted_waits_on(values):
    waiting = Waiting([1, 2, 3], lambda _: [], there=values)
    assert waiting.take(lambda item: item > 1) == 2
    assert waiting.take(lambda item: item > 9) is None
    assert [waiting.take(), waiting.take()] == [1, 3]


def test_each_value_is_read_once(values):
    asked = []

    def reads(item):
        asked.append(item)
        return values

    waiting = Waiting(range(100), reads, there=())
    for value in values:
        assert waiting.take() is None
        waiting.deliver(value)
    assert [waiting.take() for _ in range(100)] == list(range(100))
    assert asked == list(range(100))
