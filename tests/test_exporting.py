"""A file exported to ONNX decides and computes what the dynamic model does, and skips what the model skips."""

import functools

import numpy as np
import pytest
import torch
from profiling import flops, profiled
from skipping import Video
from test_passes import MODELS, REFUSED
from torch import nn

import dyncompile as dc
from dyncompile.checking.deciding import settle, switch_on
from dyncompile.errors import ExportError
from dyncompile.exporting import checking, files
from dyncompile.exporting.pieces import Pieces
from dyncompile.exporting.routing import Writer
from dyncompile.passes import available
from dyncompile.passes.channel_gate import ChannelGate
from dyncompile.passes.frame_skip import FrameSkip
from dyncompile.passes.layer_skip import LayerSkip
from dyncompile.passes.neuron_gate import NeuronGate

KINDS = ("images", "vectors", "steps", "text")
FIRST = [(next(kind for kind in KINDS if (strategy, kind) not in REFUSED), strategy) for strategy in available()]
CHAINS = [
    ("images", "channel_gate-layer_skip-early_exit"),
    ("images", "early_exit-block_policy"),
    ("text", "layer_skip-early_exit"),
    ("steps", "early_exit-frame_skip"),
]


class StepsFirst(nn.Module):
    """A transformer over `[L, N, D]`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean(0)


class Several(nn.Module):
    """Recurrent layers of other kinds than an LSTM, beside each other."""

    def __init__(self):
        super().__init__()
        self.both = nn.GRU(6, 4, batch_first=True, bidirectional=True)
        self.plain = nn.RNN(6, 4, batch_first=True, nonlinearity="relu", bias=False)

    def forward(self, x):
        h, state = self.both(x)
        return torch.cat((h.mean(1), state[-1], self.plain(x)[0].mean(1)), 1)


def channels():
    """Convolutions and linear layers whose channels are gated one by one."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.SiLU()),
        *(nn.Conv2d(16, 8, 3, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 5)),
    )


ONE_BY_ONE = ChannelGate(granularity="channel", worth=0.0, hidden=2)

# Decisions about rows of a sample, samples along another dim, an agent that reads the state.
MORE = {
    "tokens": (*MODELS["text"], [NeuronGate(per="token", groups=4, top_k=2)], {}),
    "frames": (Video, lambda n: (torch.randn(n, 5, 3, 8, 8),), [FrameSkip()], {}),
    "steps first": (StepsFirst, lambda n: (torch.randn(4, n, 8),), [LayerSkip()], {"batch_dims": {"x": 1}}),
    "state": (*MODELS["steps"], [FrameSkip(reads="state")], {}),
    "channels": (channels, lambda n: (torch.randn(n, 3, 8, 8),), [ONE_BY_ONE], {}),
    "recurrent": (Several, lambda n: (torch.randn(n, 7, 6),), [FrameSkip()], {}),
}
CASES = [*FIRST, *CHAINS, *((kind, "") for kind in MORE)]
RECURRENT = ("steps", "state", "frames", "recurrent")
BATCHES = (1, 2, 7, 33)


def example(kind, batch):
    return (MODELS | MORE)[kind][1](batch)


@functools.cache
def converted(kind, chain):
    """A dynamic model each of whose decisions says yes to about half of the samples."""
    torch.manual_seed(0)
    make, inputs, *more = (MODELS | MORE)[kind]
    passes, options = more or (chain.split("-"), {})
    dyn = switch_on(dc.dynamize(make(), passes, example_inputs=inputs(2), **options))
    settle(dyn, inputs(64))
    return dyn


