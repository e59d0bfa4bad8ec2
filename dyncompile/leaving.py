"""How a sample leaves early: its prediction in place of the model's."""

from torch import fx

from dyncompile.graph import Graph
from dyncompile.ops import SELECT


def leave(graph: Graph, decision: fx.Node, prediction: fx.Node) -> None:
    """Return a prediction where a decision says so: `select(decision, prediction, final)`, behind the earlier exits.

    Args:
        graph: Changed in place.
        decision: One value a sample: whether it leaves.
        prediction: Of the shape of the model's own.
    """
    final = graph.final
    final.meta["final"] = True
    # Inside the last select's `otherwise`: who left before is not asked again.
    outer = [n for n in final.users if n.target is SELECT and n.args[2] is final]
    with graph.fx.inserting_before(outer[0] if outer else graph.output):
        chosen = graph.fx.call_function(SELECT, (decision, prediction, final))
    if outer:
        outer[0].replace_input_with(final, chosen)
    else:
        leaves = list(graph.output.args[0])  # type: ignore[arg-type]
        leaves[graph.signature.prediction] = chosen
        graph.output.args = (tuple(leaves),)
