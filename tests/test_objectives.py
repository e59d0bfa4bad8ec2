import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dyncompile.conversion import dynamize
from dyncompile.errors import ArgumentError, DataError
from dyncompile.module import Trace
from dyncompile.training import (
    Distillation,
    ExpectedCost,
    LearnedConfidence,
    MultiExit,
    Objective,
)

N, K, T = 6, 4, 3.0


def make_trace(device, shape=(N, K), **parts):
    values = {name: torch.randn(shape, device=device, requires_grad=True) for name in ("exit0", "exit1", "final")}
    exits = {name: values[name] for name in ("exit0", "exit1")}
    cost = parts.pop("cost", torch.ones(N, device=device))
    confidence = parts.pop("confidence", {})
    return Trace(values["final"], values["final"], exits, confidence, {}, {}, cost)


@pytest.fixture
def trace(device):
    return make_trace(device)


@pytest.fixture
def labels(device):
    return torch.arange(N, device=device) % K


def near(value):
    value = value.item() if isinstance(value, torch.Tensor) else value
    return pytest.approx(value, rel=1e-5, abs=1e-7)


def test_multi_exit_is_the_weighted_sum_of_cross_entropies(trace, labels):
    each = [F.cross_entropy(p, labels) for p in (*trace.exits.values(), trace.final)]
    assert MultiExit()(trace, labels).item() == near(sum(each))
    weighted = 2 * each[0] + 0.5 * each[1] + 3 * each[2]
    assert MultiExit(weights=[2, 0.5, 3])(trace, labels).item() == near(weighted)
    named = MultiExit(weights={"exit1": 0.5})(trace, labels)
    assert named.item() == near(each[0] + 0.5 * each[1] + each[2])


def test_parts_add_up_and_have_names(trace, labels):
    parts = Distillation()(trace, labels), Distillation().parts(trace, labels)
    assert parts[0].item() == near(sum(parts[1].values()))
    assert sorted(parts[1]) == [
        "distillation/exit0",
        "distillation/exit1",
        "task/exit0",
        "task/exit1",
        "task/final",
    ]


def test_distillation_is_the_formula(trace, labels):
    q = F.softmax(trace.final / T, 1)
    expected = 0.3 * F.cross_entropy(trace.final, labels)
    for prediction in trace.exits.values():
        p = F.softmax(prediction / T, 1)
        divergence = -(q * torch.log(p / q)).sum(1).mean()
        expected = expected + 0.3 * F.cross_entropy(prediction, labels) + 0.7 * T**2 * divergence
    loss = Distillation(alpha=0.3, temperature=T)(trace, labels)
    assert loss.item() == near(expected)


def test_distillation_of_the_task_alone_is_multi_exit(trace, labels):
    weights = {"exit0": 0.2}
    loss = Distillation(alpha=1, weights=weights)(trace, labels)
    assert loss.item() == near(MultiExit(weights=weights)(trace, labels))


def test_no_gradient_reaches_the_teacher(trace, labels):
    Distillation(alpha=0)(trace, labels).backward()
    assert not trace.final.grad.any()
    assert all(prediction.grad.any() for prediction in trace.exits.values())


