"""Feed-forward layers in groups of neurons: found or refused, the sum of their parts, lowered, counted."""

import copy
import functools

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.clustering import balanced_clusters, even_split
from dyncompile.demand import specialise, stands_in
from dyncompile.errors import ArgumentError, PassError
from dyncompile.nn.neurons import GatedNeurons
from dyncompile.nn.ragged import free_calls
from dyncompile.passes import Refusal, Site
from dyncompile.passes.channel_gate import ChannelGate
from dyncompile.passes.early_exit import EarlyExit
from dyncompile.passes.layer_skip import LayerSkip
from dyncompile.passes.neuron_gate import NeuronGate
from dyncompile.testing import forced


class Encoder(nn.Module):
    """Tokens, with a mask of padding, to classes."""

    def __init__(self, *, batch_first=True, dropout=0.1, activation="relu"):
        super().__init__()
        options = {"batch_first": batch_first, "dropout": dropout, "activation": activation}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, **options) for _ in range(2))
        self.head = nn.Linear(16, 3)
        self.tokens = 1 if batch_first else 0

    def forward(self, x, padding):
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.head(x.mean(self.tokens))


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(12, 32, bias=False), nn.Linear(12, 32, bias=False)
        self.down = nn.Linear(32, 5, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Transposed(nn.Module):
    """GPT-2's layer, as transformers have it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Pixels(nn.Module):
    """A block of a ConvNeXt."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.mix = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.first, self.second = nn.Conv2d(12, 32, 1, bias=bias), nn.Conv2d(32, 12, 1, bias=bias)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = x + self.second(nn.functional.gelu(self.first(self.mix(x))))
        return self.head(x.mean((2, 3)))


def tokens(n):
    padding = torch.zeros(n, 6, dtype=torch.bool)
    padding[::2, 4:] = True
    return torch.randn(n, 6, 16), padding


def sequence(n):
    x, padding = tokens(n)
    return x.transpose(0, 1).contiguous(), padding


def vectors(n):
    return (torch.randn(n, 12),)


def mlp(*between, width=40):
    return nn.Sequential(nn.Linear(12, width), *(between or [nn.ReLU(), nn.Dropout(0.2)]), nn.Linear(width, 5))


MODELS = {
    "encoder": (Encoder, tokens, 2),
    "sequence": (lambda: Encoder(batch_first=False, activation="gelu"), sequence, 2),
    "mlp": (mlp, vectors, 1),
    "gated": (Gated, vectors, 1),
    "images": (lambda: nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6), nn.Flatten(), nn.Linear(72, 3)),
               lambda n: (torch.randn(n, 3, 4, 6),), 1),
    "transposed": (lambda: nn.Sequential(Transposed(8, 40), nn.GELU(), Transposed(40, 6), nn.Flatten()),
                   lambda n: (torch.randn(n, 5, 8),), 1),
    "pixels": (Pixels, lambda n: (torch.randn(n, 12, 5, 4),), 1),
    "unbiased pixels": (lambda: Pixels(bias=False), lambda n: (torch.randn(n, 12, 5, 4),), 1),
    "signals": (lambda: nn.Sequential(nn.Conv1d(8, 32, 1), nn.ReLU(), nn.Conv1d(32, 6, 1), nn.Flatten()),
                lambda n: (torch.randn(n, 8, 5),), 1),
}  # fmt: skip
VARIANTS = [
    (model, options)
    for model in MODELS
    for options in (
        {"per": "sample", "split": "contiguous"},
        {"per": "sample", "split": "cluster"},
        {"per": "token", "split": "contiguous"},
        {"per": "token", "split": "cluster", "top_k": 2},
    )
    if (model, options["per"]) != ("sequence", "token")
    and (model not in ("pixels", "unbiased pixels", "signals") or options.get("top_k") or options["per"] == "sample")
]
VARIANT = pytest.mark.parametrize(("kind", "options"), VARIANTS)
LOWERED = VARIANT


@functools.cache
def conversion(kind, device, options):
    torch.manual_seed(0)
    make, inputs, _ = MODELS[kind]
    model = make().to(device).eval()
    strategy = NeuronGate(**{"groups": 4, "hidden": 4} | dict(options))
    batch_dims = {"x": 1} if kind == "sequence" else None
    return model, dc.dynamize(model, strategy, example_inputs=moved(inputs(2), device), batch_dims=batch_dims)


@pytest.fixture
def converted(device):
    def convert(kind, **options):
        model, dyn = copy.deepcopy(conversion(kind, device, tuple(options.items())))
        torch.manual_seed(0)
        return model, dyn, lambda n: moved(MODELS[kind][1](n), device)

    return convert


def moved(inputs, device):
    return tuple(t.to(device) for t in inputs)


