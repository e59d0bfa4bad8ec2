"""The report of a real small model, from calibration to the page in a reader's hands."""

import base64
import copy
import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.calibration import Calibration
from dyncompile.calibration.evidence import Evidence, Gallery
from dyncompile.demo.datasets import Images, load
from dyncompile.demo.models import ResNet
from dyncompile.demo.run import Row
from dyncompile.errors import ArgumentError
from dyncompile.reporting import write_report
from dyncompile.reporting.figures import depth_colours, thumbnail

ROWS = {
    "static twin": Row(accuracy=0.971, cost=1.0, seconds=0.5, form="inductor frozen"),
    "dynamic": Row(accuracy=0.966, cost=0.6, seconds=0.33, form="lowered"),
    "small static": Row(accuracy=0.941, cost=1.2, seconds=0.7, form="eager"),
}


@pytest.fixture(scope="module")
def digits(needs: object) -> Images:
    needs("sklearn")  # type: ignore[operator]
    return load("digits")


@pytest.fixture(scope="module")
def calibration(digits: Images, device: torch.device) -> Calibration:
    """A ResNet-8 trained with its exits for a few seconds, then calibrated."""
    torch.manual_seed(0)
    model = ResNet(8, width=8, in_channels=1).to(device)
    dyn = dc.dynamize(model, "early_exit", example_inputs=digits.train.tensors[0][:2].to(device))
    optimizer = torch.optim.Adam(dyn.parameters(), 5e-3)
    images, labels = (tensor.to(device) for tensor in digits.train.tensors)
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(64):
            trace = dyn.train().trace(images[batch])
            logits = (trace.final, *trace.exits.values())
            loss = sum(F.cross_entropy(each, labels[batch]) for each in logits)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
    return dc.calibrate(dyn, digits.calibration, max_drop=0.1, progress=False)


@pytest.fixture(scope="module")
def page(calibration: Calibration, digits: Images, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    calibration.report(path, measurements=ROWS, classes=[f"digit <{c}>" for c in digits.classes])
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Text, tables, addresses and open tags of a page."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        self._cell = tag in ("td", "th") or (self._cell and tag in ("i", "b"))
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._cell:
            self.tables[-1][-1][-1] += data.strip().replace("\u202f", " ")


def table(page: str, heading: str) -> dict[str, list[str]]:
    """Rows of the table whose first heading is `heading`, by their first cell."""
    found = next(t for t in Reader(page).tables if t[0][0] == heading)
    return {row[0]: row[1:] for row in found[1:]}


def test_page_is_well_formed_and_refers_to_nothing_outside(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    assert all(a.startswith(("data:", "#")) for a in reader.addresses)
    text = re.sub(r"base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|//\w|@import|<script|url\((?!#)", text)
    assert page.startswith("<!DOCTYPE html>")
    assert 'name="viewport"' in page


def test_settings_are_the_calibrations(page: str, calibration: Calibration) -> None:
    rows = table(page, "Exit")
    assert list(rows) == [*(e.name for e in calibration.exits), "final"]
    assert any(e.enabled for e in calibration.exits)
    for e in calibration.exits:
        threshold, temperature, cost, share, accuracy = rows[e.name]
        if not e.enabled:
            assert (threshold, temperature, cost, share) == ("off", "", "", "")
            continue
        assert threshold == f"{e.threshold:.4f}"
        assert temperature == f"{e.temperature:.2f}"
        assert cost == f"{e.cost:.3f}"
        assert share == f"{100 * e.share:.1f} %"
        assert accuracy == ("" if e.accuracy is None else f"{100 * e.accuracy:.2f} %")
    assert rows["final"][2:4] == [f"{calibration.final.cost:.3f}", f"{100 * calibration.final.share:.1f} %"]


def test_headline_numbers_are_the_calibrations(page: str, calibration: Calibration) -> None:
    numbers = re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page)
    assert (
        dict(numbers).items()
        >= {
            "Expected cost": f"{calibration.cost:.3f}",
            "Accuracy": f"{100 * calibration.accuracy:.2f}\u202f%",
            "Risk, measured": f"{calibration.risk:.4f}",
            "Samples held out": str(calibration.held_out_samples),
        }.items()
    )
    text = " ".join(" ".join(Reader(page).text).split())
    assert f"the risk exceeds {calibration.bound:.4f} with probability at most 0.05" in text
    assert f"candidates from {calibration.design_samples} samples" in text


def test_regions_add_up_to_the_expected_cost(page: str, calibration: Calibration) -> None:
    rows = table(page, "Region runs")
    together = rows.pop("together")
    enabled = [e.name for e in calibration.exits if e.enabled]
    assert list(rows) == ["always", *(f"unless {name}" for name in enabled)]
    assert together[-1] == f"{calibration.cost:.3f}"
    assert sum(float(row[-1]) for row in rows.values()) == pytest.approx(calibration.cost, abs=2e-3)
    left = 1.0
    for row, setting in zip(rows.values(), [e for e in calibration.exits if e.enabled], strict=False):
        assert row[3] == f"{100 * left:.1f} %"
        left -= setting.share
    assert rows["always"][0].startswith("conv")
    assert rows[f"unless {enabled[-1]}"][0].endswith("fc")


def test_shares_by_class_are_those_of_the_samples(page: str, calibration: Calibration) -> None:
    evidence = calibration.evidence
    assert evidence is not None
    assert evidence.labels is not None
    shares = np.bincount(evidence.leave, minlength=len(calibration.exits) + 1) / len(evidence.leave)
    assert shares == pytest.approx([e.share for e in (*calibration.exits, calibration.final)])
    counts = dict(re.findall(r'title="digit &lt;(\d)&gt;, (\d+) samples"', page))
    assert {int(k): int(v) for k, v in counts.items()} == dict(enumerate(np.bincount(evidence.labels).tolist()))
    costs = [float(c) for c in re.findall(r"</div><em>([\d.]+)</em>", page)][1:11]
    assert costs == sorted(costs)


def test_pictures_are_the_easiest_and_the_hardest(page: str, calibration: Calibration, digits: Images) -> None:
    evidence = calibration.evidence
    assert evidence is not None
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="(\w+) input of class ([^"]+)"', page)
    assert [kind for _, kind, _ in images] == ["Easiest"] * 12 + ["Hardest"] * 12
    pictures = (*evidence.easiest, *evidence.hardest)
    for (data, _, name), picture in zip(images, pictures, strict=True):
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert html.unescape(name) == f"digit <{picture.label}>"
    pixels, labels = digits.calibration.tensors
    for picture in pictures:
        at = (pixels == torch.from_numpy(picture.image)).flatten(1).all(1).nonzero()[0]
        assert labels[at] == picture.label
    with torch.no_grad():
        device = next(evidence.dyn.parameters()).device
        confidence = [
            torch.stack(
                list(evidence.dyn.eval().trace(torch.from_numpy(np.stack(batch)).to(device)).confidence.values())
            )
            for batch in ([p.image for p in evidence.easiest], [p.image for p in evidence.hardest])
        ]
    assert confidence[0].mean() > confidence[1].mean() + 0.2
    assert np.mean([p.leave for p in evidence.easiest]) < np.mean([p.leave for p in evidence.hardest])


