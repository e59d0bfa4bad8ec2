"""Saving and loading: what comes back, what is refused, and what a kill leaves."""

import copy
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dyncompile as dc
from dyncompile.errors import ArgumentError, RecipeError
from dyncompile.passes.early_exit import EarlyExit


class Convolutional(nn.Module):
    """Images `[N, 1, 8, 8]` to `[N, 3]`, with batch norm and a layer that is used twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.body(self.stem(x)))
        return self.fc(x.mean((2, 3)))


class Tied(nn.Module):
    """Two layers that share a weight; arguments in a dict, by keyword, and one no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 3)

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.first(batch["x"]).relu()
        x = self.second(x * scale).relu() + batch["bias"]
        return {"logits": self.last(x)}


def perceptron() -> nn.Sequential:
    """Vectors `[N, 8]` to `[N, 3]`."""
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def cautious(logits: Tensor, earlier: object) -> Tensor:
    """A criterion of the user's own."""
    return logits.softmax(1).amax(1) ** 2


def dynamic(device: torch.device, width: int = 8, **options: object) -> dc.DynamicModule:
    """A model that is nowhere as it was born: trained-looking statistics, exits set."""
    model = Convolutional(width).to(device)
    dyn = dc.dynamize(model, "early_exit", example_inputs=torch.randn(4, 1, 8, 8, device=device), **options)
    dyn.train()(torch.randn(16, 1, 8, 8, device=device))
    with torch.no_grad():
        for parameter in dyn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for i, module in enumerate(dyn.exits.values()):
        module.threshold.fill_(0.35 + 0.01 * i)
        module.temperature.fill_(1.5 + i)
        module.enabled.fill_(i != 1)
    return dyn.eval()


@pytest.fixture(scope="module")
def dyn(device: torch.device) -> dc.DynamicModule:
    torch.manual_seed(0)
    return dynamic(device)


@pytest.fixture
def folder(dyn: dc.DynamicModule, tmp_path: Path) -> Path:
    dc.save(dyn, tmp_path / "saved")
    return tmp_path / "saved"


def assert_same_state(loaded: nn.Module, saved: nn.Module) -> None:
    expected = saved.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_comes_back_bit_for_bit(dyn: dc.DynamicModule, folder: Path, device: torch.device) -> None:
    loaded = dc.load(folder, Convolutional().to(device).eval())
    assert_same_state(loaded, dyn)
    x = torch.randn(9, 1, 8, 8, device=device)
    before, after = dyn.trace(x), loaded.trace(x)
    assert any(d.any() for d in before.decisions.values())
    assert torch.equal(after.output, before.output)
    assert torch.equal(after.cost, before.cost)
    assert loaded.exit_costs() == dyn.exit_costs()
    assert loaded.recipe.steps == dyn.recipe.steps
    assert loaded.recipe.fingerprint == dyn.recipe.fingerprint
    for name, module in dyn.exits.items():
        for buffer in ("threshold", "temperature", "enabled"):
            assert getattr(loaded.exits[name], buffer) == getattr(module, buffer)


def test_only_two_files_and_no_pickle(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "recipe.json"]
    assert json.loads((folder / "recipe.json").read_text())["format"] == "dyncompile-recipe"
    assert "example_inputs.x" in load_file(folder / "model.safetensors")