def decisive(dyn):
    """Gates that are enabled and decide one thing for some samples, another for others."""
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
        with torch.no_grad():
            gate.policy.outer.weight.normal_(std=3)
            gate.offset.zero_()


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
    ],
    ids=["torchvision", "timm", "bert", "llama", "gpt2", "convnext"],
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
        (mlp(nn.Softmax(-1), nn.ReLU()), {}, "_3", "`_1`: found what does not act on each neuron alone"),
        (Shared(), {}, "b", "found neurons that `slice_1` reads too"),
        (Elsewhere(), {}, "b", "found another input than `a` has"),
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


@VARIANT
def test_all_groups_are_the_whole(converted, kind, options):
    """What stands in for the layers, where it does not fall back on them."""
    model, dyn, inputs = converted(kind, **options)
    apart = specialise(dyn.graph.fx, {})
    assert all(n.args[0] is None for n in apart.nodes if stands_in(n))
    x = inputs(5)
    (found,) = fx.Interpreter(dyn, graph=apart).run(*x)
    torch.testing.assert_close(found, model(*x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, torch.zeros_like(found))


@VARIANT
def test_a_closed_group_does_not_matter(converted, kind, options):
    _, dyn, inputs = converted(kind, **options)
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    (path,) = [n for n, m in dyn.named_modules() if isinstance(m, GatedNeurons)][:1]
    gated = dyn.get_submodule(path)
    (call,) = [n for n in dyn.graph.fx.nodes if n.target == path]
    x = inputs(3)
    shut = torch.ones_like(dyn.trace(*x).decisions["neurons0"])
    shut.view(3, -1, 4)[..., 1] = False
    bias = next(n for n in call.args[3:] if n.target.endswith("weight"))
    weight = dyn.get_parameter(bias.target)
    members = range(gated.size, 2 * gated.size) if gated.order is None else gated.order[gated.size : 2 * gated.size]
    along = int(gated.transposed[0])
    for training in (False, True):
        dyn.train(training)
        with torch.no_grad(), forced(dyn, {"neurons0": shut, **{n: 1.0 for n in dyn.gates if n != "neurons0"}}):
            found = []
            for neuron in (int(members[0]), int((gated.order if gated.order is not None else range(99))[0])):
                kept = weight.clone()
                torch.manual_seed(2)
                before = dyn(*x)
                weight.select(along, neuron).mul_(float("nan") if not training and not found else 3.0)
                torch.manual_seed(2)
                found.append(torch.allclose(dyn(*x), before, atol=1e-6))
                weight.copy_(kept)
        assert found == [True, False]


# --- as the static model, and as its decisions say -------------------------------------------------


@VARIANT
def test_exact_at_birth(converted, kind, options):
    model, dyn, inputs = converted(kind, **options)
    for training in (False, True):
        model.train(training)
        dyn.train(training)
        for batch in (1, 2, 7):
            x = inputs(batch)
            torch.manual_seed(batch)
            expected = model(*x)
            for run in (dyn, lambda *x: dyn.trace(*x).output):
                torch.manual_seed(batch)
                assert torch.equal(run(*x), expected)


@VARIANT
def test_training_is_evaluation_with_the_same_decisions(converted, kind, options):
    _, dyn, inputs = converted(kind, **options)
    for module in dyn.modules():
        vars(module).update({name: 0.0 for name in ("p", "dropout") if isinstance(vars(module).get(name), float)})
    decisive(dyn)
    x = inputs(6)
    drawn = dyn.train().trace(*x)
    dyn.eval()
    dyn._override = lambda name, value: drawn.decisions[name].flatten() > 0.5
    chosen = dyn.trace(*x)
    dyn._override = None
    assert 0.1 < torch.cat([d.flatten() for d in drawn.decisions.values()]).mean() < 0.9
    torch.testing.assert_close(drawn.output, chosen.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.cost, chosen.cost)


def test_gradient_of_the_cost(converted):
    """Each decision costs what its group costs, whatever the others are."""
    _, dyn, inputs = converted("gated")
    costs = dyn.train().cost_model()
    for state in (0.0, 1.0):
        decision = torch.full((3, 4), state, requires_grad=True)
        costs.expected({"neurons0": decision}).sum().backward()
        group = 2 * (2 * 12 * 8) + 2 * 8 * 5
        torch.testing.assert_close(decision.grad, torch.full((3, 4), group / costs.static))
    decisive(dyn)
    trace = dyn.trace(*inputs(5))
    trace.output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in dyn.parameters())


# --- lowered ---------------------------------------------------------------------------------------

BATCHES = pytest.mark.parametrize("batch", [1, 2, 7, 33])


