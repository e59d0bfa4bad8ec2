"""What every pass is: where it applies, and how one site is rewritten. The rest is done here, once."""

import dataclasses
import difflib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from dyncompile.capture.check import distance, mark_rows, resize, undisturbed
from dyncompile.errors import ArgumentError, DyncompileError, InexactError, PassError, UnknownStrategyError
from dyncompile.graph import Graph

GROUP = "dyncompile.passes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where a pass rewrites: plain data, so that a recipe replays on a fresh model.

    Attributes:
        name: Name of what is inserted: `exit0`.
        node: Name of the node it is inserted at.
        data: Whatever else the rewrite needs, JSON-able.
    """

    name: str
    node: str
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A place that a pass does not rewrite, and why."""

    node: str
    reason: str


class Pass(ABC):
    """A graph rewrite that inserts decisions and selects. Subclasses are frozen dataclasses of JSON-able options.

    Attributes:
        name: The strategy's name.
        summary: One line.
        paper: arXiv id of the source.
        seeks: What it rewrites, in the plural; the error of a model that has none of it says so.
        before: Strategies that must come later than this one in a list; the order check reads it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    seeks: ClassVar[str] = ""
    before: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """Where to rewrite, in order, or why not. Changes nothing."""

    @abstractmethod
    def rewrite(self, graph: Graph, site: Site) -> None:
        """Rewrite one site, inserting only."""

    def options(self) -> dict[str, Any]:
        """The options, by name."""
        assert dataclasses.is_dataclass(self)
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def apply(
        self, graph: Graph, *, ran: Sequence[str] = (), sites: Sequence[Site] | None = None
    ) -> tuple[list[Site], list[Refusal]]:
        """Rewrite every site and prove that nothing changed.

        Args:
            graph: Changed in place.
            ran: Names of the passes before this one, for errors.
            sites: Replay these instead of asking `sites()`.

        Returns:
            The sites that were rewritten and the places that were refused.

        Raises:
            PassError: No site, an order that is not legal, a rewrite that cannot run, or a model that gives NaN.
            InexactError: A rewrite that changes the output.
        """
        context = f"pass `{self.name}`" + (f" (after {', '.join(ran)})" if ran else "")
        found = list(sites) if sites is not None else list(self.sites(graph))
        chosen = [s for s in found if isinstance(s, Site)]
        refused = [s for s in found if isinstance(s, Refusal)]
        if not chosen:
            places: dict[str, list[str]] = {}
            for r in refused:
                places.setdefault(r.reason, []).append(r.node)
            reasons = "; ".join(f"{', '.join(nodes)}: {reason}" for reason, nodes in places.items())
            none = "the graph offers none" + (f" of what it rewrites, {self.seeks}" if self.seeks else "")
            raise PassError(f"{context} found no site: {reasons or none}")
        expected = _outputs(graph)
        if any(isinstance(leaf, torch.Tensor) and bool(leaf.isnan().any()) for run in expected for leaf in run):
            advice = "look at the model's weights, or pass other example_inputs"
            raise PassError(f"{context}: the model itself gives NaN for its example inputs; {advice}")
        old = set(graph.fx.nodes)
        for site in chosen:
            try:
                self.rewrite(graph, site)
                for node in graph.fx.nodes:
                    if node not in old:
                        node.meta["inserted"] = self.name
                graph.invalidate()
                graph.propagate()
            except DyncompileError as error:
                raise PassError(f"{context}, site {site.name} at `{site.node}`: {error}") from error
        graph.fx.lint()
        mark_rows(graph)
        for mode, before, after in zip(("eval", "training"), expected, _outputs(graph), strict=False):
            for name, a, b in zip(graph.signature.output_names, before, after, strict=True):
                if isinstance(a, torch.Tensor) and not torch.equal(a, b):
                    why = f"`{name}` {distance(b, a)}"
                    raise InexactError(f"{context} changed the model's output in {mode} mode: {why}")
        return chosen, refused


def find(graph: Graph, name: str) -> fx.Node:
    """The node of a name.

    Raises:
        PassError: The graph has none: it is not the model that the sites were made for.
    """
    node = graph.find(name)
    if node is None:
        raise PassError(f"no node `{name}` in the graph: the sites were made for another model")
    return node


def _outputs(graph: Graph) -> list[tuple[Any, ...]]:
    """Outputs in eval and, where it was captured, training mode."""
    results = []
    for training in (False, True) if graph.mode == "train" else (False,):
        with undisturbed(graph.root), torch.no_grad():
            graph.root.train(training)
            torch.manual_seed(0)
            results.append(graph.run(resize(graph.inputs, graph.batch_dims, 3)))
    return results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registration:
    """An entry point of the group `dyncompile.passes`.

    Attributes:
        name: The strategy's name.
        package: Name of the distribution that registers it.
        version: Its version.
        kind: The pass; None where it is broken.
        broken: Why it cannot be used; empty if it can.
    """

    name: str
    package: str
    version: str
    kind: type[Pass] | None = None
    broken: str = ""


def registered() -> list[Registration]:
    """Every entry point of the group `dyncompile.passes`, built-in and third-party alike, in order of name."""
    entries = importlib.metadata.entry_points(group=GROUP)
    found: list[Registration] = []
    # The built-in ones come first, so that no other package takes a name from them.
    for entry in sorted(entries, key=lambda e: (e.name, e.dist is None or e.dist.name != "dyncompile")):
        kind, broken = _load(entry)
        if found and found[-1].name == entry.name:
            kind, broken = None, f"`{found[-1].package}` registers a pass of that name already"
        package, version = (entry.dist.name, entry.dist.version) if entry.dist else ("", "")
        found.append(Registration(name=entry.name, package=package, version=version, kind=kind, broken=broken))
    return found


def _load(entry: importlib.metadata.EntryPoint) -> tuple[type[Pass] | None, str]:
    """What an entry point names, or why it is no pass."""
    try:
        kind = entry.load()
    except Exception as error:  # noqa: BLE001 - what a package raises when it is imported can be anything
        return None, f"`{entry.value}` cannot be loaded ({type(error).__name__}: {error})"
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        return None, f"`{entry.value}` is no subclass of dyncompile.passes.Pass"
    missing = [name for name in ("name", "summary", "paper") if not isinstance(getattr(kind, name, None), str)]
    if missing:
        return None, f"`{entry.value}` has no `{missing[0]}`"
    if kind.name != entry.name:
        return None, f"`{entry.value}` calls itself `{kind.name}`, not `{entry.name}` as its entry point"
    return kind, ""


def available() -> dict[str, type[Pass]]:
    """Every registered pass that can be used, by name."""
    return {found.name: found.kind for found in registered() if found.kind is not None}


def resolve(
    strategy: "str | Pass | Sequence[str | Pass]", options: dict[str, Any], *, ran: Sequence[str] = ()
) -> list[Pass]:
    """Passes from what the user wrote.

    Args:
        strategy: A name, a pass, or a list of either.
        options: Options for the one pass that `strategy` names.
        ran: Names of the passes that the model has already been through.

    Raises:
        UnknownStrategyError: No pass of that name; the nearest is suggested.
        ArgumentError: Options that the pass does not have, or options with several passes.
        PassError: An order that is not legal.
    """
    items = [strategy] if isinstance(strategy, str | Pass) else strategy
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Pass) for item in items):
        raise ArgumentError("strategy", found=repr(strategy), expected="a name, a pass object, or a list of either")
    if not items:
        raise ArgumentError("strategy", found="an empty list", expected="at least one pass")
    if options and (len(items) > 1 or isinstance(items[0], Pass)):
        raise ArgumentError("options", found=sorted(options), expected="options inside each pass object")
    passes = [item if isinstance(item, Pass) else _named(item, options) for item in items]
    names = [*ran, *(p.name for p in passes)]
    for i, p in enumerate(passes, start=len(ran)):
        wrong = [name for name in names[:i] if name in p.before]
        if wrong:
            raise PassError(f"illegal order {names}: `{p.name}` must come before `{wrong[0]}`")
    if len(set(names)) < len(names):
        raise PassError(f"illegal order {names}: a pass is applied once")
    return passes


def _named(name: object, options: dict[str, Any]) -> Pass:
    known = available()
    broken = {found.name: found for found in registered() if found.name not in known}
    if name in broken:
        found = broken[str(name)]
        raise UnknownStrategyError(
            "strategy", found=f"{name!r}, which is broken in `{found.package}`", expected=f"a pass, but {found.broken}"
        )
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownStrategyError("strategy", found=repr(name), expected=f"{hint}one of {sorted(known)}")
    kind = known[str(name)]
    try:
        return kind(**options)
    except TypeError as error:
        assert dataclasses.is_dataclass(kind)
        fields = [f.name for f in dataclasses.fields(kind)]
        raise ArgumentError("options", found=str(error), expected=f"options of `{name}`: {fields}") from None