def test_frontier_is_drawn_with_the_choice(page: str, calibration: Calibration) -> None:
    figure = page[page.index("<svg") : page.index("</svg>")]
    for text in ("expected cost", "accuracy, %", "certified", "considered", "static model", "chosen"):
        assert text in figure
    points = re.findall(r'<use xlink:href="#\w+"', figure)
    assert len(points) >= len(calibration.frontier)


def test_measured_stands_beside_counted(page: str) -> None:
    text = " ".join(" ".join(Reader(page).text).split())
    assert "relative to static twin , run as inductor frozen" in text
    assert (
        "lowered · accuracy 96.60 % · 330 ms · 85 % of the counted saving is realised "
        "measured 0.660 counted 0.600" in text
    )
    assert "eager · accuracy 94.10 % · 700 ms measured 1.400 counted 1.200" in text


def test_recipe_is_there(page: str, calibration: Calibration) -> None:
    assert calibration.evidence is not None
    recipe = calibration.evidence.dyn.recipe
    text = " ".join(" ".join(Reader(page).text).split())
    assert "dyncompile.demo.models.ResNet" in text
    assert recipe.fingerprint[:16] in text
    assert "exit0 after relu exit1 after blocks.0 exit2 after blocks.1" in text
    assert [site["name"] for site in recipe.steps[0].sites] == ["exit0", "exit1", "exit2"]
    assert '"format": "dyncompile-recipe"' in text