@BATCHES
@LOWERED
def test_lowered_is_the_reference_and_runs_what_is_counted(converted, kind, options, batch):
    _, dyn, inputs = converted(kind, **options)
    x = inputs(batch)
    fast = dc.lower(dyn, "eager")
    assert fast.plan.demand.units == ()
    decisive(dyn)
    fast.relower()
    trace = dyn.trace(*x)
    torch.testing.assert_close(fast(*x), trace.output, rtol=1e-5, atol=1e-5)
    with FlopCounterMode(display=False) as counter, free_calls():
        found = fast(*x)
    torch.testing.assert_close(found, trace.output, rtol=1e-5, atol=1e-5)
    assert fast.plan.dense == {}
    # The counter does not know the kernel that attention runs in evaluation on this device.
    assert counter.get_total_flops() <= float(trace.cost.sum()) * dyn.cost_model().static * 1.0001
    if kind in ("mlp", "gated", "images"):
        assert counter.get_total_flops() == pytest.approx(float(trace.cost.sum()) * dyn.cost_model().static)
    if batch == 33:
        shares = torch.cat([d.view(-1, 4) for d in trace.decisions.values()]).float().mean(0)
        assert ((shares > 0) & (shares < 1)).any()


@BATCHES
@pytest.mark.parametrize("kind", ["mlp", "gated", "images"])
def test_forced_groups(converted, kind, batch):
    _, dyn, inputs = converted(kind)
    dyn.gates["neurons0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager")
    x = inputs(batch)
    whole = dyn(*x)
    mask = torch.rand(batch, 4, device=whole.device) < 0.5
    mask[:, 1], mask[:, 2] = False, True
    for shares in ({"neurons0": mask}, {"neurons0": torch.zeros_like(mask)}, {"neurons0": 0.5}):
        with forced(dyn, shares):
            trace = dyn.trace(*x)
        with forced(fast, shares), FlopCounterMode(display=False) as counter, free_calls():
            found = fast(*x)
        torch.testing.assert_close(found, trace.output, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, whole)
        assert fast.last_run["neurons0"] == int(trace.decisions["neurons0"].sum())
        assert counter.get_total_flops() == pytest.approx(float(trace.cost.sum()) * dyn.cost_model().static)
    with forced(fast, {"neurons0": 1.0}):
        torch.testing.assert_close(fast(*x), whole, rtol=1e-5, atol=1e-6)


def test_what_takes_less_time_is_run(converted, monkeypatch):
    _, dyn, inputs = converted("mlp")
    dyn.gates["neurons0"].enabled.fill_(True)
    fast = dc.lower(dyn, "eager")
    x = inputs(8)
    mask = torch.zeros(8, 4, dtype=torch.bool, device=x[0].device)
    mask[:4, 0] = mask[4:, 3] = True
    counted = {}
    for calls in (0.0, 1e12):
        monkeypatch.setattr("dyncompile.nn.ragged.CALL_FLOPS", calls)
        monkeypatch.setattr("dyncompile.nn.ragged.MOVE_FLOPS", 0.0)
        with forced(fast, {"neurons0": mask}), FlopCounterMode(display=False) as counter:
            found = fast(*x)
        with forced(dyn, {"neurons0": mask}):
            torch.testing.assert_close(found, dyn(*x), rtol=1e-5, atol=1e-6)
        counted[calls] = counter.get_total_flops()
    assert counted[1e12] - counted[0.0] == 8 * 2 * 10 * (12 + 5)  # each row's other group of the two


def test_rows_with_every_group_have_the_value_of_the_layer_itself(converted):
    model, dyn, inputs = converted("encoder")
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    x = inputs(5)
    mask = torch.rand(5, 4, device=x[0].device) < 0.5
    mask[[1, 3]] = True
    with forced(dyn, dict.fromkeys(dyn.gates, mask)):
        found, expected = dyn(*x), model(*x)
        assert torch.equal(found[mask.all(1)], expected[mask.all(1)])
        assert not torch.allclose(found[~mask.all(1)], expected[~mask.all(1)])


@pytest.mark.parametrize("split", ["contiguous", "cluster"])
def test_changed_weights_are_read(converted, split):
    """The compiled form keeps them, in another layout."""
    _, dyn, inputs = converted("mlp", split=split)
    decisive(dyn)
    fast = dc.lower(dyn, "eager")
    x = inputs(3)
    before = fast(*x)
    with torch.no_grad():
        dyn.get_parameter("3.weight").data.mul_(-1)  # unseen by torch's count of versions
    torch.testing.assert_close(fast(*x), dyn(*x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fast(*x), before)


def test_compiled_segments(converted):
    _, dyn, inputs = converted("mlp", split="cluster")
    decisive(dyn)
    fast = dc.lower(dyn, "inductor", decline=False)
    for batch in (1, 7):
        x = inputs(batch)
        torch.testing.assert_close(fast(*x), dyn(*x), rtol=1e-4, atol=1e-5)
    assert 0 < fast.last_run["neurons0"] < 28


def test_the_reference_compiles_in_both_modes(converted):
    _, dyn, inputs = converted("mlp")
    decisive(dyn)
    x = inputs(3)
    compiled = torch.compile(dyn, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*x), dyn(*x))
    dyn.train()
    torch.manual_seed(0)
    assert compiled(*x).requires_grad


