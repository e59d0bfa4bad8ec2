"""What a model that skips frames runs: kernels, rows, backbones."""

import pytest
import torch
from skipping import HIDDEN, STEPS, WIDTH, Reader, Video, converted, enable, kept, over_kept_steps, sequences
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.capture.recurrent import KERNELS, RecurrentLayer
from dyncompile.kernel_costs import KernelCosts, assumed
from dyncompile.nn import SkippingLayer
from dyncompile.passes import Refusal, Site
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.testing import forced

# --- what runs -------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Steps times samples of every call of a recurrent kernel."""
    found = []

    def counted(kernel):
        def run(x, *args):
            found.append(x.shape[0] * x.shape[1])
            return kernel(x, *args)

        return run

    for name, kernel in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, counted(kernel))
    return found


@pytest.mark.parametrize(("kind", "reads"), [(nn.LSTM, ("c",)), (nn.LSTM, ("last",)), (nn.GRU, ("h",))])
def test_kernels_run_over_the_kept_steps(kind, reads, calls, device):
    model = Reader(kind, batch_first=True, reads=reads)
    dyn = converted(model, device)
    enable(dyn)
    fast = dc.lower(dyn, "eager")
    x, mask = sequences(33, model, device), kept(33, STEPS, device)
    worth = 40.0  # steps of a sample take as long as a call
    with assumed(KernelCosts(call=worth, unit=1.0, gathered=1.0)):
        calls.clear()
        with forced(fast, {"frames0": mask}):
            fast(x)
        assert fast.last_run == {"always": 33, "frames0": int(mask.sum())}
        if reads == ("c",):
            assert sum(calls) == mask.sum(), "final cell states want every sample to end where a call does"
        else:
            most = min(mask.sum() + worth * len(calls), 33 * int(mask.sum(1).max()))
            assert mask.sum() <= sum(calls) <= most
        calls.clear()
        with forced(fast, {"frames0": 0.0}):
            fast(x)
        assert not calls
        with forced(fast, {"frames0": 1.0}):
            fast(x)
        assert calls == [33 * STEPS]


def test_stretches_waste_less_than_calls_would_cost(calls, device):
    rnn = nn.GRU(6, 5, batch_first=True).to(device)
    layer = SkippingLayer(RecurrentLayer(rnn)).lowered()
    x = torch.randn(16, 40, 6, device=device)
    mask = torch.arange(40, device=device) < torch.tensor([1] * 4 + [2] * 10 + [40] * 2, device=device).unsqueeze(1)
    with torch.no_grad(), assumed(KernelCosts(call=5.0, unit=1.0, gathered=1.0)):
        layer(None, mask.flatten(), x, None, *rnn.parameters())
    assert len(calls) == 2
    assert sum(calls) == 2 * 16 + 38 * 2


def test_an_agent_that_reads_the_state_drops_rows(device):
    model = Reader(batch_first=True)
    dyn = converted(model, device, reads="state")
    enable(dyn)
    fast = dc.lower(dyn, "eager")
    x = sequences(33, model, device)
    trace = dyn.trace(x)
    steps = int(trace.decisions["frames0"].sum())
    assert 0 < steps < 33 * STEPS
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast(x)
    cell = 2 * 4 * HIDDEN * (WIDTH + HIDDEN)
    agent = 2 * 4 * (WIDTH + HIDDEN + 1)
    assert counter.get_total_flops() == steps * cell + 33 * (STEPS * agent + 2 * HIDDEN * 3)
    static = STEPS * cell + 2 * HIDDEN * 3
    assert float(trace.cost.mean()) == pytest.approx(counter.get_total_flops() / (33 * static), rel=1e-5)


def test_cost_is_the_share_of_steps_and_the_agent(device):
    model = Reader(num_layers=2, batch_first=True)
    dyn = converted(model, device)
    enable(dyn)
    x, mask = sequences(5, model, device), kept(5, STEPS, device)
    with forced(dyn, {"frames0": mask}):
        cost = dyn.trace(x).cost
    layers = STEPS * 2 * 4 * HIDDEN * (WIDTH + HIDDEN + 2 * HIDDEN)
    rest, agent = 2 * HIDDEN * 3, STEPS * 2 * 4 * (WIDTH + 1)
    expected = (mask.float().mean(1) * layers + agent + rest) / (layers + rest)
    torch.testing.assert_close(cost, expected)
    dyn.train()
    with forced(dyn, {"frames0": mask}):
        torch.testing.assert_close(dyn.trace(x).cost, expected)
    trace = dyn.trace(x)
    grad = torch.autograd.grad(trace.cost.sum(), trace.decisions["frames0"])[0]
    torch.testing.assert_close(grad, torch.full_like(grad, layers / STEPS / (layers + rest)))
    assert "frames0" in dyn.inspect()


