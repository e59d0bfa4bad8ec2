"""Layer skip: where gates go and why not, both kinds of gate, whole blocks, and models of the libraries."""

import pytest
import torch
from test_zoo import ZOO, call, leaf, moved
from torch import nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.errors import ArgumentError, PassError
from dyncompile.nn.heads import Feature
from dyncompile.nn.policies import FeedForwardPolicy, RecurrentCore, RecurrentPolicy
from dyncompile.ops import arms_of, decision_of, is_select
from dyncompile.passes import Refusal, Site
from dyncompile.passes.layer_skip import LayerSkip
from dyncompile.shapes import flop_counter
from dyncompile.testing import forced


class Branch(nn.Module):
    """`x + f(x)`, or with `out` a projection shortcut; `tap` hands out a value inside."""

    def __init__(self, width, out=None, tap=False):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 64), nn.Linear(64, out or width)
        self.shortcut = nn.Linear(width, out) if out else None
        self.tap = tap

    def forward(self, x):
        h = self.inner(x).relu()
        y = self.outer(h) + (x if self.shortcut is None else self.shortcut(x))
        return (y, h) if self.tap else y


class Attending(nn.Module):
    """A transformer block, written out; norms before the branches or after them."""

    def __init__(self, width=16, first=True):
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first = first

    def forward(self, x):
        if self.first:
            h = self.norm1(x)
            x = x + self.attend(h, h, h, need_weights=False)[0]
            return x + self.narrow(self.wide(self.norm2(x)).relu())
        x = self.norm1(x + self.attend(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.narrow(self.wide(x).relu()))


def residual(*blocks):
    return nn.Sequential(nn.Linear(6, 16), *blocks, nn.Linear(16, 3))


def gated(model, x, device, **options):
    example = tuple(t.to(device) for t in x) if isinstance(x, tuple) else x.to(device)
    return dc.dynamize(model.to(device).eval(), "layer_skip", example_inputs=example, **options)


def enabled(dyn):
    for gate in dyn.gates.values():
        gate.enabled.fill_(True)
    return dyn.eval()


def sites(model, *inputs, **options):
    graph = capture(model.eval(), inputs)
    found = list(LayerSkip(**options).sites(graph))
    return [s for s in found if isinstance(s, Site)], [r for r in found if isinstance(r, Refusal)]


# --- where ---------------------------------------------------------------------------------------


class Bypassed(nn.Module):
    """Two branches, the second with one inside of it; the head also reads what lies before them."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.inside = nn.Linear(6, 16), Branch(16), Branch(16)
        self.outer, self.fc = nn.Linear(16, 16), nn.Linear(32, 3)

    def forward(self, x):
        stem = self.stem(x)
        x = self.first(stem)
        x = x + self.outer(self.inside(x))
        return self.fc(torch.cat((x, stem), 1))


def test_branches_beside_the_trunk_and_inside_of_another(device):
    dyn = gated(Bypassed(), torch.randn(2, 6), device)
    assert len(dyn.gates) == 3
    enabled(dyn)
    fast = dc.lower(dyn, backend="eager")
    x = torch.randn(8, 6, device=device)
    for shares in ([0.5, 0.5, 0.5], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]):
        chosen = dict(zip(dyn.gates, shares, strict=True))
        with forced(dyn, chosen), forced(fast, chosen):
            torch.testing.assert_close(fast(x), dyn(x))
    assert fast.last_run == {"always": 8, "gate2": 4, "gate2 & gate1": 4}


def test_a_sum_of_two_parts_is_no_shortcut(device):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part, self.fc = nn.Linear(6, 16), Branch(8), nn.Linear(16, 3)
            self.first = nn.Linear(8, 8)

        def forward(self, x):
            left, right = self.stem(x).chunk(2, 1)
            left = self.first(left)
            return self.fc(torch.cat((left, self.part.outer(self.part.inner(left + right).relu())), 1))

    model = Split()
    model.part.outer = nn.Linear(64, 8)
    assert sites(model, torch.randn(2, 6)) == ([], [])


def test_golden_graph(device):
    dyn = gated(residual(Branch(16)), torch.randn(2, 6), device)
    assert [f"{n.name} = {n.target}{n.args}" for n in dyn.graph.fx.nodes][1:-1] == [
        "_0 = 0(input_1,)",
        "gates_gate0 = gates.gate0(_0,)",
        "getitem = <built-in function getitem>(gates_gate0, 0)",
        "getitem_1 = <built-in function getitem>(gates_gate0, 1)",
        "_1_inner = 1.inner(_0,)",
        "relu = aten.relu.default(_1_inner,)",
        "_1_outer = 1.outer(relu,)",
        "add = aten.add.Tensor(_1_outer, _0)",
        "select_default = dyncompile.select.default(getitem, add, _0)",
        "_2 = 2(select_default,)",
    ]


def test_every_reader_of_the_branch_reads_the_select(device):
    dyn = gated(residual(Branch(16), Branch(16)), torch.randn(2, 6), device)
    selects = [n for n in dyn.graph.fx.nodes if is_select(n)]
    assert [s["node"] for s in dyn.recipe.steps[0].sites] == [arms_of(s)[1].name for s in selects]
    for select in selects:
        otherwise, taken = arms_of(select)
        assert list(taken.users) == [select]
        assert otherwise in taken.all_input_nodes
        assert decision_of(select).meta["owner"] in dyn.gates
    assert arms_of(selects[1])[0] is selects[0]


def test_projection_branches_pass_the_shortcut_alone_or_are_left(device):
    model = residual(Branch(16), Branch(16, out=16))
    dyn = gated(model, torch.randn(2, 6), device)
    x = torch.randn(5, 6, device=device)
    with forced(dyn, {"gate0": 1.0, "gate1": 0.0}):
        expected = model[3](model[2].shortcut(model[1](model[0](x))))
        assert torch.equal(dyn(x), expected)
    found, refused = sites(model.cpu(), torch.randn(2, 6), projection=False)
    assert [s.name for s in found] == ["gate0"]
    assert [r.reason for r in refused] == ["its shortcut is a projection, and projection=False"]


def test_a_branch_whose_values_are_read_outside_saves_only_the_rest():
    class Tapped(nn.Module):
        def __init__(self, all_of_it):
            super().__init__()
            self.stem, self.fc, self.all_of_it = nn.Linear(6, 16), nn.Linear(16, 3), all_of_it
            self.branch = Branch(16, tap=True)

        def forward(self, x):
            y, h = self.branch(self.stem(x))
            inner = self.branch.outer(h) if self.all_of_it else h
            return {"logits": self.fc(y), "hidden": inner}

    x = torch.randn(2, 6)
    found, _ = sites(Tapped(all_of_it=False), x)
    assert [s.name for s in found] == ["gate0"]

    class Delivered(Tapped):
        def forward(self, x):
            x = self.stem(x)
            h = self.branch.outer(self.branch.inner(x).relu())
            return {"logits": self.fc(h + x), "hidden": h.sum(1)}

    found, refused = sites(Delivered(all_of_it=True), x)
    assert found == []
    assert [r.reason for r in refused] == [
        "the gate costs 544 FLOPs and skipping the branch saves 0, since `branch_outer` inside it is read outside too"
    ]


def test_a_branch_cheaper_than_its_gate_is_refused():
    class Cheap(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation = nn.Tanh()

        def forward(self, x):
            return x + self.activation(x)

    model = residual(Cheap())
    found, refused = sites(model, torch.randn(2, 6))
    assert found == []
    assert refused[0].reason == "the gate costs 544 FLOPs and skipping the branch saves 0"
    with pytest.raises(PassError, match="pass `layer_skip` found no site: add.*: the gate costs 544 FLOPs"):
        gated(model, torch.randn(2, 6), torch.device("cpu"))
    found, refused = sites(residual(Branch(16)), torch.randn(2, 6), hidden=256)
    assert found == []
    assert refused[0].reason == "the gate costs 8704 FLOPs and skipping the branch saves 4096"


def test_a_branch_under_a_decision_is_refused():
    graph = capture(residual(Branch(16), Branch(16)).eval(), (torch.randn(2, 6),))
    LayerSkip().apply(graph)
    assert [r.reason for r in LayerSkip().sites(graph)] == [
        "the decision `gate0` skips it already",
        "the decision `gate1` skips it already",
    ]


def test_options_are_checked():
    for options, message in (
        ({"gate": "convolutional"}, r"`gate`: found 'convolutional'; expected one of \('feed_forward', 'recurrent'\)"),
        ({"granularity": "stage"}, r"`granularity`: found 'stage'"),
        ({"pool": "max"}, r"`pool`: found 'max'"),
        ({"estimator": "oracle"}, r"`estimator`: found 'oracle'"),
        ({"hidden": 0}, r"`hidden`: found 0; expected a width >= 1"),
        ({"projection": "no"}, r"`projection`: found 'no'; expected True or False"),
    ):
        with pytest.raises(ArgumentError, match=message):
            LayerSkip(**options)


# --- gates ---------------------------------------------------------------------------------------


def test_recurrent_gates_share_one_cell_whose_state_passes_every_gate(device):
    model = residual(*(Branch(16) for _ in range(3)))
    dyn = enabled(gated(model, torch.randn(2, 6), device, gate="recurrent", hidden=5))
    cores = {m for m in dyn.modules() if isinstance(m, RecurrentCore)}
    assert len(cores) == 1
    assert len([n for n, _ in dyn.named_parameters() if "core.cell" in n]) == 4
    x = torch.randn(4, 6, device=device)
    core = cores.pop()

    def logits(kept):
        """By hand: the state is updated at every gate, whether the branch runs or not."""
        h, state, found = model[0](x), None, []
        for i in range(3):
            gate = dyn.gates[f"gate{i}"]
            state = core.cell(gate.policy.project(gate.policy.norm(h)), state)
            found.append(gate.settle(core.outer(state[0]).squeeze(1)))
            h = torch.where(kept[i][:, None], model[i + 1](h), h)
        return torch.stack(found)

    for rows in (torch.ones(3, 4), torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]])):
        kept = rows.bool().to(device)
        with torch.no_grad(), forced(dyn, {f"gate{i}": kept[i] for i in range(3)}):
            trace = dyn.trace(x)
            expected = logits(kept)
        given = torch.stack(list(trace.probabilities.values()))
        torch.testing.assert_close(given, expected.sigmoid(), rtol=1e-5, atol=1e-6)


def test_gates_read_the_tokens_that_a_mask_keeps(device):
    make, inputs = ZOO["encoder"]
    ids, padding = (t.to(device) for t in inputs(3))
    dyn = gated(make(None), (ids, padding), device)
    other = torch.where(padding, (ids + 1) % 64, ids)
    assert not torch.equal(other, ids)
    before, after = dyn.trace(ids, padding).probabilities, dyn.trace(other, padding).probabilities
    for name, probability in before.items():
        torch.testing.assert_close(after[name], probability, rtol=0, atol=1e-6)


def test_sequence_first(device):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32)
            self.encoder, self.fc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)

        def forward(self, x):
            return self.fc(self.encoder(x).mean(0))

    x = torch.randn(5, 3, 16, device=device)
    dyn = dc.dynamize(Encoder().to(device), "layer_skip", example_inputs=x, batch_dims={"x": 1})
    assert [n.args[3] for n in dyn.graph.fx.nodes if is_select(n)] == [1, 1, 1, 1]
    fast = dc.lower(enabled(dyn), backend="eager", decline=False)
    masks = {f"gate{i}": torch.rand(7) < 0.5 for i in range(4)}
    x = torch.randn(5, 7, 16, device=device)
    with torch.no_grad(), forced(dyn, masks), forced(fast, masks):
        torch.testing.assert_close(fast(x), dyn(x))
        assert dyn.trace(x).probabilities["gate0"].shape == (7,)


def test_frames_in_the_batch_dim_are_gated_each_by_itself(device):
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.frame, self.fc = nn.Sequential(nn.Linear(6, 16), Branch(16)), nn.Linear(16, 3)

        def forward(self, x):
            return self.fc(self.frame(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1])).mean(1))

    dyn = enabled(gated(Video(), torch.randn(2, 4, 6), device))
    x = torch.randn(3, 4, 6, device=device)
    kept = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], device=device).bool()
    fast = dc.lower(dyn, backend="eager", decline=False)
    with torch.no_grad(), forced(dyn, {"gate0": kept}), forced(fast, {"gate0": kept}), flop_counter() as counter:
        lowered = fast(x)
    with torch.no_grad(), forced(dyn, {"gate0": kept}):
        trace = dyn.trace(x)
        h = dyn.frame[0](x)
        expected = dyn.fc(torch.where(kept[..., None], dyn.frame[1](h), h).mean(1))
    torch.testing.assert_close(trace.output, expected)
    assert torch.equal(trace.decisions["gate0"], kept)
    fixed, branch = dyn.cost_model().weights
    torch.testing.assert_close(trace.cost.cpu(), fixed + branch * torch.tensor([0.5, 0.0, 1.0]))
    torch.testing.assert_close(lowered, trace.output)
    assert counter.get_total_flops() == pytest.approx(float(trace.cost.sum()) * dyn.cost_model().static, rel=1e-5)


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_whole_blocks(first, device):
    model = nn.Sequential(*(Attending(first=first) for _ in range(3)), nn.Flatten(), nn.Linear(80, 3))
    x = torch.randn(2, 5, 16)
    dyn = gated(model, x, device, granularity="block")
    assert len(dyn.gates) == 3
    assert len(gated(model, x, device).gates) == 6
    x = torch.randn(4, 5, 16, device=device)
    with torch.no_grad(), forced(dyn, {"gate0": 1.0, "gate1": 0.0, "gate2": 1.0}):
        # A sample that skips a block has its input as output, norms included.
        torch.testing.assert_close(dyn(x), model[4](model[3](model[2](model[0](x)))))
    always, *guarded = enabled(dyn).cost_model().weights
    assert len(guarded) == 3
    assert always < 0.05


class Windowed(nn.Module):
    """A block of timm's Swin: attention on a map, the feed-forward layer on its tokens."""

    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = (
            nn.MultiheadAttention(16, 2, batch_first=True),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
        )

    def forward(self, x):
        n, h, w, c = x.shape
        tokens = x.reshape(n, h * w, c)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0].reshape(n, h, w, c)
        x = x.reshape(n, -1, c)
        x = x + self.down(self.up(x).relu())
        return x.reshape(n, h, w, c)


