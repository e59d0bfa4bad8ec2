"""The scoreboard: all its parts run, what was trained is kept, and documents are written from JSON alone."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dyncompile as dc  # noqa: E402
from benchmarks import pictures, render, scoreboard  # noqa: E402
from benchmarks.contestants.static import Static  # noqa: E402
from benchmarks.growth import BLOCKS, EXITS, exponent, operations, pass_all, places, stack  # noqa: E402
from benchmarks.harness import Report, Table, Target, stream  # noqa: E402
from benchmarks.parts import PARTS  # noqa: E402
from benchmarks.scores import Score, Scoreboard  # noqa: E402
from benchmarks.tasks import TASKS, Run  # noqa: E402
from dyncompile.errors import ArgumentError  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory, needs, device):
    """The JSON of all parts, from `python -m benchmarks --quick`."""
    needs("earlyon")
    needs("aeon")
    out = tmp_path_factory.mktemp("scoreboard")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", str(device)]
    where = ["--out", str(out), "--cache", str(out / "cache")]
    done = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: render.read(out / f"{name}.json") for name in PARTS}


@pytest.mark.slow
def test_every_part_says_what_was_run_and_where(quick):
    for name, found in quick.items():
        assert found.command.startswith("python -m benchmarks."), name
        assert {"processor", "torch", "load before"} <= set(found.machine), name
        if isinstance(found, Report):
            assert found.tables, name
            assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)


@pytest.mark.slow
def test_every_contestant_is_scored_on_every_task(quick):
    for task in TASKS:
        board = quick[task]
        assert {"static, eager", "static, quantised dynamically"} <= {score.name for score in board.scores}
        assert any(score.family == "dyncompile" for score in board.scores)
        for score in board.scores:
            assert 0 <= score.accuracy <= 1
            assert score.cost > 0
            alone = "one by one" not in score.name
            assert set(score.seconds) >= ({1, 16, 64} if alone else {16, 64}), score.name
            assert not alone or 0 < score.p50 <= score.p95
            assert score.compile > 0
    names = {score.name for score in quick["fashion-resnet"].scores}
    assert {
        "static, pruned 50%",
        "earlyon 0.3.0",
        "torch.cond",
        "early exit by hand",
        "early exit by hand, dropping rows",
        "SkipNet, computes and masks",
    } <= names
    costs = {score.name: score.cost for score in quick["fashion-resnet"].scores}
    assert costs["static, width 0.5"] < costs["static, width 0.75"] < costs["static, eager"] == 1


@pytest.mark.slow
def test_times_are_measured_again_alone(tmp_path, needs, capsys):
    needs("lightning")
    out = tmp_path / "board.json"
    command = ["--quick", "--contestant", "static, eager", "--cache", str(tmp_path), "--out", str(out)]
    with pytest.raises(SystemExit):
        scoreboard.main(["--quick", "--only", "time", "--out", str(out)])
    assert "measure everything first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scoreboard.main(["--quick", "--contestant", "nobody", "--out", str(out)])
    assert "`--contestant`: found ['nobody']; expected parts of ['static, eager'" in capsys.readouterr().err
    scoreboard.main(command)
    first = render.read(out)
    marked = first.model_copy(deep=True)
    marked.scores[0].accuracy, marked.scores[0].seconds[1] = 0.75, 99.0
    marked.write(out)
    with pytest.raises(SystemExit):
        scoreboard.main([*command, "--only", "time"])
    assert "expected one of both" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scoreboard.main(["--quick", "--task", "hapt-lstm", "--only", "time", "--out", str(out)])
    assert "`--out`: found a board of the task 'fashion-resnet'; expected 'hapt-lstm'" in capsys.readouterr().err
    scoreboard.main([*command[:1], *command[3:], "--only", "time"])
    again = render.read(out)
    assert again.settings["before"] == first.command
    assert "--only time" in again.command
    assert (again.scores[0].accuracy, again.scores[0].memory) == (0.75, first.scores[0].memory)
    assert 0 < again.scores[0].seconds[1] < 99
    scoreboard.main(["--quick", "--contestant", "width 0.5", *command[3:]])
    joined = render.read(out)
    assert [score.name for score in joined.scores] == [*(score.name for score in first.scores), "static, width 0.5"]
    assert joined.scores[0].accuracy == 0.75
    assert all(score.weighed == score.forms[64] and {1, 16, 64} <= set(score.seconds) for score in joined.scores)


@pytest.mark.slow
def test_exits_are_measured_in_every_section(quick):
    report = quick["early_exit"]
    for part in ("batch 1", "batch 4", "compile time", "peak memory", "earlyon"):
        assert any(part in table.title for table in report.tables), part
        assert any(part in target.what for target in report.targets), part
    rows = {row[0] for table in report.tables for row in table.rows}
    assert {"dynamic, nobody leaves", "smaller static model"} <= rows


@pytest.mark.slow
def test_gates_are_measured_beside_the_static_forms(quick):
    report = quick["gates"]
    assert [t.title.rpartition(", ")[2] for t in report.tables] == ["batch 1", "batch 4"]
    for table in report.tables:
        costs = {row[0]: row[1] for row in table.rows}
        assert costs["dynamic, all open"] >= 1
        assert costs["dynamic, 25% kept"] < costs["dynamic, 50% kept"] < 1
    assert len(report.targets) == 4


@pytest.mark.slow
def test_exported_files_are_measured_beside_the_static_export(quick):
    assert len(quick["export"].tables) == 4
    for table in quick["export"].tables:
        costs = {row[0]: row[1] for row in table.rows}
        assert costs["a half decides"] < costs["a quarter decides"] < 1 <= costs["full depth"]


@pytest.mark.slow
def test_large_models_are_measured_in_both_dtypes(quick):
    titles = [table.title for table in quick["large"].tables]
    assert len(titles) == len(set(titles)) == 8
    for table in quick["large"].tables:
        costs = {(row[0], row[1]): row[2] for row in table.rows}
        assert costs[1, "static, eager"] == 1
        assert costs[4, "lowered, eager"] < 1


def test_parts_are_listed_and_others_refused():
    def run(*arguments):
        command = [sys.executable, "-m", "benchmarks", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    listed = run()
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in PARTS)
    refused = run("nothing")
    assert refused.returncode != 0
    assert "nothing" in refused.stderr


# --- what is trained is kept ------------------------------------------------------------------------


def test_what_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    run = Run(task=TASKS["hapt-lstm"], scale="quick", cache=tmp_path)
    first = Static(width=0.5).model(run)

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(Run, "fit", refuse)
    again = Static(width=0.5).model(run)
    assert not again.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    with pytest.raises(AssertionError, match="trained again"):
        Static(width=0.75).model(run)
    (run.folder / "sizes.txt").write_text("Sizes(width=1)")
    with pytest.raises(
        ArgumentError, match=r"`--cache`: found .*quick with Sizes\(width=1\); expected Sizes\(width=16"
    ):
        Static(width=0.5).model(run)


def test_people_need_their_archive(tmp_path):
    with pytest.raises(ArgumentError, match="--hapt"):
        Run(task=TASKS["hapt-lstm"], scale="full", cache=tmp_path).splits  # noqa: B018


# --- figures ----------------------------------------------------------------------------------------


def score(name, family, accuracy, cost, seconds, **more):
    return Score(name=name, family=family, accuracy=accuracy, cost=cost, seconds={64: seconds, 1: seconds}, **more)


@pytest.fixture
def board():
    return Scoreboard(
        name="toy",
        title="Toy",
        command="python -m benchmarks.scoreboard",
        machine={"processor": "one"},
        settings={"data": "toys", "scale": "small"},
        scores=[
            score("static, eager", "static", 0.9, 1.0, 4.0),
            score("static, inductor", "static", 0.9, 1.0, 2.0),
            score("static, pruned 50%", "static", 0.8, 1.0, 1.5, note="zeros"),
            score("static, width 0.5", "static", 0.85, 0.5, 1.2),
            score("by hand", "mechanism", 0.89, 0.5, 1.1, together=0.91),
            score("dyncompile, early exit", "dyncompile", 0.9, 0.5, 1.25),
        ],
    )


def test_the_twin_is_the_fastest_form_and_no_other_model(board):
    assert board.twin(64).name == "static, inductor"
    dynamic = board.scores[-1]
    assert board.realised(dynamic, 64) == pytest.approx((1 - 1.25 / 2) / 0.5)
    assert board.realised(board.scores[0], 64) is None
    board.scores = [dynamic]
    assert board.twin(64) is None
    assert board.realised(dynamic, 64) is None
    assert dynamic.name in board.table().markdown()


def test_the_frontier_holds_whom_nobody_beats_at_that_batch_size(board):
    assert [s.name for s in board.frontier(1)] == ["by hand", "dyncompile, early exit"]
    assert [s.name for s in board.frontier(64)] == ["by hand"]


def test_a_verdict_names_the_frontier_and_says_where_strategies_are_not_on_it(board):
    assert board.verdict(1) == "Batch 1: on the frontier of accuracy and time: by hand; dyncompile, early exit."
    assert board.verdict(64).endswith("by hand. Nothing of dyncompile is.")
    board.scores.append(score("gates + exits", "dyncompile", 0.87, 0.3, 1.2))
    assert board.verdict(1).endswith(
        "Combined strategies are not: by hand is at least as accurate as gates + exits, and faster."
    )
    board.scores = board.scores[:2]
    assert board.verdict(1).endswith("static, inductor. Nothing of dyncompile is.")


def test_streams_take_turns_and_keep_inputs_apart():
    called = []
    inputs = [torch.zeros(1), torch.ones(1)]
    found = stream({"a": called.append, "b": lambda _: None}, inputs, rounds=3)
    assert [len(turn) for turn in found["a"].seconds] == [2, 2, 2]
    assert [int(x) for x in called] == [1, 0, 1] * 4  # one before each round; the first round does not count
    slow = found["a"].model_copy(update={"seconds": [[1.0, 5.0], [3.0, 5.0], [2.0, 50.0]]})
    assert (slow.quantile(0.5), slow.quantile(0.95)) == (5.0, 5.0)
    assert slow.mean.median == 4.0


def test_exponent_is_that_of_the_largest():
    assert exponent([(1, 9), (10, 1), (100, 100)]) == pytest.approx(2)


@pytest.mark.parametrize("count", EXITS)
def test_exits_are_spread_over_the_depth(count):
    found = [int(place) for place in places(BLOCKS, count)]
    assert len(set(found)) == count
    assert found == sorted(found)
    assert max(found) <= BLOCKS - 2


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["layer_skip", "early_exit"])
def test_operations_alone_are_those_of_the_call(strategy):
    dyn = dc.dynamize(stack(3), strategy, example_inputs=torch.randn(2, 32)).eval()
    pass_all(dyn)
    x = torch.randn(5, 32)
    (output,), decisions = operations(dyn)(dyn, x)
    torch.testing.assert_close(output, dyn(x))
    assert len(decisions) == len(dyn.gates) + len(dyn.exits) > 0
    rows = dc.lower(dyn, "eager")
    rows(x)
    assert set(rows.last_run.values()) == {5}


# --- documents --------------------------------------------------------------------------------------


def test_documents_come_from_the_files_alone(board, tmp_path, needs):
    needs("matplotlib")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    board.write(folder / "toy.json")
    text = "before\n<!-- benchmarks:toy -->\nstale\n<!-- /benchmarks:toy -->\nbehind\n"
    (tmp_path / "README.md").write_text(text)
    render.render(tmp_path)
    shown = (tmp_path / "README.md").read_text()
    assert shown.startswith("before\n")
    assert shown.endswith("behind\n")
    assert "stale" not in shown
    assert "Nothing of dyncompile is." in shown
    results = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert "| static, width 0.5 | 85.00% |" in results
    assert (folder / "toy-64.svg").is_file()
    first = shown, results, (folder / "toy-64.svg").read_text()
    render.render(tmp_path)
    again = (tmp_path / "README.md").read_text(), (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert (*again, (folder / "toy-64.svg").read_text()) == first


def test_targets_that_are_missed_are_shown_and_long_tables_folded():
    rows = [[i, "x"] for i in range(101)]
    report = Report(
        command="c",
        machine={},
        settings={},
        tables=[Table(title="long", columns=["a", "b"], rows=rows), Table(title="short", columns=["a"], rows=[[1]])],
        targets=[
            Target(what="cost", found=0.5, bound=0.6),
            Target(what="saved", found=0.5, bound=0.8, at_least=True),
            Target(what="lost", found=0.011, bound=0.01),
        ],
    )
    assert "| toy | 1 of 3 | saved: 0.5, at least 0.8 |" in render.targets({"toy": report})
    assert "|  |" in render.targets({"toy": report.model_copy(update={"targets": report.targets[:1]})})
    assert report.markdown().count("<details><summary>101 rows</summary>") == report.markdown().count("</details>") == 1


def test_a_marker_without_its_end_is_an_error():
    with pytest.raises(ArgumentError, match="both"):
        render.between("<!-- benchmarks:x -->", "x", "new")


def test_the_repository_s_documents_are_those_of_its_files(tmp_path, needs):
    needs("matplotlib")
    (tmp_path / "benchmarks").mkdir()
    results = tmp_path / "benchmarks" / "results"
    results.mkdir()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        json.loads(path.read_text())
        (results / path.name).write_text(path.read_text())
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    render.render(tmp_path)
    for name in ("README.md", "benchmarks/RESULTS.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"python -m benchmarks render: {name}"


def test_a_picture_names_every_contestant_and_has_no_ground(board, needs):
    needs("matplotlib")
    drawn = ET.fromstring(pictures.frontier(board, 64))
    texts = {"".join(element.itertext()) for element in drawn.iter() if element.tag.endswith("text")}
    assert {"by hand", "early exit", "inductor", "width 0.5", "pruned 50%"} <= texts
    assert "#ffffff" not in ET.tostring(drawn, encoding="unicode")


def test_names_keep_off_each_other(board, needs, monkeypatch):
    text = needs("matplotlib.text")
    boxes = []
    kept = pictures._svg

    def measured(figure):
        figure.draw_without_rendering()
        boxes.extend(text.Text.get_window_extent(t) for axes in figure.axes for t in axes.texts)
        return kept(figure)

    monkeypatch.setattr(pictures, "_svg", measured)
    board.scores += [score(f"static, one more {i}", "static", 0.9, 1.0, 1.2 + 0.01 * i, note="x") for i in range(6)]
    pictures.frontier(board, 64)
    assert len(boxes) == 12
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_growth_is_drawn_with_its_target(needs):
    needs("matplotlib")
    columns = ["residual blocks", "conditionals", "convert, s", "lower, s", "overhead, us a conditional"]
    table = Table(title="Growth", columns=columns, rows=[[10, 10, 1.0, 0.1, 9.0], [100, 100, 10.0, 1.0, 9.0]])
    drawn = pictures.growth(table)
    assert all(column in drawn for column in ("convert, s", "lower, s", "residual blocks"))
