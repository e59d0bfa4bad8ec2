"""Feed-forward layers in groups of neurons: which are split, or refused and why; options."""

import numpy as np
import pytest
import torch
from feedforward import MODELS, Encoder, Packed, Transposed, converter, decisive, mlp, moved, sequence, vectors
from scipy.optimize import linear_sum_assignment
from torch import fx, nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.clustering import _shared_out, balanced_clusters, even_split
from dyncompile.demand import specialise
from dyncompile.errors import ArgumentError, PassError
from dyncompile.passes import Refusal, Site
from dyncompile.passes.channel_gate import ChannelGate
from dyncompile.passes.neuron_gate import NeuronGate


@pytest.fixture
def converted(device):
    return converter(device)


def sites_of(model, inputs, device, **options):
    graph = capture(model.to(device), moved(inputs, device))
    found = list(NeuronGate(**options).sites(graph))
    return [s for s in found if isinstance(s, Site)], {r.node: r.reason for r in found if isinstance(r, Refusal)}


# --- where -----------------------------------------------------------------------------------------


def torchvision_transformer(needs):
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return needs("torchvision").models.VisionTransformer(**sizes), {"x": torch.randn(2, 3, 32, 32)}


def timm_transformer(needs):
    model = needs("timm").create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    return model, {"x": torch.randn(2, 3, 32, 32)}


def hugging_face(name, **options):
    def make(needs):
        library = needs("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = getattr(library, f"{name}Config")(**sizes, vocab_size=64, max_position_embeddings=32, **options)
        model = getattr(library, f"{name}ForSequenceClassification")(config)
        return model, {"input_ids": torch.randint(3, 64, (2, 12)), "attention_mask": torch.ones(2, 12).long()}

    return make


def gpt2(needs):
    library = needs("transformers")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32, "num_labels": 3}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = library.GPT2ForSequenceClassification(library.GPT2Config(**sizes, **tokens))
    return model, {"input_ids": torch.randint(3, 64, (2, 12))}


def convnext(needs):
    model = needs("timm").create_model("convnext_atto", depths=(2, 1, 1, 1), dims=(16, 24, 24, 24), num_classes=5)
    return model, {"x": torch.randn(2, 3, 64, 64)}


@pytest.mark.slow
def test_found_in_a_whole_vision_transformer(needs, device):
    sites, _ = sites_of(needs("torchvision").models.vit_b_16(image_size=32), (torch.randn(2, 3, 32, 32),), device)
    assert [site.node for site in sites] == [f"encoder_layers_encoder_layer_{i}_mlp_3" for i in range(12)]
    assert [site.name for site in sites] == [f"neurons{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (torchvision_transformer, {"per": "token"}, "encoder_layers_encoder_layer_{}_mlp_3"),
        (timm_transformer, {}, "blocks_{}_mlp_fc2"),
        (hugging_face("Bert"), {"split": "cluster", "min_share": 0.02}, "bert_encoder_layer_{}_output_dense"),
        (
            hugging_face("Llama", num_key_value_heads=2, pad_token_id=0),
            {"per": "token", "top_k": 3},
            "model_layers_{}_mlp_down_proj",
        ),
        (gpt2, {"per": "token", "split": "cluster"}, "transformer_h_{}_mlp_c_proj"),
        (convnext, {"min_share": 0.15}, "stages_0_blocks_{}_mlp_fc2"),
        (
            hugging_face("Phi3", num_key_value_heads=2, pad_token_id=0),
            {"per": "token", "split": "cluster"},
            "model_layers_{}_mlp_down_proj",
        ),
        (hugging_face("ModernBert", pad_token_id=0), {}, "model_layers_{}_mlp_wo"),
    ],
    ids=["torchvision", "timm", "bert", "llama", "gpt2", "convnext", "phi3", "modernbert"],
)
def test_found_in_libraries(needs, device, make, options, expected):
    model, inputs = make(needs)
    model = model.to(device).eval()
    inputs = {name: t.to(device) for name, t in inputs.items()}
    strategy = NeuronGate(hidden=4, **options)
    if list(inputs) == ["x"]:
        dyn = dc.dynamize(model, strategy, example_inputs=inputs["x"])
    else:
        dyn = dc.dynamize(model, strategy, example_inputs=inputs, prediction_only=True)
    assert [site["node"] for site in dyn.recipe.steps[0].sites] == [expected.format(i) for i in range(2)]
    decisive(dyn.eval())
    found = dc.lower(dyn, "eager")(**inputs)
    reference = dyn(**inputs)
    assert dyn.trace(**inputs).cost.max() < 1.05
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "count"), [(kind, count) for kind, (_, _, count) in MODELS.items()])
def test_found_in_plain_models(converted, kind, count):
    _, dyn, _ = converted(kind)
    assert list(dyn.gates) == [f"neurons{i}" for i in range(count)]


