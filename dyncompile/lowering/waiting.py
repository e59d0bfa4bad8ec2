"""Items that wait for values, handed out in their order as soon as they wait no longer."""

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Generic, TypeVar

from torch import fx

T = TypeVar("T")


class Waiting(Generic[T]):
    """A list of items of which each is ready once all values that it reads are there.

    Every value is looked at once for each of its readers, however often the queue is asked.

    Args:
        items: In order.
        reads: The values that an item reads.
        there: Those that are there already.
    """

    def __init__(self, items: Sequence[T], reads: Callable[[T], Iterable[fx.Node]], there: Collection[fx.Node]) -> None:
        self.items = items
        self._left = len(items)
        self._missing: list[int] = []
        self._readers: dict[fx.Node, list[int]] = {}
        for place, item in enumerate(items):
            unmet = {value for value in reads(item) if value not in there}
            self._missing.append(len(unmet))
            for value in unmet:
                self._readers.setdefault(value, []).append(place)
        self._ready = [place for place, missing in enumerate(self._missing) if not missing]

    def __len__(self) -> int:
        """How many have not been handed out."""
        return self._left

    def deliver(self, value: fx.Node) -> None:
        """A value is there."""
        for place in self._readers.pop(value, ()):
            self._missing[place] -= 1
            if not self._missing[place]:
                heapq.heappush(self._ready, place)

    def take(self, wanted: Callable[[T], bool] = lambda _: True) -> T | None:
        """The first ready item that is wanted; None if there is none."""
        refused: list[int] = []
        found: T | None = None
        while self._ready and found is None:
            place = heapq.heappop(self._ready)
            if wanted(self.items[place]):
                found = self.items[place]
                self._left -= 1
            else:
                refused.append(place)
        for place in refused:
            heapq.heappush(self._ready, place)
        return found
