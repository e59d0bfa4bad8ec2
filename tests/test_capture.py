"""Capture: exact in both modes, the model untouched, hard models taken or refused with a reason."""

import collections
import copy
import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyncompile.capture import capture
from dyncompile.capture.examples import infer_inputs
from dyncompile.errors import ArgumentError, CaptureError, MixedSamplesError


def run(graph, *inputs, training=False, seed=1):
    graph.root.train(training)
    torch.manual_seed(seed)
    return graph.signature.unflatten(graph.run(inputs))


def assert_captured(model, *args, training=True, **options):
    """Capture, and compare with the model bit for bit on new data, in both modes."""
    inputs = [torch.randn_like(a) if a.is_floating_point() else a for a in args]
    graph = capture(model, args, **options)
    assert graph.mode == ("train" if training else "eval")
    for mode in (False, True) if training else (False,):
        twin = copy.deepcopy(model).train(mode)
        torch.manual_seed(1)
        expected = twin(*(x.clone() for x in inputs))
        actual = run(graph, *inputs, training=mode)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    return graph


def targets(graph):
    return [str(node.target) for node in graph.fx.nodes]


class Lambda(nn.Module):
    """A model of one function over its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def small_cnn():
    return nn.Sequential(
        collections.OrderedDict(
            conv=nn.Conv2d(3, 8, 3, padding=1),
            norm=nn.BatchNorm2d(8),
            act=nn.ReLU(inplace=True),
            drop=nn.Dropout(0.2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(8, 5),
        )
    )


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 8, 8, device=device)


# --- the model is left as it was -----------------------------------------------------------------


def test_state_dict_keys_survive_and_layers_stay_whole(device, images):
    model = small_cnn().to(device)
    graph = assert_captured(model, images)
    assert list(graph.root.state_dict()) == list(model.state_dict())
    assert [t for t in targets(graph) if t in dict(model.named_modules())] == [
        "conv",
        "norm",
        "act",
        "drop",
        "pool",
        "fc",
    ]


def test_the_model_is_untouched(device, images):
    model = small_cnn().to(device)
    model.conv.weight.requires_grad_(requires_grad=False)
    model.norm.eval()
    fired = []
    model.fc.register_forward_hook(lambda *_: fired.append("hook"))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    graph = capture(model, (images,))
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert model.act.inplace
    assert "forward" not in vars(model.conv)
    assert all(torch.equal(v, before[k]) and v.device.type == device.type for k, v in model.state_dict().items())
    assert [p.requires_grad for p in graph.root.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not model.conv.weight.requires_grad
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(graph.root.parameters(), model.parameters(), strict=True))
    fired.clear()
    run(graph, images)
    assert fired == ["hook"]


def test_hooks_that_change_an_output_are_applied_once(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)).to(device)
    model[0].register_forward_hook(lambda m, a, out: out * 2)
    model[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    assert_captured(model, torch.randn(2, 4, device=device))


def test_inplace_takes_the_modules_themselves(device, images):
    model = small_cnn().to(device)
    weights = [p.data_ptr() for p in model.parameters()]
    graph = capture(model, (images,), inplace=True)
    assert graph.root is model
    assert [p.data_ptr() for p in model.parameters()] == weights


# --- calling conventions -------------------------------------------------------------------------


@dataclasses.dataclass
class Output(collections.OrderedDict):
    pass


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda y: y, ("output",)),
        (lambda y: (y,), ("0",)),
        (lambda y: {"logits": y, "hidden": y * 2}, ("logits", "hidden")),
        (lambda y: {"logits": y, "extra": [y.argmax(1), (y + 1,)]}, ("logits", "extra.0", "extra.1.0")),
    ],
)
def test_output_structures(device, wrap, names):
    model = Lambda(lambda m, x: wrap(m.fc(x)), fc=nn.Linear(4, 3)).to(device)
    graph = assert_captured(model, torch.randn(2, 4, device=device))
    assert graph.signature.output_names == names
    assert graph.prediction.target == "fc"


def test_model_outputs_of_hugging_face(device, needs):
    transformers = needs("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    model = transformers.BertForSequenceClassification(config).to(device).eval()
    ids = torch.randint(0, 32, (2, 6), device=device)
    graph = capture(model, (), {"input_ids": ids, "output_hidden_states": True})
    out = run(graph, ids)
    expected = model(ids, output_hidden_states=True)
    assert type(out) is type(expected)
    assert graph.signature.output_names == ("logits", "hidden_states.0", "hidden_states.1")
    assert torch.equal(out.hidden_states[1], expected.hidden_states[1])


def test_which_leaf_is_the_prediction(device):
    model = Lambda(lambda m, x: (m.fc(x), m.fc(x) * 2), fc=nn.Linear(4, 3)).to(device)
    x = torch.randn(2, 4, device=device)
    with pytest.raises(
        ArgumentError, match=r"`prediction`: found 2 floating leaves; expected the name of one of \['0', '1'\]"
    ):
        capture(model, (x,))
    graph = capture(model, (x,), prediction="1", prediction_only=True)
    assert torch.equal(run(graph, x), model(x)[1])
    with pytest.raises(ArgumentError, match="`prediction`: found 'logits'"):
        capture(model, (x,), prediction="logits")


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, scale=None, *, extra=None, flip=False):
        y = self.fc(x["a"] + x["b"][0])
        y = y if scale is None else y * scale
        y = y if extra is None else y + extra
        return -y if flip else y


def test_keyword_arguments_pytrees_and_constants(device):
    model = TwoInputs().to(device)
    a, b, extra = (torch.randn(2, n, device=device) for n in (4, 4, 3))
    graph = capture(model, ({"a": a, "b": [b]},), {"extra": extra, "flip": True})
    assert graph.signature.names == ("x.a", "x.b.0", "extra")
    flatten = graph.signature.flatten
    expected = model({"a": a, "b": [b]}, extra=extra, flip=True)
    for args, kwargs in (
        (({"a": a, "b": [b]},), {"extra": extra, "flip": True}),
        ((), {"flip": True, "extra": extra, "x": {"a": a, "b": [b]}, "scale": None}),
    ):
        assert torch.equal(run(graph, *flatten(args, kwargs)), expected)
    with pytest.raises(ArgumentError, match="found False as a constant argument; expected True"):
        flatten(({"a": a, "b": [b]},), {"extra": extra, "flip": False})
    with pytest.raises(ArgumentError, match="`inputs`: found arguments"):
        flatten(({"a": a, "b": [b, b]},), {"extra": extra, "flip": True})
    with pytest.raises(ArgumentError, match="got an unexpected keyword argument 'nonsense'"):
        flatten(({"a": a, "b": [b]},), {"nonsense": extra})


def test_an_input_without_a_batch(device):
    model = TwoInputs().to(device)
    x = {"a": torch.randn(4, 4, device=device), "b": [torch.randn(4, 4, device=device)]}
    scale = torch.randn(3, device=device)
    graph = capture(model, (x, scale))
    assert graph.batch_dims == (0, 0, None)
    more = [torch.randn(7, 4, device=device) for _ in range(2)]
    expected = model({"a": more[0], "b": [more[1]]}, scale)
    assert torch.equal(run(graph, *more, scale), expected)


@pytest.mark.parametrize(
    ("batch_dims", "message"),
    [
        ({"y": 0}, r"`batch_dims`: found 'y'; expected names among \['x'\]"),
        ({"x": 2}, r"`batch_dims\['x'\]`: found 2; expected a dim of an input with 2 dims"),
        ({"x": None}, "`example_inputs`: found no input with a batch"),
    ],
)
def test_wrong_batch_dims(device, batch_dims, message):
    model = nn.Linear(4, 2).to(device)
    model = nn.Sequential(model)
    model.forward = lambda x: nn.Sequential.forward(model, x)
    with pytest.raises(ArgumentError, match=message):
        capture(model, (torch.randn(2, 4, device=device),), batch_dims=batch_dims)


def test_an_empty_example_is_refused(device):
    with pytest.raises(ArgumentError, match="`example_inputs`: found an empty batch"):
        capture(nn.Sequential(nn.Linear(4, 2)), (torch.randn(0, 4),))


def test_examples_that_do_not_fit(device):
    model = nn.Sequential(nn.Linear(4, 2)).to(device)
    with pytest.raises(CaptureError, match="the model stops on its example inputs: RuntimeError: mat1 and mat2"):
        capture(model, (torch.randn(2, 5, device=device),))
    with pytest.raises(ArgumentError, match="`example_inputs`: found no tensor"):
        capture(model, (3,))


def test_inputs_are_inferred_or_asked_for():
    args, _, origin = infer_inputs(nn.Sequential(nn.Conv2d(3, 4, 3)), None)
    assert (args[0].shape, origin) == ((2, 3, 64, 64), "first layer `0`: [2, 3, 64, 64]")
    args, _, _ = infer_inputs(nn.Sequential(nn.Embedding(10, 4)), None)
    assert args[0].dtype == torch.int64
    assert int(args[0].max()) < 10
    args, _, _ = infer_inputs(nn.Sequential(nn.Linear(7, 2).double()), None)
    assert (args[0].shape, args[0].dtype) == ((2, 7), torch.float64)
    with pytest.raises(ArgumentError, match=r"example_inputs=torch.randn\(2, 3, 224, 224\)"):
        infer_inputs(nn.Sequential(nn.LayerNorm(4)), None)
    with pytest.raises(ArgumentError, match="`example_inputs`: found int"):
        infer_inputs(nn.Sequential(nn.LayerNorm(4)), 3)


# --- in-place operations -------------------------------------------------------------------------


def _first_column(m, x):
    y = m.fc(x)
    y[:, 0] = 0.0
    y[:, 1:3] += y[:, 2:4] * 2
    return y


def _chained(m, x):
    y = m.fc(x)
    y[:, 1].mul_(2).add_(1)
    return y


def _view_taken_before(m, x):
    y = m.fc(x)
    v = y.view(-1, 2, 2)
    y.add_(1)
    v.transpose(1, 2)[:, 0].mul_(3)
    return torch.cat([y, v.flatten(1)], 1)


def _written_view_of_a_view(m, x):
    y = m.fc(x)
    a = y[:, :3]
    b = a[:, 1:]
    b.fill_(2.0)
    a.exp_()
    return y * b.sum(1, keepdim=True)


def _masked(m, x):
    y = m.fc(x)
    y[y < 0] = -1.0
    y.masked_fill_(y > 1, 1.0)
    return y.clamp_(min=-0.5)


def _reused_preactivation(m, x):
    y = m.fc(x)
    z = F.relu(y, inplace=True)
    return z + y


def _layer_overwrites(m, x):
    y = m.fc(x)
    z = m.act(y)
    return z + y


def _copied_reshape(m, x):
    y = m.fc(x).view(-1, 2, 2)
    r = y.transpose(1, 2).reshape(-1, 4)  # a copy: writing to it leaves y alone
    r.add_(1)
    return torch.cat([r, y.flatten(1)], 1)


def _no_op_cast(m, x):
    y = m.fc(x)
    y.to(x.dtype).contiguous().add_(1)  # no copies: y changes
    return y


def _writes_to_the_input(m, x):
    x.mul_(2)
    return m.fc(x)


def _dtype_stays(m, x):
    y = m.fc(x)
    flags = (y > 0).to(torch.int64)
    flags.eq_(1)
    flags.mul_(y.argmax(1, keepdim=True))
    return y * flags


def _flattened_layer(m, x):
    y = m.fc(x).view(-1, 2, 2)
    m.flat(y).add_(1)
    return y.sum(1)


def _copied_into(m, x):
    y = torch.zeros_like(x)
    y[:, :2].copy_(m.fc(x)[:, :2])
    y[:, 2:] = 1
    return y


def _nested_lists(m, x):
    y = m.fc(x)
    a, b = y.clone(), y.clone()
    for part in (a, b):
        part.view(-1, 2, 2).diagonal(0, 1, 2).mul_(2)
        part.unsqueeze(1)[:, 0].add_(1)
        part.permute(1, 0).t().unflatten(1, (2, 2)).narrow(1, 0, 1).neg_()
    return a + b


@pytest.mark.parametrize(
    "function",
    [
        _first_column,
        _chained,
        _view_taken_before,
        _written_view_of_a_view,
        _masked,
        _reused_preactivation,
        _layer_overwrites,
        _copied_reshape,
        _no_op_cast,
        _writes_to_the_input,
        _dtype_stays,
        _flattened_layer,
        _copied_into,
        _nested_lists,
    ],
)
def test_in_place_operations_become_functional(device, function):
    model = Lambda(function, fc=nn.Linear(4, 4), act=nn.ReLU(inplace=True), flat=nn.Flatten()).to(device)
    graph = assert_captured(model, torch.randn(3, 4, device=device))
    for node in graph.fx.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node.format_node()
        assert not getattr(graph.module_of(node), "inplace", False)


def test_inputs_are_not_written_to(device):
    model = Lambda(_writes_to_the_input, fc=nn.Linear(4, 4)).to(device)
    x = torch.randn(3, 4, device=device)
    before = x.clone()
    graph = capture(model, (x,))
    run(graph, x)
    assert torch.equal(x, before)


class Counter(nn.Module):
    def __init__(self, only_training=False):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.only_training = only_training
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        if self.training or not self.only_training:
            self.step += 1
        return self.fc(x) * (1 + 0 * self.step)


def test_a_model_that_writes_to_its_own_buffer_is_refused(device):
    with pytest.raises(
        CaptureError, match=r"writes to its own `step` in forward, at File .*test_capture.py.*self.step \+= 1"
    ):
        capture(Counter().to(device), (torch.randn(2, 4, device=device),))


def test_one_that_does_so_in_training_is_captured_in_eval_mode(device, caplog):
    model = Counter(only_training=True).to(device)
    with caplog.at_level(logging.WARNING):
        assert_captured(model, torch.randn(2, 4, device=device), training=False)
    assert "captured in eval mode only, because in training mode the model writes to its own `step`" in caplog.text
    assert float(model.step) == 0


# --- sharing -------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.mix = nn.Linear(6, 6)
        self.decode = nn.Linear(6, 12, bias=False)
        self.decode.weight = self.embed.weight  # tied
        self.scale = nn.Parameter(torch.ones(6))  # used twice
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def forward(self, ids):
        h = self.embed(ids).mean(1) * self.scale
        h = self.mix(self.mix(h)) * self.scale + self.table  # called twice
        return self.decode(h)


def test_tied_weights_and_repeated_calls(device):
    model = Shared().to(device)
    graph = assert_captured(model, torch.randint(0, 12, (2, 5), device=device))
    root = graph.root
    assert root.decode.weight is root.embed.weight
    assert targets(graph).count("mix") == 2
    assert "table" not in root.state_dict()
    assert list(root.state_dict()) == list(model.state_dict())
    run(graph, torch.randint(0, 12, (3, 5), device=device), training=True).sum().backward()
    assert root.embed.weight.grad is not None
    assert root.scale.grad is not None


def test_a_copy_and_its_original_train_apart(device, images):
    graph = capture(small_cnn().to(device), (images,))
    twin = copy.deepcopy(graph)
    with torch.no_grad():
        twin.root.fc.weight.add_(1)
    assert not torch.equal(run(graph, images), run(twin, images))
    assert {n.op for n in twin.fx.nodes} == {n.op for n in graph.fx.nodes}


# --- modes ---------------------------------------------------------------------------------------


def _functional_dropout(m, x):
    y = F.dropout(m.fc(x), 0.5, training=m.training)
    return F.dropout(y, 0.3, training=m.training, inplace=True)


def _functional_norm(m, x):
    y = m.fc(x)
    return F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, m.training)


def _feature_dropout(m, x):
    y = F.dropout2d(m.fc(x).view(-1, 2, 2, 1), 0.5, m.training).flatten(1)
    return F.alpha_dropout(y, 0.2, m.training)


def _attention(m, x):
    q = m.fc(x).view(-1, 1, 2, 2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if m.training else 0.0).flatten(1)


def _attention_with_mask(m, x):
    q = m.fc(x).view(-1, 1, 2, 2)
    mask = torch.tensor([[True, False], [True, True]], device=x.device)
    p = 0.5 if m.training else 0.0
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=p, scale=0.3).flatten(1)


@pytest.mark.parametrize(
    "function", [_functional_dropout, _functional_norm, _feature_dropout, _attention, _attention_with_mask]
)
def test_functional_layers_follow_the_mode(device, function):
    model = Lambda(function, fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)).to(device)
    x = torch.randn(8, 4, device=device)
    graph = assert_captured(model, x)
    assert not torch.equal(run(graph, x, training=True), run(graph, x))
    assert list(graph.root.state_dict()) == list(model.state_dict())


def test_batch_norm_statistics_move_in_training_alone(device, images):
    graph = capture(small_cnn().to(device), (images,))
    run(graph, images)
    assert int(graph.root.norm.num_batches_tracked) == 0
    run(graph, images, training=True)
    assert int(graph.root.norm.num_batches_tracked) == 1
    assert float(graph.root.norm.running_mean.abs().sum()) > 0


def test_another_structure_in_training_means_eval_mode(device, caplog):
    def function(m, x):
        y = m.fc(x)
        return {"logits": y, "aux": y * 2} if m.training else y

    with caplog.at_level(logging.WARNING):
        assert_captured(
            Lambda(function, fc=nn.Linear(4, 4)).to(device), torch.randn(2, 4, device=device), training=False
        )
    assert "captured in eval mode only" in caplog.text
    assert "returns ['logits', 'aux'] in training mode and ['output'] in eval mode" in caplog.text


def test_regions_without_gradient(device):
    def function(m, x):
        with torch.no_grad():
            h = m.fc(x)
            with torch.enable_grad():
                h = h + 1
        return m.out(h)

    model = Lambda(function, fc=nn.Linear(4, 4), out=nn.Linear(4, 2)).to(device)
    graph = assert_captured(model, torch.randn(2, 4, device=device))
    run(graph, torch.randn(2, 4, device=device), training=True).sum().backward()
    assert graph.root.fc.weight.grad is None
    assert graph.root.out.weight.grad is not None


def test_autocast_inside_a_model(device):
    def function(enabled):
        def forward(m, x):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled):
                return m.fc(x).float()

        return forward

    x = torch.randn(2, 4, device=device)
    assert_captured(Lambda(function(enabled=False), fc=nn.Linear(4, 4)).to(device), x)
    with pytest.raises(CaptureError, match="the model uses `wrap_with_autocast`.*; cast outside of it"):
        capture(Lambda(function(enabled=True), fc=nn.Linear(4, 4)).to(device), (x,))


# --- refusals ------------------------------------------------------------------------------------

_MIXERS = {
    "mean": lambda m, x: m.fc(x) - m.fc(x).mean(0, keepdim=True),
    "sort": lambda m, x: m.fc(x.sort(0).values),
    "flip": lambda m, x: m.fc(x).flip(0),
    "cumsum": lambda m, x: m.fc(x).cumsum(0),
    "softmax": lambda m, x: m.fc(x).softmax(0),
    "matmul": lambda m, x: (x @ x.T) @ m.fc(x),
    "norm": lambda m, x: m.norm(m.fc(x)),
    "cat": lambda m, x: torch.cat([x, x[:1]])[1:],
    "slice": lambda m, x: m.fc(x) + x[:1],
}


@pytest.mark.parametrize("name", _MIXERS)
def test_models_that_mix_samples_are_refused_by_operation(device, name):
    model = Lambda(_MIXERS[name], fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(4, track_running_stats=False)).to(device)
    with pytest.raises(MixedSamplesError, match=rf"^`{name}.*mixes the samples of a batch") as caught:
        capture(model, (torch.randn(2, 4, device=device),))
    assert name == "norm" or "test_capture.py" in str(caught.value)


def test_mixing_of_equal_rows_is_seen(device):
    """The example's batch is one row of integers: its copies must differ, or nothing shows."""
    model = Lambda(
        lambda m, x: m.fc(m.embed(x).mean(0, keepdim=True).expand(x.shape[0], -1, -1)).mean(1),
        fc=nn.Linear(4, 4),
        embed=nn.Embedding(10, 4),
    ).to(device)
    with pytest.raises(MixedSamplesError, match="^`mean"):
        capture(model, (torch.tensor([[1, 2, 3]], device=device),))


