"""What carries out a lowered program on the processor: as the Python program does, and without Python in between."""

import dataclasses
import sys
import threading

import pytest
import torch
from carrying_out import same_in_both
from torch import nn

import dyncompile as dc
from dyncompile.lowering import native
from dyncompile.lowering.inductor import SegmentInput, compile_segment
from dyncompile.lowering.instructions import Argument, Arm, Call, Code, Drop, Gather, Merge, Part, Split
from dyncompile.lowering.native import native_program
from dyncompile.lowering.runtime import Run
from dyncompile.lowering.source import python_program
from dyncompile.testing import forced


def call(function, *places, to, dead=()):
    """A step that runs a function of Python's."""
    arguments = tuple(Argument(register=place) for place in places)
    return Call(segment=lambda *given: (function(*given),), arguments=arguments, dead=dead, results=(to,))


def block(function, *, name="inside"):
    """The code of an arm of one input."""
    return Code(name=name, inputs=1, registers=2, steps=(call(function, 0, to=1, dead=(0,)),), outputs=(1,))


def choosing(arms, *, dim=0, entries=1, base=None, finer=1, copied=True):
    """Code that chooses, of a value (0) and a decision (1), between functions of its rows; None leaves them as is."""
    made = []
    for index, function in enumerate(arms):
        if function is None:
            made.append(Arm(wanted=base is None, moved=((2, 0),)))
        else:
            rows = (Gather(register=0, dim=dim, entries=entries),)
            code = block(function, name=f"arm {index}")
            made.append(Arm(code=code, given=((0, False),), results=((2, 0),), gathered=rows))
    parts = []
    for index, function in enumerate(arms):
        if function is not None:
            parts.append(Part(arm=index, result=0, rows=None))
        elif base is None:
            parts.append(Part(arm=index, result=None, rows=Gather(register=0, dim=dim, entries=entries)))
    split = Split(
        decision=1,
        name="chosen",
        rows=finer,
        finer=finer,
        arms=tuple(made),
        dead=(0, 1),
        ungathered=(1,),
        merged=(Merge(target=2, base=base, copied=copied, parts=tuple(parts), dim=dim, entries=entries),),
    )
    return Code(name="always", inputs=2, registers=3, steps=(split,), outputs=(2,))


def results(code, *values, count):
    """Outputs and counted rows, in Python and in C++."""
    found = []
    for program in (python_program(code), native_program(code)):
        run = Run(count)
        found.append((program([v.clone() for v in values], count, None, run), run.rows))
    return found


