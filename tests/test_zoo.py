"""Architectures of torchvision, timm, Hugging Face and plain torch.nn: converted, exact at birth."""

import pytest
import torch
from torch import nn

import dyncompile as dc
from dyncompile.testing import forced

SMALL = {"num_labels": 3, "vocab_size": 64}
BERT = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
DISTILBERT = SMALL | {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 32}
VIT = {k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
GPT2 = SMALL | {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 16, 3, batch_first=True, dropout=0.2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


class EncoderClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.embed = nn.Embedding(64, 32)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.fc = nn.Linear(32, 3)

    def forward(self, ids, padding_mask):
        h = self.encoder(self.embed(ids), src_key_padding_mask=padding_mask)
        keep = (~padding_mask)[..., None].to(h.dtype)
        return self.fc((h * keep).sum(1) / keep.sum(1))


def images(size=64):
    return lambda n: (torch.randn(n, 3, size, size),)


def tokens(n):
    mask = torch.ones(n, 12, dtype=torch.int64)
    mask[-1, 8:] = 0
    return torch.randint(3, 64, (n, 12)), mask


def text(n):
    ids, mask = tokens(n)
    return {"input_ids": ids, "attention_mask": mask}


def vision(name, **options):
    return lambda needs: getattr(needs("torchvision").models, name)(**options)


def timm(name, **options):
    return lambda needs: needs("timm").create_model(name, **options)


def hugging_face(model, config, **options):
    def make(needs):
        library = needs("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return make


ZOO = {
    "resnet18": (vision("resnet18"), images(32)),
    "resnet50": (vision("resnet50"), images(32)),
    "vit_b_16": (vision("vit_b_16", image_size=32), images(32)),
    "mobilenet_v3_large": (vision("mobilenet_v3_large"), images(32)),
    "convnext_tiny": (vision("convnext_tiny"), images(32)),
    "efficientnet_b0": (vision("efficientnet_b0"), images(32)),
    "densenet121": (vision("densenet121"), images(32)),
    "swin_t": (vision("swin_t"), images()),
    "vit_small": (timm("vit_small_patch16_224", img_size=32), images(32)),
    "regnety_002": (timm("regnety_002"), images(32)),
    "mobilenetv4_conv_small": (timm("mobilenetv4_conv_small"), images(32)),
    "hf_bert": (hugging_face("BertForSequenceClassification", "BertConfig", **BERT), text),
    "hf_vit": (
        hugging_face("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **VIT),
        lambda n: {"pixel_values": torch.randn(n, 3, 32, 32)},
    ),
    "hf_distilbert": (hugging_face("DistilBertForSequenceClassification", "DistilBertConfig", **DISTILBERT), text),
    "hf_gpt2": (hugging_face("GPT2ForSequenceClassification", "GPT2Config", **GPT2), text),
    "lstm": (lambda needs: LSTMClassifier(), lambda n: (torch.randn(n, 7, 4),)),
    "encoder": (lambda needs: EncoderClassifier(), lambda n: (tokens(n)[0], tokens(n)[1] == 0)),
}


def leaf(output):
    return getattr(output, "logits", output)


def call(model, inputs, seed=0):
    torch.manual_seed(seed)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def moved(inputs, device):
    if isinstance(inputs, dict):
        return {k: v.to(device) for k, v in inputs.items()}
    return tuple(v.to(device) for v in inputs)


@pytest.mark.parametrize("name", ZOO)
def test_converts_exact_at_birth_and_trains(name, needs, device):
    make, inputs = ZOO[name]
    model = make(needs).to(device).eval()
    keys = list(model.state_dict())
    dyn = dc.dynamize(model, "early_exit", example_inputs=moved(inputs(2), device))
    assert dyn.recipe.mode == "train"
    assert 1 <= len(dyn.exits) <= 3
    assert set(keys) <= set(dyn.state_dict())
    for training, batch in ((False, 4), (True, 3)):
        x = moved(inputs(batch), device)
        model.train(training)
        dyn.train(training)
        expected, actual = call(model, x), call(dyn, x)
        assert type(actual) is type(expected)
        assert torch.equal(leaf(actual), leaf(expected))
    trace = dyn.trace(**x) if isinstance(x, dict) else dyn.trace(*x)
    loss = trace.final.square().mean() + sum(e.square().mean() for e in trace.exits.values()) + trace.cost.mean()
    loss.backward()
    assert [n for n, p in dyn.exits.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    costs = list(dyn.exit_costs(list(dyn.exits)).values())
    assert costs == sorted(costs)
    assert costs[0] < 0.8
    assert 1 <= costs[-1] < 1.2
    lowered_equals_reference(dyn.eval(), inputs, device, "eager", 1e-5)


def lowered_equals_reference(dyn, inputs, device, backend, tolerance):
    for module in dyn.exits.values():
        module.enabled.fill_(True)
    fast = dc.lower(dyn, backend=backend, decline=False)
    assert not fast.plan.dense
    shares = [0.3, 0.3, 0.2][: len(dyn.exits)]
    for batch in (1, 2, 7, 33):
        x = moved(inputs(batch), device)
        with torch.no_grad(), forced(dyn, shares, seed=batch), forced(fast, shares, seed=batch):
            expected, actual = leaf(call(dyn, x)), leaf(call(fast, x))
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
        assert fast.last_run["always"] == batch
    assert fast.last_run["not exit0"] == 33 - round(0.3 * 33)
    empty = moved(inputs(2), device)
    empty = {k: v[:0] for k, v in empty.items()} if isinstance(empty, dict) else [v[:0] for v in empty]
    assert leaf(call(fast, empty)).shape == (0, *expected.shape[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_gpt2", "encoder", "lstm", "mobilenetv4_conv_small"])
def test_inductor_equals_reference(name, needs, device):
    make, inputs = ZOO[name]
    dyn = dc.dynamize(make(needs).to(device).eval(), exits=1, example_inputs=moved(inputs(2), device))
    lowered_equals_reference(dyn, inputs, device, "inductor", 1e-4)
