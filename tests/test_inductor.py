"""Compiled segments: equal to eager at every batch size, compiled once, frozen, and a snapshot."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from dyncompile.errors import ArgumentError, LoweringError
from dyncompile.lowering.inductor import SegmentInput, compile_module, compile_segment

BATCHES = (1, 2, 7, 33)
# Folding batch norm and another order of summation: a few units in the last place of float32.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Residual(nn.Module):
    """Two inputs that are the same kind of features, two outputs: a segment inside a ResNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 1, stride=2)
        for tensor in (self.bn1.weight, self.bn1.running_var):
            nn.init.uniform_(tensor, 0.5, 2.0)
        for tensor in (self.bn1.bias, self.bn1.running_mean):
            nn.init.normal_(tensor)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn1(self.conv1(x)).relu() + skip
        return y, self.conv2(y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (x + self.out(y),)


def images(batch: int, device: torch.device, channels: int = 8) -> Tensor:
    return torch.randn(batch, channels, 10, 10, device=device).to(memory_format=torch.channels_last)


def traced(module: nn.Module, device: torch.device) -> fx.GraphModule:
    return fx.symbolic_trace(module.eval().to(device))


def compilations() -> int:
    return counters["aot_autograd"]["total"]


def check(compiled: object, segment: nn.Module, tensors: Sequence[Tensor], **tolerance: float) -> None:
    with torch.inference_mode():
        expected = segment(*tensors)
        found = compiled(*tensors)
    assert isinstance(found, tuple)
    assert_close(found, tuple(expected), **(tolerance or TOLERANCE))


@pytest.mark.parametrize("example", [1, 16])
def test_equal_to_eager_at_every_batch_size_from_one_program(device: torch.device, example: int) -> None:
    segment = traced(Residual(), device)
    examples = [images(example, device), images(example, device)]
    compiled = compile_segment(segment, examples, [SegmentInput()] * 2)
    before = compilations()
    for batch in BATCHES:
        check(compiled, segment, [images(batch, device), images(batch, device)])
    compiled.warmup(range(1, 200))
    assert compiled.programs == 1
    assert compilations() == before > 0


def test_tokens(device: torch.device) -> None:
    segment = traced(Attention(), device)
    compiled = compile_segment(segment, [torch.randn(4, 9, 16, device=device)], [SegmentInput()])
    for batch in BATCHES:
        check(compiled, segment, [torch.randn(batch, 9, 16, device=device)])
    assert compiled.programs == 1


def test_bfloat16(device: torch.device) -> None:
    segment = traced(Residual(), device).to(torch.bfloat16)
    examples = [images(8, device).bfloat16(), images(8, device).bfloat16()]
    compiled = compile_segment(segment, examples, [SegmentInput()] * 2)
    for batch in BATCHES:
        tensors = [images(batch, device).bfloat16(), images(batch, device).bfloat16()]
        # bfloat16 has 8 bits, and folding rounds the weights once more.
        check(compiled, segment, tensors, rtol=0.05, atol=0.05)


def test_batch_in_another_dimension_several_rows_and_no_batch(device: torch.device) -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, steps: Tensor, windows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            # steps [T, B, 6], windows [3 B, 4], table [5, 4]
            pooled = windows.unflatten(0, (-1, 3)).sum(1)
            return self.linear(steps) + pooled, pooled @ table.t()

    segment = traced(Mix(), device)
    inputs = [
        SegmentInput(batch_dim=1, rows=1),
        SegmentInput(batch_dim=0, rows=3),
        SegmentInput(batch_dim=None),
    ]

    def tensors(batch: int) -> list[Tensor]:
        shapes = [(5, batch, 6), (3 * batch, 4), (5, 4)]
        return [torch.randn(shape, device=device) for shape in shapes]

    compiled = compile_segment(segment, tensors(4), inputs)
    for batch in BATCHES:
        check(compiled, segment, tensors(batch))
    assert compiled.programs == 1


def test_a_layer_whose_owner_reads_its_weights(device: torch.device) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval().to(device)
    compiled = compile_module(layer, [torch.randn(4, 5, 16, device=device)])
    for batch in (1, 7):
        x = torch.randn(batch, 5, 16, device=device)
        with torch.no_grad():
            assert_close(compiled(x)[0], layer(x), **TOLERANCE)


def test_weights_are_a_snapshot_and_the_modules_stay_as_they_are(device: torch.device) -> None:
    segment = traced(Residual(), device)
    tensors = [images(5, device), images(5, device)]
    state = copy.deepcopy(segment.state_dict())
    compiled = compile_segment(segment, tensors, [SegmentInput()] * 2)
    for name, tensor in segment.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.stride() == state[name].stride(), name
    assert segment.conv1.weight.requires_grad
    frozen = copy.deepcopy(segment)
    with torch.no_grad():
        for parameter in segment.parameters():
            parameter.zero_()
    check(compiled, frozen, tensors)


def test_module_in_training_mode_is_compiled_in_eval_mode(device: torch.device) -> None:
    module = Residual().to(device).train()
    tensors = [images(5, device), images(5, device)]
    compiled = compile_module(module, tensors)
    assert module.training
    assert module.bn1.training
    check(compiled, copy.deepcopy(module).eval(), tensors)


def test_batch_norm_is_folded_and_weights_are_packed(device: torch.device) -> None:
    segment = traced(Residual(), device)
    # Generated C++ calls its operators past the dispatcher, where no profiler looks.
    seen = {"cpp_wrapper": False}
    compiled = compile_segment(segment, [images(16, device), images(16, device)], [SegmentInput()] * 2, settings=seen)
    tensors = [images(2, device), images(2, device)]
    with torch.inference_mode():
        compiled(*tensors)
        with torch.profiler.profile(acc_events=True) as profile:
            compiled(*tensors)
    ran = [event.name for event in profile.events()]
    assert not [name for name in ran if "batch_norm" in name]
    if device.type == "cpu":
        assert sum(name == "mkldnn::_convolution_pointwise" for name in ran) == 2
        constants = compiled._programs[0].run.__func__.__globals__.values()
        assert sum(isinstance(value, Tensor) and value.is_mkldnn for value in constants) == 2


def test_kernels_are_called_from_cpp_unless_the_settings_say_otherwise(device: torch.device) -> None:
    segment = traced(Residual(), device)
    examples = [images(4, device), images(4, device)]
    compiled = compile_segment(segment, examples, [SegmentInput()] * 2)
    python = compile_segment(segment, examples, [SegmentInput()] * 2, settings={"cpp_wrapper": False})
    assert [c._programs[0].wrapped for c in (compiled, python)] == [device.type == "cpu", False]
    for batch in (1, 3):
        tensors = [images(batch, device), images(batch, device)]
        with torch.inference_mode():
            for a, b in zip(compiled(*tensors), python(*tensors), strict=True):
                torch.testing.assert_close(a, b)


def test_borders_keep_channels_last_and_take_any_strides(device: torch.device) -> None:
    segment = traced(Residual(), device)
    compiled = compile_segment(segment, [images(4, device), images(4, device)], [SegmentInput()] * 2)
    tensors = [images(3, device), images(3, device)]
    with torch.inference_mode():
        for output in compiled(*tensors):
            assert output.is_contiguous(memory_format=torch.channels_last)
    check(compiled, segment, [t.contiguous() for t in tensors])
    check(compiled, segment, [images(9, device)[::3], images(3, device).flip(0)])


def test_outputs_that_are_inputs_or_views(device: torch.device) -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x.relu()
            return x, x.unflatten(1, (2, 3)), y, y.t(), y[:, :2]

    segment = traced(Views(), device)
    compiled = compile_segment(segment, [torch.randn(4, 6, device=device)], [SegmentInput()])
    for batch in BATCHES:
        check(compiled, segment, [torch.randn(batch, 6, device=device)])


def test_mutation_inside_a_segment_does_not_reach_its_input(device: torch.device) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            y = x + 1
            y[:, 0] = 0
            return (y.mul_(2),)

    module = Shifted()
    compiled = compile_module(module, [torch.randn(4, 6, device=device)])
    x = torch.randn(5, 6, device=device)
    kept = x.clone()
    check(compiled, module, [x])
    assert torch.equal(x, kept)


def test_code_that_asks_for_the_batch_size_gets_one_program_a_range(device: torch.device) -> None:
    class Ranges(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * 2 if x.shape[0] >= 8 else x * 3,)

    module = Ranges()
    compiled = compile_module(module, [torch.randn(16, 6, device=device)])
    for batch in (16, 8, 40, 100, 7, 3, 2, 1, 9):
        check(compiled, module, [torch.randn(batch, 6, device=device)])
    assert compiled.programs == 2


@pytest.mark.parametrize("first", [4, 5])
def test_a_batch_at_which_sizes_are_equal_by_chance_gets_a_program_of_its_own(device: torch.device, first: int) -> None:
    class Chance(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * 2 if x.shape[0] * x.shape[1] == 24 else x * 3,)

    module = Chance()
    compiled = compile_module(module, [torch.randn(first, 6, device=device)])
    for batch in (4, 5, 1, 33, 4):
        check(compiled, module, [torch.randn(batch, 6, device=device)])
    assert compiled.programs == 2


def test_whole_module_returns_its_leaves(device: torch.device) -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
            return {"a": x + 1, "b": [x * 2]}

    x = torch.randn(4, 6, device=device)
    compiled = compile_module(Nested(), [x])
    with torch.inference_mode():
        assert_close(compiled(x), (x + 1, x * 2))


def test_what_is_tied_to_the_batch_size_is_refused(device: torch.device) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x + self.offset,)

    with pytest.raises(LoweringError, match="tied to the example's batch size, 4"):
        compile_segment(traced(Tied(), device), [torch.randn(4, 6, device=device)], [SegmentInput()])


