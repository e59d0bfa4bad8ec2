"""Balanced clusters: groups of one size whose members are alike."""

import itertools
import warnings

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

_SEED = 0
_ITERATIONS = 20


def balanced_clusters(rows: Tensor, groups: int) -> list[list[int]]:
    """Split rows into groups of equal size, as near to their group's centre as that allows.

    k-means finds the centres, whatever the sizes of its clusters; then each row is given to a centre, all at once and
    at the least sum of squared distances, with `H / groups` places at each (MoEfication, arXiv 2110.01786). The same
    rows give the same groups.

    Args:
        rows: `[H, D]`.
        groups: How many, at most H. Where they do not divide H, sizes differ by one.

    Returns:
        For each group its rows, ascending; groups ordered by their first row.
    """
    points = rows.detach().double().cpu().numpy()
    with warnings.catch_warnings():
        # A cluster may come out empty; every group is filled below.
        warnings.simplefilter("ignore", UserWarning)
        centres, _ = kmeans2(points, groups, iter=_ITERATIONS, minit="++", seed=_SEED)
    places = np.sort(np.arange(len(points)) % groups)
    _, taken = linear_sum_assignment(cdist(points, centres, "sqeuclidean")[:, places])
    found = [np.flatnonzero(places[taken] == g).tolist() for g in range(groups)]
    return sorted(found)


def even_split(count: int, groups: int) -> list[list[int]]:
    """`[0, count)` in consecutive groups whose sizes differ by one at most."""
    edges = [count * g // groups for g in range(groups + 1)]
    return [list(range(start, stop)) for start, stop in itertools.pairwise(edges)]
