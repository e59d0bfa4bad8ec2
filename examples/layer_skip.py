"""A residual network that skips blocks, image by image: `python examples/layer_skip.py`."""

import torch
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.data import as_loader
from dyncompile.demo.datasets import digits
from dyncompile.demo.models import ResNet

torch.manual_seed(0)
data = digits()  # ships with scikit-learn
train, (x, y) = data.train, data.test.tensors
model = ResNet(20, width=8, in_channels=x.shape[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(8):  # the static model, as you have it
    for images, labels in as_loader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

dyn = dc.dynamize(model, "layer_skip", example_inputs=x[:2])
print(dyn.inspect())
dc.finetune(dyn, train, epochs=20, mode="joint", target_cost=0.6, lr=4e-3, progress=False)

dyn.eval()
trace = dyn.trace(x)
static = (model.eval()(x).argmax(1) == y).float().mean().item()
dynamic = (trace.output.argmax(1) == y).float().mean().item()
print(f"static accuracy {static:.3f}; dynamic {dynamic:.3f} at {trace.cost.mean().item():.2f} of the cost")
for name, kept in trace.decisions.items():
    print(f"{name}: run by {kept.float().mean().item():.0%} of the images")

fast = dc.lower(dyn)
assert torch.allclose(fast(x), trace.output, atol=1e-3)
print("rows that ran:", fast.last_run)