def halves(y):
    return y[..., :32], y[..., 32:]


CUTS = {
    "chunk": lambda y: y.chunk(2, -1),
    "split": lambda y: y.split([32, 32], dim=-1),
    "slices": halves,
    "interleaved": lambda y: (y[..., ::2], y[..., 1::2]),
    "unbind": lambda y: y.unflatten(-1, (2, 32)).unbind(-2),
    "overlapping": lambda y: (y[..., :32], y[..., 16:48]),
    "narrow": lambda y: (y.narrow(-1, 32, 32), y.narrow(-1, 0, 32)),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("transposed", [False, True])
def test_first_projections_packed_in_one_layer(device, cut, transposed):
    """`GatedNeurons` alone equals the layer, where all of its groups are open."""
    model = Packed(cut, both=Transposed(12, 64) if transposed else None).to(device).eval()
    dyn = dc.dynamize(model, NeuronGate(hidden=2), example_inputs=vectors(2)[0].to(device))
    (x,) = moved(vectors(5), device)
    (found,) = fx.Interpreter(dyn, graph=specialise(dyn.graph.fx, {})).run(x)
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)
    assert dyn.trace(x).cost.max() < 1.1


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 40), nn.Linear(40, 5), nn.Linear(12, 40)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h) + h[:, :5]


class Elsewhere(Shared):
    def forward(self, x):
        return self.b(self.a(x).relu() * self.c(x * 2))


def weight_normed():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("model", "options", "node", "reason"),
    [
        (mlp(nn.BatchNorm1d(40), nn.ReLU()), {}, "_3", "`_1`: found what does not act on each neuron alone"),
        (mlp(nn.PReLU(40), nn.ReLU()), {}, "_3", "`_1`: found what does not act on each neuron alone"),
        (mlp(nn.ReLU(), nn.Dropout(), nn.LayerNorm(40)), {}, "_4", "`_3`: found what does not act on each neuron"),
        (mlp(nn.Softmax(-1), nn.ReLU()), {}, "_3", "`_1`: found what does not act on each neuron alone"),
        (Shared(), {}, "b", "found neurons that `slice_1` reads too"),
        (Elsewhere(), {}, "b", "found another input than `a` has"),
        (Packed(lambda y: (y[..., :32].sum(-1, keepdim=True), halves(y)[1])), {}, "down",
         "`sum_1`: found what does not act on each neuron alone"),
        (Packed(lambda y: (y[:, :32], y[:, 32:].flip(-1))), {}, "down", "`flip`: found what does not act"),
        (weight_normed, {}, "_3", "`_0`: found a weight that is computed, or hooks"),
        (mlp(width=11), {}, "_3", "11 neurons cannot be split into 2 to 8 groups of equal size"),
        (mlp(width=30), {"top_k": 6}, "_3", "its 30 neurons make 6 groups, no more than top_k=6 picks"),
        (mlp(width=8), {"hidden": 64}, "_3", "a gate costs 2560 FLOPs and the groups that it can skip 272"),
        (mlp(width=64), {"hidden": 8, "top_k": 7}, "_3", "a gate costs 320 FLOPs and the groups that it can skip 272"),
        (nn.Sequential(mlp(), nn.ReLU(), nn.Linear(5, 9)), {"hidden": 2}, "_2",
         "`_0_3` belongs to the layer of `neurons0` already"),
        (nn.Sequential(mlp(), nn.Linear(5, 900)), {"hidden": 2, "min_share": 0.5}, "_0_3",
         "it is 13.1% of the model's FLOPs, less than min_share=50.0%"),
    ],
)  # fmt: skip
def test_refused(device, model, options, node, reason):
    model = model() if not isinstance(model, nn.Module) else model
    _, refused = sites_of(model, vectors(2), device, **options)
    assert reason in refused[node]


class Frames(nn.Module):
    """Frames as further rows of the batch."""

    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(15, 2)

    def forward(self, x):
        return self.head(self.body(x.flatten(0, 1)).unflatten(0, (-1, 3)).flatten(1))