def test_a_little_mixing_in_half_precision_is_seen(device):
    model = Lambda(lambda m, x: m.fc(x) + 0.02 * x.mean(0), fc=nn.Linear(4, 4)).to(device, torch.bfloat16)
    with pytest.raises(MixedSamplesError, match="^`mean"):
        capture(model, (torch.randn(2, 4, device=device, dtype=torch.bfloat16),))


def test_time_taken_for_the_batch_is_refused(device):
    model = Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 4)).to(device)
    with pytest.raises(CaptureError, match="where the batch is not dim 0 of an input, pass batch_dims"):
        capture(model, (torch.randn(5, 2, 4, device=device),))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.fc(x)
        return x


def test_a_model_that_branches_on_data_is_refused_with_its_line(device):
    with pytest.raises(CaptureError, match=r"torch.export stopped: .*test_capture.py:\d+: `if x.sum\(\) > 0:`"):
        capture(Branching().to(device), (torch.randn(2, 4, device=device),))


def test_a_model_that_cannot_be_copied(device):
    model = nn.Sequential(nn.Linear(4, 4)).to(device)
    model.cache = model[0].weight * 2
    x = torch.randn(2, 4, device=device)
    with pytest.raises(CaptureError, match="the model cannot be copied: .*inplace=True"):
        capture(model, (x,))
    assert capture(model, (x,), inplace=True).root is model


