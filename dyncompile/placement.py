"""Where exits pay: what must run before each cut point, and the best places by dynamic programming."""

from collections.abc import Sequence

from torch import fx

from dyncompile.graph import Graph


def prefixes(graph: Graph) -> dict[fx.Node, float]:
    """Share of the model's FLOPs that must have run before each cut point is there."""
    total = graph.total_flops or 1.0
    needed: dict[fx.Node, float] = {}
    seen: set[fx.Node] = set()
    running = 0.0
    for cut in graph.cut_points:
        queue = [cut]
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                running += graph.flops(node)
                queue.extend(node.all_input_nodes)
        needed[cut] = running / total
    return needed


def place(depth: Sequence[float], heads: Sequence[float], count: int) -> list[int]:
    """Choose where to put exits by dynamic programming.

    Args:
        depth: Share of the model's compute that each candidate needs, ascending.
        heads: Share that a head there costs.
        count: How many exits at most.

    Returns:
        Indices, ascending, that minimise `expected_cost`: at least one, and fewer than `count` where more would not
        pay; none without candidates.
    """
    n = len(depth)
    if not n:
        return []
    # best[j][i]: cost of the samples and heads so far, with the last of j + 1 exits at candidate i.
    best = [[depth[i] * depth[i] + heads[i] for i in range(n)]]
    back: list[list[int]] = [[-1] * n]
    for _ in range(1, min(count, n)):
        steps = [
            min(
                ((best[-1][p] + (depth[i] - depth[p]) * depth[i] + (1 - depth[p]) * heads[i], p) for p in range(i)),
                default=(float("inf"), -1),
            )
            for i in range(n)
        ]
        best.append([cost for cost, _ in steps])
        back.append([p for _, p in steps])
    _, j, i = min((best[j][i] + (1 - depth[i]), j, i) for j in range(len(best)) for i in range(n))
    chosen = []
    while j >= 0:
        chosen.append(i)
        i, j = back[j][i], j - 1
    return chosen[::-1]


def expected_cost(depth: Sequence[float], heads: Sequence[float], chosen: Sequence[int]) -> float:
    """Expected cost of a sample whose needed depth is uniform in [0, 1], relative to the model.

    It leaves at the first chosen exit that is as deep, else at the end, and pays the heads on its way.

    Args:
        depth: Share of the model's compute that each candidate needs, ascending.
        heads: Share that a head there costs.
        chosen: Indices of the exits, ascending.
    """
    before, cost = 0.0, 0.0
    for i in chosen:
        cost += (depth[i] - before) * depth[i] + (1 - before) * heads[i]
        before = depth[i]
    return cost + (1 - before)
