"""The contracts of every registered pass. A new pass is covered the moment it is registered."""

import collections
import copy
import dataclasses

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.errors import ArgumentError, PassError
from dyncompile.module import DynamicModule
from dyncompile.ops import is_select
from dyncompile.passes import Pass, Site, available, resolve
from dyncompile.passes.early_exit import EarlyExit


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return self.body(x) + x


def images():
    parts = [nn.Conv2d(3, 8, 3, padding=1), *(Residual(8) for _ in range(4))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.fc = nn.Embedding(20, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, ids, attention_mask):
        return self.fc(self.encoder(self.embed(ids), src_key_padding_mask=attention_mask == 0)[:, 0])


MODELS = {
    "images": (images, lambda n: (torch.randn(n, 3, 8, 8),)),
    "text": (Text, lambda n: (torch.randint(0, 20, (n, 6)), torch.ones(n, 6, dtype=torch.int64).tril(2))),
}
NO_SITE = {("neuron_gate", "images")}
CONTRACT = pytest.mark.parametrize(
    ("strategy", "kind"), [(s, m) for s in available() for m in MODELS if (s, m) not in NO_SITE]
)


@pytest.fixture
def converted(device):
    def convert(strategy, kind):
        torch.manual_seed(0)
        make, inputs = MODELS[kind]
        model = make().to(device)
        example = tuple(t.to(device) for t in inputs(2))
        return (
            model,
            dc.dynamize(model, strategy, example_inputs=example),
            lambda n: tuple(t.to(device) for t in inputs(n)),
        )

    return convert


@CONTRACT
def test_exact_at_birth(converted, strategy, kind):
    model, dyn, inputs = converted(strategy, kind)
    for training in (False, True):
        model.train(training)
        dyn.train(training)
        for batch in (1, 2, 7, 33):
            if training and batch == 1:
                continue  # batch norm takes none
            x = inputs(batch)
            torch.manual_seed(batch)
            expected = model(*x)
            torch.manual_seed(batch)
            assert torch.equal(dyn(*x), expected)


@CONTRACT
def test_gradient_reaches_every_new_parameter(converted, strategy, kind):
    model, dyn, inputs = converted(strategy, kind)
    dyn.train()
    trace = dyn.trace(*inputs(4))
    loss = trace.final.square().mean() + trace.cost.mean()
    loss = loss + sum(e.square().mean() for e in trace.exits.values())
    loss.backward()
    names = {name for name, _ in model.named_parameters()}
    new = {n: p for n, p in dyn.named_parameters() if n not in names}
    assert new
    assert {n for n, p in new.items() if p.grad is None or not p.grad.abs().sum() > 0} == set()
    assert all(p.grad is not None for p in dyn.parameters())


@CONTRACT
def test_only_inserts(converted, strategy, kind):
    model, dyn, _ = converted(strategy, kind)
    inserted = [n for n in dyn.graph.fx.nodes if "inserted" in n.meta]
    assert any(is_select(n) for n in inserted)
    assert {n.meta["inserted"] for n in inserted} == {strategy}
    state = dyn.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    assert all(site["name"] in {**dyn.exits, **dyn.gates} for site in dyn.recipe.steps[0].sites)


@CONTRACT
def test_sites_replay_on_a_fresh_model(converted, strategy, kind, device):
    _, dyn, inputs = converted(strategy, kind)
    graph = capture(MODELS[kind][0]().to(device), inputs(2))
    sites = [Site(**site) for site in dyn.recipe.steps[0].sites]
    replayed, refused = resolve(strategy, {})[0].apply(graph, sites=sites)
    assert replayed == sites
    assert not refused
    assert list(DynamicModule(graph, dyn.recipe).state_dict()) == list(dyn.state_dict())


@CONTRACT
def test_sites_are_plain_data_and_change_nothing(converted, strategy, kind, device):
    _, dyn, inputs = converted(strategy, kind)
    graph = capture(MODELS[kind][0]().to(device), inputs(2))
    before = str(graph.fx)
    item = resolve(strategy, {})[0]
    first, second = list(item.sites(graph)), list(item.sites(graph))
    assert first == second
    assert str(graph.fx) == before
    assert dyn.recipe == type(dyn.recipe).model_validate_json(dyn.recipe.model_dump_json())


@CONTRACT
def test_the_result_is_a_module_in_every_respect(converted, strategy, kind, device):
    model, dyn, inputs = converted(strategy, kind)
    dyn.eval()
    x = inputs(3)
    dyn.trace(*x)
    twin = copy.deepcopy(dyn)
    with torch.no_grad():
        for p in dyn.parameters():
            p.zero_()
    assert torch.equal(twin(*x), model.eval()(*x))
    assert not torch.equal(dyn(*x), twin(*x))
    dyn.load_state_dict(twin.state_dict())
    assert torch.equal(dyn(*x), twin(*x))
    assert torch.equal(dyn.static()(*x), model(*x))


@pytest.mark.parametrize("strategy", available())
def test_documented(strategy):
    kind = available()[strategy]
    assert kind.name == strategy
    assert kind.summary
    assert kind.paper
    assert "Before:" in kind.__doc__
    assert "After:" in kind.__doc__
    assert dataclasses.is_dataclass(kind)


def test_illegal_orders_are_refused():
    class Later(EarlyExit):
        name = "later"
        before = ("early_exit",)

    with pytest.raises(
        PassError, match=r"illegal order \['early_exit', 'later'\]: `later` must come before `early_exit`"
    ):
        resolve(["early_exit", Later()], {})
    assert [p.name for p in resolve([Later(), "early_exit"], {})] == ["later", "early_exit"]
    with pytest.raises(PassError, match="a pass is applied once"):
        resolve(["early_exit", EarlyExit(exits=1)], {})
    with pytest.raises(ArgumentError, match="`strategy`: found an empty list"):
        resolve([], {})
    with pytest.raises(ArgumentError, match=r"`options`: found \['exits'\]; expected options inside each pass object"):
        resolve(EarlyExit(), {"exits": 2})


def test_a_pass_that_changes_the_output_is_refused(device):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(Pass):
        name = "wrong"

        def sites(self, graph):
            yield Site(name="x", node=graph.final.name)

        def rewrite(self, graph, site):
            final = graph.final
            with graph.fx.inserting_before(graph.output):
                new = graph.fx.call_function(torch.ops.aten.mul.Tensor, (final, 1.001))
            graph.output.args = ((new,),)

    with pytest.raises(PassError, match="pass `wrong` changed the model's output in eval mode"):
        dc.dynamize(images().to(device), Wrong(), example_inputs=torch.randn(2, 3, 8, 8, device=device))


def test_sites_of_another_model_are_refused(device):
    graph = capture(images().to(device), (torch.randn(2, 3, 8, 8, device=device),))
    with pytest.raises(PassError, match="no node `nowhere` in the graph: the sites were made for another model"):
        EarlyExit().apply(graph, sites=[Site(name="exit0", node="nowhere")])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "`model`: found int; expected a torch.nn.Module"),
        (collections.OrderedDict(), "`model`: found OrderedDict"),
    ],
)
def test_what_is_no_model(model, message):
    with pytest.raises(ArgumentError, match=message):
        dc.dynamize(model)


def test_a_dynamic_model_is_not_converted_again(converted):
    _, dyn, inputs = converted("early_exit", "images")
    with pytest.raises(ArgumentError, match="`model`: found a dynamic model"):
        dc.dynamize(dyn, example_inputs=inputs(2))