# --- dtypes and devices --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(device, dtype):
    model = small_cnn().to(device, dtype)
    graph = capture(model, (torch.randn(2, 3, 8, 8, device=device, dtype=dtype),))
    x = torch.randn(4, 3, 8, 8, device=device, dtype=dtype)
    out = run(graph, x)
    assert out.dtype == dtype
    assert torch.equal(out, model.eval()(x))


class MakesTensors(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        bias = torch.zeros(ids.shape[0], ids.shape[1], 4, device=ids.device) + torch.tensor(0.5)
        return (self.embed(ids) * positions[:, None] + bias).sum(1)


def test_no_device_is_baked_in(device):
    graph = capture(MakesTensors(), (torch.randint(0, 8, (2, 5)),))
    ids = torch.randint(0, 8, (3, 5))
    expected = MakesTensors.forward(graph.root, ids)
    assert torch.equal(run(graph, ids), expected)
    graph.root.to("meta")
    assert run(graph, ids.to("meta")).device.type == "meta"
    moved = capture(MakesTensors(), (torch.randint(0, 8, (2, 5)),))
    moved.root.to(device)
    assert run(moved, ids.to(device)).device.type == device.type


# --- recurrent layers ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, *, layers=3, states=False, **options):
        super().__init__()
        self.rnn = kind(4, 6, layers, dropout=0.3 if layers > 1 else 0.0, **options)
        self.fc = nn.LazyLinear(3)
        self.states = states

    def forward(self, x):
        y, state = self.rnn(x)
        y = y[:, -1] if self.rnn.batch_first else y[-1]
        if self.states:
            for s in state if isinstance(state, tuple) else (state,):
                y = torch.cat([y, s.transpose(0, 1).flatten(1)], 1)
        return self.fc(y)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stacks_of_recurrent_layers_are_unstacked(device, kind, bidirectional, batch_first):
    model = Recurrent(kind, states=True, batch_first=batch_first, bidirectional=bidirectional).to(device)
    x = torch.randn(*((2, 5) if batch_first else (5, 2)), 4, device=device)
    model(x)
    graph = assert_captured(model, x, batch_dims=None if batch_first else {"x": 1})
    layers = [n for n in graph.fx.nodes if type(graph.module_of(n)).__name__ == "RecurrentLayer"]
    assert len(layers) == 3
    assert list(graph.root.state_dict()) == list(model.state_dict())
    run(graph, x, training=True).sum().backward()
    assert all(p.grad is not None for p in graph.root.parameters())


def test_cut_points_lie_between_recurrent_layers(device):
    model = Recurrent(nn.LSTM, batch_first=True).to(device)
    x = torch.randn(2, 5, 4, device=device)
    model(x)
    paths = {path for node in capture(model, (x,)).cut_points for path in node.meta["path"]}
    assert {"rnn.0", "rnn.1", "rnn.2"} <= paths


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_with_projection_and_given_state(device):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, 2, proj_size=3, bias=False, batch_first=True)

        def forward(self, x, h, c):
            y, (h, c) = self.lstm(x, (h.transpose(0, 1), c.transpose(0, 1)))
            return y.mean(1) + h[1] + c[0, :, :3]

    shapes = ((2, 5, 4), (2, 2, 3), (2, 2, 6))
    assert_captured(Stateful().to(device), *(torch.randn(*s, device=device) for s in shapes))


def test_a_single_recurrent_layer_stays_itself(device):
    model = Recurrent(nn.LSTM, layers=1, batch_first=True).to(device)
    x = torch.randn(2, 5, 4, device=device)
    model(x)
    assert "rnn" in targets(assert_captured(model, x))


def test_packed_sequences_are_refused_with_their_line(device):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 6, batch_first=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.rnn(packed)[1][0]

    with pytest.raises(CaptureError, match="test_capture.py"):
        capture(Packed().to(device), (torch.randn(2, 5, 4, device=device), torch.tensor([5, 3], device=device)))
