"""Groups of coupled channels: counted on known architectures, and rule by rule."""

import pytest
import torch
import widening
from torch import nn

from dyncompile.capture import capture
from dyncompile.channels import channel_groups
from dyncompile.kinds import kind_of

OUTPUT = "its channels are an output of the model"


def groups_of(model, *inputs):
    return channel_groups(capture(model.eval(), inputs))


def made_by(groups):
    return [[str(layer.target) for layer in group.producers] for group in groups]


def obstacles(model, *inputs):
    return {str(group.producers[0].target): group.obstacles for group in groups_of(model, *inputs)}


# resnet18: 8 inside blocks, 4 streams (the stem belongs to the first), the classifier; resnet50: 2 in each of 16
# blocks, the stem, 4 streams, the classifier; mobilenet_v3_large: 14 expansions, 8 squeezes, 6 streams, the last
# convolution, 2 linear layers; vit_b_16: 12 MLPs, the patches, the stream, the head; vgg11: each of its 11 layers;
# convnext_tiny: 18 MLPs, 4 streams, the head.
@pytest.mark.parametrize(
    ("name", "count", "free"),
    [
        ("resnet18", 13, 12),
        ("resnet50", 38, 37),
        ("mobilenet_v3_large", 31, 30),
        ("vit_b_16", 15, 12),
        ("vgg11", 11, 10),
        ("squeezenet1_1", 26, 9),
    ],
)
def test_counts(needs, name, count, free):
    torch.manual_seed(0)
    options = {"image_size": 32} if name == "vit_b_16" else {}
    model = getattr(needs("torchvision").models, name)(**options)
    groups = groups_of(model, torch.randn(2, 3, 32, 32))
    assert len(groups) == count
    assert sum(not group.obstacles for group in groups) == free


def test_streams_of_a_resnet(needs):
    groups = groups_of(needs("torchvision").models.resnet18(), torch.randn(2, 3, 32, 32))
    streams = [group for group in groups if len(group.producers) > 1]
    assert made_by(streams) == [
        ["conv1", "layer1.0.conv2", "layer1.1.conv2"],
        *([f"layer{i}.0.conv2", f"layer{i}.0.downsample.0", f"layer{i}.1.conv2"] for i in (2, 3, 4)),
    ]
    assert [str(layer.target) for layer in streams[-1].consumers] == ["layer4.1.conv1", "fc"]
    assert [group.parts for group in streams] == [64, 128, 256, 512]


@pytest.mark.parametrize("name", widening.MODELS)
def test_makers_readers_and_parts(name):
    make, inputs, sites = widening.MODELS[name]
    found = {str(g.producers[0].target): g for g in groups_of(make(), inputs(2))}
    for maker, parts, readers in (group for site in sites for group in site):
        assert found[maker].parts == parts
        assert [str(layer.target) for layer in found[maker].consumers] == readers
        assert not found[maker].obstacles


def test_two_layers_make_one_group():
    groups = groups_of(widening.Pooled(widening.Gated()), widening.tokens(2))
    assert made_by(groups)[0] == ["blocks.0.gate", "blocks.0.up"]


class Between(nn.Module):
    """One operation between a layer that makes channels and one that reads them."""

    def __init__(self, operation, made=8, read=8, linear=False):
        super().__init__()
        self.make = nn.Linear(4, made) if linear else nn.Conv2d(3, made, 3, padding=1)
        self.read = nn.Linear(read, 4) if linear else nn.Conv2d(read, 4, 1)
        self.operation = operation

    def forward(self, x):
        return self.read(self.operation(self.make(x)))


