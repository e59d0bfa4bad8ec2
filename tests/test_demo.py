"""The main job, at the smallest size: repeatable, resumable, complete."""

import copy
import dataclasses
import io
import json

import pytest
import torch
import torch._dynamo
from rich.console import Console

from dyncompile.demo.run import Settings, run
from dyncompile.errors import ArgumentError


@pytest.fixture
def settings(tmp_path, device, needs):
    for package in ("sklearn", "lightning", "tensorboard", "jinja2", "matplotlib"):
        needs(package)
    return Settings(
        out=tmp_path / "first",
        depth=8,
        width=8,
        epochs=2,
        finetune_epochs=2,
        max_drop=0.3,
        repeats=1,
        device=str(device),
    )


def outcome(rows):
    return [(name, row.accuracy, row.cost) for name, row in rows.items()]


@pytest.mark.slow
@torch._dynamo.config.patch(disable=True)  # static forms uncompiled: their speed is for benchmarks
def test_demo(settings, tmp_path, device):
    console = Console(file=io.StringIO(), width=120)
    first = run(settings, console)
    text = console.file.getvalue()
    for heading in ("accuracy", "cost", "ratio", "static ResNet-8", "early exit"):
        assert heading in text
    static, dynamic, small = first.values()
    assert static.cost == 1
    assert 0 < dynamic.cost < 1
    assert dynamic.cost <= small.cost < dynamic.cost + 0.3
    assert min(row.seconds for row in first.values()) > 0
    assert list(json.loads((settings.out / "result.json").read_text())) == list(first)
    assert "<html" in (settings.out / "report.html").read_text()
    assert sorted(path.name for path in (settings.out / "model").iterdir()) == [
        "model.safetensors",
        "recipe.json",
    ]

    if device.type == "cpu":
        again = run(dataclasses.replace(settings, out=tmp_path / "second"), console)
        assert outcome(again) == outcome(first)
    resumed = run(dataclasses.replace(settings, resume=True), console)
    assert outcome(resumed) == outcome(first)
    with pytest.raises(ArgumentError, match=r"`resume`: found epochs=3; expected epochs=2"):
        run(dataclasses.replace(settings, resume=True, epochs=3), console)


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("resume", [False, True])
def test_only_a_resumption_takes_up_what_was_left(settings, monkeypatch, resume):
    console = Console(file=io.StringIO())
    monkeypatch.setattr("dyncompile.demo.run.train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(settings, console)
    left = [settings.out / "resnet8-8.safetensors", settings.out / "finetune" / "last.ckpt"]
    left[1].parent.mkdir()
    for path in left:
        path.touch()
    if resume:
        with pytest.raises(ArgumentError, match="`resume`: found .*resnet8-8.safetensors, which is corrupt"):
            run(dataclasses.replace(settings, resume=True), console)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(settings, console)
    assert [path.exists() for path in left] == [resume, resume]


def test_a_resumption_draws_the_same_heads(settings, monkeypatch):
    drawn = []

    def note(dyn, *_, **__):
        drawn.append(copy.deepcopy(dyn.state_dict()))
        raise KeyboardInterrupt

    monkeypatch.setattr("dyncompile.finetune", note)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(dataclasses.replace(settings, epochs=1, resume=resume), Console(file=io.StringIO()))
    first, resumed = drawn
    assert all(torch.equal(value, resumed[name]) for name, value in first.items())


def test_settings_that_cannot_be_read_are_told(settings):
    settings.out.mkdir()
    (settings.out / "settings.json").write_text("{")
    with pytest.raises(ArgumentError, match="`resume`: found .*settings.json, which is corrupt"):
        run(dataclasses.replace(settings, resume=True), Console(file=io.StringIO()))
