"""The committed baseline: where passes rewrite a model, and what each region costs; and in what a model differs."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from dyncompile.cost import cost_model
from dyncompile.drafts import drafted
from dyncompile.errors import BaselineError
from dyncompile.module import DynamicModule

VERSION = 1

_FORMAT: Literal["dyncompile-lock"] = "dyncompile-lock"

T = TypeVar("T", "Place", "Refused")

# Shares of the cost are written to four digits; kernels of another version of torch may count a little differently.
_TOLERANCE = 1e-3


class _Plain(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Place(_Plain):
    """A site.

    Attributes:
        strategy: The pass.
        name: What was inserted: `exit0`.
        node: Where, in the graph.
        module: Path of the innermost module of the model that the node belongs to.
        data: What else the pass noted.
    """

    strategy: str
    name: str
    node: str
    module: str = ""
    data: dict[str, Any] = {}

    @property
    def where(self) -> str:
        """In words."""
        return f"`{self.node}`" + (f" in `{self.module}`" if self.module else "")


class Refused(_Plain):
    """A place that a pass did not rewrite.

    Attributes:
        strategy: The pass.
        node: Where.
        module: Path of the innermost module that the node belongs to.
        reason: Why not.
    """

    strategy: str
    node: str
    module: str = ""
    reason: str

    @property
    def where(self) -> str:
        """In words."""
        return f"`{self.node}`" + (f" in `{self.module}`" if self.module else "")


class Snapshot(_Plain):
    """One conversion.

    Attributes:
        options: Of each pass.
        flops: Of the static model, per sample.
        sites: In order.
        refused: In order.
        shares: Of each region, by its guard: its cost over that of the static model.
    """

    options: dict[str, dict[str, Any]] = {}
    flops: float
    sites: list[Place] = []
    refused: list[Refused] = []
    shares: dict[str, float] = {}


class Baseline(_Plain):
    """What is committed.

    Attributes:
        format: Tells a baseline from other JSON.
        version: Version of the format.
        models: Conversions by model and strategy.
    """

    format: Literal["dyncompile-lock"] = _FORMAT
    version: int = VERSION
    models: dict[str, dict[str, Snapshot]] = {}

    def find(self, model: str, strategy: str) -> Snapshot | None:
        """The conversion of a model, if there is one."""
        return self.models.get(model, {}).get(strategy)

    def updated(self, model: str, strategy: str, snapshot: Snapshot) -> "Baseline":
        """A copy with one conversion replaced."""
        models = {**self.models, model: {**self.models.get(model, {}), strategy: snapshot}}
        ordered = {name: dict(sorted(models[name].items())) for name in sorted(models)}
        return self.model_copy(update={"models": ordered})

    @classmethod
    def read(cls, path: Path) -> "Baseline":
        """Read a baseline.

        Raises:
            BaselineError: There is none, or it is malformed or too new.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise BaselineError(f"no baseline {path}: make it with --update (pytest: --dyncompile-update)") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BaselineError(f"the baseline {path} cannot be read: {error}") from error
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise BaselineError(f"the baseline {path} is no JSON: {error}; {_REMAKE}") from error
        if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
            raise BaselineError(f"{path} is no baseline: it has no `format` {_FORMAT!r}")
        version = raw.get("version")
        if isinstance(version, int) and version > VERSION:
            message = f"the baseline {path} has version {version}; this dyncompile reads up to {VERSION}: upgrade it"
            raise BaselineError(message)
        try:
            return cls.model_validate(raw)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise BaselineError(f"the baseline {path} is malformed: `{place}`: {first['msg']}; {_REMAKE}") from error

    def write(self, path: Path) -> None:
        """Write the baseline all at once: whatever stops it, the file holds the one before, or this one."""
        with drafted(path) as draft:
            draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


_REMAKE = "restore it, or delete it and make it anew with --update"