def test_whole_blocks_that_reshape_between_their_branches(device):
    model = nn.Sequential(Windowed(), Windowed(), nn.Flatten(), nn.Linear(96, 3))
    dyn = gated(model, torch.randn(2, 2, 3, 16), device, granularity="block")
    assert len(dyn.gates) == 2
    x = torch.randn(4, 2, 3, 16, device=device)
    with torch.no_grad(), forced(dyn, {"gate0": 0.0, "gate1": 1.0}):
        torch.testing.assert_close(dyn(x), model[3](model[2](model[1](x))))
    always, *_ = enabled(dyn).cost_model().weights
    assert always < 0.05


def test_blocks_of_convolutions_are_their_branches(needs):
    make, inputs = ZOO["resnet18"]
    model, x = make(needs), inputs(2)
    assert sites(model, *x, granularity="block") == sites(model, *x)


# --- models of the libraries ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "gates"),
    [
        ("resnet18", {}, 8),
        ("resnet18", {"projection": False}, 5),
        ("vit_small", {"granularity": "block"}, 12),
        ("hf_vit", {"gate": "recurrent"}, 6),
        ("hf_bert", {}, 6),
        ("hf_bert", {"granularity": "block", "gate": "recurrent"}, 3),
        ("encoder", {"granularity": "block"}, 3),
    ],
)
def test_library_models(name, options, gates, needs, device):
    make, inputs = ZOO[name]
    model = make(needs).to(device).eval()
    dyn = dc.dynamize(model, "layer_skip", example_inputs=moved(inputs(2), device), **options)
    assert len(dyn.gates) == gates
    for training, batch in ((False, 4), (True, 3)):
        x = moved(inputs(batch), device)
        model.train(training)
        dyn.train(training)
        assert torch.equal(leaf(call(dyn, x)), leaf(call(model, x)))
    trace = call(dyn.trace, x)
    (trace.final.square().mean() + trace.cost.mean()).backward()
    assert [n for n, p in dyn.gates.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    fast = dc.lower(enabled(dyn), backend="eager", decline=False)
    for batch in (1, 7):
        x = moved(inputs(batch), device)
        masks = {name: torch.rand(batch) < 0.5 for name in dyn.gates}
        with torch.no_grad(), forced(dyn, masks), forced(fast, masks):
            trace = call(dyn.trace, x)
            with flop_counter() as counter:
                output = leaf(call(fast, x))
        torch.testing.assert_close(output, leaf(trace.output), rtol=1e-4, atol=1e-5)
        expected = float(trace.cost.double().sum()) * dyn.cost_model().static
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
def test_gates_of_one_or_two_channels_see_how_large_they_are(channels, device):
    torch.manual_seed(0)
    feature = Feature(shape=(1, channels, 4, 4), batch_dim=0, channel_dim=1)
    x = torch.tensor([0.1, 1.0, 3.0], device=device).view(3, 1, 1, 1).expand(-1, channels, 4, 4)
    for policy in (FeedForwardPolicy(feature, 16), RecurrentPolicy(feature, RecurrentCore(16))):
        found = policy.to(device)(x)
        logits = found[0] if isinstance(found, tuple) else found
        assert len(set(logits.tolist())) == 3
