"""A vision transformer that skips half layers and stops early: `python examples/vit_layer_skip_early_exit.py`."""

import torch
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.data import as_loader
from dyncompile.demo.datasets import digits
from dyncompile.demo.models import VisionTransformer

torch.manual_seed(0)
data = digits()  # ships with scikit-learn
x, y = data.test.tensors
model = VisionTransformer(x.shape[-1], patch=4, width=48, depth=4, in_channels=x.shape[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(20):  # the static model, as you have it
    for images, labels in as_loader(data.train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

# A gate on each attention and each feed-forward branch; exits between the layers, inside what the gates leave.
dyn = dc.dynamize(model, ["layer_skip", "early_exit"], example_inputs=x[:2])
print(dyn.inspect())
dc.finetune(dyn, data.train, epochs=16, mode="joint", target_cost=0.7, lr=3e-3, progress=False)
print(dc.calibrate(dyn.eval(), data.calibration, max_cost=0.5, progress=False))

trace = dyn.trace(x)
static = (model.eval()(x).argmax(1) == y).float().mean().item()
dynamic = (trace.output.argmax(1) == y).float().mean().item()
print(f"static accuracy {static:.3f}; dynamic {dynamic:.3f} at {trace.cost.mean().item():.2f} of the cost")

fast = dc.lower(dyn)
torch.testing.assert_close(fast(x), trace.output, rtol=1e-3, atol=1e-3)
print("rows that ran:", fast.last_run)
