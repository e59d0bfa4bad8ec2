"""What the tests of early exit share: small models of images and tokens, converted."""

import torch
from torch import nn

import dyncompile as dc


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.norm(self.conv(x))).relu_()


class Net(nn.Module):
    """A small residual network; `tail` turns the last features into the output."""

    def __init__(self, blocks=4, width=8, classes=5, tail="logits"):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, classes)
        self.tail = tail

    def forward(self, x):
        h = self.blocks(self.stem(x))
        if self.tail == "pixels":
            return self.fc(h.movedim(1, -1)).movedim(-1, 1)
        y = self.fc(h.mean((2, 3)))
        if self.tail == "several":
            return {"logits": y, "norm": h.flatten(1).norm(dim=1), "early": x.mean((1, 2, 3))}
        return y.squeeze(1) if self.tail == "number" else y


class Tokens(nn.Module):
    """A small transformer encoder over token ids with a mask of the tokens to keep."""

    def __init__(self, pooling="mean", width=16, layers=3, classes=4):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.fc = nn.Linear(width, classes)
        self.pooling = pooling

    def forward(self, ids, attention_mask):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=attention_mask == 0)
        if self.pooling == "tokens":
            return self.fc(h)
        if self.pooling == "cls":
            return self.fc(h[:, 0])
        if self.pooling == "last":
            rows = torch.arange(ids.shape[0], device=ids.device)
            return self.fc(h[rows, attention_mask.sum(1) - 1])
        keep = attention_mask.to(h.dtype)[..., None]
        return self.fc((h * keep).sum(1) / keep.sum(1))


def dynamic(model, inputs, device, **options):
    model = model.to(device).eval()
    return model, dc.dynamize(model, "early_exit", example_inputs=inputs, **options)


def enable(dyn, *, threshold, names=None):
    for name in names or dyn.exits:
        dyn.exits[name].enabled.fill_(True)
        dyn.exits[name].threshold.fill_(threshold)


def exact_at_birth(model, dyn, *inputs):
    for training in (False, True):
        model.train(training)
        dyn.train(training)
        assert torch.equal(dyn(*inputs), model(*inputs))
