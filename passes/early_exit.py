"""Early exit: a prediction head after chosen cut points; a sample leaves at the first that is sure enough."""

import copy
import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from dyncompile.demand import sweep
from dyncompile.errors import ArgumentError
from dyncompile.graph import Graph, Spec, is_tensor, spec
from dyncompile.nn import Criterion, Exit, build_head, certainty
from dyncompile.nn.criteria import REDUCTIONS
from dyncompile.nn.heads import Feature
from dyncompile.ops import SELECT
from dyncompile.passes.base import Pass, Refusal, Site, find

_HEADS = ("linear", "conv", "clone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit(Pass):
    """Attach exits to a model (BranchyNet, arXiv 1709.01686; Shallow-Deep Networks, arXiv 1810.07052).

    Before:  %y = tail(%h)                             ; return %y
    After:   %e = exits.exit0(%h)                      ; %p, _, %d = %e
             %y = tail(%h); %s = select(%d, %p, %y)    ; return %s

    Legality: an exit goes on a cut point (every path from the input to the prediction passes it) whose value is one
    tensor with one row a sample; the head must cost less than the rest of the model; no other leaf of the output may
    need the rest of the model, since a sample that left cannot deliver it.

    Args:
        exits: How many, placed to minimise the expected cost when the depth that a sample needs is uniform over the
            compute; or paths of modules after which to exit; or "all".
        head: "linear" (pool, norm, linear), "conv" (a small convolution before it), "clone" (a copy of the model's
            own tail, where the shapes allow).
        features: "last" reads the cut point alone; "dense" also the cut points of the earlier exits (MSDNet, arXiv 1703.09844).
        criterion: "max_softmax", "margin", "entropy", "patience" or a callable (logits `[N, K, ...]`, earlier) -> `[N, ...]`.
        reduction: How confidences of pixels or tokens become one per sample: "mean", "min" or "quantile10".
        pool: "auto" (as the model itself pools), "mean", "cls" or "last".
    """

    name: ClassVar[str] = "early_exit"
    summary: ClassVar[str] = "classifier heads at cut points; a sample leaves at the first that is sure"
    paper: ClassVar[str] = "1709.01686"

    exits: int | str | Sequence[str] = 3
    head: str = "linear"
    features: str = "last"
    criterion: str | Criterion = "max_softmax"
    reduction: str = "mean"
    pool: str = "auto"

    def __post_init__(self) -> None:
        for argument, value, allowed in (
            ("head", self.head, _HEADS),
            ("features", self.features, ("last", "dense")),
            ("reduction", self.reduction, tuple(REDUCTIONS)),
            ("pool", self.pool, ("auto", "mean", "cls", "last")),
        ):
            if value not in allowed:
                raise ArgumentError(argument, found=repr(value), expected=f"one of {allowed}")
        certainty(self.criterion)
        count = isinstance(self.exits, int) and not isinstance(self.exits, bool) and self.exits >= 1
        paths = not isinstance(self.exits, int | str) and len(self.exits) > 0
        if not (count or paths or self.exits == "all"):
            raise ArgumentError("exits", found=repr(self.exits), expected='a number >= 1, module paths, or "all"')

    # --- where -----------------------------------------------------------------------------------

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Cut points worth an exit, in order of execution."""
        candidates: list[fx.Node] = []
        depth = prefixes(graph)
        for node in graph.cut_points:
            reason = self._refuse(graph, node, depth[node])
            if reason:
                yield Refusal(node=node.name, reason=reason)
            else:
                candidates.append(node)
        late = _late_outputs(graph, candidates)
        if late:
            yield Refusal(node=late, reason=f"the output `{late}` needs the whole model; keep only the prediction: prediction_only=True")
            return
        for i, node in enumerate(self._choose(graph, candidates, depth)):
            yield Site(name=f"exit{i}", node=node.name, data={"depth": round(depth[node], 4)})

    def _refuse(self, graph: Graph, node: fx.Node, depth: float) -> str | None:
        if not is_tensor(node):
            return "its value is no single tensor"
        value = spec(node)
        if value.batch_dim is None or value.rows != 1 or not node.meta.get("sliceable", False):
            return "its value is not one row a sample"
        if len(value.shape) < 2:
            return "its value has no channels"
        if not value.dtype.is_floating_point:
            return "its value is not floating"
        try:
            head = self._head(graph, [node])
        except ArgumentError as error:
            return str(error)
        if depth + head_share(graph, node, head) >= 1:
            return "the head costs as much as what an exit there could save"
        return None

    def _choose(self, graph: Graph, candidates: list[fx.Node], depth: dict[fx.Node, float]) -> list[fx.Node]:
        if isinstance(self.exits, str):
            return _distinct(candidates, depth)
        if isinstance(self.exits, int):
            distinct = _distinct(candidates, depth)
            heads = [head_share(graph, node, self._head(graph, [node])) for node in distinct]
            return [distinct[i] for i in place([depth[n] for n in distinct], heads, self.exits)]
        chosen = []
        for path in self.exits:
            inside = [node for node in candidates if _within(node, path)]
            if not inside:
                raise ArgumentError(
                    "exits", found=repr(path), expected=f"a module whose output is a cut point: {_paths(candidates)}"
                )
            chosen.append(inside[-1])
        return sorted(set(chosen), key=candidates.index)

    # --- how -------------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Insert one exit behind the exits that are already there."""
        node = find(graph, site.node)
        earlier = [n for n in graph.fx.nodes if n.meta.get("tap") == ("exit", n.meta.get("owner"))]
        cuts = [find(graph, n.meta["cut"]) for n in earlier] if self.features == "dense" else []
        sources = [*cuts, node]
        inputs = self._inputs(graph, sources)
        target = spec(graph.prediction)
        learned = graph.task == "regression"
        module = Exit(
            self._head(graph, sources),
            criterion=self.criterion,
            reduction=self.reduction,
            class_dim=class_dim(target),
            features=len(inputs),
            learned=learned,
        )
        path = f"exits.{site.name}"
        graph.add_module(path, module.to(graph.inputs[0].device, target.dtype))
        final = graph.final
        final.meta["final"] = True
        with graph.fx.inserting_after(_latest(graph, inputs)):
            call = graph.fx.create_node("call_module", path, (*inputs, *earlier))
        parts = []
        for i, tap in enumerate(("exit", "confidence", "decision")):
            with graph.fx.inserting_after(parts[-1] if parts else call):
                part = graph.fx.call_function(operator.getitem, (call, i))
            part.meta.update(tap=(tap, site.name), owner=site.name, cut=site.node)
            parts.append(part)
        prediction, _, decision = parts
        decision.meta["decision"] = site.name
        # Behind the earlier exits: inside the last select's `otherwise`.
        outer = [n for n in final.users if n.target is SELECT and n.args[2] is final]
        with graph.fx.inserting_before(outer[0] if outer else graph.output):
            chosen = graph.fx.call_function(SELECT, (decision, prediction, final))
        if outer:
            outer[0].replace_input_with(final, chosen)
        else:
            leaves = list(graph.output.args[0])  # type: ignore[arg-type]
            leaves[graph.signature.prediction] = chosen
            graph.output.args = (tuple(leaves),)

    def _inputs(self, graph: Graph, sources: list[fx.Node]) -> list[fx.Node]:
        """The head's inputs: each feature, with its mask after it."""
        if self.head == "clone":
            return [*sources[-1:], *_tail(graph, sources[-1])[1]]
        inputs: list[fx.Node] = []
        for node in sources:
            inputs.append(node)
            mask = _mask(graph, node)
            if mask is not None and len(spec(graph.prediction).shape) <= 2:
                inputs.append(mask)
        return inputs

    def _head(self, graph: Graph, sources: list[fx.Node]) -> nn.Module:
        if self.head == "clone":
            return _tail(graph, sources[-1])[0]
        target = spec(graph.prediction)
        features = [self._feature(graph, node) for node in sources]
        return build_head(
            self.head, features, target.shape, class_dim(target), learned=graph.task == "regression"
        )

    def _feature(self, graph: Graph, node: fx.Node) -> Feature:
        value = spec(node)
        channel_dim = graph.channel_dim(node)
        if channel_dim == value.batch_dim or value.batch_dim is None:
            raise ArgumentError("head", found=f"features {list(value.shape)}", expected="channels beside the batch")
        mask = _mask(graph, node)
        return Feature(
            shape=value.shape,
            batch_dim=value.batch_dim,
            channel_dim=channel_dim,
            pool=_pooling(graph, node) if self.pool == "auto" else self.pool,
            masked=mask is not None and len(spec(graph.prediction).shape) <= 2,
            padding=mask is not None and "pad" in mask.name,
        )






# --- placement -----------------------------------------------------------------------------------


def prefixes(graph: Graph) -> dict[fx.Node, float]:
    """Share of the model's FLOPs that must have run before each cut point is there."""
    total = sum(graph.flops(n) for n in graph.fx.nodes) or 1.0
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


def head_share(graph: Graph, node: fx.Node, head: nn.Module) -> float:
    """FLOPs of a head relative to the model: two a weight and position it is applied at."""
    total = sum(graph.flops(n) for n in graph.fx.nodes) or 1.0
    value = spec(node)
    channels = value.shape[graph.channel_dim(node)]
    positions = math.prod(value.shape) // channels
    flops = 0.0
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            flops += 2 * module.weight.numel() * positions / (module.stride[0] * module.stride[1])
        elif isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel() * (positions if len(spec(graph.prediction).shape) == 3 else 1)
    return flops / total


def place(depth: Sequence[float], heads: Sequence[float], count: int) -> list[int]:
    """Choose where to put exits by dynamic programming.

    Args:
        depth: Share of the model's compute that each candidate needs, ascending.
        heads: Share that a head there costs.
        count: How many exits at most.

    Returns:
        Indices that minimise the expected cost of a sample whose needed depth is uniform in [0, 1]: it leaves at the
        first exit that is as deep, and pays the heads on its way; fewer than `count` where more would not pay.
    """
    n = len(depth)
    # best[j][i]: cost of the samples and heads so far, with the j-th exit at candidate i.
    best = [[depth[i] * depth[i] + heads[i] for i in range(n)]]
    back: list[list[int]] = [[-1] * n]
    for _ in range(1, min(count, n)):
        row, origin = [], []
        for i in range(n):
            options = [
                (best[-1][p] + (depth[i] - depth[p]) * depth[i] + (1 - depth[p]) * heads[i], p) for p in range(i)
            ]
            cost, p = min(options, default=(float("inf"), -1))
            row.append(cost)
            origin.append(p)
        best.append(row)
        back.append(origin)
    total, j, i = min(
        (best[j][i] + (1 - depth[i]), j, i) for j in range(len(best)) for i in range(n)
    ) if n else (0.0, -1, -1)
    chosen = []
    while j >= 0:
        chosen.append(i)
        i, j = back[j][i], j - 1
    return chosen[::-1]


def _distinct(candidates: list[fx.Node], depth: dict[fx.Node, float]) -> list[fx.Node]:
    """Of cut points with the same compute before them, the last: after norm and activation."""
    last = {round(depth[node], 6): node for node in candidates if depth[node] > 0}
    return list(last.values())


def _within(node: fx.Node, path: str) -> bool:
    return any(p == path or p.startswith(f"{path}.") for p in node.meta.get("path", ()))


def _paths(candidates: list[fx.Node]) -> list[str]:
    return sorted({path for node in candidates for path in node.meta.get("path", ()) if path})


def _late_outputs(graph: Graph, candidates: list[fx.Node]) -> str | None:
    """Name of an output leaf, besides the prediction, that needs more than the last candidate's ancestors."""
    if not candidates:
        return None
    deep = set(graph.fx.nodes)
    queue = [candidates[0]]
    while queue:
        node = queue.pop()
        if node in deep:
            deep.discard(node)
            queue.extend(node.all_input_nodes)
    leaves = graph.output.args[0]
    for i, leaf in enumerate(leaves):  # type: ignore[arg-type, var-annotated]
        if i != graph.signature.prediction and isinstance(leaf, fx.Node) and leaf in deep and leaf is not graph.prediction:
            return graph.signature.output_names[i]
    return None


# --- heads ---------------------------------------------------------------------------------------


def class_dim(target: Spec) -> int:
    """Dim of the classes in a prediction: 1 for `[N, K]` and `[N, K, H, W]`, the last for `[N, L, K]`."""
    return 2 if len(target.shape) == 3 else 1


def _latest(graph: Graph, nodes: list[fx.Node]) -> fx.Node:
    order = {n: i for i, n in enumerate(graph.fx.nodes)}
    last = max(nodes, key=lambda n: order[n])
    return graph.placeholders[-1] if last.op == "placeholder" else last


def _mask(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The input that marks the tokens of a token feature: integers or booleans `[N, L]` named like a mask."""
    shape = spec(node).shape
    if len(shape) != 3 or spec(node).batch_dim != 0:
        return None
    for inp in graph.placeholders:
        if is_tensor(inp) and spec(inp).shape == shape[:2] and ("mask" in inp.name or "pad" in inp.name):
            return inp
    return None


def _pooling(graph: Graph, node: fx.Node) -> str:
    """How the model itself turns tokens or steps into one vector: read off the last cut points."""
    value = spec(node)
    if len(value.shape) != 3:
        return "mean"
    steps = 0 if value.batch_dim == 1 else 1
    aten = torch.ops.aten
    for other in reversed(graph.fx.nodes):
        if other.target is aten.select.int and is_tensor(other.args[0]) and len(spec(other.args[0]).shape) == 3:  # type: ignore[arg-type]
            _, dim, index = other.args
            if dim == steps and other in graph.trunk:
                return "cls" if index == 0 else "last"
        if other.target is aten.index.Tensor and other in graph.trunk and len(other.args[1]) == 2:  # type: ignore[arg-type]
            return "last"
    return "mean"


def _tail(graph: Graph, node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A copy of the model's own tail: what follows the last cut point of the same shape as `node`.

    Returns:
        The tail with its own copies of the modules, and the further inputs (masks, sizes' sources) that it needs.

    Raises:
        ArgumentError: No later cut point has the shape, or the tail reads something that cannot be copied.
    """
    alike = [c for c in graph.cut_points if is_tensor(c) and spec(c) == spec(node)]
    start = alike[-1] if alike else node
    inside = {start}
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {start: copied.placeholder("x")}
    root = nn.Module()
    extra: list[fx.Node] = []
    final = graph.final
    if start is final or not alike:
        raise ArgumentError("head", found=f"'clone' at features {list(spec(node).shape)}", expected="a cut point of the shape that the model's tail reads")
    needed = _ancestors(final, stop=start)
    for other in graph.fx.nodes:
        if other not in needed or other in inside:
            continue
        if other.op == "placeholder":
            mapping[other] = copied.placeholder(other.name)
            extra.append(other)
            continue
        mapping[other] = copied.node_copy(other, lambda n: mapping[n])
        if other.op == "call_module":
            _adopt(root, str(other.target), copy.deepcopy(graph.root.get_submodule(str(other.target))))
        elif other.op == "get_attr":
            value = graph.root
            for part in str(other.target).split("."):
                value = getattr(value, part)
            clone = value.detach().clone()  # type: ignore[operator]
            _adopt(root, str(other.target), nn.Parameter(clone) if isinstance(value, nn.Parameter) else clone)
    copied.output(mapping[final])
    sweep(copied)
    flops = sum(n.meta.get("flops", 0.0) for n in needed)
    if flops > 0.5 * sum(graph.flops(n) for n in graph.fx.nodes):
        raise ArgumentError("head", found="'clone' of a tail that is over half of the model", expected="a later cut point, or head='linear'")
    return fx.GraphModule(root, copied), extra


def _ancestors(node: fx.Node, stop: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in found:
            found.add(current)
            if current is not stop:
                queue.extend(current.all_input_nodes)
    return found


def _adopt(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