# --- backbones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "steps first"])
def test_skipped_frames_do_not_enter_the_backbone(variant, device):
    model = Video(variant)
    dyn = converted(model, device, example=torch.randn(2, 5, 3, 8, 8, device=device))
    assert dyn.recipe.steps[0].sites[0]["data"]["features"]
    x = torch.randn(7, 5, 3, 8, 8, device=device)
    for training in (False, True):
        assert torch.equal(dyn.train(training)(x), model.train(training)(x))
    model.eval()
    dyn.eval()
    enable(dyn)
    fast = dc.lower(dyn, "eager", decline=False)
    assert not fast.plan.dense
    mask = kept(7, 5, device)
    zeros = [torch.zeros(1, 7, HIDDEN, device=device)] * 2
    features = model.backbone(x.flatten(0, 1)).view(7, 5, -1)
    rnn = nn.LSTM(16, HIDDEN, batch_first=True).to(device)
    rnn.load_state_dict(model.rnn.state_dict())
    with torch.no_grad(), forced(dyn, {"frames0": mask}), forced(fast, {"frames0": mask}):
        out, _ = over_kept_steps(rnn, features, mask, zeros)
        torch.testing.assert_close(dyn(x), model.fc(out[:, -1]), rtol=0, atol=1e-5)
        with FlopCounterMode(display=False) as counter:
            fast(x)
        torch.testing.assert_close(fast(x), dyn(x), rtol=0, atol=1e-5)
        cost = dyn.trace(x).cost
    per_frame = 2 * 64 * 9 * (3 * 8 + 8 * 16)
    policy = dyn.gates["frames0"].policy
    with FlopCounterMode(display=False) as agent, torch.no_grad():
        policy(x.flatten(0, 1))
    ran = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    of_agent = agent.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert ran - of_agent == per_frame * int(mask.sum())
    rest = 5 * 2 * 4 * HIDDEN * (16 + HIDDEN)
    static = 5 * per_frame + rest + 2 * HIDDEN * 3
    expected = mask.float().mean(1) * (5 * per_frame + rest) + agent.get_total_flops() / 7 + 2 * HIDDEN * 3
    torch.testing.assert_close(cost, expected / static, rtol=1e-5, atol=1e-6)


def test_in_training_the_gate_sees_what_a_skipped_frame_would_bring(device):
    dyn = converted(Video(), device, example=torch.randn(2, 5, 3, 8, 8, device=device)).train()
    enable(dyn)
    x = torch.randn(4, 5, 3, 8, 8, device=device)
    with forced(dyn, {"frames0": 0.0}):
        dyn(x).square().mean().backward()
    assert all(p.grad.abs().sum() == 0 for n, p in dyn.rnn.named_parameters() if "ih" in n)
    admitted = next(n for n in dyn.graph.fx.nodes if "decision" in n.meta and n.op == "call_module")
    module = dyn.get_submodule(str(admitted.target))
    d = torch.tensor([0.0, 1.0], device=device)
    assert module(d).tolist() == [1, 1]
    assert module.eval()(d > 0).tolist() == [False, True]


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("centred", "of one frame depends on other frames"),
        ("read twice", "is also read by `view"),
        ("stacked", "`stack` has no row for each frame, those of a sample next to each other"),
        ("transposed", "has no row for each frame, those of a sample next to each other"),
        ("plain", "an agent costs "),
    ],
)
def test_backbones_that_run_for_every_frame(variant, reason, device):
    graph = capture(Video(variant).to(device), (torch.randn(2, 5, 3, 8, 8, device=device),))
    refused, site = FrameSkip(hidden=24 if variant == "plain" else 4).sites(graph)
    assert isinstance(refused, Refusal)
    assert isinstance(site, Site)
    assert refused.reason.startswith("the backbone runs for every frame: ")
    assert reason in refused.reason
    assert "features" not in site.data
