"""What kernels take is measured once on each device, where nothing is assumed of it."""

import torch
from feedforward import converter
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.capture.recurrent import KERNELS, RecurrentLayer
from dyncompile.kernel_costs import FREE, KernelCosts, assumed, kernel_costs
from dyncompile.nn import SkippingLayer, ragged
from dyncompile.nn.neurons import GatedNeurons, NeuronLayout
from dyncompile.shapes import flop_counter
from dyncompile.testing import forced

COSTS = KernelCosts(call=3.0, unit=2.0, gathered=4.0)


def test_measured_once_for_a_place_and_a_key(device):
    known, measured = {}, []

    def measure():
        measured.append(1)
        return COSTS

    x = torch.ones(2, device=device)
    assert [kernel_costs(known, key, t, measure) for key, t in (("a", x), ("a", x + 1), ("b", x), ("a", x.half()))] == [
        COSTS
    ] * 4
    assert len(measured) == len(known) == 3
    with assumed(FREE):
        assert kernel_costs(known, "c", x, measure) is FREE
    assert len(measured) == 3
    assert kernel_costs(known, "a", x, measure) is COSTS


def test_recurrent_kernels_are_measured_where_samples_end_apart(device, monkeypatch):
    found, kernel = [], KERNELS["GRU"]
    monkeypatch.setitem(KERNELS, "GRU", lambda x, *args: found.append(x.shape[:2]) or kernel(x, *args))
    monkeypatch.setattr(ragged, "_known", {})
    rnn = nn.GRU(6, 5, batch_first=True).to(device)
    layer = SkippingLayer(RecurrentLayer(rnn)).lowered()
    mask = torch.arange(9, device=device) < torch.tensor([2, 9], device=device).unsqueeze(1)
    with torch.no_grad():
        for _ in range(2):
            layer(None, mask.flatten(), torch.randn(2, 9, 6, device=device), None, *rnn.parameters())
    (costs,) = ragged._known.values()
    assert costs.call > 0
    assert costs.unit > 0
    assert found.count((1, 1)) > 1, "a call that does as little as can be"


def test_what_is_measured_is_not_counted_and_a_call_costs_more_than_a_part(device):
    graph = fx.Graph()
    graph.output(graph.call_function(torch.relu, (graph.placeholder("h"),)))
    layout = NeuronLayout(batch_dim=0, channel_dim=1, by_token=False)
    groups = [range(g * 16, g * 16 + 16) for g in range(4)]
    dense = GatedNeurons(
        fx.GraphModule(nn.Module(), graph),
        groups,
        layout=layout,
        biased=[True, True],
        transposed=[False, False],
        cuts=[slice(0, 64), slice(0, 8)],
    )
    lowered = dense.lowered()
    weights = [torch.randn(size, device=device) for size in ((64, 8), (64,), (8, 64), (8,))]
    opened = torch.zeros(8, 4, dtype=torch.bool, device=device)
    opened[:4, 0] = opened[4:, 3] = True
    with torch.no_grad(), flop_counter() as counter:
        lowered(None, opened.flatten(), torch.randn(8, 8, device=device), *weights)
    assert counter.get_total_flops() in {2 * 8 * 8 * 16 * part for part in (2, 4)}
    (costs,) = lowered._known.values()
    assert costs.call > max(costs.unit, costs.gathered) >= 0


def test_what_takes_less_time_is_run(device):
    _, dyn, inputs = converter(device)("mlp")
    dyn.gates["neurons0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager")
    x = inputs(8)
    mask = torch.zeros(8, 4, dtype=torch.bool, device=x[0].device)
    mask[:4, 0] = mask[4:, 3] = True
    counted = {}
    for calls in (0.0, 1e12):
        costs = KernelCosts(call=calls, unit=1.0, gathered=1.0)
        with forced(fast, {"neurons0": mask}), FlopCounterMode(display=False) as counter, assumed(costs):
            found = fast(*x)
        with forced(dyn, {"neurons0": mask}):
            torch.testing.assert_close(found, dyn(*x), rtol=1e-5, atol=1e-6)
        counted[calls] = counter.get_total_flops()
    assert counted[1e12] - counted[0.0] == 8 * 2 * 10 * (12 + 5)  # each row's other group of the two
