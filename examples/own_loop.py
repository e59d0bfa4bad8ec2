"""Train the exits of a static model in a loop of your own: `python examples/own_loop.py`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.data import as_loader
from dyncompile.training import Distillation

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 1, 8, 8) / 16
train = as_loader((images[:1400], labels[:1400]), batch_size=64, shuffle=True)
test = as_loader((images[1400:], labels[1400:]), batch_size=397)

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(512, 10)),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(4):  # the static model, as you have it
    for x, y in train:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

dyn = dc.dynamize(model, "early_exit", exits=2, example_inputs=x[:2])
objective, optimizer = Distillation(), torch.optim.AdamW(dyn.parameters(), lr=2e-3)
dyn.train()
for epoch in range(4):
    for x, y in train:
        optimizer.zero_grad()
        trace = dyn.trace(x)
        loss = objective(trace, y)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

x, y = next(iter(test))
trace, costs = dyn.eval().trace(x), dyn.exit_costs(list(dyn.exits))
for name, prediction in {**trace.exits, "final": trace.final}.items():
    accuracy = (prediction.argmax(1) == y).float().mean().item()
    print(f"{name}: accuracy {accuracy:.3f} at {costs[name]:.2f} of the static model's cost")