def fed(dyn, inputs):
    return {n: t.numpy() for n, t in zip(dyn.graph.signature.names, inputs, strict=True)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file in each routing; what takes long, torch's export of the segments, is done once for both."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def plan(kind, chain):
        plain = dc.lower(converted(kind, chain), backend="eager", decline=False)
        return plain.plan, Pieces(plain.plan, plain.dynamic, plain.examples(5))

    @functools.cache
    def export(kind, chain, routing):
        dyn, (planned, pieces) = converted(kind, chain), plan(kind, chain)
        assert not planned.dense
        path = folder / f"{kind}-{chain}-{routing}.onnx"
        files.save(Writer(planned, dyn, pieces, routing=routing, decisions=True).model(), path)
        return dyn, path

    return export


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["sample", "batch"])
@pytest.mark.parametrize(("kind", "chain"), CASES)
def test_the_file_decides_and_computes_what_the_model_does(exported, kind, chain, routing):
    dyn, path = exported(kind, chain, routing)
    run = checking.running(checking.session(path))
    for batch in BATCHES:
        inputs = example(kind, batch)
        found = run(fed(dyn, inputs))
        assert not checking.differences(found, dyn, inputs)
        trace = dyn.trace(*inputs)
        shown = {name.removeprefix("decisions.") for name in found if name.startswith("decisions.")}
        assert shown == set(trace.decisions)
        if dyn.exits:
            taken = torch.stack([trace.decisions[name] for name in dyn.exits] + [torch.ones(batch, dtype=torch.bool)])
            np.testing.assert_array_equal(found["exit"], taken.int().argmax(0).numpy())
            asked = found["exit"] >= np.arange(len(dyn.exits))[:, None]
            for name, rows in zip(dyn.exits, asked, strict=True):
                np.testing.assert_array_equal(found[f"decisions.{name}"] >= 0, rows)


@pytest.mark.parametrize(
    ("kind", "chain"), [case for case in CASES if case[0] not in ("steps", "state", "frames", "recurrent", "channels")]
)
def test_by_the_sample_no_more_runs_than_is_counted(exported, kind, chain, tmp_path):
    dyn, path = exported(kind, chain, "sample")
    inputs = example(kind, 33)
    _, ran = profiled(path, fed(dyn, inputs), tmp_path)
    trace = dyn.trace(*inputs)
    assert float(torch.cat([d.flatten().float() for d in trace.decisions.values()]).mean()) > 0
    assert flops(ran) == pytest.approx(float(trace.cost.double().sum()) * dyn.cost_model().static, rel=1e-5)


def test_of_channels_gated_one_by_one_a_sample_runs_its_own(exported, tmp_path):
    dyn, path = exported("channels", "", "sample")
    for _ in range(4):
        inputs = example("channels", 1)
        _, ran = profiled(path, fed(dyn, inputs), tmp_path)
        trace = dyn.trace(*inputs)
        assert 0 < float(trace.decisions["channels0"].float().mean()) < 1
        assert flops(ran) == pytest.approx(float(trace.cost.double().sum()) * dyn.cost_model().static, rel=1e-5)


def test_groups_as_many_as_channels_are_open_are_refused(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)
    )
    dyn = dc.dynamize(model.eval(), ONE_BY_ONE, example_inputs=torch.randn(2, 3, 8, 8))
    with pytest.raises(ExportError, match="which ONNX cannot count: take granularity='levels', or export to"):
        dc.export(switch_on(dyn), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_skipped_does_not_run_where_the_agent_reads_the_state(exported, tmp_path):
    dyn, path = exported("state", "", "sample")
    for _ in range(4):
        inputs = example("state", 1)
        _, ran = profiled(path, fed(dyn, inputs), tmp_path)
        kept = int(dyn.trace(*inputs).decisions["frames0"].sum())
        # Of the state of a cell.
        assert sum(kind == "Tanh" for kind, _, _ in ran) == 2 * kept


def test_frames_that_are_skipped_do_not_enter_the_backbone(exported, tmp_path):
    dyn, path = exported("frames", "", "sample")
    inputs = example("frames", 12)
    _, ran = profiled(path, fed(dyn, inputs), tmp_path)
    kept = int(dyn.trace(*inputs).decisions["frames0"].sum())
    assert 0 < kept < 60
    # The agent looks at every frame, by three convolutions.
    assert [given[0][0] for kind, given, _ in ran if kind == "Conv"] == [60, 60, 60, kept, kept]