# --- options ---------------------------------------------------------------------------------------


def test_top_k_picks_k(converted):
    _, dyn, inputs = converted("encoder", per="token", top_k=2)
    decisive(dyn)
    for training in (False, True):
        trace = dyn.train(training).trace(*inputs(5))
        assert trace.decisions["neurons1"].shape == (5, 24)
        picked = trace.decisions["neurons1"].view(5, 6, 4).float()
        assert torch.equal(picked.sum(-1), torch.full((5, 6), 2.0))
        assert picked.mean((0, 1)).std() > 0
        torch.testing.assert_close(trace.cost, trace.cost[:1].expand(5))
    dyn.eval()
    trace = dyn.trace(*inputs(5))
    picked = trace.decisions["neurons1"].view(5, 6, 4)
    scores = trace.probabilities["neurons1"].view(5, 6, 4)
    best = scores.topk(2).indices.sort(-1).values
    certain = scores.max(-1).values < 1
    assert torch.equal(picked.nonzero()[:, 2].view(5, 6, 2)[certain], best[certain])


@pytest.mark.parametrize("estimator", ["gumbel", "straight_through", "semantic_hashing"])
def test_top_k_by_every_estimator(converted, estimator):
    _, dyn, inputs = converted("mlp", top_k=2, estimator=estimator)
    decisive(dyn)
    trace = dyn.train().trace(*inputs(64))
    picked = torch.stack(list(trace.decisions.values()), -1)
    assert ((picked >= 0) & (picked <= 1)).all()
    assert float(picked.detach().sum(-1).max()) <= 2 + 1e-5
    trace.output.square().mean().backward()
    assert dyn.gates["neurons0"].policy.inner.weight.grad.abs().sum() > 0


def test_padding_does_not_sway_a_gate(converted):
    _, dyn, inputs = converted("encoder")
    x, padding = inputs(4)
    changed = x + 5 * padding[..., None] * torch.randn_like(x)
    first, second = dyn.trace(x, padding), dyn.trace(changed, padding)
    assert padding.any()
    torch.testing.assert_close(first.probabilities["neurons0"], second.probabilities["neurons0"])


def test_a_token_decides_for_itself(converted):
    _, dyn, inputs = converted("images", per="token")
    decisive(dyn)
    (x,) = inputs(2)
    changed = x.clone()
    changed[1, 2, 3] += 3.0
    before, after = (dyn.trace(t).probabilities["neurons0"] for t in (x, changed))
    apart = (before != after).view(2, 12, 4).any(-1)
    assert apart.nonzero().tolist() == [[1, 11]]


# --- with other passes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [
        [NeuronGate(groups=4, hidden=4), LayerSkip(hidden=4), EarlyExit(exits=1)],
        [EarlyExit(exits=1), LayerSkip(hidden=4), NeuronGate(groups=4, hidden=4)],
        [NeuronGate(groups=4, hidden=4, per="token"), EarlyExit(exits=1)],
    ],
)
def test_composed(device, chain):
    model = Encoder().to(device).eval()
    x = moved(tokens(7), device)
    dyn = dc.dynamize(model, chain, example_inputs=x)
    assert torch.equal(dyn(*x), model(*x))
    assert {type(p).name for p in chain} == {n.meta["inserted"] for n in dyn.graph.fx.nodes if "inserted" in n.meta}
    decisive(dyn)
    dyn.exits["exit0"].enabled.fill_(True)
    dyn.exits["exit0"].threshold.fill_(0.4)
    fast = dc.lower(dyn, "eager")
    torch.testing.assert_close(fast(*x), dyn(*x), rtol=1e-5, atol=1e-6)
    assert "neurons0" in dyn.inspect()


def test_the_last_layer_may_be_split_behind_an_exit(device):
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.LayerNorm(12), *mlp()).to(device).eval()
    (x,) = moved(vectors(6), device)
    dyn = dc.dynamize(model, [EarlyExit(exits=["0"]), NeuronGate(groups=4, hidden=1)], example_inputs=x)
    assert torch.equal(dyn(x), model(x))
    decisive(dyn)
    trace = dyn.trace(x)
    assert torch.equal(trace.final, trace.output)
    assert not torch.equal(trace.final, model(x))