def snapshot(dyn: DynamicModule) -> Snapshot:
    """What was done to a model, for a baseline."""
    nodes = {node.name: node for node in dyn.graph.fx.nodes}

    def module(name: str) -> str:
        path = nodes[name].meta.get("path", ()) if name in nodes else ()
        return str(path[-1]) if path else ""

    model = cost_model(dyn.graph.fx)
    regions = [region.name for region in model.regions]
    shares = dict.fromkeys(regions, 0.0)
    for name, weight in zip(regions, model.weights, strict=True):
        shares[name] += float(weight)
    steps = dyn.recipe.steps
    # By way of JSON, for that is what the baseline is compared with.
    plain = {
        "options": {step.strategy: step.options for step in steps},
        "flops": model.static,
        "sites": [{"strategy": s.strategy, "module": module(site["node"]), **site} for s in steps for site in s.sites],
        "refused": [{"strategy": s.strategy, "module": module(r["node"]), **r} for s in steps for r in s.refused],
        "shares": {name: round(share, 4) for name, share in shares.items()},
    }
    return Snapshot.model_validate_json(json.dumps(plain, default=str))


def differences(now: Snapshot, before: Snapshot) -> list[str]:
    """In what a conversion differs from its baseline, a line each.

    Nodes are matched by the module that they belong to, for their numbers shift with every edit before them.
    """
    found = [
        f"options of `{name}` are {now.options.get(name)}; they were {before.options.get(name)}"
        for name in dict.fromkeys((*before.options, *now.options))
        if now.options.get(name) != before.options.get(name)
    ]
    found += _moved(_keyed(now.sites), _keyed(before.sites))
    refused, then = _keyed(now.refused), _keyed(before.refused)
    changes: dict[tuple[str, str], list[str]] = {}
    for key in dict.fromkeys((*then, *refused)):
        new, old = refused.get(key), then.get(key)
        if new is None and old is not None:
            changes.setdefault((f"`{old.strategy}` no longer refuses", ""), []).append(old.where)
        elif new is not None and (old is None or new.reason != old.reason):
            what = "now refuses" if old is None else "refuses for another reason"
            changes.setdefault((f"`{new.strategy}` {what}", f": {new.reason}"), []).append(new.where)
    found += [f"{what} {', '.join(places)}{reason}" for (what, reason), places in changes.items()]
    for name in dict.fromkeys((*before.shares, *now.shares)):
        share, was = now.shares.get(name), before.shares.get(name)
        if share is None or was is None:
            found.append(f"region `{name}` is {'gone' if share is None else 'new'}")
        elif abs(share - was) > _TOLERANCE:
            found.append(f"region `{name}` costs {share:.1%} of the static model; it was {was:.1%}")
    return found


def _moved(now: dict[str, Place], before: dict[str, Place]) -> list[str]:
    found = []
    kept = set(now) & set(before)
    for key in (key for key in now if key in kept):
        site, was = now[key], before[key]
        if site.name != was.name:
            found.append(f"`{was.name}` at {was.where} is now called `{site.name}`")
        elif _numberless(site.data) != _numberless(was.data):
            found.append(f"`{site.name}` at {site.where} has {site.data}; it had {was.data}")
    new = {(site.strategy, site.name): site for key, site in now.items() if key not in kept}
    gone = {(site.strategy, site.name): site for key, site in before.items() if key not in kept}
    both = [(gone[place], new[place]) for place in gone if place in new]
    found += [f"`{was.name}` moved from {was.where} to {site.where}" for was, site in both]
    found += [f"`{site.name}` is gone; it was at {site.where}" for key, site in gone.items() if key not in new]
    found += [f"`{site.name}` is new, at {site.where}" for key, site in new.items() if key not in gone]
    return found


def _keyed(places: list[T]) -> dict[str, T]:
    """Places by pass, module and operation, numbered where one module holds several."""
    seen: Counter[str] = Counter()
    keyed = {}
    for place in places:
        key = f"{place.strategy} {place.module} {_numberless(place.node)}"
        seen[key] += 1
        keyed[f"{key} {seen[key]}"] = place
    return keyed


def _numberless(value: Any) -> Any:
    """The same without the numbers at the ends of names, and without shares of the cost, which regions tell."""
    if isinstance(value, dict):
        return {key: _numberless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numberless(item) for item in value]
    if isinstance(value, float):
        return None
    return re.sub(r"_\d+$", "", value) if isinstance(value, str) else value
