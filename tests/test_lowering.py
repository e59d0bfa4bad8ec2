"""Lowered equals reference, and what the plan says is skipped did not run."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dyncompile as dc
from dyncompile.demand import analyse, specialise
from dyncompile.errors import ArgumentError, LoweringError
from dyncompile.testing import forced

BATCHES = (1, 2, 7, 33)
SHARES = ([0.0, 0.0], [0.4, 0.3], [1.0, 0.0], [0.0, 1.0])


class ConvNet(nn.Module):
    """Three convolutional stages of equal cost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)) for _ in range(3)
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = x + stage(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def converted(device: torch.device) -> dc.DynamicModule:
    torch.manual_seed(0)
    model = ConvNet().to(device).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    dyn = dc.dynamize(model, "early_exit", exits=2, example_inputs=torch.randn(2, 3, 12, 12, device=device))
    for module in dyn.exits.values():
        module.enabled.fill_(True)
    return dyn


@pytest.fixture
def dyn(converted: dc.DynamicModule) -> dc.DynamicModule:
    return copy.deepcopy(converted)


class Counting(TorchDispatchMode):
    """Counts operators, and the rows that convolutions see."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name == "convolution":
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_eager_equals_reference(dyn: dc.DynamicModule, device: torch.device, batch: int, shares: list[float]) -> None:
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(batch, 3, 12, 12, device=device)
    with torch.no_grad(), forced(dyn, shares, seed=3), forced(fast, shares, seed=3):
        torch.testing.assert_close(fast(x), dyn(x), rtol=1e-5, atol=1e-6)


def test_own_decisions_equal_reference(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(33, 3, 12, 12, device=device)
    trace = dyn.trace(x)
    for module, confidence in zip(dyn.exits.values(), trace.confidence.values(), strict=True):
        module.threshold.copy_(confidence.median())
    trace = dyn.trace(x)
    left = trace.decisions["exit0"]
    assert 0 < int(left.sum()) < 33
    torch.testing.assert_close(fast(x), dyn(x), rtol=1e-5, atol=1e-6)
    assert fast.last_run["not exit0"] == 33 - int(left.sum())


@pytest.mark.parametrize("batch", BATCHES)
def test_skipped_operations_do_not_run(dyn: dc.DynamicModule, device: torch.device, batch: int) -> None:
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(batch, 3, 12, 12, device=device)
    for shares, expected in (([0.0, 0.0], 4), ([1.0, 0.0], 2), ([0.0, 1.0], 3)):
        with forced(fast, shares), Counting() as counted:
            fast(x)
        assert counted.rows == [batch] * expected, shares


def test_rows_of_a_mixed_batch(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(20, 3, 12, 12, device=device)
    with forced(fast, [0.5, 0.25]), Counting() as counted:
        fast(x)
    assert counted.rows == [20, 20, 10, 5]
    assert fast.last_run == {"always": 20, "not exit0": 10, "not exit0 & not exit1": 5}


def test_buckets_fill_parts_and_change_nothing(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, backend="eager", buckets=(8, 16))
    x = torch.randn(20, 3, 12, 12, device=device)
    with torch.no_grad(), forced(dyn, [0.5, 0.25], seed=2), forced(fast, [0.5, 0.25], seed=2), Counting() as counted:
        out = fast(x)
    with torch.no_grad(), forced(dyn, [0.5, 0.25], seed=2):
        torch.testing.assert_close(out, dyn(x), rtol=1e-5, atol=1e-6)
    assert counted.rows == [20, 20, 16, 8]


def test_empty_batch(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, backend="eager")
    out = fast(torch.randn(0, 3, 12, 12, device=device))
    assert out.shape == (0, 5)
    assert fast.last_run == {"always": 0}


def test_disabled_exits_are_left_out(dyn: dc.DynamicModule, device: torch.device) -> None:
    for module in dyn.exits.values():
        module.enabled.fill_(False)
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(4, 3, 12, 12, device=device)
    with Counting() as counted, torch.no_grad():
        out = fast(x)
    with Counting() as static, torch.no_grad():
        expected = dyn.static()(x)
    assert torch.equal(out, expected)
    assert counted.calls["addmm"] == static.calls["addmm"] == 1


def test_input_is_not_written_to(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(8, 3, 12, 12, device=device)
    before = x.clone()
    with forced(fast, [0.5, 0.25]):
        fast(x)
    assert torch.equal(x, before)


def test_training_mode_is_refused(dyn: dc.DynamicModule) -> None:
    with pytest.raises(LoweringError, match=r"dyn\.eval\(\)"):
        dc.lower(dyn.train())
    fast = dc.lower(dyn.eval(), backend="eager")
    with pytest.raises(LoweringError, match="does not train"):
        fast.train()
    dyn.train()
    with pytest.raises(LoweringError, match="training mode"):
        fast(torch.randn(2, 3, 12, 12))


def test_bad_arguments(dyn: dc.DynamicModule) -> None:
    with pytest.raises(ArgumentError, match="backend"):
        dc.lower(dyn, backend="tvm")
    with pytest.raises(ArgumentError, match="dynamize"):
        dc.lower(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="buckets"):
        dc.lower(dyn, buckets=[0])
    fast = dc.lower(dyn, backend="eager")
    with pytest.raises(ArgumentError, match="batch_sizes"):
        fast.warmup([0])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"exit9": 0.5}, "exit9"),
        ([0.7, 0.7], "sum to"),
        ([1.2], "share in"),
        ([0.1] * 3, "at most 2"),
    ],
)
def test_bad_shares(dyn: dc.DynamicModule, shares: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message), forced(dyn, shares):
        pass


def test_forced_masks_and_restoration(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(6, 3, 12, 12, device=device)
    mask = torch.tensor([True, False, True, False, False, False], device=device)
    trace = dyn.trace(x)
    with forced(fast, {"exit0": mask, "exit1": 0.0}):
        out = fast(x)
    torch.testing.assert_close(out[mask], trace.exits["exit0"][mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[~mask], trace.final[~mask], rtol=1e-5, atol=1e-6)
    assert fast._override is None


def test_forced_shares_are_right_on_average_at_batch_one(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(1, 3, 12, 12, device=device)
    left = 0
    for seed in range(200):
        with forced(fast, [0.25, 0.0], seed=seed):
            fast(x)
        left += "not exit0" not in fast.last_run
    assert 30 <= left <= 70  # binomial(200, 0.25): beyond 3 standard deviations


@pytest.mark.parametrize("batch", BATCHES)
def test_inductor_equals_reference(
    lowered: tuple[dc.DynamicModule, dc.lowering.LoweredModule], device: torch.device, batch: int
) -> None:
    dyn, fast = lowered
    x = torch.randn(batch, 3, 12, 12, device=device)
    for shares in SHARES:
        with torch.no_grad(), forced(dyn, shares, seed=3), forced(fast, shares, seed=3):
            torch.testing.assert_close(fast(x), dyn(x), rtol=1e-4, atol=1e-5)


def test_inductor_is_a_snapshot(
    lowered: tuple[dc.DynamicModule, dc.lowering.LoweredModule], device: torch.device
) -> None:
    dyn, fast = lowered
    assert fast.snapshot
    x = torch.randn(3, 3, 12, 12, device=device)
    before = fast(x)
    weight = dyn.fc.weight
    with torch.no_grad():
        saved = weight.clone()
        weight.zero_()
    torch.testing.assert_close(fast(x), before)
    with torch.no_grad():
        weight.copy_(saved)


@pytest.fixture(scope="module")
def lowered(converted: dc.DynamicModule) -> tuple[dc.DynamicModule, dc.lowering.LoweredModule]:
    dyn = copy.deepcopy(converted)
    return dyn, dc.lower(dyn)


def test_inputs_of_compiled_segments_are_checked(
    lowered: tuple[dc.DynamicModule, dc.lowering.LoweredModule], device: torch.device
) -> None:
    _, fast = lowered
    x = torch.randn(4, 3, 12, 12, device=device)
    for wrong in (x.double(), x.bfloat16(), (x * 10).to(torch.uint8)):
        with pytest.raises(ArgumentError, match="float32, which the model was lowered for"):
            fast(wrong)
    with pytest.raises(ArgumentError, match="for another size"):
        fast(torch.randn(4, 3, 13, 12, device=device))
    with pytest.raises(ArgumentError, match="for another size"):
        fast(torch.randn(3, 12, 12, device=device))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two, self.fc = (
            nn.Embedding(9, 16),
            nn.Linear(16, 64),
            nn.Linear(64, 16),
            nn.Linear(16, 3),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = (self.embed(ids) * mask.unsqueeze(-1)).sum(1)
        return self.fc(self.two(self.one(x).relu()).relu())  # type: ignore[no-any-return]


def test_integer_inputs_are_cast_and_batches_must_agree(device: torch.device) -> None:
    ids, mask = torch.randint(9, (4, 6), device=device), torch.ones(4, 6, dtype=torch.long, device=device)
    mask[1, 3:] = 0
    dyn = dc.dynamize(Masked().to(device).eval(), exits=1, example_inputs=(ids, mask))
    dyn.exits["exit0"].enabled.fill_(True)
    fast = dc.lower(dyn, decline=False)
    with torch.no_grad():
        expected = dyn(ids, mask)
        for kind in (torch.bool, torch.int32, torch.uint8):
            torch.testing.assert_close(fast(ids.int(), mask.to(kind)), expected, rtol=1e-4, atol=1e-5)
    for model in (dyn, fast, dc.lower(dyn, "eager")):
        with pytest.raises(ArgumentError, match="as many as in the other inputs, 4"):
            model(ids, mask[:3])


@pytest.mark.parametrize("wrong", [8, None, "12", [0], [1.5], ["a"], [True]])
def test_sizes_are_whole_numbers(dyn: dc.DynamicModule, wrong: object) -> None:
    with pytest.raises(ArgumentError, match="`buckets`: found"):
        dc.lower(dyn, "eager", buckets=wrong)
    with pytest.raises(ArgumentError, match="`batch_sizes`: found"):
        dc.lower(dyn, "eager").warmup(wrong)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_tensors_that_are_elsewhere_are_refused(dyn: dc.DynamicModule, device: torch.device, backend: str) -> None:
    """A compiled program reads where they say, and would end the process."""
    fast = dc.lower(dyn, backend, decline=False)
    x = torch.randn(2, 3, 12, 12, device=device)
    for wrong, found in (
        (x.to("meta"), "a strided tensor on meta"),
        (x.to_sparse(), f"a sparse_coo tensor on {x.device}"),
    ):
        with pytest.raises(ArgumentError, match=f"`x`: found {found}; expected a strided one on {x.device}"):
            fast(wrong)


def test_a_cast_model_lowers_and_keeps_its_dtype(dyn: dc.DynamicModule, device: torch.device) -> None:
    half = dyn.bfloat16()
    x = torch.randn(5, 3, 12, 12, device=device).bfloat16()
    for backend in ("eager", "inductor"):
        fast = dc.lower(half, backend)
        with torch.no_grad(), forced(half, [0.4, 0.2]), forced(fast, [0.4, 0.2]):
            torch.testing.assert_close(fast(x), half(x), rtol=5e-2, atol=5e-2)
        assert fast(x[:0]).dtype == torch.bfloat16


def test_eager_sees_exits_enabled_later(dyn: dc.DynamicModule, device: torch.device) -> None:
    for module in dyn.exits.values():
        module.enabled.fill_(False)
    fast = dc.lower(dyn, "eager")
    dyn.exits["exit1"].enabled.fill_(True)
    dyn.exits["exit1"].threshold.fill_(0.0)
    x = torch.randn(5, 3, 12, 12, device=device)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), dyn(x), rtol=1e-5, atol=1e-6)
    assert fast.last_run == {"always": 5}


def test_copies_and_casts_of_a_lowered_model(dyn: dc.DynamicModule, device: torch.device) -> None:
    fast = dc.lower(dyn, "eager")
    x = torch.randn(3, 3, 12, 12, device=device)
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    with pytest.raises(LoweringError, match="relower"):
        fast.half()


@pytest.mark.parametrize(("buffer", "value"), [("threshold", 3.0), ("threshold", float("nan")), ("temperature", -1.0)])
def test_impossible_thresholds_are_refused(dyn: dc.DynamicModule, buffer: str, value: float) -> None:
    dyn.exits["exit0"].get_buffer(buffer).fill_(value)
    with pytest.raises(ArgumentError, match=f"exits.exit0.{buffer}"):
        dc.lower(dyn, "eager")
    with pytest.raises(ArgumentError, match="options"):
        dc.lower(dyn, "eager", cudagraphs=True)


# --- any nesting of selects ----------------------------------------------------------------------


class Nested(nn.Module):
    """A program of selects drawn by hypothesis: each step reads two earlier values under a decision."""

    def __init__(self, steps: list[tuple[int, int, int, str]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in steps)

    def forward(self, x: Tensor, bits: Tensor) -> Tensor:
        values = [x]
        for (a, b, d, kind), layer in zip(self.steps, self.layers, strict=True):
            left, right = values[a % len(values)], values[b % len(values)]
            made = layer(left).tanh()
            decision = bits[:, d] > 0
            if kind == "select":
                values.append(dc.select(decision, made + right, right))
            elif kind == "both":
                values.append(dc.select(decision, made, layer(right)))
            elif kind == "pair":
                first, second = dc.select(decision, (made, right), (right, left))
                values.append(first * 0.5 + second)
            elif kind == "switch":
                route = (bits[:, d] > 0).long() + (bits[:, (d + 1) % 3] > 0).long()
                values.append(dc.switch(route, made, right, layer(right) + left))
            else:
                values.append(made)
        return values[-1]


programs = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.integers(0, 6),
        st.integers(0, 2),
        st.sampled_from(["select", "both", "pair", "switch", "plain"]),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=programs, seed=st.integers(0, 100))
def test_random_programs_lower_to_their_reference(device: torch.device, steps: Any, seed: int) -> None:
    from dyncompile.capture import capture
    from dyncompile.conversion import describe

    torch.manual_seed(seed)
    model = Nested(steps).to(device).eval()
    example = (torch.randn(2, 4, device=device), torch.randn(2, 3, device=device))
    graph = capture(model, example, {})
    dyn = dc.DynamicModule(graph, describe(graph, model, "given"))
    fast = dc.lower(dyn, backend="eager")
    for batch in (1, 2, 7):
        x, bits = torch.randn(batch, 4, device=device), torch.randn(batch, 3, device=device)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, bits), model(x, bits), rtol=1e-5, atol=1e-6)


def test_demand_of_a_deepcopy_is_the_same(dyn: dc.DynamicModule) -> None:
    twin = copy.deepcopy(dyn)
    names = [r.name for r in analyse(specialise(twin.graph.fx, {})).regions]
    assert names == [r.name for r in analyse(specialise(dyn.graph.fx, {})).regions]