def test_same_calibration_same_page(calibration: Calibration, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(calibration, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Measured against counted" not in page
    assert page.count('samples">7</span>') == 1


def test_without_evidence_the_settings_remain(calibration: Calibration, tmp_path: Path) -> None:
    bare = dataclasses.replace(calibration, evidence=None)
    assert bare == calibration
    bare.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Reader(page).open == []
    assert list(table(page, "Exit")) == [*calibration.thresholds, "final"]
    assert "<svg" in page
    assert "Recipe" not in page


def test_calibration_stays_plain_data(calibration: Calibration) -> None:
    assert "evidence" not in calibration.to_dict()
    assert "evidence" not in repr(calibration)


def test_greedy_promises_nothing(calibration: Calibration, digits: Images, tmp_path: Path) -> None:
    assert calibration.evidence is not None
    dyn = calibration.evidence.dyn
    greedy = dc.calibrate(dyn, digits.calibration, max_drop=0.05, method="greedy", progress=False)
    greedy.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nothing is guaranteed" in page
    assert "no guarantee: greedy" in page
    calibration.apply(dyn)


def test_regression_on_vectors(tmp_path: Path, device: torch.device) -> None:
    x = torch.randn(400, 8)
    y = x[:, :1].clone()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    dyn = dc.dynamize(model, "early_exit", exits=1, example_inputs=x[:2].to(device))
    found = dc.calibrate(
        dyn, (x, y), max_cost=0.95, risk=lambda p, t, f: torch.zeros(len(p), device=p.device), progress=False
    )
    found.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Reader(page).open == []
    assert "Risk over cost" in page
    assert "<img" not in page
    assert "for each class" not in page
    assert list(table(page, "Exit")) == ["exit0", "final"]


def test_many_classes_are_cut_in_the_middle(calibration: Calibration, tmp_path: Path) -> None:
    assert calibration.evidence is not None
    leave = calibration.evidence.leave
    labels = np.arange(len(leave)) % 50
    evidence = Evidence(dyn=calibration.evidence.dyn, leave=leave, labels=labels)
    dataclasses.replace(calibration, evidence=evidence).report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "26 classes between" in page
    assert page.count('class="bar"') == 24


def test_wrong_arguments_are_named(calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="`classes`: found 3 names; expected at least 10"):
        calibration.report(tmp_path / "report.html", classes=["a", "b", "c"])
    twin = {"static": dataclasses.replace(ROWS["dynamic"], seconds=0.0)}
    with pytest.raises(ArgumentError, match="`measurements`: found 0.0 s for the static twin"):
        calibration.report(tmp_path / "report.html", measurements=twin)
    assert list(tmp_path.iterdir()) == []


def test_gallery_keeps_the_ends_whatever_the_batches() -> None:
    images = torch.rand(50, 3, 4, 4)
    confidence, counted = torch.rand(50, 2), torch.rand(50) > 0.2
    found = []
    for size in (50, 7):
        gallery = Gallery(5)
        for batch in torch.arange(50).split(size):
            gallery.add([torch.zeros(len(batch), 9), images[batch]], confidence[batch], counted[batch])
        found.append([[index for index, _ in end] for end in gallery.ends()])
    order = confidence[counted].mean(1).argsort().tolist()
    assert found[0] == found[1] == [order[:5], order[-5:][::-1]]
    few = Gallery(5)
    few.add([images[:3]], confidence[:3], torch.ones(3, dtype=torch.bool))
    assert [len(end) for end in few.ends()] == [1, 1]
    none = Gallery(5)
    none.add(torch.rand(4, 8), confidence[:4], torch.ones(4, dtype=torch.bool))
    assert none.ends() == ([], [])


@pytest.mark.parametrize("path", [None, 3, "."])
def test_a_report_needs_a_file_to_write(calibration: Calibration, tmp_path: Path, monkeypatch, path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="`path`: found .*; expected a file to write"):
        calibration.report(path)
    assert not list(tmp_path.iterdir())


def test_thumbnails_keep_colours_and_order() -> None:
    image = np.zeros((3, 2, 3), dtype=np.float32)
    image[0, 0, 0], image[1, 1, 2] = 5.0, np.nan
    data = base64.b64decode(thumbnail(image).removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == 3
    assert int.from_bytes(data[20:24]) == 2
    assert thumbnail(np.full((1, 2, 2), 7.0, dtype=np.float32)).startswith("data:image/png")


def test_depth_is_light_to_dark() -> None:
    assert depth_colours(1) == ["#8fd6c4"]
    for count in (2, 3, 9):
        colours = depth_colours(count)
        light = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in colours]
        assert len(set(colours)) == count
        assert light == sorted(light, reverse=True)


def test_measured_time_is_the_unit_of_the_regions_too(calibration: Calibration, tmp_path: Path) -> None:
    assert calibration.evidence is not None
    dyn = copy.deepcopy(calibration.evidence.dyn)
    for node in dyn.graph.fx.nodes:  # what lowering would have measured: a microsecond a layer
        node.meta["seconds"] = 1e-6 * (node.op == "call_module")
    evidence = dataclasses.replace(calibration.evidence, dyn=dyn)
    dataclasses.replace(calibration, unit="time", evidence=evidence).report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "in measured time" in page
    model = dyn.cost_model([name for name, on in calibration.enabled.items() if on], unit="time")
    shares = [row[2] for row in table(page, "Region runs").values()][:-1]
    assert shares == [f"{100 * weight:.1f} %" for weight in model.weights]