def test_users_model_is_left_and_leads(folder: Path, device: torch.device) -> None:
    model = Convolutional().to(device).double()
    model.body.eval()
    model.fc.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    loaded = dc.load(folder, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(dict(model.named_children())) == ["stem", "body", "fc"]
    assert loaded.training
    assert not loaded.body.training
    assert not loaded.fc.bias.requires_grad
    assert loaded.stem[0].weight.dtype == torch.float64
    assert loaded.exits["exit0"].head.project.weight.dtype == torch.float64
    assert loaded.exits["exit0"].threshold.dtype == torch.float32
    assert loaded.stem[0].weight.device.type == device.type
    assert loaded(torch.randn(2, 1, 8, 8, device=device).double()).shape == (2, 3)


def test_random_state_of_the_inputs_is_not_needed(folder: Path, device: torch.device) -> None:
    torch.manual_seed(7)
    first = dc.load(folder, Convolutional().to(device))
    torch.manual_seed(8)
    assert_same_state(dc.load(folder, Convolutional().to(device)), first)


def test_saved_again_it_is_the_same(dyn: dc.DynamicModule, folder: Path, tmp_path: Path, device: torch.device) -> None:
    loaded = dc.load(folder, Convolutional().to(device))
    dc.save(loaded, tmp_path / "again")
    for name in ("recipe.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_tied_weights_and_structured_arguments(tmp_path: Path, device: torch.device) -> None:
    def inputs(n: int) -> dict[str, Tensor]:
        return {"x": torch.randn(n, 16, device=device), "bias": torch.randn(n, 16, device=device)}

    example = {"batch": inputs(2), "scale": 0.5}
    dyn = dc.dynamize(Tied().to(device), EarlyExit(exits=1), example_inputs=example).eval()
    dyn.exits["exit0"].enabled.fill_(True)
    dc.save(dyn, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert len({"first.weight", "second.weight"} & stored.keys()) == 1
    loaded = dc.load(tmp_path, Tied().to(device).eval())
    assert loaded.first.weight is loaded.second.weight
    assert_same_state(loaded, dyn)
    batch = inputs(5)
    assert torch.equal(loaded(batch, scale=0.5)["logits"], dyn(batch, scale=0.5)["logits"])
    with pytest.raises(ArgumentError, match=r"0\.7 as a constant"):
        loaded(batch, scale=0.7)


def test_criterion_of_the_users_own_is_imported_again(tmp_path: Path, device: torch.device) -> None:
    dyn = dynamic(device, exits=1, criterion=cautious)
    dc.save(dyn, tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["steps"][0]["options"]["criterion"] == {"callable": f"{__name__}:cautious"}
    loaded = dc.load(tmp_path, Convolutional().to(device).eval())
    assert loaded.exits["exit0"].criterion is cautious
    recipe["steps"][0]["options"]["criterion"] = {"callable": f"{__name__}:gone"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=r"test_storage:gone` cannot be imported"):
        dc.load(tmp_path, Convolutional().to(device))


class Squared:
    """A criterion with a state, which no import brings back."""

    def __call__(self, logits: Tensor, earlier: object) -> Tensor:
        return cautious(logits, earlier)


@pytest.mark.parametrize("kind", ["lambda", "local", "instance"])
def test_criterion_that_cannot_be_imported_is_refused(kind: str, tmp_path: Path, device: torch.device) -> None:
    def local(logits: Tensor, earlier: object) -> Tensor:
        return cautious(logits, earlier)

    criterion = {
        "lambda": lambda logits, earlier: logits.softmax(1).amax(1),
        "local": local,
        "instance": Squared(),
    }
    dyn = dc.dynamize(
        perceptron().to(device),
        EarlyExit(exits=1, criterion=criterion[kind]),
    )
    with pytest.raises(
        RecipeError,
        match=r"option `criterion` of `early_exit` cannot be saved: .* must be a function",
    ):
        dc.save(dyn, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --- what load refuses ---------------------------------------------------------------------------


def test_other_architectures_are_named(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"`body.0.bias` is \[6\] instead of \[8\].*; and \d+ more"):
        dc.load(folder, Convolutional(6))
    changed = Convolutional()
    changed.head = changed.fc
    del changed.fc
    with pytest.raises(
        RecipeError,
        match=r"`fc.bias` is missing; `fc.weight` is missing; `head.bias` is not in the",
    ):
        dc.load(folder, changed)


def test_same_state_with_other_operations_is_refused(folder: Path, device: torch.device) -> None:
    class Pooled(Convolutional):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(self.stem(x)).amax((2, 3)))

    with pytest.raises(RecipeError, match=r"has the state of .*Convolutional` but computes something"):
        dc.load(folder, Pooled().to(device))

    class Smooth(Convolutional):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(nn.functional.gelu(self.body[1](self.body[0](x.expand(-1, 8, 8, 8)))).mean((2, 3)))

    with pytest.raises(RecipeError, match=r"made for .*Convolutional` .*cannot be replayed: .*no node"):
        dc.load(folder, Smooth().to(device))


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere: no such folder"):
        dc.load(tmp_path / "nowhere", Convolutional())
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"no recipe.json in it"):
        dc.load(tmp_path / "empty", Convolutional())
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"no model.safetensors beside the recipe"):
        dc.load(folder, Convolutional())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("name", ["recipe.json", "model.safetensors"])
def test_truncated_files(folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(RecipeError, match=rf"{name} is corrupt"):
        dc.load(folder, Convolutional())


@pytest.mark.parametrize("place", [0, 40, -1])
def test_one_flipped_byte_in_the_weights(folder: Path, place: int) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[place] ^= 0xFF
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(RecipeError, match="its SHA-256 differs"):
        dc.load(folder, Convolutional())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": 99, "dyncompile": "7.1"},
            r"format version 99, of dyncompile 7\.1; .* upgrade dyncompile",
        ),
        ({"format": "something-else"}, "is no recipe of dyncompile"),
        ({"task": "poetry"}, "recipe.json is corrupt: `task`: Input should be"),
        ({"surprise": 1}, "recipe.json is corrupt: `surprise`: Extra inputs"),
        ({"mode": "eval"}, "captured in eval mode, and now only in train mode"),
        ({"arguments": {"x": {"tensor": "y"}}}, r"arguments hold .*which means nothing"),
        ({"arguments": {"x": {"tensor": ["x"]}}}, "cannot be replayed: TypeError"),
    ],
)
def test_recipes_that_are_newer_foreign_or_tampered_with(
    folder: Path, change: dict[str, object], message: str, device: torch.device
) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe | change))
    with pytest.raises(RecipeError, match=message):
        dc.load(folder, Convolutional().to(device))


@pytest.mark.parametrize("content", [b"[1, 2]", b'"text"', b'{"a": 1}', b"\xff\xfe\x00binary", b"[" * 100_000])
def test_recipe_that_is_something_else(folder: Path, content: bytes) -> None:
    (folder / "recipe.json").write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe.json is (no recipe|corrupt)"):
        dc.load(folder, Convolutional())


