"""Early exit: a prediction head after chosen cut points; a sample leaves at the first that is sure enough."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import fx, nn

from dyncompile.errors import ArgumentError
from dyncompile.features import POOLS, class_dim, feature, is_padding, token_mask
from dyncompile.graph import Graph, Spec, spec
from dyncompile.leaving import leave
from dyncompile.nn import Criterion, Exit, Feature, build_head, certainty
from dyncompile.nn.criteria import REDUCTIONS, check_criterion, reads_earlier
from dyncompile.passes.base import Pass, Refusal, Site, find
from dyncompile.placement import place, prefixes
from dyncompile.shapes import module_flops
from dyncompile.tails import clone_tail, tail_flops, tail_inputs, tail_start

_HEADS = ("auto", "linear", "conv", "clone")
_DEAR = 0.03
"""Share of the model's FLOPs above which "auto" takes no convolution."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit(Pass):
    """Attach exits to a model (BranchyNet, arXiv 1709.01686; Shallow-Deep Networks, arXiv 1810.07052).

    Before:  %y = tail(%h)                             ; return %y
    After:   %e = exits.exit0(%h)                      ; %p, _, %d = %e
             %y = tail(%h); %s = select(%d, %p, %y)    ; return %s

    Legality: an exit goes on a cut point (every path from the input to the prediction passes it)
    whose value is one tensor with one row a sample; the head must cost less than the rest of the
    model; no other leaf of the output may need the rest of the model, since a sample that left
    cannot deliver it.

    Args:
        exits: How many, placed to minimise the expected cost when the depth that a sample needs is
            uniform over the compute; or paths of modules after which to exit; or "all".
        head: "linear" (pool, norm, linear), "conv" (a small convolution before it), "clone" (a copy
            of the model's own tail, where the shapes allow); "auto": "conv" where the model gives one prediction an
            image, the cut point is a feature map and the convolution costs little, else "linear".
        features: "last" reads the cut point alone; "dense" also the cut points of the earlier exits
            (MSDNet, arXiv 1703.09844).
        criterion: "max_softmax", "margin", "entropy", "patience" or a callable (logits `[N, K,
            ...]`, earlier) -> `[N, ...]`.
        reduction: How confidences of pixels or tokens become one per sample: "mean", "min" or
            "quantile10".
        pool: "auto" (as the model itself pools), "mean", "cls" or "last".
    """

    name: ClassVar[str] = "early_exit"
    summary: ClassVar[str] = "classifier heads at cut points; a sample leaves at the first that is sure"
    paper: ClassVar[str] = "1709.01686"
    seeks: ClassVar[str] = "values between input and prediction that every path passes"

    exits: int | str | Sequence[str] = 3
    head: str = "auto"
    features: str = "last"
    criterion: str | Criterion = "max_softmax"
    reduction: str = "mean"
    pool: str = "auto"

    def __post_init__(self) -> None:
        for argument, value, allowed in (
            ("head", self.head, _HEADS),
            ("features", self.features, ("last", "dense")),
            ("reduction", self.reduction, tuple(REDUCTIONS)),
            ("pool", self.pool, POOLS),
        ):
            if value not in allowed:
                raise ArgumentError(argument, found=repr(value), expected=f"one of {allowed}")
        certainty(self.criterion)
        if self.head == "clone" and self.features == "dense":
            raise ArgumentError("features", found="'dense'", expected="'last' with head='clone', whose input is one")
        count = isinstance(self.exits, int) and not isinstance(self.exits, bool) and self.exits >= 1
        several = isinstance(self.exits, Sequence) and not isinstance(self.exits, str) and len(self.exits) > 0
        paths = several and all(isinstance(path, str) for path in self.exits)  # type: ignore[union-attr]
        if not (count or paths or self.exits == "all"):
            raise ArgumentError("exits", found=repr(self.exits), expected='a number >= 1, module paths, or "all"')

    # --- where -----------------------------------------------------------------------------------

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Cut points worth an exit, in order of execution."""
        target = spec(graph.prediction)
        if graph.task == "classification":
            sizes = list(target.shape)
            check_criterion(
                certainty(self.criterion), [sizes.pop(class_dim(target)), *sizes[1:]], graph.inputs[0].device
            )
        if self.features == "dense" and len(target.shape) > 2:
            raise ArgumentError("features", found=f"'dense' for an output {list(target.shape)}", expected="'last'")
        if self.head == "clone" and graph.task == "regression":
            found = "'clone' for a regression, whose exits learn a confidence"
            raise ArgumentError("head", found=found, expected="'linear' or 'conv'")
        if target.batch_dim != 0 or target.rows != 1:
            reason = f"the prediction {list(target.at(2))} of two samples does not hold one in each entry of dim 0"
            yield Refusal(node=graph.prediction.name, reason=reason)
            return
        depth = prefixes(graph)
        heads: dict[fx.Node, float] = {}
        kinds: dict[fx.Node, str] = {}
        for node in graph.cut_points:
            try:
                kinds[node], heads[node] = self._priced(graph, node, depth[node])
            except ArgumentError as error:
                yield Refusal(node=node.name, reason=str(error))
        for i, node in enumerate(self._choose(list(heads), depth, heads)):
            yield Site(name=f"exit{i}", node=node.name, data={"depth": round(depth[node], 4), "head": kinds[node]})

    def _priced(self, graph: Graph, node: fx.Node, depth: float) -> tuple[str, float]:
        """The kind of a head at a cut point, and the share of the model's FLOPs that it costs.

        Raises:
            ArgumentError: No exit can be there; the message says why.
        """
        value = node.meta["spec"]
        if not isinstance(value, Spec):
            raise ArgumentError("cut point", found="several tensors", expected="one")
        if not node.meta["sliceable"] or value.batch_dim is None or value.rows != 1:
            raise ArgumentError("cut point", found=f"value {list(value.shape)}", expected="one row a sample")
        if len(value.shape) < 2 or not value.dtype.is_floating_point:
            raise ArgumentError("cut point", found=f"{list(value.shape)} {value.dtype}", expected="floating channels")
        late = _late_output(graph, node)
        if late:
            expected = "outputs that are there at the exit; keep the prediction alone: prediction_only=True"
            raise ArgumentError("outputs", found=f"`{late}`, which is computed later", expected=expected)
        kind = self.head
        if kind == "auto":
            mixes = self._feature(graph, node).spatial and len(spec(graph.final).shape) <= 2
            kind = "conv" if mixes and self._share(graph, node, "conv") <= _DEAR else "linear"
        share = self._share(graph, node, kind)
        if depth + share >= 1:
            raise ArgumentError(
                "head", found="a head as dear as what an exit here could save", expected="a cheaper one"
            )
        return kind, share

    def _share(self, graph: Graph, node: fx.Node, kind: str) -> float:
        if kind == "clone":
            flops = tail_flops(graph, tail_start(graph, node))
        else:
            flops = module_flops(lambda: self._head(graph, [node], kind), self._inputs(graph, [node]))
        return flops / (graph.total_flops or 1.0)

    def _choose(
        self, candidates: list[fx.Node], depth: dict[fx.Node, float], heads: dict[fx.Node, float]
    ) -> list[fx.Node]:
        # Of cut points with the same compute before them take the last: after norm and activation.
        distinct = list({round(depth[node], 6): node for node in candidates if depth[node] > 0}.values())
        if self.exits == "all":
            return distinct
        if isinstance(self.exits, int):
            return [distinct[i] for i in place([depth[n] for n in distinct], [heads[n] for n in distinct], self.exits)]
        chosen = []
        for path in self.exits:
            inside = [node for node in candidates if _within(node, path)]
            if not inside:
                paths = sorted({p for node in candidates for p in node.meta.get("path", ())})
                raise ArgumentError("exits", found=repr(path), expected=f"a module that ends in a cut point: {paths}")
            chosen.append(inside[-1])
        return sorted(set(chosen), key=candidates.index)

    # --- how -------------------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Insert one exit behind the exits that are already there."""
        node = find(graph, site.node)
        exits = [n for n in graph.fx.nodes if n.meta.get("tap") == ("exit", n.meta.get("owner"))]
        cuts = [find(graph, n.meta["cut"]) for n in exits] if self.features == "dense" else []
        inputs = self._inputs(graph, [*cuts, node])
        earlier = exits if reads_earlier(certainty(self.criterion)) else []
        target = spec(graph.final)
        # The head of a token output needs no mask, but how sure it is of padding must not count.
        mask = token_mask(graph, node) if len(target.shape) == 3 else None
        module = Exit(
            self._head(graph, [*cuts, node], site.data.get("head", self.head)),
            criterion=self.criterion,
            reduction=self.reduction,
            class_dim=class_dim(target),
            features=len(inputs),
            masked=mask is not None,
            padding=mask is not None and is_padding(mask),
            learned=graph.task == "regression",
        )
        taps = ("exit", "confidence", "decision")
        prediction, _, decision = graph.insert(
            f"exits.{site.name}", module, [*inputs, *([mask] if mask else []), *earlier], taps, cut=site.node
        )
        leave(graph, decision, prediction)

    def _inputs(self, graph: Graph, sources: list[fx.Node]) -> list[fx.Node]:
        """The head's inputs: each feature, with its mask after it."""
        if self.head == "clone":
            return [*sources, *tail_inputs(graph, tail_start(graph, sources[0]))]
        masks = [_mask(graph, node) for node in sources]
        return [n for pair in zip(sources, masks, strict=True) for n in pair if n is not None]

    def _head(self, graph: Graph, sources: list[fx.Node], kind: str) -> nn.Module:
        if kind == "clone":
            return clone_tail(graph, tail_start(graph, sources[0]))
        target = spec(graph.final)
        return build_head(
            kind,
            [self._feature(graph, node) for node in sources],
            target.shape,
            class_dim(target),
            learned=graph.task == "regression",
        )

    def _feature(self, graph: Graph, node: fx.Node) -> Feature:
        return feature(graph, node, mask=_mask(graph, node), pool=self.pool)


def _within(node: fx.Node, path: str) -> bool:
    return any(p == path or p.startswith(f"{path}.") for p in node.meta.get("path", ()))


def _late_output(graph: Graph, cut: fx.Node) -> str | None:
    """Name of an output leaf, besides the prediction, that is not there yet where only `cut` has run."""
    if len(graph.signature.output_names) == 1:
        return None
    there: set[fx.Node] = set()
    queue = [cut]
    while queue:
        node = queue.pop()
        if node not in there:
            there.add(node)
            queue.extend(node.all_input_nodes)
    leaves: list[object] = list(graph.output.args[0])  # type: ignore[arg-type]
    for i, leaf in enumerate(leaves):
        late = isinstance(leaf, fx.Node) and leaf.op != "placeholder" and leaf not in there
        if late and i != graph.signature.prediction:
            return graph.signature.output_names[i]
    return None


def _mask(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The mask of a cut point's tokens; heads that predict for every token or pixel need none."""
    return None if len(spec(graph.final).shape) > 2 else token_mask(graph, node)
