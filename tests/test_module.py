"""The dynamic model is an nn.Module in every respect, and the user's model is sacred."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dyncompile as dc
from dyncompile.errors import ArgumentError
from dyncompile.testing import forced


class Net(nn.Module):
    """A residual MLP with a parameter and buffers of its own at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))
        self.register_buffer("shift", torch.zeros(32))
        self.register_buffer("unsaved", torch.ones(32), persistent=False)
        self.stem = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.scale + self.shift * self.unsaved
        for block in self.blocks:
            x = x + block(x)
        return self.fc(self.drop(x))  # type: ignore[no-any-return]


@pytest.fixture
def model(device: torch.device) -> Net:
    return Net().to(device).eval()


@pytest.fixture
def dyn(model: Net) -> dc.DynamicModule:
    return dc.dynamize(model, exits=2)


def inputs(device: torch.device, batch: int = 5) -> Tensor:
    return torch.randn(batch, 8, device=device)


def test_state_dict_keys_survive(model: Net, dyn: dc.DynamicModule) -> None:
    state = dyn.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    assert all(name.startswith("exits.") for name in set(state) - set(model.state_dict()))


def test_model_is_untouched(device: torch.device) -> None:
    model = Net().to(device).eval()
    model.blocks[1].train()
    model.fc.weight.requires_grad_(False)
    calls: list[int] = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    dyn = dc.dynamize(model, exits=1)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [m.training for m in model.modules()] == modes
    assert not model.fc.weight.requires_grad
    assert not dyn.fc.weight.requires_grad
    assert len(model.fc._forward_hooks) == 1
    calls.clear()
    model(inputs(device))
    assert calls == [1]
    assert not set(map(id, model.parameters())) & set(map(id, dyn.parameters()))


def test_inplace_shares_the_models_modules(model: Net) -> None:
    keys = set(model.state_dict())
    dyn = dc.dynamize(model, exits=1, inplace=True)
    assert dyn.fc is model.fc
    assert set(model.state_dict()) == keys


def test_static_gives_the_model_back_with_its_trained_weights(dyn: dc.DynamicModule, device: torch.device) -> None:
    with torch.no_grad():
        dyn.scale.mul_(2)
        dyn.blocks[0][0].weight.add_(0.1)
    static = dyn.static()
    assert type(static) is Net
    assert not hasattr(static, "exits")
    x = inputs(device)
    assert torch.equal(static(x), dyn(x))
    assert static.fc is not dyn.fc
    assert "unsaved" not in static.state_dict()


