"""A pass of your own: `python examples/own_pass.py`.

A small network glances at each image, and the model sees those that it was not sure of: a cascade of two.

A package registers its passes in its pyproject.toml, and from then on they have names, as the built-in ones have:

    [project.entry-points."dyncompile.passes"]
    glance = "your_package.glance:Glance"

`dyncompile passes` lists it; `dyncompile check model.py:build --strategy glance` checks it on a model. Before that,
`--strategy own_pass.py:Glance` does.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.graph import Graph, spec
from dyncompile.leaving import leave
from dyncompile.nn import Exit
from dyncompile.passes import Pass, Refusal, Site
from dyncompile.passes.base import find
from dyncompile.shapes import module_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glance(Pass):
    """Ask a small network first (IDK cascades, arXiv 1706.00885).

    Before:  %y = model(%x)                       ; return %y
    After:   %p, _, %d = exits.glance(%x)
             %s = select(%d, %p, model(%x))       ; return %s

    Legality: the model maps images `[N, C, H, W]` to classes `[N, K]` and to nothing else, and costs more.

    Args:
        width: Channels of the small network.
    """

    name: ClassVar[str] = "glance"
    summary: ClassVar[str] = "a small network answers the images that it is sure of; the model sees the rest"
    paper: ClassVar[str] = "1706.00885"
    before: ClassVar[tuple[str, ...]] = ("early_exit",)  # exits inside the model come later

    width: int = 16

    def sites(self, graph: Graph) -> Iterator[Site | Refusal]:
        """The model's input, or why not."""
        image, outputs = graph.main_input, graph.signature.output_names
        shapes = [list(spec(node).shape) for node in (image, graph.prediction)]
        if [len(shape) for shape in shapes] != [4, 2] or len(outputs) > 1:
            reason = f"from {shapes[0]} to {shapes[1]} and {len(outputs)} outputs, not from images to classes alone"
            yield Refusal(node=image.name, reason=reason)
        elif (cost := module_flops(lambda: self.head(graph), [image])) >= graph.total_flops:
            yield Refusal(node=image.name, reason=f"a glance costs {cost:.0f} FLOPs, the model {graph.total_flops:.0f}")
        else:
            yield Site(name="glance", node=image.name)

    def rewrite(self, graph: Graph, site: Site) -> None:
        """Insert the small network as an exit, and let those leave who are sure."""
        taps = ("exit", "confidence", "decision")
        inputs = [find(graph, site.node)]
        prediction, _, decision = graph.insert(
            f"exits.{site.name}", Exit(self.head(graph)), inputs, taps, cut=site.node
        )
        leave(graph, decision, prediction)

    def head(self, graph: Graph) -> nn.Module:
        """Two convolutions with stride, and a linear layer."""
        channels, classes = spec(graph.main_input).shape[1], spec(graph.prediction).shape[1]
        first = [nn.Conv2d(channels, self.width, 3, 2, 1), nn.BatchNorm2d(self.width), nn.ReLU()]
        second = [nn.Conv2d(self.width, self.width, 3, 2, 1), nn.BatchNorm2d(self.width), nn.ReLU()]
        return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * self.width, classes))


if __name__ == "__main__":
    from dyncompile.data import as_loader
    from dyncompile.demo.datasets import digits
    from dyncompile.demo.models import ResNet
    from dyncompile.testing import assert_convertible

    torch.manual_seed(0)
    data = digits()  # ships with scikit-learn
    x, y = data.test.tensors
    model = ResNet(14, width=8, in_channels=x.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):  # the static model, as you have it
        for images, labels in as_loader(data.train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    # The contracts that the built-in passes keep: raises with the reason where one is broken.
    for result in assert_convertible(model, Glance(), example_inputs=x[:2]).results:
        print(f"{result.status}: {result.check}")

    # From here on everything that dyncompile does works for it, and it combines with other passes.
    dyn = dc.dynamize(model, [Glance(), "early_exit"], example_inputs=x[:2])
    dc.finetune(dyn, data.train, epochs=10, progress=False)
    dc.calibrate(dyn, data.calibration, max_drop=0.05)
    fast = dc.lower(dyn.eval(), backend="eager")
    accuracy = (fast(x).argmax(1) == y).float().mean().item()
    print(
        f"accuracy {accuracy:.3f} at {dyn.trace(x).cost.mean().item():.2f} of the cost; rows that ran: {fast.last_run}"
    )