def test_missing_third_party_pass_names_its_entry_point(folder: Path, device: torch.device) -> None:
    text = (folder / "recipe.json").read_text()
    (folder / "recipe.json").write_text(text.replace('"strategy": "early_exit"', '"strategy": "acme_skip"'))
    expected = r"no package offers the entry point `acme_skip` in the group `dyncompile\.passes`"
    with pytest.raises(RecipeError, match=expected):
        dc.load(folder, Convolutional().to(device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"bogus": 1}}, "the installed pass `early_exit` has other options"),
        ({"options": {"head": "bogus"}}, "`head`: found 'bogus'"),
        ({"sites": [{"node": "relu"}]}, "a site of `early_exit` is malformed"),
        ({"sites": [{"name": "items", "node": "relu"}]}, "cannot be replayed"),
        ({"sites": [{"name": "exit0", "node": "output"}]}, "cannot be replayed"),
    ],
)
def test_steps_that_do_not_fit_the_pass(
    folder: Path, change: dict[str, object], message: str, device: torch.device
) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["steps"][0] |= change
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=message):
        dc.load(folder, Convolutional().to(device))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state, _: state.pop("example_output"), "it has no `example_output`"),
        (lambda state, _: state.update(example_output=torch.ones(3).long()), "it has no `example_output`"),
        (lambda _, metadata: metadata.update(aliases="[1]"), "is not what dyncompile.save wrote"),
        (lambda state, _: state.pop("exits.exit0.threshold"), "the weights do not fit the recipe"),
    ],
)
def test_weights_that_were_written_by_others_under_a_recipe_that_fits(
    folder: Path, device: torch.device, damage: Callable[..., object], message: str
) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    damage(state, metadata)
    save_file(state, path, metadata)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["weights"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=message):
        dc.load(folder, Convolutional().to(device))


@pytest.mark.parametrize("name", ["recipe.json", "model.safetensors"])
def test_folders_in_the_place_of_files_are_left(dyn: dc.DynamicModule, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ArgumentError, match=f"`folder`: found .*{name}, a folder"):
        dc.save(dyn, tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_arguments(dyn: dc.DynamicModule, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="`model`: found DynamicModule"):
        dc.load(folder, dyn)
    for wrong in (None, 3, b"folder"):
        with pytest.raises(ArgumentError, match="`folder`: found .*; expected a path"):
            dc.save(dyn, wrong)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="`folder`: found .*; expected a path"):
            dc.load(wrong, Convolutional())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`dyn`: found Linear"):
        dc.save(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="file, a file"):
        dc.save(dyn, tmp_path / "file")


# --- what save leaves ----------------------------------------------------------------------------


def test_files_of_others_are_kept_without_force(dyn: dc.DynamicModule, tmp_path: Path, device: torch.device) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ArgumentError, match=r"model.safetensors not written by dyncompile.*force=True"):
        dc.save(dyn, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    dc.save(dyn, tmp_path, force=True)
    assert_same_state(dc.load(tmp_path, Convolutional().to(device)), dyn)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    dc.save(dyn, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_at_every_step_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    old = dc.dynamize(perceptron(), EarlyExit(exits=1))
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.get_parameter("4.weight").add_(1)
    new.exits["exit0"].threshold.fill_(0.75)
    folder = tmp_path / "saved"
    steps, found = 0, []
    while True:
        for left in folder.glob(".*"):
            left.unlink()
        dc.save(old, folder)
        child = os.fork()
        if not child:
            save_until_killed(new, folder, steps)
        _, status = os.waitpid(child, 0)
        loaded = dc.load(folder, perceptron())
        found.append(bool(loaded.exits["exit0"].threshold == 0.75))
        assert_same_state(loaded, new if found[-1] else old)
        dc.save(new, folder)
        assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "recipe.json"]
        if not os.WIFSIGNALED(status):
            break
        steps += 1
    assert steps >= 6
    assert found == sorted(found)
    assert found[0] is False
    assert found[-2:] == [True, True]


def save_until_killed(dyn: dc.DynamicModule, folder: Path, step: int) -> None:
    """Save in a child process, killed as it is about to touch the folder for the `step`-th time."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    dc.save(dyn, folder)
    os._exit(0)


class OtherInTraining(nn.Module):
    """Returns a tuple in training mode, as GoogLeNet does: captured in eval mode."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x):
        y = self.fc(self.two(self.one(x).relu()).relu())
        return (y, y * 2) if self.training else y


@pytest.mark.parametrize("training", [False, True])
def test_a_model_captured_in_eval_mode_comes_back(tmp_path, device, training):
    model = OtherInTraining().to(device).eval()
    dyn = dc.dynamize(model, exits=1)
    assert dyn.recipe.mode == "eval"
    dc.save(dyn, tmp_path / "out")
    again = dc.load(tmp_path / "out", model.train(training))
    x = torch.randn(4, 8, device=device)
    assert torch.equal(again.eval()(x), dyn(x))