@pytest.mark.parametrize("changed", [True, False])
def test_what_changes_or_returns_its_buffers_is_refused(device: torch.device, changed: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            if changed:
                self.calls += 1
                return (x + self.calls,)
            return x + 1, self.calls

    with pytest.raises(LoweringError, match="one of its own parameters or buffers"):
        compile_module(Counting().to(device), [torch.randn(4, 6, device=device)])


def test_outputs_other_than_tensors_are_refused(device: torch.device) -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x + 1, 3

    with pytest.raises(LoweringError, match="tensors only, not 3"):
        compile_module(Counted(), [torch.randn(4, 6, device=device)])


@pytest.mark.parametrize(
    ("shapes", "inputs", "argument"),
    [
        ([(4, 6)], [], "inputs"),
        ([(4, 6)], [SegmentInput(batch_dim=None)], "example_inputs"),
        ([(4, 6), (5, 6)], [SegmentInput()] * 2, "example_inputs"),
        ([(4, 6)], [SegmentInput(rows=3)], "example_inputs"),
        ([(0, 6)], [SegmentInput()], "example_inputs"),
    ],
)
def test_examples_that_do_not_fit(shapes: list[tuple[int, ...]], inputs: list[SegmentInput], argument: str) -> None:
    segment = traced(nn.Identity(), torch.device("cpu"))
    with pytest.raises(ArgumentError) as error:
        compile_segment(segment, [torch.zeros(shape) for shape in shapes], inputs)
    assert error.value.argument == argument


@pytest.mark.parametrize("batch", [1, 4])
def test_one_input_channel_is_channels_last_from_there_on(device: torch.device, batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = model.to(device).eval()
    compiled = compile_module(model, [torch.randn(4, 1, 10, 10, device=device)])
    x = torch.randn(batch, 1, 10, 10, device=device)
    with torch.no_grad():
        (out,) = compiled(x)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_second_program_of_a_segment(device: torch.device) -> None:
    class Ranged(nn.Module):
        """Code that depends on the range of the batch size, after layers that are replaced."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(self.conv(x).mean((2, 3)))
            return y * 2 if x.shape[0] > 8 else y  # type: ignore[no-any-return]

    model = Ranged().to(device).eval()
    compiled = compile_module(model, [torch.randn(4, 1, 6, 6, device=device)])
    for batch in (3, 12):
        x = torch.randn(batch, 1, 6, 6, device=device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x)[0], model(x), rtol=1e-4, atol=1e-5)
    assert compiled.programs == 2


def test_scalars_of_equal_graphs_are_not_mistaken_for_each_other(device):
    """Inductor keeps code on disk; a threshold of another model, or from before calibration, must not come back."""

    class Passes(nn.Module):
        def __init__(self, threshold):
            super().__init__()
            self.register_buffer("threshold", torch.tensor(threshold))

        def forward(self, x):
            return (x.sin().sum(1) >= self.threshold,)

    x = torch.linspace(0, 1, 12, device=device).view(4, 3)
    for threshold in (0.25, 1.25, 2.25):
        module = Passes(threshold).to(device)
        (found,) = compile_segment(module, [x], [SegmentInput()])(x)
        assert torch.equal(found, *module(x))
