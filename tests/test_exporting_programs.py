"""Programs of torch: they load without dyncompile, run an arm where a sample needs it, and compute the same."""

import subprocess
import sys

import pytest
import torch
from exiting import Net, Tokens
from skipping import STEPS, WIDTH, Reader
from test_exporting import converted, example
from torch import nn
from torch.nn import functional as F

import dyncompile as dc
from dyncompile.checking.deciding import settle, switch_on
from dyncompile.passes.frame_skip import FrameSkip

# A process in which dyncompile cannot be imported.
ALONE = """
import sys
sys.modules["dyncompile"] = None
import torch
path, data = sys.argv[1:]
cases = torch.load(data)
if path.endswith(".aoti.pt2"):
    call = torch._inductor.aoti_load_package(path)
else:
    program = torch.export.load(path)
    call = program.module()
    seen = set()
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            assert "dyncompile" not in str(node.target), node
            seen.add(str(node.target))
    assert seen & {"cond", "aten.nonzero.default"}, seen
for inputs, wanted in cases:
    with torch.no_grad():
        torch.testing.assert_close(call(*inputs), wanted, rtol=1e-4, atol=1e-5)
"""


def check_alone(dyn, inputs, path):
    dc.export(dyn, path)
    with torch.no_grad():
        cases = [(given, dyn(*given)) for given in map(inputs, (1, 2, 7))]
    torch.save(cases, path.with_suffix(".data"))
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), str(path.with_suffix(".data"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("kind", "chain"),
    [("images", "layer_skip-early_exit"), ("images", "channel_gate"), ("channels", ""), ("vectors", "neuron_gate")],
)
def test_it_loads_without_dyncompile(kind, chain, tmp_path):
    check_alone(converted(kind, chain), lambda n: example(kind, n), tmp_path / "model.pt2")


def test_an_arm_gives_other_strides_than_what_it_replaces(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    dyn = dc.dynamize(Net(blocks=2, tail="pixels"), "early_exit", exits=1, example_inputs=x[:2]).eval()
    settle(switch_on(dyn), (x,))
    check_alone(dyn, lambda n: (torch.randn(n, 3, 6, 6),), tmp_path / "model.pt2")


def test_numbers_that_numpy_does_not_have(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6).bfloat16()
    dyn = dc.dynamize(Net(blocks=2).bfloat16(), "early_exit", exits=1, example_inputs=x[:2]).eval()
    dyn.exits["exit0"].enabled.fill_(True)
    dc.export(dyn, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(x)
    torch.testing.assert_close(found, dyn(x))


def test_it_is_called_by_keyword_where_the_example_was(tmp_path):
    model = Tokens().eval()
    ids, mask = torch.randint(0, 20, (5, 6)), torch.ones(5, 6, dtype=torch.int64)
    mask[1, 3:] = 0
    named = {"ids": ids, "attention_mask": mask}
    dyn = dc.dynamize(model, "early_exit", exits=1, example_inputs=named).eval()
    dc.save(dyn, tmp_path / "saved")
    for number, one in enumerate((dyn, dc.load(tmp_path / "saved", model))):
        path = dc.export(one, tmp_path / f"{number}.pt2")
        torch.testing.assert_close(torch.export.load(path).module()(**named), dyn(**named))


@pytest.mark.parametrize("reads", ["input", "state"])
def test_steps_are_left_out_where_nobody_keeps_them(reads, tmp_path):
    torch.manual_seed(0)
    model = Reader(batch_first=True).eval()
    dyn = dc.dynamize(model, FrameSkip(reads=reads), example_inputs=torch.randn(2, STEPS, WIDTH)).eval()
    dyn.gates["frames0"].enabled.fill_(True)
    dyn.gates["frames0"].offset.zero_()
    check_alone(dyn, lambda n: (torch.randn(n, STEPS, WIDTH),), tmp_path / "model.pt2")


class Patches(nn.Module):
    """Patches as tokens, which lie transposed: strides of a convolution's channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + F.gelu(layer(norm(x)))
        return self.fc(x.mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [["early_exit"], ["layer_skip", "early_exit"]], ids=" ".join)
def test_compiled_branches_read_values_that_lie_transposed(strategies, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    dyn = dc.dynamize(Patches(), strategies, example_inputs=x[:2]).eval()
    settle(switch_on(dyn), (x,))
    check_alone(dyn, lambda n: (x[:n],), tmp_path / "model.aoti.pt2")


@pytest.mark.slow
def test_it_compiles_ahead_of_time(tmp_path):
    check_alone(converted("images", "early_exit"), lambda n: example("images", n), tmp_path / "model.aoti.pt2")
