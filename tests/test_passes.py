"""The contracts of every registered pass. A new pass is covered the moment it is registered."""

import collections
import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.capture import capture
from dyncompile.checking.contracts import (
    exact_at_birth,
    gradient_reaches_every_parameter,
    lowered_equals_reference,
    lowered_runs,
    skips_as_planned,
)
from dyncompile.checking.deciding import BATCHES, settle, switch_on
from dyncompile.demand import stands_in
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
            nn.Conv2d(width, width, 3, padding=1),
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


def vectors():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(6, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


MODELS = {
    "images": (images, lambda n: (torch.randn(n, 3, 8, 8),)),
    "text": (Text, lambda n: (torch.randint(0, 20, (n, 6)), torch.ones(n, 6, dtype=torch.int64).tril(2))),
    "vectors": (vectors, lambda n: (torch.randn(n, 12),)),
    "steps": (Steps, lambda n: (torch.randn(n, 7, 6),)),
}
# Where a pass has nothing to do, and what it says.
REFUSED = {
    ("layer_skip", "vectors"): "the graph offers none",
    ("layer_skip", "steps"): "the graph offers none",
    ("block_policy", "vectors"): "the graph offers none",
    ("block_policy", "steps"): "the graph offers none",
    ("channel_gate", "steps"): "fc: its channels are an output of the model",
    ("frame_skip", "images"): "the graph offers none",
    ("frame_skip", "text"): "the graph offers none",
    ("frame_skip", "vectors"): "the graph offers none",
    ("neuron_gate", "images"): "the graph offers none",
    ("neuron_gate", "steps"): "the graph offers none",
}
PAIRS = [(strategy, kind) for strategy in available() for kind in MODELS]
CONTRACT = pytest.mark.parametrize(("strategy", "kind"), [pair for pair in PAIRS if pair not in REFUSED])


@functools.cache
def _convert(strategy, kind, device):
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    model = make().to(device)
    return model, dc.dynamize(model, strategy, example_inputs=tuple(t.to(device) for t in inputs(2)))


@functools.cache
def _capture(kind, device):
    make, inputs = MODELS[kind]
    return capture(make().to(device), tuple(t.to(device) for t in inputs(2)))


@pytest.fixture
def converted(device):
    """The static model, the dynamic one and a maker of inputs: copies, for conversion takes seconds."""

    def convert(strategy, kind):
        model, dyn = copy.deepcopy(_convert(strategy, kind, device))
        return model, dyn, lambda n: tuple(t.to(device) for t in MODELS[kind][1](n))

    return convert


@pytest.fixture
def captured(device):
    return lambda kind: copy.deepcopy(_capture(kind, device))


@pytest.mark.parametrize(("strategy", "kind"), [pair for pair in PAIRS if pair in REFUSED])
def test_a_model_that_offers_nothing_is_refused(strategy, kind, device):
    with pytest.raises(PassError, match=REFUSED[strategy, kind]):
        _convert(strategy, kind, device)


@CONTRACT
def test_exact_at_birth(converted, strategy, kind):
    model, dyn, _ = converted(strategy, kind)
    assert not exact_at_birth(model, dyn)


@CONTRACT
def test_gradient_reaches_every_new_parameter(converted, strategy, kind):
    model, dyn, _ = converted(strategy, kind)
    assert len(list(dyn.parameters())) > len(list(model.parameters()))
    assert not gradient_reaches_every_parameter(model, dyn)


@CONTRACT
def test_lowered_equals_reference_and_runs_what_was_decided(converted, strategy, kind):
    _, dyn, _ = converted(strategy, kind)
    settle(switch_on(dyn), dyn.examples(max(BATCHES)))
    fast = dc.lower(dyn, backend="eager", decline=False)
    runs = list(lowered_runs(dyn, fast, slack=0.05))
    assert not lowered_equals_reference(runs)
    assert not skips_as_planned(fast, runs)
    assert all(0 < run.planned < 0.999 * run.dense for run in runs[-2:])


@CONTRACT
def test_saved_and_loaded_it_decides_as_before(converted, strategy, kind, device, tmp_path):
    _, dyn, inputs = converted(strategy, kind)
    switch_on(dyn)
    dc.save(dyn, tmp_path)
    loaded = dc.load(tmp_path, MODELS[kind][0]().to(device)).eval()
    x = inputs(33)
    before, after = dyn.trace(*x), loaded.trace(*x)
    assert torch.equal(before.output, after.output)
    assert all(torch.equal(after.decisions[name], decision) for name, decision in before.decisions.items())
    assert all(bool(module.enabled) for module in (*loaded.exits.values(), *loaded.gates.values()))


@CONTRACT
def test_only_inserts(converted, strategy, kind):
    model, dyn, _ = converted(strategy, kind)
    inserted = [n for n in dyn.graph.fx.nodes if "inserted" in n.meta]
    assert any(is_select(n) or stands_in(n) for n in inserted)
    assert {n.meta["inserted"] for n in inserted} == {strategy}
    state = dyn.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    assert all(site["name"] in {**dyn.exits, **dyn.gates} for site in dyn.recipe.steps[0].sites)


@CONTRACT
def test_sites_replay_on_a_fresh_model(converted, captured, strategy, kind):
    _, dyn, _ = converted(strategy, kind)
    graph = captured(kind)
    sites = [Site(**site) for site in dyn.recipe.steps[0].sites]
    replayed, refused = resolve(strategy, {})[0].apply(graph, sites=sites)
    assert replayed == sites
    assert not refused
    assert list(DynamicModule(graph, dyn.recipe).state_dict()) == list(dyn.state_dict())


@CONTRACT
def test_sites_are_plain_data_and_change_nothing(converted, captured, strategy, kind):
    _, dyn, _ = converted(strategy, kind)
    graph = captured(kind)
    before = str(graph.fx)
    item = resolve(strategy, {})[0]
    first, second = list(item.sites(graph)), list(item.sites(graph))
    assert first == second
    assert str(graph.fx) == before
    assert dyn.recipe == type(dyn.recipe).model_validate_json(dyn.recipe.model_dump_json())


@CONTRACT
def test_the_result_is_a_module_in_every_respect(converted, strategy, kind):
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


def test_a_dynamic_model_gets_further_passes(device, tmp_path):
    model = images().to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    gated = dc.dynamize(model, "layer_skip", example_inputs=x)
    for gate in gated.gates.values():
        gate.enabled.fill_(True)
        gate.bias.fill_(-0.1)
        torch.nn.init.normal_(gate.shift)
    gated.eval()
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    both = dc.dynamize(gated, "early_exit", exits=1)
    assert gated.state_dict().keys() == before.keys()
    assert list(gated.exits) == []
    assert torch.equal(both(x), gated(x))
    for name, value in before.items():
        assert torch.equal(both.state_dict()[name], value)
    both.exits["exit0"].enabled.fill_(True)
    both.exits["exit0"].threshold.fill_(0.0)
    assert both.trace(x).cost.mean() < gated.trace(x).cost.mean()
    torch.testing.assert_close(dc.lower(both, "eager")(x), both(x))

    at_once = dc.dynamize(model, ["layer_skip", EarlyExit(exits=1)], example_inputs=x)
    assert both.recipe.steps == at_once.recipe.steps
    assert both.state_dict().keys() == at_once.state_dict().keys()
    dc.save(both, tmp_path / "both")
    assert torch.equal(dc.load(tmp_path / "both", model).eval()(x), both(x))


def test_further_passes_that_are_refused(converted):
    _, dyn, inputs = converted("early_exit", "images")
    with pytest.raises(ArgumentError, match="`example_inputs`: found a value; expected none: a dynamic model has it"):
        dc.dynamize(dyn, example_inputs=inputs(2))
    with pytest.raises(PassError, match="a pass is applied once"):
        dc.dynamize(dyn, "early_exit")
    with pytest.raises(ArgumentError, match="found one cast to float64; expected float32, as converted"):
        dc.dynamize(copy.deepcopy(dyn).double(), "layer_skip")
    with pytest.raises(ArgumentError, match="found a lowered model; expected the model it was lowered from"):
        dc.dynamize(dc.lower(copy.deepcopy(dyn).eval(), "eager"), "layer_skip")