def test_rows_decide(device):
    inputs = (torch.randn(2, 3, 12),)
    sites, refused = sites_of(Frames(), inputs, device, hidden=2)
    assert sites == []
    assert refused == {"body_3": "its input [3, 12] has 3 rows a sample; take per='token'"}
    sites, refused = sites_of(Frames(), inputs, device, hidden=2, per="token")
    assert [site.node for site in sites] == ["body_3"]
    graph = capture(Encoder(batch_first=False).to(device), moved(sequence(2), device), batch_dims={"x": 1})
    reasons = {r.reason for r in NeuronGate(per="token", hidden=2).sites(graph)}
    assert reasons == {"the samples lie along dim 1 of its input [6, 1, 16], not along dim 0, per token"}


def test_what_another_gate_narrows_is_refused_by_its_name(device):
    strategy = [ChannelGate(granularity="channel", hidden=2), NeuronGate(hidden=2)]
    with pytest.raises(PassError, match=r"`_modes_channels0__2`: found what `channels0` decides about already"):
        dc.dynamize(mlp(width=256).to(device), strategy, example_inputs=vectors(2)[0].to(device))


def test_no_site_says_why(device):
    with pytest.raises(PassError, match="pass `neuron_gate` found no site: _3: 11 neurons cannot be split into 2 to 8"):
        dc.dynamize(mlp(width=11).to(device), "neuron_gate", example_inputs=vectors(2)[0].to(device))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 1}, "`groups`: found 1; expected a number >= 2"),
        ({"split": "random"}, "`split`: found 'random'"),
        ({"per": "batch"}, "`per`: found 'batch'"),
        ({"top_k": 8}, "`top_k`: found 8; expected None, or from 1 to 7"),
        ({"top_k": 2, "estimator": "reinforce"}, "`estimator`: found 'reinforce'; expected another one with top_k"),
        ({"hidden": 0}, "`hidden`: found 0"),
        ({"pool": "max"}, "`pool`: found 'max'"),
        ({"min_share": 1}, "`min_share`: found 1"),
        ({"estimator": "none"}, "`estimator`: found 'none'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        NeuronGate(**options)


# --- groups ----------------------------------------------------------------------------------------


def test_clusters_are_balanced_and_found_again():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(4, 8)
    member = torch.arange(48).remainder(4)
    rows = centres[member] + torch.randn(48, 8, generator=generator)
    groups = balanced_clusters(rows, 4)
    assert sorted(map(len, groups)) == [12] * 4
    assert [{int(member[i]) for i in group} for group in groups] == [{0}, {1}, {2}, {3}]
    assert balanced_clusters(rows, 4) == groups
    uneven = balanced_clusters(torch.randn(50, 8, generator=generator), 4)
    assert sorted(map(len, uneven)) == [12, 12, 13, 13]
    assert sorted(i for group in uneven for i in group) == list(range(50))
    # Half of the rows are alike, and still no group takes more than its share.
    alike = torch.cat([torch.zeros(24, 8), rows[:24]])
    assert sorted(map(len, balanced_clusters(alike, 4))) == [12] * 4


def test_rows_are_shared_out_at_the_least_cost():
    generator = np.random.default_rng(0)
    for _ in range(100):
        columns = int(generator.integers(2, 9))
        rows = int(generator.integers(columns, 50))
        costs = generator.normal(size=(rows, columns))
        if generator.random() < 0.3:
            costs = costs.round()  # ties
        places = np.sort(np.arange(rows) % columns)
        found = _shared_out(costs, np.bincount(places))
        assert np.bincount(found).tolist() == np.bincount(places).tolist()
        least = costs[:, places][linear_sum_assignment(costs[:, places])].sum()
        assert costs[np.arange(rows), found].sum() == pytest.approx(least)


def test_clusters_are_nearer_than_chance():
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))

    def spread(groups):
        return sum(float((rows[g] - rows[g].mean(0)).square().sum()) for g in groups)

    assert spread(balanced_clusters(rows, 4)) < 0.9 * spread(even_split(64, 4))


def test_even_split():
    assert even_split(10, 4) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


def test_a_site_holds_indices_only_where_it_must(converted):
    _, dyn, _ = converted("mlp", split="cluster")
    (site,) = dyn.recipe.steps[0].sites
    assert sorted(i for group in site["data"]["groups"] for i in group) == list(range(40))
    _, dyn, _ = converted("mlp", split="contiguous")
    assert dyn.recipe.steps[0].sites[0]["data"] == {}


def test_as_many_groups_as_divide_the_neurons(device):
    dyn = dc.dynamize(mlp(width=30).to(device), NeuronGate(hidden=1), example_inputs=vectors(2)[0].to(device))
    assert dyn.eval().trace(*moved(vectors(3), device)).decisions["neurons0"].shape == (3, 6)