@pytest.mark.parametrize(
    ("operation", "parts"),
    [
        (nn.GroupNorm(2, 8), 2),
        (nn.Conv2d(8, 8, 3, groups=4), 4),
        (nn.Conv2d(8, 8, 3, groups=8), 8),
        (nn.PReLU(), 8),
        (nn.AdaptiveMaxPool2d(2), 8),
        (nn.Upsample(scale_factor=2), 8),
        (nn.Dropout2d(), 8),
        (lambda h: h.mean((2, 3), keepdim=True), 8),
        (lambda h: h.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (8, 8)), 8),
        (lambda h: h.softmax(2), 8),
        (lambda h: h * torch.ones(8, 1, 1).cumsum(0), None),
        (lambda h: h[:, :, ::2], 8),
        (lambda h: h.clamp(0, 6) * 0.5 + 1, 8),
        (lambda h: torch.nn.functional.max_pool2d(h, 2), 8),
    ],
)
def test_what_ties(operation, parts):
    group = groups_of(Between(operation), torch.randn(2, 3, 8, 8))[0]
    assert made_by([group]) == [["make"]]
    if parts is None:
        assert "makes its channels, and is no layer that can be narrowed" in group.obstacles[0]
    else:
        assert [str(layer.target) for layer in group.consumers] == ["read"]
        assert (group.parts, group.obstacles) == (parts, ())


@pytest.mark.parametrize(
    ("operation", "read", "reason"),
    [
        (lambda h: torch.cat([h, h], 1), 16, "`cat` (cat) works across its channels"),
        (lambda h: h.softmax(1), 8, "`softmax` (softmax) works across its channels"),
        (lambda h: h[:, :4], 4, "(slice) works across its channels"),
        (lambda h: h.transpose(1, 2), 8, "`read` (Conv2d) works across its channels"),
        (lambda h: h.flip(1), 8, "`flip` (flip) works across its channels"),
        (nn.Softmax(1), 8, "`operation` (Softmax) works across its channels"),
        (nn.PixelShuffle(2), 2, "`operation` (PixelShuffle) works across its channels"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), 8, "`operation` (Conv2d) works across its channels"),
        (nn.ConvTranspose2d(8, 8, 3), 8, "`operation` (ConvTranspose2d) works across its channels"),
        (lambda h: h.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), 8, "works across its channels"),
        (lambda h: h + h.transpose(1, 2), 8, "`make` are tied"),
    ],
)
def test_obstacles(operation, read, reason):
    found = obstacles(Between(operation, read=read), torch.randn(2, 3, 8, 8))["make"]
    assert any(reason in text for text in found), found


def test_parts_of_a_flattened_map_stay_together():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 4))
    group = groups_of(model, torch.randn(2, 3, 5, 5))[0]
    relu, flat = (next(n for n in group.dims if str(n.target) == name) for name in ("1", "aten.flatten.using_ints"))
    assert group.parts == 6
    assert (group.kept(relu, 2), group.kept(flat, 2)) == (2, 18)


class Inheriting(nn.Conv2d):
    pass


class Overriding(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(1, keepdim=True), bias)


class Cubed(nn.Module):
    def forward(self, x):
        return x * x.square().tanh()


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean()


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


def test_a_layer_is_what_its_forward_is():
    torch.manual_seed(0)
    known = (Inheriting(3, 8, 3), Cubed(), nn.GELU(), nn.ReLU6(), nn.Dropout2d())
    assert [kind_of(m) for m in known] == [nn.Conv2d, nn.Identity, nn.GELU, nn.ReLU6, nn.Dropout2d]
    unknown = (Overriding(3, 8, 3), Centred(), Noisy(), nn.Softmax(1), nn.Flatten(), nn.LSTM(3, 4))
    assert [kind_of(m) for m in unknown] == [None] * len(unknown)
    state = torch.get_rng_state()
    assert kind_of(Noisy().train()) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_are_obstacles():
    model = Between(nn.ReLU())
    model.make.register_forward_hook(lambda module, args, out: out + 1)
    found = obstacles(model, torch.randn(2, 3, 8, 8))
    assert list(found) == ["read"]


def test_the_output_is_an_obstacle():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.a(x)
            return self.b(h), h

    groups = channel_groups(capture(Both(), (torch.randn(2, 4),), prediction="0"))
    assert [group.obstacles for group in groups] == [(OUTPUT,), (OUTPUT,)]


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_norm_of_another_forward_is_unknown_also_where_its_weight_is_nought():
    norm = Doubled(4)
    nn.init.zeros_(norm.weight)
    assert kind_of(norm) is None