LAYOUTS = {
    "row-major": (lambda n: torch.randn(n, 3, 4, 5), 0, 1),
    "channels last": (lambda n: torch.randn(n, 3, 4, 5).contiguous(memory_format=torch.channels_last), 0, 1),
    "channels last in space": (
        lambda n: torch.randn(n, 3, 2, 4, 5).contiguous(memory_format=torch.channels_last_3d),
        0,
        1,
    ),
    "one channel": (lambda n: torch.randn(n, 1, 4, 5).contiguous(memory_format=torch.channels_last), 0, 1),
    "several entries a row": (lambda n: torch.randn(3 * n, 4), 0, 3),
    "several entries a row, channels last": (
        lambda n: torch.randn(3 * n, 2, 4, 4).contiguous(memory_format=torch.channels_last),
        0,
        3,
    ),
    "rows second": (lambda n: torch.randn(4, n, 5), 1, 1),
    "rows second, several entries": (lambda n: torch.randn(4, 2 * n, 5), 1, 2),
    "transposed": (lambda n: torch.randn(4, n).t(), 0, 1),
    "every other one": (lambda n: torch.randn(n, 8)[:, ::2], 0, 1),
    "images, every other one": (lambda n: torch.randn(n, 3, 4, 8)[..., ::2], 0, 1),
    "expanded": (lambda n: torch.randn(1, 4).expand(n, 4), 0, 1),
    "conjugated": (lambda n: torch.randn(n, 4, dtype=torch.complex64).conj(), 0, 1),
    "integers": (lambda n: torch.arange(4 * n).view(n, 4), 0, 1),
    "bool": (lambda n: torch.randn(n, 4) > 0, 0, 1),
    "no elements": (lambda n: torch.randn(n, 0), 0, 1),
    "numbers": (torch.randn, 0, 1),
}


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("base", [None, 0], ids=["made anew", "written into"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_split_and_put_together_as_in_python(layout, base, count):
    make, dim, entries = LAYOUTS[layout]
    code = choosing([None, lambda t: t.flip(-1) if t.dim() > 1 else -t], dim=dim, entries=entries, base=base)
    for decisions in (torch.rand(count) > 0.5, torch.ones(count) > 0, torch.zeros(count) > 0):
        value = make(count)
        (expected, counted), (found, rows) = results(code, value, decisions, count=count)
        assert rows == counted
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_route_may_have_many_arms(kind):
    code = choosing([torch.neg, torch.exp, None, torch.square])
    for route in ([0, 1, 2, 3, 1, 1], [3, 3, 0, 3, 3, 0], [2] * 6, [1] * 6):
        decision = torch.tensor(route).to(kind)
        (expected, counted), (found, rows) = results(code, torch.randn(6, 4), decision, count=6)
        assert rows == counted
        assert torch.equal(found[0], expected[0])


def test_a_row_may_decide_for_finer_ones():
    code = choosing([None, torch.exp], base=0, finer=3)
    decision = torch.tensor([True, False, False] * 4)
    (expected, counted), (found, rows) = results(code, torch.randn(12, 2), decision, count=4)
    assert rows == counted == {"always": 4, "arm 1": 4}
    assert torch.equal(found[0], expected[0])


def test_a_route_to_no_arm_is_an_error():
    program = native_program(choosing([torch.neg, torch.exp]))
    with pytest.raises(IndexError, match="arm 2 of 2"):
        program([torch.randn(2, 1), torch.tensor([0, 2])], 2, None, Run(2))


def test_what_a_segment_raises_comes_through():
    def refuse(value):
        raise ZeroDivisionError(f"of {value.shape[0]} rows")

    program = native_program(choosing([None, refuse]))
    with pytest.raises(ZeroDivisionError, match="of 2 rows"):
        program([torch.randn(3, 1), torch.tensor([True, False, True])], 3, None, Run(3))


def test_nothing_is_kept_alive():
    """A value goes before the segment runs that is the last to read it; afterwards nothing is left."""
    counts = []

    def last(value):
        counts.append(sys.getrefcount(value))
        return value + 1

    def user(value):
        # Two names, the argument of `getrefcount` and what the caller holds.
        return last(value)

    dropped = Drop(registers=(1,))
    code = Code(
        name="always",
        inputs=1,
        registers=3,
        steps=(call(torch.exp, 0, to=1, dead=(0,)), call(user, 1, to=2, dead=(1,)), dropped),
        outputs=(2,),
    )
    value = torch.randn(2, 2)
    before = sys.getrefcount(value)
    for program in (python_program(code), native_program(code)):
        program([value], 2, None, Run(2))
        assert sys.getrefcount(value) == before
    assert counts[1] <= counts[0]


def test_of_a_value_that_a_segment_returns_twice_both_live():
    class Twice(nn.Module):
        def forward(self, x):
            found = torch.relu(x)
            return found, x + 1, found.view_as(x)

    x = torch.randn(4, 8)
    segment = compile_segment(torch.fx.symbolic_trace(Twice()), [x], [SegmentInput()])
    given = (Argument(register=0),)
    twice = Call(segment=segment, arguments=given, dead=(0,), results=(1, 2, 3))
    code = Code(name="always", inputs=1, registers=4, steps=(twice,), outputs=(1, 2, 3))
    program = native_program(code)
    for _ in range(20):
        first, more, second = program([x], 4, None, Run(4))
        assert torch.equal(first, x.relu())
        assert torch.equal(second, x.relu())
        assert torch.equal(more, x + 1)


def test_what_an_operator_of_pythons_raises_comes_through():
    @torch.library.custom_op("dyncompile_tests::small", mutates_args=())
    def small(x: torch.Tensor) -> torch.Tensor:
        if bool((x > 1).any()):
            raise ValueError("too large")
        return x.clone()

    small.register_fake(torch.empty_like)

    class Checked(nn.Module):
        def forward(self, x):
            return (torch.ops.dyncompile_tests.small(x * 2) + 1,)

    segment = compile_segment(torch.fx.symbolic_trace(Checked()), [torch.zeros(4, 8)], [SegmentInput()])
    step = Call(segment=segment, arguments=(Argument(register=0),), dead=(0,), results=(1,))
    program = native_program(Code(name="always", inputs=1, registers=2, steps=(step,), outputs=(1,)))
    for _ in range(3):
        assert torch.equal(program([torch.zeros(4, 8)], 4, None, Run(4))[0], torch.ones(4, 8))
        with pytest.raises((ValueError, RuntimeError), match="too large|dyncompile_tests::small"):
            program([torch.ones(4, 8)], 4, None, Run(4))


@pytest.mark.parametrize("finer", [1, 3])
def test_what_replaces_decisions_is_asked_about_the_rows_at_hand(finer):
    inner = choosing([None, torch.exp], base=0)
    outer = choosing([None, torch.neg], base=0, finer=finer)
    nested = Arm(
        code=inner,
        given=((0, False), (1, False)),
        results=((2, 0),),
        gathered=(Gather(register=0, dim=0, entries=1), Gather(register=1, dim=0, entries=1)),
    )
    split = outer.steps[0]
    code = dataclasses.replace(outer, steps=(dataclasses.replace(split, arms=(split.arms[0], nested)),))
    decision = torch.arange(4 * finer) % 2 == 0
    asked = []
    for program in (python_program(code), native_program(code)):
        notes = []
        for _ in range(2):

            def override(name, value, index, total, notes=notes):
                notes.append((name, value.tolist(), None if index is None else index.tolist(), total))
                return value if index is None else ~value

            program([torch.randn(4 * finer, 2), decision], 4, None, Run(4, override))
        asked.append(notes)
    assert asked[0] == asked[1]
    assert any(index is not None for _, _, index, _ in asked[0])


def test_without_an_interpreter_python_runs_it(lowered, monkeypatch):
    _, fast = lowered
    native._interpreter.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(native, "_SOURCES", ("native.cpp",))
            with pytest.warns(UserWarning, match="interpreter cannot be built"):
                assert native_program(fast._code) is None
            assert type(fast.carry_out(fast._code)).__name__ == "function"
    finally:
        native._interpreter.cache_clear()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for module in self.blocks:
            x = x + module(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def lowered(device):
    torch.manual_seed(0)
    example = torch.randn(2, 3, 8, 8, device=device)
    dyn = dc.dynamize(Net().to(device).eval(), ["layer_skip", "early_exit"], example_inputs=example).eval()
    for module in (*dyn.exits.values(), *dyn.gates.values()):
        module.get_buffer("enabled").fill_(True)
    return dyn, dc.lower(dyn, decline=False)


def test_a_compiled_model_runs_natively_and_as_in_python(lowered, device):
    dyn, fast = lowered
    if device.type != "cpu":
        pytest.skip("on a processor alone")
    assert type(fast._program).__name__ == "Program"
    assert all(segment.native for segment in fast.segments.values())
    for batch in (1, 2, 7, 33):
        x = torch.randn(batch, 3, 8, 8)
        same_in_both(fast, x)
        for gates, exits in ((0.0, 0.0), (0.4, 0.3), (1.0, 0.2), (1.0, 1.0)):
            with forced(fast, {**dict.fromkeys(dyn.gates, gates), next(iter(dyn.exits)): exits}):
                same_in_both(fast, x)


def test_buckets_are_filled_by_the_python_program(lowered, device):
    dyn, _ = lowered
    fast = dc.lower(dyn, decline=False, buckets=(4, 8))
    assert type(fast._program).__name__ == "function"


def test_threads_run_side_by_side(lowered, device):
    _, fast = lowered
    inputs = [torch.randn(batch, 3, 8, 8, device=device) for batch in (1, 2, 3, 5, 7)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
    wrong = []

    def work(x, result):
        with torch.no_grad():
            wrong.extend(i for i in range(50) if not torch.equal(fast(x), result))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
