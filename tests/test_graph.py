"""What a graph tells of a model: cut points, residual branches, FLOPs, shapes."""

import copy

import pytest
import torch
from torch import fx, nn

from dyncompile.capture import capture
from dyncompile.errors import MixedSamplesError
from dyncompile.features import channel_dim
from dyncompile.graph import Size, Spec, spec


@pytest.fixture(scope="module")
def captured(needs):
    """Captures of torchvision models at a small input, made once."""
    models = needs("torchvision").models
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            options = {"image_size": 64} if name.startswith("vit") else {}
            size = 32 if name.startswith(("resnet", "mobile", "effic", "dense")) else 64
            model = getattr(models, name)(**options)
            made[name] = capture(model, (torch.randn(2, 3, size, size),))
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "identity", "projection"),
    [
        ("resnet18", 5, 3),
        ("resnet50", 12, 4),
        ("vit_b_16", 24, 0),
        ("mobilenet_v3_large", 10, 0),
        ("efficientnet_b0", 9, 0),
        ("convnext_tiny", 18, 0),
        ("swin_t", 24, 0),
        ("densenet121", 0, 0),
    ],
)
def test_residual_branches_are_all_found(captured, name, identity, projection):
    branches = captured(name).residual_branches
    assert sum(b.identity for b in branches) == identity
    assert sum(not b.identity for b in branches) == projection
    for b in branches:
        assert spec(b.add) == spec(b.output) == spec(b.shortcut)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "swin_t", "densenet121"])
def test_one_dominator_is_the_one_that_the_whole_tree_has(captured, name):
    graph = captured(name)
    assert len(graph.dominators) > 20
    for node, found in graph.dominators.items():
        assert graph.dominator(node) is found


def test_nodes_are_found_by_name_also_after_the_graph_changed(captured):
    graph = copy.copy(captured("resnet18"))
    graph.fx = fx.Graph()
    graph.fx.output((graph.fx.call_function(torch.zeros, (1,)),))
    (zeros, output) = graph.fx.nodes
    assert graph.find("zeros") is zeros
    with graph.fx.inserting_before(output):
        new = graph.fx.call_function(torch.ones, (1,))
    assert graph.find("ones") is new
    output.args = ((new,),)
    graph.fx.erase_node(zeros)
    assert graph.find("zeros") is None


def test_what_is_derived_from_a_copy_is_made_of_its_nodes():
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
    graph = capture(nn.Sequential(*layers), (torch.randn(2, 4),))
    assert graph.find("_2") in graph.cut_points
    copied = copy.deepcopy(graph)
    assert len(copied.cut_points) == len(graph.cut_points) == 4
    for node in (*copied.cut_points, *copied.dominators, *copied.trunk, copied.find("_2")):
        assert node.graph is copied.fx
        assert node in set(copied.fx.nodes)


def test_bert_has_two_branches_a_layer(needs):
    transformers = needs("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 32, (2, 6))
    graph = capture(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert len(graph.residual_branches) == 24
    assert all(b.identity for b in graph.residual_branches)


def test_rotary_embeddings_do_not_bypass_the_layers_that_share_them():
    class Rotary(nn.Module):
        def forward(self, x):
            angles = torch.arange(x.shape[1], device=x.device)[:, None] / torch.arange(1, x.shape[2] + 1)
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary = Rotary()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            h = self.layers[0](x)
            cos, sin = self.rotary(h)
            for layer in self.layers[1:]:
                h = layer(h * cos + h.flip(-1) * sin) + h
            return self.fc(h.mean(1))

    graph = capture(Model(), (torch.randn(2, 5, 8),))
    adds = [n for n in graph.cut_points if n in {b.add for b in graph.residual_branches}]
    assert len(adds) == 2
    assert "layers.0" in [str(n.target) for n in graph.cut_points]


def test_cut_points_of_a_resnet_are_its_trunk(captured):
    graph = captured("resnet18")
    assert len(graph.fx.nodes) == 71
    targets = [str(n.target) for n in graph.cut_points]
    assert targets[:4] == ["conv1", "bn1", "relu", "maxpool"]
    assert targets[-2:] == ["avgpool", "aten.flatten.using_ints"]
    adds = [n for n in graph.cut_points if n in {b.add for b in graph.residual_branches}]
    assert len(adds) == 8
    assert len(graph.cut_points) == 22
    assert len(captured("resnet50").fx.nodes) == 177


def test_the_transitions_of_a_densenet_are_cut_points(captured):
    paths = {path for n in captured("densenet121").cut_points for path in n.meta["path"]}
    assert {f"features.transition{i}.conv" for i in (1, 2, 3)} <= paths
    assert not any(path.startswith("features.denseblock1.denselayer2") for path in paths)


@pytest.mark.parametrize(("name", "gmacs"), [("resnet18", 1.814), ("resnet50", 4.089)])
def test_flops_equal_the_published_numbers(captured, name, gmacs):
    from dyncompile.shapes import probe

    graph = captured(name)
    nodes = torch.fx.Graph()
    nodes.output(nodes.graph_copy(graph.fx, {}))
    for node in nodes.nodes:
        node.meta.pop("flops", None)
    probe(graph.root, nodes, (torch.empty(2, 3, 224, 224),), (0,))
    total = sum(node.meta["flops"] for node in nodes.nodes)
    assert total / 2e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (3, 1), (2, 2)])