def test_deepcopy_is_independent(dyn: dc.DynamicModule, device: torch.device) -> None:
    twin = copy.deepcopy(dyn)
    x = inputs(device)
    before = dyn(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.fc.weight.zero_()
        twin.exits["exit0"].enabled.fill_(True)
    assert torch.equal(dyn(x), before)
    assert not bool(dyn.exits["exit0"].enabled)
    assert twin.static().fc.weight.abs().sum() == 0


def test_deepcopy_warns_of_nothing(dyn: dc.DynamicModule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(dyn)


def test_deepcopy_after_a_trace(device: torch.device) -> None:
    layers = [layer for _ in range(60) for layer in (nn.Linear(8, 8), nn.ReLU())]
    dyn = dc.dynamize(nn.Sequential(*layers, nn.Linear(8, 3)).to(device).eval(), exits=2)
    dyn.trace(inputs(device))
    dyn.inspect()
    twin = copy.deepcopy(dyn)
    assert twin.exit_costs(["exit0"]) == dyn.exit_costs(["exit0"])


def test_cast_and_load(dyn: dc.DynamicModule, device: torch.device) -> None:
    half = copy.deepcopy(dyn).to(torch.bfloat16)
    assert half(inputs(device).bfloat16()).dtype == torch.bfloat16
    assert half.exits["exit0"].threshold.dtype == torch.float32
    assert half.static()(inputs(device).bfloat16()).dtype == torch.bfloat16
    other = dc.dynamize(Net().to(device).eval(), exits=2)
    other.load_state_dict(dyn.state_dict())
    x = inputs(device)
    assert torch.equal(other(x), dyn(x))
    other.load_state_dict({k: v * 0 for k, v in dyn.state_dict().items()}, assign=True)
    assert other(x).abs().sum() == 0
    assert other.static()(x).abs().sum() == 0


def test_inputs_of_another_dtype_or_device_are_named(dyn: dc.DynamicModule, device: torch.device) -> None:
    x = inputs(device)
    for run in (dyn, dyn.trace):
        for wrong, found in ((x.double(), f"torch.float64 on {x.device}"), (x.long(), f"torch.int64 on {x.device}")):
            with pytest.raises(ArgumentError, match=f"`x`: found {found}; expected torch.float32 on {x.device}"):
                run(wrong)
        with pytest.raises(
            ArgumentError, match=f"`x`: found torch.float32 on meta; expected torch.float32 on {x.device}"
        ):
            run(x.to("meta"))
    half = copy.deepcopy(dyn).bfloat16()
    with pytest.raises(ArgumentError, match="`x`: found torch.float32 on .*; expected torch.bfloat16"):
        half(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert dyn(x.bfloat16()).isfinite().all()  # autocast converts, so this is no mistake


def test_torch_compile_takes_it_whole(dyn: dc.DynamicModule, device: torch.device) -> None:
    for exit_ in dyn.exits.values():
        exit_.enabled.fill_(True)
        exit_.threshold.fill_(0.4)
    x = inputs(device, 16)
    compiled = torch.compile(dyn, fullgraph=True)
    torch.testing.assert_close(compiled(x), dyn(x), rtol=1e-4, atol=1e-5)


def test_trace_in_eval_mode(dyn: dc.DynamicModule, device: torch.device) -> None:
    x = inputs(device, 64)
    first = dyn.trace(x)
    for exit_, confidence in zip(dyn.exits.values(), first.confidence.values(), strict=True):
        exit_.enabled.fill_(True)
        exit_.threshold.copy_(confidence.median())
    trace = dyn.trace(x)
    assert list(trace.exits) == list(trace.confidence) == list(trace.decisions) == ["exit0", "exit1"]
    left0, left1 = trace.decisions["exit0"], trace.decisions["exit1"]
    assert left0.dtype == torch.bool
    expected = torch.where(
        left0[:, None],
        trace.exits["exit0"],
        torch.where(left1[:, None], trace.exits["exit1"], trace.final),
    )
    assert torch.equal(trace.output, expected)
    assert torch.equal(trace.output, dyn(x))
    costs = dyn.exit_costs()
    assert list(costs) == ["exit0", "exit1", "final"]
    by_sample = torch.where(left0, costs["exit0"], torch.where(left1, costs["exit1"], costs["final"]))
    torch.testing.assert_close(trace.cost, by_sample)
    assert costs["exit0"] < costs["exit1"] < 1 < costs["final"]


def test_trace_in_training_mode_is_differentiable(dyn: dc.DynamicModule, device: torch.device) -> None:
    dyn.train()
    trace = dyn.trace(inputs(device))
    torch.testing.assert_close(trace.output, trace.final)
    trace.cost.sum().backward(retain_graph=True)
    assert dyn.exits["exit0"].head.project.weight.grad.abs().sum() > 0
    dyn.zero_grad()
    (trace.final.sum() + sum(p.sum() for p in trace.exits.values())).backward()
    assert all(p.grad is not None for p in dyn.parameters())


def test_disabled_exits_cost_nothing(dyn: dc.DynamicModule, device: torch.device) -> None:
    assert dyn.exit_costs() == {"final": pytest.approx(1.0)}
    torch.testing.assert_close(dyn.trace(inputs(device)).cost.cpu(), torch.ones(5))
    with pytest.raises(ArgumentError, match="exit7"):
        dyn.exit_costs(["exit7"])


def test_inspect_shows_every_region(dyn: dc.DynamicModule) -> None:
    text = dyn.inspect()
    assert "not exit0 & not exit1" in text
    assert "MFLOPs" in text


def test_forced_reference_routes_as_asked(dyn: dc.DynamicModule, device: torch.device) -> None:
    x = inputs(device, 40)
    with forced(dyn, [0.25, 0.5]):
        trace = dyn.trace(x)
        out = dyn(x)
    assert torch.equal(out, trace.output)
    assert int(trace.decisions["exit0"].sum()) == 10
    assert int((trace.decisions["exit1"] & ~trace.decisions["exit0"]).sum()) == 20


def test_wrong_inputs_are_refused(dyn: dc.DynamicModule, device: torch.device) -> None:
    with pytest.raises(ArgumentError, match="captured with"):
        dyn((inputs(device), inputs(device)))
    with pytest.raises(ArgumentError, match="too many positional"):
        dyn(inputs(device), inputs(device))


def _train_one_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    dyn = dc.dynamize(Net().eval(), exits=2).train()
    dyn.drop.p = 0.0
    data = torch.randn(8, 8)
    parallel = DistributedDataParallel(dyn)
    parallel(data[rank * 4 : rank * 4 + 4]).square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in dyn.named_parameters()}, f"{folder}/grads")
    torch.distributed.destroy_process_group()


def test_ddp_gives_every_parameter_a_gradient(tmp_path: Path, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("needs two CUDA devices")
    mp.spawn(_train_one_step, args=(str(tmp_path),), nprocs=2)
    grads = torch.load(tmp_path / "grads")
    torch.manual_seed(0)
    dyn = dc.dynamize(Net().eval(), exits=2).train()
    dyn.drop.p = 0.0
    dyn(torch.randn(8, 8)).square().mean().backward()
    for name, parameter in dyn.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)
