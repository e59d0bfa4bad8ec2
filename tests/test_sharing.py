"""Segments of equal structure share a program, and nothing else: each computes with its own weights."""

import copy
import gc

import pytest
import torch
from test_inductor import Residual, compilations, images, traced
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.testing import assert_close

import dyncompile as dc
from dyncompile.lowering.inductor import SegmentInput, compile_segment
from dyncompile.lowering.sharing import structure
from dyncompile.testing import forced


class Head(nn.Module):
    """A scalar, a vector short enough to be written into code, and one that is folded and read as well."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.fc = nn.Linear(16, 3)
        self.register_buffer("threshold", torch.rand(()))
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x):
        y = self.fc(x) * (self.scale / (self.scale.sum() + self.eps)) + self.scale
        return y, y.amax(1) > self.threshold


def others(make, count: int, device):
    torch.manual_seed(0)
    return [traced(make(), device) for _ in range(count)]


def test_one_compilation_serves_all_with_their_own_weights(device):
    if device.type != "cpu":
        pytest.skip("programs are shared on the processor alone")
    for make, examples in (
        (Residual, [images(4, device), images(4, device)]),
        (Head, [torch.randn(4, 16, device=device)]),
    ):
        first, *rest = others(make, 3, device)
        inputs = [SegmentInput()] * len(examples)
        pattern = compile_segment(first, examples, inputs)
        before = compilations()
        compiled = [compile_segment(segment, examples, inputs, like=pattern) for segment in rest]
        assert compilations() == before
        for segment, program in zip((first, *rest), (pattern, *compiled), strict=True):
            for batch in (1, 2, 7, 33):
                given = [torch.randn(batch, *x.shape[1:], device=device).to(x) for x in examples]
                given = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]
                with torch.no_grad():
                    assert_close(program(*given), segment(*given), rtol=1e-4, atol=1e-5)


def test_what_is_shared_is_a_snapshot_too(device):
    first, second = others(Head, 2, device)
    x = torch.randn(4, 16, device=device)
    pattern = compile_segment(first, [x], [SegmentInput()])
    compiled = compile_segment(second, [x], [SegmentInput()], like=pattern)
    with torch.no_grad():
        expected = second(x)
        for segment in (first, second):
            for tensor in segment.parameters():
                tensor.add_(1)
        assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


class TwoTables(nn.Module):
    """Two buffers in one place of memory, or not."""

    def __init__(self, *, one_place: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.randn(16))
        self.register_buffer("shift", self.scale[:] if one_place else torch.randn(16))

    def forward(self, x):
        return x * self.scale, x + self.shift


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_buffers_in_one_place_are_one_by_chance(order, device):
    torch.manual_seed(0)
    segments = [traced(TwoTables(one_place=one_place), device) for one_place in order]
    x = torch.randn(4, 16, device=device)
    with fresh_cache():
        pattern = compile_segment(segments[0], [x], [SegmentInput()])
        for like in (pattern, None):
            for segment in segments:
                assert_close(compile_segment(segment, [x], [SegmentInput()], like=like)(x), segment(x))


def test_weights_are_held_once(device):
    first, second = others(lambda: nn.Sequential(nn.Conv2d(8, 8, 3)), 2, device)
    if device.type != "cpu":
        pytest.skip("programs are shared on the processor alone")
    x = images(4, device)

    def held() -> int:
        gc.collect()
        return sum(type(item) in (Tensor, nn.Parameter) and item.shape == (8, 8, 3, 3) for item in gc.get_objects())

    before = held()
    pattern = compile_segment(first, [x], [SegmentInput()])
    compiled = compile_segment(second, [x], [SegmentInput()], like=pattern)
    assert held() - before == 2
    assert_close(compiled(x), (second(x),), rtol=1e-4, atol=1e-5)


@torch.fx.wrap
def by_size(x):
    return x * 3 if x.shape[0] > 8 else x * 2


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return (by_size(self.fc(x)),)


def test_programs_for_other_batch_sizes_are_shared_as_they_come(device):
    if device.type != "cpu":
        pytest.skip("programs are shared on the processor alone")
    first, second = others(Branching, 2, device)
    x = torch.randn(4, 16, device=device)
    pattern = compile_segment(first, [x], [SegmentInput()])
    compiled = compile_segment(second, [x], [SegmentInput()], like=pattern)
    before = compilations()
    for batch in (2, 9, 33, 4):
        x = torch.randn(batch, 16, device=device)
        with torch.no_grad():
            assert_close(compiled(x), second(x), rtol=1e-4, atol=1e-5)
            assert_close(pattern(x), first(x), rtol=1e-4, atol=1e-5)
    assert compiled.programs == pattern.programs == 2
    assert compilations() == before + 1


def test_what_differs_in_more_than_values_has_another_key(device):
    torch.manual_seed(0)
    segment = traced(Head(), device)
    key, tensors = structure(segment)
    assert [t.shape for t in tensors] == [(3, 16), (3,), (3,), ()]
    assert structure(traced(Head(), device))[0] == key
    assert structure(copy.deepcopy(segment))[0] == key
    assert structure(traced(Head().half(), device))[0] != key
    assert structure(traced(Head(eps=1e-3), device))[0] != key
    tied = Head()
    tied.scale = tied.fc.bias
    assert structure(traced(tied, device))[0] != key
    norms = [nn.LayerNorm(16), nn.LayerNorm(16, eps=1e-3), nn.LayerNorm(16, bias=False), nn.RMSNorm(16)]
    assert len({structure(traced(nn.Sequential(norm), device))[0] for norm in norms}) == 4


def test_what_cannot_be_compared_has_none(device):
    hooked = traced(nn.Sequential(nn.Linear(4, 4)), device)
    hooked.get_submodule("0").register_forward_hook(lambda module, inputs, output: output * 2)
    assert structure(hooked) is None
    holding = nn.Identity()
    holding.table = [torch.ones(2)]
    root = nn.Sequential(holding)
    graph = torch.fx.Graph()
    graph.output((graph.call_module("0", (graph.placeholder("x"),)),))
    assert structure(torch.fx.GraphModule(root, graph)) is None


@pytest.mark.slow
def test_a_deep_model_compiles_each_kind_of_block_once(device):
    if device.type != "cpu":
        pytest.skip("programs are shared on the processor alone")

    def deep(depth):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
        return nn.Sequential(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(16, 3))

    counts = []
    for depth in (3, 6):
        torch.manual_seed(0)
        model = deep(depth).to(device).eval()
        for tensor in model.parameters():
            nn.init.normal_(tensor, std=0.3)
        dyn = dc.dynamize(model, "layer_skip", example_inputs=torch.randn(2, 5, 16, device=device)).eval()
        for gate in dyn.gates.values():
            gate.enabled.fill_(True)
            gate.bias.normal_()
        before = compilations()
        fast = dc.lower(dyn, decline=False)
        counts.append(compilations() - before)
        x = torch.randn(7, 5, 16, device=device)
        with torch.no_grad(), forced(dyn, dict.fromkeys(dyn.gates, 0.5)), forced(fast, dict.fromkeys(dyn.gates, 0.5)):
            assert_close(fast(x), dyn(x), rtol=1e-4, atol=1e-5)
    assert counts[0] == counts[1]