def test_flops_of_recurrent_layers(device, kind, gates, layers, directions):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(5, 7, layers, batch_first=True, bidirectional=directions == 2)

        def forward(self, x):
            return self.rnn(x)[0][:, -1]

    graph = capture(Model().to(device), (torch.randn(2, 11, 5, device=device),))
    widths = [5] + [7 * directions] * (layers - 1)
    expected = sum(2 * 11 * directions * gates * 7 * (width + 7) for width in widths)
    assert graph.total_flops == expected


def test_flops_and_bytes_of_single_layers(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5)).to(device)
    graph = capture(model, (torch.randn(2, 3, 8, 8, device=device),))
    flops = {str(n.target): graph.flops(n) for n in graph.fx.nodes}
    assert flops["0"] == 2 * 8 * 3 * 9 * 9
    assert flops["3"] == 2 * 72 * 5
    assert graph.total_flops == flops["0"] + flops["3"]
    sizes = {str(n.target): graph.parameter_bytes(n) for n in graph.fx.nodes}
    assert sizes["0"] == 4 * (8 * 27 + 8)
    assert sizes["3"] == 4 * (72 * 5 + 5)


class Shapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        n, length, _ = x.shape
        h = self.fc(x)
        rows = h.reshape(n * length, 4)
        front = h.transpose(0, 1)
        return (rows.reshape(n, length, 4) + front.transpose(0, 1)).sum((1, 2)) + length


def test_batch_dims_and_rows(device):
    graph = capture(Shapes().to(device), (torch.randn(2, 3, 4, device=device),))
    found = {n.name: n.meta["spec"] for n in graph.fx.nodes}
    assert found["fc"] == Spec((1, 3, 4), torch.float32, 0)
    assert found["reshape"] == Spec((3, 4), torch.float32, 0)
    assert found["reshape"].rows == 3
    assert found["reshape"].at(7) == (21, 4)
    assert found["transpose"] == Spec((3, 1, 4), torch.float32, 1)
    sizes = {value for value in found.values() if isinstance(value, Size)}
    assert {Size(1, 0), Size(3, 0)} <= sizes
    assert all(n.meta["sliceable"] for n in graph.fx.nodes)


def test_what_is_laid_out_otherwise_is_no_rows(device):
    class Interleaved(nn.Module):
        def forward(self, x):
            h = x.transpose(0, 1).reshape(-1, x.shape[2])  # samples innermost
            return h.relu().reshape(x.shape[1], -1, x.shape[2]).transpose(0, 1).sum(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), Interleaved()
            self.c = nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            h = h.transpose(0, 1).reshape(-1, 4).relu().reshape(x.shape[1], -1, 4).transpose(0, 1)
            return self.c(h)

    graph = capture(Model().to(device), (torch.randn(2, 3, 4, device=device),))
    rows = {n.name: n.meta["sliceable"] for n in graph.fx.nodes}
    assert not rows["reshape"]
    assert not rows["relu"]
    assert rows["a"]
    assert rows["c"]


def test_a_size_out_of_proportion_is_refused(device):
    class Padded(nn.Module):
        def forward(self, x):
            return torch.cat([x, x.new_zeros(1, 4)]).relu()[:-1]

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Padded(), nn.Identity()))
    model[1][0].inner = nn.Identity()  # no leaf: its operations show
    with pytest.raises(MixedSamplesError, match=r"its shape is \[4, 4\] for 3 samples and \[6, 4\] for 5"):
        capture(model.to(device), (torch.randn(2, 4, device=device),))


def test_channels_lie_where_the_layers_keep_them(captured):
    graph = captured("resnet18")
    assert {channel_dim(graph, n) for n in graph.cut_points if len(spec(n).shape) == 4} == {1}
    graph = captured("vit_b_16")
    assert {channel_dim(graph, b.add) for b in graph.residual_branches} == {2}
    graph = captured("swin_t")
    assert {channel_dim(graph, b.add) for b in graph.residual_branches} == {3}
