"""Capture: exact in both modes, the model untouched, every calling convention."""

import collections
import copy
import dataclasses

import pytest
import torch
from capturing import Lambda, assert_captured, run, small_cnn, targets
from torch import nn

from dyncompile.capture import capture
from dyncompile.capture.examples import infer_inputs
from dyncompile.conversion import dynamize
from dyncompile.errors import ArgumentError, CaptureError


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


def test_a_default_may_be_passed_or_left_out(device):
    model = Lambda(lambda m, x: m.fc(x), fc=nn.Linear(4, 3)).to(device)
    model.forward = lambda x, scale=1.5: model.fc(x) * scale
    x = torch.randn(2, 4, device=device)
    for example in ({}, {"scale": 1.5}):
        flatten = capture(model, (x,), example).signature.flatten
        assert [*map(id, flatten((x,), {}))] == [*map(id, flatten((x, 1.5), {}))] == [id(x)]
        with pytest.raises(ArgumentError, match="`inputs`: found arguments"):
            flatten((x, 2.0), {})
    flatten = capture(model, (x,), {"scale": x[:, :1]}).signature.flatten
    with pytest.raises(ArgumentError, match="`scale`: found 1.5; expected a tensor, as captured"):
        flatten((x,), {})


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
    for given in ({"flip": False}, {}):
        with pytest.raises(ArgumentError, match="found False as a constant argument; expected True"):
            flatten(({"a": a, "b": [b]},), {"extra": extra, **given})
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


def test_inputs_of_hugging_face_and_timm_are_inferred(needs):
    transformers, timm = needs("transformers"), needs("timm")
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(image_size=48, **sizes))
    args, kwargs, origin = infer_inputs(model, None)
    assert args == ()
    assert {name: value.shape for name, value in kwargs.items()} == {"pixel_values": (2, 3, 48, 48)}
    assert "pixel_values" in origin
    args, _, _ = infer_inputs(timm.create_model("mixer_s32_224", img_size=64), None)
    assert args[0].shape == (2, 3, 64, 64)


def test_inferred_inputs_that_do_not_fit_are_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            assert x.shape[-1] == 32
            return self.fc(self.conv(x).mean((2, 3)))

    with pytest.raises(ArgumentError, match=r"`example_inputs`: found None; inputs were taken from first layer `conv`"):
        dynamize(Model())


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