def test_the_temperature_keeps_the_size_of_small_gradients(device, labels):
    sizes = []
    for temperature in (20.0, 80.0):
        torch.manual_seed(0)
        trace = make_trace(device)
        Distillation(alpha=0, temperature=temperature)(trace, labels).backward()
        sizes.append(trace.exits["exit0"].grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_static_teacher_is_asked_about_the_inputs_and_stays_as_it_was(device, labels):
    trace = make_trace(device)
    inputs = torch.randn(N, 5, device=device)
    teacher = nn.Sequential(nn.Linear(5, K), nn.Dropout()).to(device)
    objective = Distillation(alpha=0, temperature=1.0, teacher=teacher)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    log_q = F.log_softmax(teacher[0](inputs), 1)
    predictions = (*trace.exits.values(), trace.final)
    expected = sum(F.kl_div(F.log_softmax(p, 1), log_q, reduction="batchmean", log_target=True) for p in predictions)
    nn.init.zeros_(teacher[0].weight)
    assert objective(trace, labels, inputs).item() == near(expected)
    assert objective(trace, labels, {"input": inputs}).item() == near(expected)
    with pytest.raises(ArgumentError, match=r"objective\(trace, targets, inputs\)"):
        objective(trace, labels)


def test_a_teacher_of_another_shape_is_refused(trace, labels, device):
    objective = Distillation(teacher=nn.Linear(5, K + 1))
    with pytest.raises(ArgumentError, match=r"`teacher`: found outputs of shape \[\[6, 5\]\]"):
        objective(trace, labels, torch.randn(N, 5, device=device))


def test_expected_cost(device, labels):
    cost = torch.linspace(0.2, 1.2, N, device=device, requires_grad=True)
    trace = make_trace(device, cost=cost)
    assert ExpectedCost(weight=2.0)(trace, labels).item() == near(2 * 0.7)
    loss = ExpectedCost(weight=2.0, target=0.4)(trace, labels)
    assert loss.item() == near(2 * 0.3**2)
    loss.backward()
    assert (cost.grad > 0).all()


def test_a_target_pushes_back_from_below(device, labels):
    cost = torch.full((N,), 0.1, device=device, requires_grad=True)
    ExpectedCost(target=0.4)(make_trace(device, cost=cost), labels).backward()
    assert (cost.grad < 0).all()


def test_objectives_add_up(trace, labels):
    total = MultiExit() + Distillation(alpha=0) + ExpectedCost(weight=0.5)
    assert isinstance(total, Objective)
    parts = (MultiExit(), Distillation(alpha=0), ExpectedCost(weight=0.5))
    assert total(trace, labels).item() == near(sum(part(trace, labels) for part in parts))
    task = MultiExit().parts(trace, labels)["task/exit0"]
    assert total.parts(trace, labels)["task/exit0"].item() == near(task)
    assert (MultiExit(ignore_index=255) + ExpectedCost()).ignore_index == 255


@pytest.mark.parametrize(("shape", "dims"), [((N, 5, K), (N, 5)), ((N, K, 5, 3), (N, 5, 3))])
def test_dense_predictions(device, shape, dims):
    trace = make_trace(device, shape)
    labels = torch.randint(K, dims, device=device)
    at = shape.index(K)
    flat = [p.movedim(at, -1).reshape(-1, K) for p in (*trace.exits.values(), trace.final)]
    expected = sum(F.cross_entropy(p, labels.flatten()) for p in flat)
    assert MultiExit()(trace, labels).item() == near(expected)
    kept = labels.clone()
    kept.view(-1)[::2] = 255
    expected = sum(F.cross_entropy(p[1::2], labels.flatten()[1::2]) for p in flat)
    assert MultiExit(ignore_index=255)(trace, kept).item() == near(expected)
    q = F.log_softmax(flat[2][1::2] / T, 1)
    divergences = [F.kl_div(F.log_softmax(p[1::2] / T, 1), q, reduction="batchmean", log_target=True) for p in flat[:2]]
    loss = Distillation(alpha=0, temperature=T, ignore_index=255)(trace, kept)
    assert loss.item() == near(T**2 * sum(divergences))


def test_classes_are_found_where_they_could_be_meant_otherwise(device):
    square = make_trace(device, (N, K, K))
    labels = torch.randint(K, (N, K), device=device)
    expected = F.cross_entropy(square.final.reshape(-1, K), labels.flatten())
    assert MultiExit().parts(square, labels)["task/final"].item() == near(expected)
    channels_first = make_trace(device, (N, K, 7))
    labels = torch.randint(K, (N, 7), device=device)
    expected = F.cross_entropy(channels_first.final, labels)
    assert MultiExit().parts(channels_first, labels)["task/final"].item() == near(expected)


def test_a_batch_without_labels_costs_nothing(trace, device):
    loss = Distillation()(trace, torch.full((N,), -100, device=device))
    assert loss.item() == 0
    loss.backward()
    assert not trace.exits["exit0"].grad.any()


def test_regression(device):
    trace = make_trace(device, (N, 1))
    targets = torch.randn(N, device=device)
    predictions = (*trace.exits.values(), trace.final)
    expected = sum(F.mse_loss(p[:, 0], targets) for p in predictions)
    assert MultiExit()(trace, targets).item() == near(expected)
    apart = sum(F.mse_loss(p, trace.final) for p in trace.exits.values())
    assert Distillation(alpha=0)(trace, targets).item() == near(apart)


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_learned_confidence_is_least_at_what_it_teaches(device, shape):
    confidence = {name: torch.full((N,), 0.5, device=device, requires_grad=True) for name in ("exit0", "exit1")}
    trace = make_trace(device, shape, confidence=confidence)
    targets = torch.randn(N, device=device)
    errors = [(p.reshape(N) - targets) ** 2 for p in (*trace.exits.values(), trace.final)]
    scale = torch.stack(errors).mean()
    expected = sum(((0.5 - torch.exp(-e / scale)) ** 2).mean() for e in errors[:2])
    loss = LearnedConfidence(weight=2.0)(trace, targets)
    assert loss.item() == near(2 * expected)
    loss.backward()
    # Descending raises the confidence where the error is least and lowers it where it is largest.
    gradient = confidence["exit0"].grad
    assert gradient[errors[0].argmin()] < gradient[errors[0].argmax()]
    assert trace.exits["exit0"].grad is None


def test_half_precision_is_taken_to_float32(device, labels):
    trace = make_trace(device)
    half = Trace(
        None,
        trace.final.bfloat16(),
        {name: p.bfloat16() for name, p in trace.exits.items()},
        {},
        {},
        {},
        trace.cost.bfloat16(),
    )
    loss = (Distillation() + ExpectedCost())(half, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((Distillation() + ExpectedCost())(trace, labels).item(), rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiExit(weights=[1, -1, 1]), "`weights`: found -1; expected numbers that are not negative"),
        (lambda: MultiExit(weights={"exit0": math.nan}), "`weights`: found"),
        (lambda: Distillation(alpha=1.5), r"`alpha`: found 1.5; expected a number in \[0, 1\]"),
        (lambda: Distillation(temperature=0), "`temperature`: found 0"),
        (lambda: Distillation(teacher="exit0"), "`teacher`: found 'exit0'"),
        (lambda: ExpectedCost(weight=0), "`weight`: found 0"),
        (lambda: ExpectedCost(target=-1), "`target`: found -1"),
        (lambda: LearnedConfidence(weight=-1), "`weight`: found -1"),
        (lambda: LearnedConfidence(weight=None), "`weight`: found None"),
        (lambda: Distillation(alpha="a"), "`alpha`: found 'a'"),
        (lambda: MultiExit(weights=3), "`weights`: found 3; expected one number for each exit"),
        (lambda: MultiExit(weights={"exit0": "a"}), "`weights`: found 'a'"),
        (lambda: MultiExit()(torch.zeros(2), torch.zeros(2)), "`trace`: found a Tensor; expected what `dyn.trace"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_weights_belong_to_exits_that_exist(trace, labels):
    with pytest.raises(ArgumentError, match=r"found \['exit7'\]; expected names out of \['exit0',"):
        MultiExit(weights={"exit7": 1})(trace, labels)
    with pytest.raises(ArgumentError, match=r"found 2 numbers; expected 3"):
        Distillation(weights=[1, 1])(trace, labels)


def test_targets_have_a_shape_that_fits(trace, labels):
    with pytest.raises(ArgumentError, match="`targets`: found a list; expected a tensor"):
        MultiExit()(trace, labels.tolist())
    if labels.device.type == "cpu":  # elsewhere torch asserts in a kernel
        with pytest.raises(DataError, match=r"found labels from 1 to 4; expected integers in \[0, 4\)"):
            MultiExit()(trace, labels + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        MultiExit() + 3
    with pytest.raises(DataError, match=r"found targets \[6, 1\] for predictions \[6, 4\]"):
        MultiExit()(trace, labels[:, None])
    with pytest.raises(DataError, match="expected one shape for both"):
        MultiExit()(trace, labels.float())


def test_every_new_parameter_of_a_real_model_gets_a_gradient(device):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)), nn.Linear(8, K))
    dyn = dynamize(model, "early_exit", exits=2, example_inputs=torch.randn(2, 8)).to(device)
    labels = torch.arange(N, device=device) % K
    for objective in (MultiExit(), Distillation(), ExpectedCost()):
        dyn.train().zero_grad()
        objective(dyn.trace(torch.randn(N, 8, device=device)), labels).backward()
        assert all(p.grad is not None and p.grad.any() for p in dyn.exits.parameters())
